//! Which files of a folder are its weights: an index, else the one safetensors file. Everything else is named, so that the user sees
//! what was not read. The rules are `K-001`, `K-011` and `A-029`.

use std::path::Path;

use crate::error::{Diagnostic, Error, Result};
use crate::io::read_error;
use crate::rules;

/// How the name of a shard index ends.
pub(super) const INDEX_SUFFIX: &str = ".safetensors.index.json";
const FILE_SUFFIX: &str = ".safetensors";
/// The names that transformers and diffusers write, before either suffix.
const STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];
/// Weights in formats that are not read, by the end of the name.
const FOREIGN: [&str; 10] = [".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".pkl"];

/// The weights of a folder: an index, or else one file.
pub(super) struct Weights {
    pub(super) index: Option<String>,
    pub(super) file: Option<String>,
    pub(super) warnings: Vec<Diagnostic>,
}

/// Chooses the weights of a folder. An index wins over a single file: it says what belongs together.
///
/// # Errors
/// `E-001`, `A-029` if only an adapter is there, `K-001` if nothing is or the choice is not clear.
pub(super) fn weights(folder: &Path) -> Result<Weights> {
    let names = list(folder)?;
    if let Some(index) = choose(folder, &names, INDEX_SUFFIX)? {
        return Ok(Weights { index: Some(index), file: None, warnings: Vec::new() });
    }
    match choose(folder, &names, FILE_SUFFIX)? {
        Some(file) if of_set(&file).is_none_or(|count| count <= 1) => {
            Ok(Weights { index: None, file: Some(file), warnings: Vec::new() })
        }
        Some(shard) => {
            Err(Error::new(rules::IS_CHECKPOINT, format!("{shard:?} is one of several shards, and there is no index"))
                .file(folder)
                .help("download the model's index and the other shards too"))
        }
        None => Err(nothing(folder, &names)),
    }
}

/// Reports safetensors files of the folder that are not among the weights `used`.
pub(super) fn leftovers(folder: &Path, used: &[&str], warnings: &mut Vec<Diagnostic>) -> Result<()> {
    let names = list(folder)?;
    let left: Vec<&str> = names.iter().map(String::as_str).filter(|n| is_weights(n) && !used.contains(n)).collect();
    if !left.is_empty() {
        let message = format!("a second set of weights is not used: {}", shown(&left));
        // transformers prefers a file over an index, so the two of them can mean two models.
        let help = "remove what is stale: other programs may load it instead";
        warnings.push(Diagnostic::new(rules::LEFTOVERS, message).file(folder).help(help));
    }
    Ok(())
}

/// The well-known name with this suffix, else the only name with it.
fn choose(folder: &Path, names: &[String], suffix: &str) -> Result<Option<String>> {
    for stem in STEMS {
        if let Some(name) = names.iter().find(|n| n.strip_suffix(suffix) == Some(stem)) {
            return Ok(Some(name.clone()));
        }
    }
    let found: Vec<&str> = names.iter().map(String::as_str).filter(|n| n.ends_with(suffix) && !is_adapter(n)).collect();
    match found[..] {
        [] => Ok(None),
        [name] => Ok(Some(name.to_owned())),
        _ => Err(Error::new(rules::IS_CHECKPOINT, format!("the folder does not say which to read: {}", shown(&found)))
            .file(folder)
            .help("download the model's index, model.safetensors.index.json, or give one file")),
    }
}

/// The error for a folder without weights, with what is there instead.
fn nothing(folder: &Path, names: &[String]) -> Error {
    if names.iter().any(|n| is_adapter(n)) {
        return Error::new(rules::ROLES, "this is an adapter, not a base model")
            .file(folder)
            .help("were the arguments swapped? the base is the model that the adapter was trained on");
    }
    let error = |message: String| Error::new(rules::IS_CHECKPOINT, message).file(folder);
    let foreign: Vec<&str> = names.iter().map(String::as_str).filter(|n| FOREIGN.iter().any(|f| n.ends_with(f))).collect();
    if !foreign.is_empty() {
        return error(format!("no safetensors file; there is {}", shown(&foreign)))
            .help("use the safetensors version of the model, or convert it with a tool you trust; pickles are never read here");
    }
    if names.iter().any(|n| n == "model_index.json") {
        return error("this is a pipeline of several models".into())
            .help("give the folder of one of them, such as unet or transformer");
    }
    let incomplete = names.iter().any(|n| n.ends_with(".incomplete"));
    let help =
        if incomplete { "the download is unfinished: run it again" } else { "give the folder that holds model.safetensors" };
    error("no safetensors file in this folder".into()).help(help)
}

/// Names of the folder's files and folders, sorted; hidden ones, such as the `._` files of macOS, are passed over.
fn list(folder: &Path) -> Result<Vec<String>> {
    let unreadable = |e| read_error(folder, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        names.extend(name.into_string().ok().filter(|n| !n.starts_with('.')));
    }
    names.sort_unstable();
    Ok(names)
}

fn is_adapter(name: &str) -> bool {
    name == "adapter_config.json" || name.starts_with("adapter_model.")
}

fn is_weights(name: &str) -> bool {
    name.ends_with(FILE_SUFFIX) && !is_adapter(name)
}

/// How many files a name in the form `x-00001-of-00004.safetensors` says there are.
fn of_set(name: &str) -> Option<u32> {
    let (_, count) = name.strip_suffix(FILE_SUFFIX)?.rsplit_once("-of-")?;
    count.parse().ok()
}

/// Up to five names, escaped.
fn shown(names: &[&str]) -> String {
    let first: Vec<String> = names.iter().take(5).map(|n| format!("{n:?}")).collect();
    let more = names.len().saturating_sub(5);
    if more == 0 { first.join(", ") } else { format!("{} and {more} more", first.join(", ")) }
}
