//! The other files of a model's folder: which of them a copy of the model needs. A list of what is copied, not of what is not: weights
//! that were not merged, code and training state must not travel with weights that they do not belong to.

use std::fs;
use std::path::{Path, PathBuf};

use super::links;
use crate::error::Result;
use crate::io::read_error;

/// How deep sub-folders are looked into, such as `1_Pooling/config.json` of sentence-transformers.
const DEPTH: usize = 3;

/// A file beside the weights.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Companion {
    /// Path inside the folder.
    pub relative: PathBuf,
    /// Whether a copy of the model needs it.
    pub copy: bool,
    /// What it is taken for.
    pub why: &'static str,
}

/// The files of a folder, sorted, but for the top-level ones that are `used` as weights. Hidden ones are passed over.
pub(super) fn list(folder: &Path, used: &[&str]) -> Result<Vec<Companion>> {
    let mut found = Vec::new();
    walk(folder, Path::new(""), DEPTH, &mut found)?;
    found.retain(|companion| companion.relative.to_str().is_none_or(|name| !used.contains(&name)));
    found.sort_by(|x, y| x.relative.cmp(&y.relative));
    Ok(found)
}

fn walk(root: &Path, below: &Path, depth: usize, found: &mut Vec<Companion>) -> Result<()> {
    let folder = root.join(below);
    let unreadable = |e| read_error(&folder, e);
    for entry in fs::read_dir(&folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let (name, kind) = (entry.file_name(), entry.file_type().map_err(unreadable)?);
        let relative = below.join(&name);
        let name = name.to_string_lossy().to_lowercase();
        if name.starts_with('.') {
            continue;
        }
        if kind.is_dir() {
            if depth > 0 && !is_training_folder(&name) {
                walk(root, &relative, depth - 1, found)?;
            }
            continue;
        }
        let (copy, why) = match links::admit(root, &relative) {
            Ok(()) if root.join(&relative).exists() => classify(&name),
            Ok(()) => (false, "a link that leads nowhere"),
            Err(_) => (false, "not a file, or a link out of the folder"),
        };
        found.push(Companion { relative, copy, why });
    }
    Ok(())
}

/// Whether a file of this name, in lower case, is copied, and what it is taken for.
fn classify(name: &str) -> (bool, &'static str) {
    let has = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    let starts = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    if starts(&["adapter_config.", "adapter_model."]) {
        (false, "part of an adapter")
    } else if has(&[".index.json"]) {
        (false, "the index of other weights")
    } else if starts(&["trainer_state.", "training_args.", "optimizer.", "scheduler.", "rng_state"]) {
        (false, "training state")
    } else if has(&[
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".gguf",
        ".onnx",
        ".onnx_data",
        ".npz",
        ".pkl",
    ]) {
        (false, "other weights")
    } else if has(&[".py"]) {
        (false, "code")
    } else if starts(&["license", "notice"]) {
        (true, "licence")
    } else if has(&[".model", ".spm", ".tiktoken", ".vocab", ".merges", ".bpe"]) {
        (true, "tokenizer")
    } else if has(&[".json", ".jinja"]) {
        (true, "configuration")
    } else if has(&[".txt", ".md"]) {
        (true, "text")
    } else {
        (false, "not a kind of file that a model is known to need")
    }
}

/// Folders that trainers fill, each with a whole model of an earlier step or with logs.
fn is_training_folder(name: &str) -> bool {
    name.starts_with("checkpoint-") || name.starts_with("global_step") || matches!(name, "runs" | "logs" | "wandb")
}

#[cfg(test)]
mod tests {
    use super::classify;

    #[test]
    fn what_a_copy_needs_is_known_by_name() {
        for name in ["config.json", "tokenizer.model", "vocab.txt", "merges.txt", "license", "notice.txt", "chat_template.jinja"]
        {
            assert!(classify(name).0, "{name}");
        }
        for name in [
            "pytorch_model.bin",
            "consolidated.safetensors",
            "modeling_x.py",
            "adapter_config.json",
            "trainer_state.json",
            "scheduler.pt",
            "pytorch_model.bin.index.json",
            "training_args.bin",
            "run.sh",
            "model.onnx_data",
            "image.png",
        ] {
            assert!(!classify(name).0, "{name}");
        }
    }
}
