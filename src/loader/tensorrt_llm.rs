//! TensorRT-LLM, by one file of unknown date: every row but the loader's own limits may have changed.

use super::ways::{BAKE, CONVERT, CONVERT_INIT, MERGE, TRY};

rows! {
    "tensorrt-llm/no-config", Refused, Read, no_config, "no adapter_config.json",
        "reads a folder with adapter_config.json and adapter_model files", CONVERT;
    "tensorrt-llm/lora-bias", Refused, Read, bias_update, "lora_bias", "ends with a KeyError at lora_B.bias", MERGE;
    "tensorrt-llm/bias", Refused, Read, trained_bias, "trained biases", "ends with a KeyError at names of full tensors", MERGE;
    "tensorrt-llm/modules-to-save", Refused, Concluded, saved_but_vocabulary, "modules_to_save",
        "takes full tensors of lm_head and embed_tokens; other names are a KeyError", MERGE;
    "tensorrt-llm/names", Refused, Concluded, not_number_module_name, "names of another form",
        "takes names that end in a number, a module and a name, as in 0.self_attn.q_proj; others are a KeyError", MERGE;
    "tensorrt-llm/adapter-name", Refused, Concluded, adapter_name, "adapter's name in names",
        "takes names that end in lora_A.weight and lora_B.weight; others are a KeyError", BAKE;
    "tensorrt-llm/wide-q", Refused, Concluded, part_of_wide_attention, "part of q, k, v; q not square",
        "fills the others with zeros of the hidden size squared, which is not their shape", MERGE, "NVIDIA/TensorRT-LLM#2283";
    "tensorrt-llm/own-alpha", Ignored, Read, own_alpha, "alpha_pattern", "scales all layers by the config's alpha", BAKE;
    "tensorrt-llm/vocabulary", Ignored, Read, embedding_or_head, "LoRA of an embedding or lm_head",
        "skips their factors", MERGE;
    "tensorrt-llm/init", Changed, Read, base_changing_init, "base changed by init",
        "adds the update to the published base, from which nothing was taken", CONVERT_INIT;
    "tensorrt-llm/rank-flag", NeedsFlag, Read, rank_over_64, "rank over 64", "takes ranks up to 64 unless it is told otherwise",
        "set max_lora_rank to {}";
    "tensorrt-llm/grouped-kv", Unknown, None, part_of_grouped_attention, "part of q, k, v; k or v not square",
        "fills the others with zeros of the hidden size squared, which may not be their shape", TRY;
    "tensorrt-llm/experts", Unknown, None, experts, "factors of experts", "is not known to take them", TRY;
    "tensorrt-llm/convolution", Unknown, None, convolution, "factors of a convolution", "is not known to take them", TRY;
    "tensorrt-llm/dtype", Unknown, None, uncommon_dtype, "factors in F64, or in two dtypes", "is not known to take them", BAKE;
}
