//! llama.cpp reads GGUF alone, so the rows are of its converter, `convert_lora_to_gguf.py`, through which every adapter goes. It
//! takes `lora_alpha` from the config and nothing else that bears on the scale.

use super::ways::{BAKE, CONVERT, CONVERT_INIT, MERGE, TRY};

rows! {
    "llamacpp/no-config", Refused, Read, no_config, "no adapter_config.json",
        "converts a folder with adapter_config.json and adapter_model.safetensors", CONVERT;
    "llamacpp/dora", Refused, Read, dora, "DoRA", "ends at names that are not of A or B", MERGE;
    "llamacpp/lora-bias", Refused, Read, bias_update, "lora_bias", "ends at names that are not of A or B", MERGE;
    "llamacpp/bias", Refused, Read, trained_bias, "trained biases", "ends at names that are not of A or B", MERGE;
    "llamacpp/modules-to-save", Refused, Read, saved_but_own_weight, "modules_to_save",
        "ends at names that are not of A or B", MERGE, "ggml-org/llama.cpp#11554";
    "llamacpp/adapter-name", Refused, Concluded, adapter_name, "adapter's name in names",
        "ends at names that do not end in lora_A.weight or lora_B.weight", BAKE;
    "llamacpp/conv1d", Refused, Concluded, transposed, "GPT-2's Conv1D",
        "transposes the factors as it does the weight, though they are not stored so; the shapes then do not fit", MERGE;
    "llamacpp/rslora", Ignored, Read, stabilized, "rsLoRA", "scales by alpha / rank: the root of the rank is lost", BAKE;
    "llamacpp/own-alpha", Ignored, Read, own_alpha, "alpha_pattern", "has one alpha for all layers", BAKE;
    "llamacpp/own-weight", Ignored, Read, own_weight, "saved weight below a LoRA", "skips base_layer.weight", MERGE;
    "llamacpp/conv1d-square", Changed, Concluded, transposed_square, "GPT-2's Conv1D, square",
        "transposes the factors as it does the weight, and nothing tells", MERGE;
    "llamacpp/init", Changed, Read, base_changing_init, "base changed by init",
        "adds the update to the published base, from which nothing was taken", CONVERT_INIT;
    "llamacpp/gguf", NeedsFlag, Read, always, "the file is not GGUF", "reads GGUF only",
        "convert_lora_to_gguf.py --base MODEL ADAPTER, of llama.cpp";
    "llamacpp/convolution", Unknown, None, convolution, "factors of a convolution", "is not known to take them", TRY;
    "llamacpp/dtype", Unknown, None, uncommon_dtype, "factors in F64, or in two dtypes", "is not known to take them", BAKE;
}
