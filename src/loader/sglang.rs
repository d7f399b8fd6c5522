//! SGLang. It reads every safetensors file of the folder, and takes rank and scale from the config alone.

use super::ways::{BAKE, CONVERT, CONVERT_INIT, MERGE, TRY};

rows! {
    "sglang/no-config", Refused, Read, no_config, "no adapter_config.json",
        "reads a folder with adapter_config.json and safetensors files", CONVERT;
    "sglang/target-modules", Refused, Read, modules_not_listed, "target_modules is no list",
        "takes a list, all-linear or all; a regular expression is an error", BAKE;
    "sglang/own-rank", Refused, Concluded, own_rank, "rank_pattern",
        "cuts its buffers by the config's r, and other ranks fail an assertion", BAKE;
    "sglang/dora", Refused, Read, dora, "DoRA", "refuses use_dora", MERGE;
    "sglang/q-without-v", Refused, Read, query_without_value, "q_proj without v_proj",
        "packs q, k and v, and ends with a KeyError if v is not there", MERGE;
    "sglang/rslora", Ignored, Read, stabilized, "rsLoRA", "scales by alpha / r whatever use_rslora says", BAKE,
        "sgl-project/sglang#40835";
    "sglang/own-alpha", Ignored, Read, own_alpha, "alpha_pattern", "scales all layers by lora_alpha / r", BAKE,
        "sgl-project/sglang#16935";
    "sglang/lora-bias", Ignored, Read, bias_update, "lora_bias", "leaves the updates of biases out", MERGE;
    "sglang/bias", Ignored, Read, trained_bias, "trained biases", "leaves them out", MERGE;
    "sglang/modules-to-save", Ignored, Read, saved_but_vocabulary, "modules_to_save",
        "leaves full tensors out, except embed_tokens and lm_head where they are declared", MERGE;
    "sglang/embedding", Ignored, Concluded, embedding_not_listed, "an embedding not listed",
        "takes the LoRA of an embedding if target_modules names it", "name it in target_modules";
    "sglang/no-layer", Ignored, Read, no_layer, "names without a layer",
        "drops what is in no layer, except embed_tokens and lm_head", MERGE;
    "sglang/not-covered", Ignored, Read, not_covered, "not in target_modules",
        "warns about other tensors, and ends with an error only if it is told to be strict", BAKE;
    "sglang/init", Changed, Read, base_changing_init, "base changed by init",
        "adds the update to the published base, from which nothing was taken", CONVERT_INIT;
    "sglang/other-files", Changed, Read, other_files, "other safetensors files",
        "reads every safetensors file of the folder as a part of the adapter", "move {} elsewhere, or loratool bake";
    "sglang/experts", Unknown, None, experts, "factors of experts", "is not known to take them", TRY;
    "sglang/convolution", Unknown, None, convolution, "factors of a convolution", "is not known to take them", TRY;
    "sglang/dtype", Unknown, None, uncommon_dtype, "factors in F64, or in two dtypes", "is not known to take them", BAKE;
}
