//! Whether a path is an adapter or a checkpoint, by its content. The library's openers then say what is wrong with it; here is only
//! decided which of them is asked.

use std::path::Path;

use crate::{Limits, ReadMode, SafetensorsFile, Strictness, TensorSource};

/// What a path is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Adapter,
    Checkpoint,
}

/// Files that only an adapter's folder holds.
const ADAPTER_FILES: [&str; 3] = ["adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"];
/// Files that only a model's folder holds.
const MODEL_FILES: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];
/// Parts of tensor names that an adapter has.
const MARKS: [&str; 6] = ["lora_", ".lora.", "_lora.", "base_model.model.", "hada_w", "lokr_w"];

/// Decides. What cannot be opened at all is a checkpoint, whose opener says why.
pub(super) fn kind(path: &Path, limits: &Limits) -> Kind {
    let adapter = if path.is_dir() { adapter_folder(path) } else { adapter_file(path, limits) };
    if adapter { Kind::Adapter } else { Kind::Checkpoint }
}

fn adapter_folder(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).symlink_metadata().is_ok();
    ADAPTER_FILES.into_iter().any(has) || (has("adapter_config.json") && !MODEL_FILES.into_iter().any(has))
}

/// A base may hold a few tensors with such names, so it takes most of them.
fn adapter_file(path: &Path, limits: &Limits) -> bool {
    if path.file_name().is_some_and(|name| name == ADAPTER_FILES[0]) {
        return true;
    }
    let Ok(file) = SafetensorsFile::open(path, ReadMode::Read, Strictness::Lenient, limits) else { return false };
    let (mut all, mut marked) = (0, 0);
    for name in file.names() {
        all += 1;
        marked += usize::from(MARKS.iter().any(|mark| name.contains(mark)));
    }
    file.metadata().iter().any(|(key, _)| key == "loratool.manifest") || 2 * marked > all
}
