//! From a path to a value: which dialect a file or folder is in, decided by content, never by its name alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::adapter::{Adapter, Orientation};
use crate::checkpoint::Checkpoint;
use crate::codec::safetensors::{SafetensorsFile, Strictness};
use crate::dialect::{container, peft};
use crate::error::{Error, Result};
use crate::io::{ReadMode, read_small};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::TensorSource;

/// How to open files.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Plain reads (default) or a memory map.
    pub mode: ReadMode,
    /// Alpha of a bare `adapter_model.safetensors` without its config. Default none: such a file is refused.
    pub alpha: Option<f64>,
    /// Overrides the orientation that the adapter declares (`fan_in_fan_out`). Default none.
    pub orientation: Option<Orientation>,
    /// States how stacks of experts lie, `(E, out, in)` or `(E, in, out)`, where shapes and the version of PEFT do not tell. Default none.
    pub expert_axes: Option<Orientation>,
    /// Gives output projections of `nn.MultiheadAttention` their update twice, which is what PEFT up to 0.21.2 does by mistake, so that
    /// adapters that were trained with it expect it. Default false: once.
    pub attention_twice: bool,
    /// The order in which modules of the model register the bare parameters that were adapted, for modules that are not known. Default
    /// none.
    pub parameter_order: Vec<String>,
    /// Bounds on input.
    pub limits: Limits,
}

/// Name of the weights in a PEFT folder.
const WEIGHTS: &str = "adapter_model.safetensors";
/// Name of the config in a PEFT folder.
const CONFIG: &str = "adapter_config.json";

/// Opens a base checkpoint: a `.safetensors` file, or a folder with one or with an index and shards.
///
/// # Errors
/// `K-001` and on: see `spec/checkpoint.md`; `C-001` and on for each file's header.
pub fn open_checkpoint(path: impl AsRef<Path>) -> Result<Checkpoint> {
    open_checkpoint_with(path, &OpenOptions::default())
}

/// [`open_checkpoint`] with options.
///
/// # Errors
/// As [`open_checkpoint`].
pub fn open_checkpoint_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Checkpoint> {
    Checkpoint::open(path.as_ref(), options.mode, &options.limits)
}

/// Opens an adapter: a container file, a PEFT folder, or an `adapter_model.safetensors` with its config beside it.
///
/// # Errors
/// `P-017`, `P-019` if a part is missing; `C`, `P` and `A` rules for what the files say.
pub fn open_adapter(path: impl AsRef<Path>) -> Result<Adapter> {
    open_adapter_with(path, &OpenOptions::default())
}

/// [`open_adapter`] with options.
///
/// # Errors
/// As [`open_adapter`].
pub fn open_adapter_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Adapter> {
    let path = path.as_ref();
    let (weights, config) = locate(path)?;
    let limits = &options.limits;
    let file = Arc::new(SafetensorsFile::open(&weights, options.mode, Strictness::Strict, limits)?);
    let config = match config {
        Some(config) => Some(read_config(&config, limits)?),
        None => None,
    };
    let peft_options = peft::PeftOptions {
        alpha: options.alpha,
        orientation: options.orientation,
        expert_axes: options.expert_axes,
        attention_twice: options.attention_twice,
        parameter_order: options.parameter_order.clone(),
        ..Default::default()
    };
    if !container::is_container(&file) {
        let source: Arc<dyn TensorSource> = Arc::clone(&file) as _;
        return Ok(peft::read(source, config.as_ref(), &peft_options, limits)?.warned(file.warnings()));
    }
    let adapter = container::read(Arc::clone(&file), limits)?;
    if let Some(config) = &config {
        let source: Arc<dyn TensorSource> = file;
        agree(&adapter, &peft::read(source, Some(config), &peft_options, limits)?)?;
    }
    Ok(adapter)
}

/// The file of weights and, if there is one, the config beside it.
fn locate(path: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    if path.is_dir() {
        let weights = path.join(WEIGHTS);
        if weights.symlink_metadata().is_ok() {
            let config = path.join(CONFIG);
            return Ok((weights, config.symlink_metadata().is_ok().then_some(config)));
        }
        return Err(no_weights(path));
    }
    // A bare PEFT file goes with the config beside it; a container needs none, and another file's config is not its own.
    let config = path
        .file_name()
        .filter(|name| *name == WEIGHTS)
        .map(|_| path.with_file_name(CONFIG))
        .filter(|c| c.symlink_metadata().is_ok());
    Ok((path.to_owned(), config))
}

fn no_weights(path: &Path) -> Error {
    let has = |name: &str| path.join(name).symlink_metadata().is_ok();
    let error = |message: &str| Error::new(rules::WEIGHTS_PRESENT, message).file(path);
    if has("adapter_model.bin") {
        error("the folder holds adapter_model.bin, a Python pickle, which is never read here")
            .help("load it in PEFT and save it again with safe_serialization=True")
    } else if has("model.safetensors") || has("model.safetensors.index.json") {
        Error::new(rules::ROLES, "the folder holds a model, not an adapter; arguments swapped?")
            .file(path)
            .help("give the folder of an adapter; a base comes first in merge, and behind --base elsewhere")
    } else if has("adapters.safetensors") {
        Error::new(
            rules::FOREIGN_DIALECT,
            "the folder holds adapters.safetensors: an MLX adapter, which this version does not read",
        )
        .file(path)
    } else if has(CONFIG) {
        error("the folder holds adapter_config.json but no adapter_model.safetensors")
            .help("download the adapter again, with its weights")
    } else {
        error("the folder holds no adapter_model.safetensors")
            .help("give the folder that holds adapter_config.json, or a container file")
    }
}

fn read_config(path: &Path, limits: &Limits) -> Result<peft::PeftConfig> {
    match read_small(path, limits.config_bytes)? {
        Some(bytes) => peft::PeftConfig::parse(&bytes, path, limits),
        None => Err(peft::PeftConfig::too_long(path, limits)),
    }
}

/// A container that lies in a PEFT folder: what its manifest says and what the config says must be one thing.
fn agree(manifest: &Adapter, config: &Adapter) -> Result<()> {
    for (m, c) in manifest.targets().iter().zip(config.targets()) {
        let (ours, theirs) = (m.scaling.effective(), c.scaling.effective());
        let same = m.tensor == c.tensor && m.scaling.rank == c.scaling.rank && (ours - theirs).abs() <= 1e-12 * ours.abs();
        if !same {
            let message = format!(
                "the manifest scales {:?} by {ours} (rank {}), adapter_config.json scales {:?} by {theirs} (rank {})",
                m.tensor, m.scaling.rank, c.tensor, c.scaling.rank
            );
            return Err(Error::new(rules::CONFIG_AGREES, message)
                .file(manifest.label())
                .tensor(&m.tensor)
                .help("one of the two was edited; convert the adapter again, or give the container file alone"));
        }
    }
    if manifest.targets().len() != config.targets().len() || manifest.replacements().len() != config.replacements().len() {
        let message = "the manifest and adapter_config.json describe different tensors";
        return Err(Error::new(rules::CONFIG_AGREES, message).file(manifest.label()));
    }
    Ok(())
}
