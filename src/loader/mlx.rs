//! mlx-lm, which has a format of its own.

use super::ways::MERGE;

rows! {
    "mlx/format", Refused, Read, always, "the file is PEFT's",
        "reads adapters.safetensors with other names and orientations, and refuses names that it does not know", MERGE,
        "ml-explore/mlx-lm#1119", "ml-explore/mlx-examples#816";
}
