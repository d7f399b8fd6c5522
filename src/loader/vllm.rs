//! vLLM. The config is checked first, and much is refused by it alone; then names of tensors by their last part. What a model does
//! not have is skipped without a word, which no table can see: `validate --base` does.

use super::ways::{BAKE, CONVERT, CONVERT_INIT, MERGE, NOTHING, PEFT_MERGE, TRY};

rows! {
    "vllm/no-config", Refused, Read, no_config, "no adapter_config.json",
        "reads a folder with adapter_config.json and adapter_model.safetensors", CONVERT;
    "vllm/field-missing", Refused, Read, field_missing, "a field is missing",
        "asks for r, lora_alpha and target_modules", BAKE;
    "vllm/rank-limit", Refused, Read, rank_over_512, "rank over 512",
        "takes max_lora_rank from a list that ends at 512", MERGE;
    "vllm/dora", Refused, Read, dora, "DoRA", "refuses use_dora", MERGE;
    "vllm/lora-bias", Refused, Read, bias_update, "lora_bias", "refuses lora_bias", MERGE;
    "vllm/bias", Refused, Read, trained_bias_or_field, "trained biases", "refuses a bias other than \"none\"", MERGE;
    "vllm/modules-to-save", Refused, Read, saved_but_classifier, "modules_to_save",
        "refuses full tensors, except those of classifier and score", MERGE,
        "vllm-project/vllm#9280", "vllm-project/vllm#32599";
    "vllm/init", Refused, Read, base_changing_init, "base changed by init",
        "refuses pissa, olora, corda and loftq", CONVERT_INIT;
    "vllm/activated", Refused, Read, activated, "an activated LoRA", "refuses alora_invocation_tokens",
        "none: no merged weight equals it; use it with PEFT";
    "vllm/layer-replication", Refused, Read, layers_replicated, "layer_replication", "refuses layer_replication",
        "build the base with repeated layers, and remove the field";
    "vllm/bd-lora", Refused, Read, block_diagonal, "BD-LoRA", "refuses use_bdlora", PEFT_MERGE;
    "vllm/qalora", Refused, Read, grouped_inputs, "QALoRA", "refuses use_qalora", "merge it with the tool that trained it";
    "vllm/adapter-name", Refused, Concluded, adapter_name, "adapter's name in names",
        "takes names that end in lora_A.weight and lora_B.weight", BAKE;
    "vllm/rank-flag", NeedsFlag, Read, rank_over_16_to_512, "rank over 16", "takes ranks up to 16 unless it is told otherwise",
        "start it with --max-lora-rank {}";
    "vllm/stacked-experts", NeedsFlag, Read, stacked_experts, "one pair for all experts",
        "takes fused factors of experts if the request says so", "set the request's flag for fused experts";
    "vllm/mixed-experts", NeedsFlag, Read, mixed_experts, "fused and single experts",
        "takes a mixture if the engine is told so", "set the engine's flag for mixed experts";
    "vllm/odd-scale", Rounded, Read, odd_scale, "scale not a power of two",
        "casts B to its own dtype, then multiplies it by the scale in that dtype", NOTHING;
    "vllm/convolution", Unknown, None, convolution, "factors of a convolution", "is not known to take them", TRY;
    "vllm/dtype", Unknown, None, uncommon_dtype, "factors in F64, or in two dtypes", "is not known to take them", BAKE;
}
