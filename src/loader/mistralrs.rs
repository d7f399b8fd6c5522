//! mistral.rs, after its LoRA was rewritten: the strictest reader of the table. What it does not use is an error.

use super::ways::{BAKE, CONVERT, CONVERT_INIT, MERGE, TRY};

rows! {
    "mistralrs/no-config", Refused, Read, no_config, "no adapter_config.json",
        "reads a folder with adapter_config.json and adapter_model.safetensors", CONVERT;
    "mistralrs/dora", Refused, Read, dora, "DoRA", "refuses use_dora", MERGE;
    "mistralrs/lora-bias", Refused, Read, bias_update, "lora_bias", "refuses lora_bias", MERGE;
    "mistralrs/bias", Refused, Read, trained_bias_or_field, "trained biases", "refuses a bias other than \"none\"", MERGE;
    "mistralrs/modules-to-save", Refused, Read, saved, "modules_to_save", "refuses full tensors", MERGE;
    "mistralrs/vocabulary", Refused, Read, embedding_or_head, "LoRA of an embedding or lm_head", "refuses it", MERGE;
    "mistralrs/init", Refused, Read, base_changing_init_or_ga, "base changed by init",
        "refuses pissa, olora, corda, loftq and lora_ga", CONVERT_INIT;
    "mistralrs/not-covered", Refused, Read, not_covered, "not in target_modules",
        "refuses tensors that target_modules does not cover", BAKE;
    "mistralrs/rank-flag", NeedsFlag, Read, rank_over_256, "rank over 256", "takes ranks up to 256 unless it is told otherwise",
        "raise its limit of ranks to {}";
    "mistralrs/bytes-flag", NeedsFlag, Read, over_8_gib, "more than 8 GiB", "takes 8 GiB of factors unless it is told otherwise",
        "raise its limit of bytes to {}";
    "mistralrs/convolution", Unknown, None, convolution, "factors of a convolution", "is not known to take them", TRY;
    "mistralrs/dtype", Unknown, None, uncommon_dtype, "factors in F64, or in two dtypes", "is not known to take them", BAKE;
}
