//! LoRAX and TGI, which has the same reader. Tensors are looked up by the name that each layer of the model implies, so what has
//! another name is not found, and a kind of layer that is not found in every layer is dropped.

use super::ways::{BAKE, CONVERT, CONVERT_INIT, MERGE, NOTHING, TRY};

rows! {
    "lorax/no-config", Refused, Read, no_config, "no adapter_config.json",
        "reads a folder with PEFT's config and safetensors files", CONVERT;
    "lorax/rank-by-layer", Refused, Read, rank_varies_by_layer, "ranks vary by layer",
        "stacks the layers of one kind, which fails if their ranks differ", BAKE;
    "lorax/own-alpha", Ignored, Read, own_alpha, "alpha_pattern", "scales all layers by the config's alpha", BAKE;
    "lorax/dora", Ignored, Read, dora, "DoRA", "leaves the magnitudes out", MERGE;
    "lorax/lora-bias", Ignored, Read, bias_update, "lora_bias", "leaves the updates of biases out", MERGE;
    "lorax/bias", Ignored, Read, trained_bias, "trained biases", "leaves them out", MERGE;
    "lorax/modules-to-save", Ignored, Read, saved, "modules_to_save", "warns that full tensors are not used", MERGE;
    "lorax/embedding", Ignored, Read, embedding, "LoRA of an embedding", "takes that of lm_head only", MERGE;
    "lorax/layers", Ignored, Read, layers_missing, "layers missing",
        "drops a kind of layer entirely if any one layer lacks it, with a warning", MERGE;
    "lorax/prefix", Ignored, Concluded, no_prefix, "names without base_model.model.",
        "looks tensors up by names with that prefix", BAKE;
    "lorax/adapter-name", Ignored, Concluded, adapter_name, "adapter's name in names",
        "looks tensors up by names that end in lora_A.weight and lora_B.weight", BAKE;
    "lorax/own-rank", Changed, Read, own_rank, "rank_pattern", "divides alpha by the config's r, whatever a layer's rank is", BAKE;
    "lorax/init", Changed, Read, base_changing_init, "base changed by init",
        "adds the update to the published base, from which nothing was taken", CONVERT_INIT;
    "lorax/other-files", Changed, Read, other_files, "other safetensors files",
        "reads every safetensors file of the folder as a part of the adapter", "move {} elsewhere, or loratool bake";
    "lorax/base-path", NeedsFlag, Concluded, base_is_a_path, "the base is named by a path",
        "compares the name with that of the model it serves, and asks the hub for both if they differ",
        "write the name of the served model into base_model_name_or_path in place of {}", "predibase/lorax#172";
    "lorax/odd-scale", Rounded, Read, odd_scale, "scale not a power of two",
        "casts B to its own dtype, then multiplies it by the scale in that dtype", NOTHING;
    "lorax/experts", Unknown, None, experts, "factors of experts", "is not known to take them", TRY;
    "lorax/convolution", Unknown, None, convolution, "factors of a convolution", "is not known to take them", TRY;
    "lorax/dtype", Unknown, None, uncommon_dtype, "factors in F64, or in two dtypes", "is not known to take them", BAKE;
}
