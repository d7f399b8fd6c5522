//! A base checkpoint: named tensors over one file or many, and what lies beside them. It knows where every tensor is, which names
//! the model ties, and what makes this base this base; it does not know LoRA. The rules are those of `spec/checkpoint.md`.
//!
//! What was checked is what is read later: files stay open, and one that was closed for want of descriptors is the same when it is opened
//! again, or an error.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, reason = "numbers from a file index nothing unchecked"))]

mod companions;
mod config;
mod coverage;
mod find;
mod links;
mod replicated;
mod roots;
mod tied;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub use companions::Companion;
pub use config::ModelConfig;
pub(crate) use config::{stored_as, with_vocabulary};
pub use tied::{Tie, TieReason};

use crate::codec::safetensors::{SafetensorsFile, Strictness};
use crate::codec::shards::ShardIndex;
use crate::error::{Diagnostic, Error, Result};
use crate::io::{ReadMode, parent_of, refuse_pending};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource};

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    is_folder: bool,
    shards: Vec<Shard>,
    by_tensor: HashMap<String, usize>,
    config: ModelConfig,
    index: Option<ShardIndex>,
    companions: Vec<Companion>,
    warnings: Vec<Diagnostic>,
    /// Ranges of stored layers that stand one after the other; empty if they are as stored.
    replication: Vec<(u64, u64)>,
}

/// One file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Plain name inside the folder.
    pub file_name: String,
    /// The open file.
    pub file: SafetensorsFile,
    /// The digest that the file is named by in a model cache, or `None` elsewhere.
    blob: Option<String>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, or a folder that holds one or an index with its shards.
    ///
    /// # Errors
    /// `E-011` if a merge into it is pending, `E-001` or `E-007` if the path cannot be opened, `A-029` if it is an adapter, and the broken rules of `spec/checkpoint.md` and
    /// of the files; those that compare the index with the shards are reported all at once.
    pub fn open(path: &Path, mode: ReadMode, limits: &Limits) -> Result<Self> {
        refuse_pending(path)?;
        if path.is_dir() { Self::open_folder(path, mode, limits) } else { Self::open_file(path, mode, limits) }
    }

    /// A path that was typed is followed wherever it leads; links are judged only where a file or folder brought them along.
    fn open_file(path: &Path, mode: ReadMode, limits: &Limits) -> Result<Self> {
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if file_name.ends_with(find::INDEX_SUFFIX) {
            let message = "this is the index of a checkpoint, not a safetensors file";
            return Err(Error::new(rules::IS_CHECKPOINT, message).file(path).help("give the folder that it lies in"));
        }
        refuse_pending(parent_of(path))?;
        let file = SafetensorsFile::open(path, mode, Strictness::Lenient, limits)?;
        let mut warnings = Vec::new();
        // The config beside the file tells which weights are tied, which matters as much for a file as for its folder.
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let config = ModelConfig::read(folder, limits, &mut warnings).facts_alone();
        let shards = vec![Shard { file_name, file, blob: None }];
        Ok(Self::assemble(path, false, shards, config, warnings))
    }

    fn open_folder(path: &Path, mode: ReadMode, limits: &Limits) -> Result<Self> {
        let found = find::weights(path)?;
        let mut warnings = found.warnings;
        let index = match &found.index {
            Some(name) => {
                links::admit(path, Path::new(name))?;
                Some(ShardIndex::read(&path.join(name), limits)?)
            }
            None => None,
        };
        let names = match &index {
            Some(index) => index.shard_names(),
            None => found.file.as_deref().into_iter().collect(),
        };
        names.iter().try_for_each(|name| refuse_pending(&path.join(name)))?;
        find::leftovers(path, &names, &mut warnings)?;
        let shards = coverage::open_shards(path, &names, mode, limits)?;
        let config = ModelConfig::read(path, limits, &mut warnings);
        let mut used = names;
        used.extend(found.index.as_deref());
        let companions = companions::list(path, &used)?;
        let mut checkpoint = Self::assemble(path, true, shards, config, warnings);
        checkpoint.companions = companions;
        if let Some(index) = index {
            coverage::check_index(&index, &checkpoint.shards, path, limits)?;
            let name = path.join(found.index.unwrap_or_default());
            checkpoint.warnings.extend(coverage::check_total(&index, &checkpoint.shards, &name));
            checkpoint.index = Some(index);
        }
        Ok(checkpoint)
    }

    fn assemble(path: &Path, is_folder: bool, shards: Vec<Shard>, config: ModelConfig, mut warnings: Vec<Diagnostic>) -> Self {
        let mut by_tensor = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            by_tensor.extend(shard.file.names().map(|name| (name.to_owned(), i)));
            warnings.extend_from_slice(shard.file.warnings());
        }
        let path = path.to_owned();
        let (index, companions, replication) = (None, Vec::new(), Vec::new());
        Checkpoint { path, is_folder, shards, by_tensor, config, index, companions, warnings, replication }
    }

    /// The file or folder, as the caller named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the path is a folder.
    pub fn is_folder(&self) -> bool {
        self.is_folder
    }

    /// The files that hold the tensors, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Index among the [`shards`](Self::shards) of the one that holds a tensor.
    pub fn locate(&self, tensor: &str) -> Option<usize> {
        self.by_tensor.get(tensor).copied()
    }

    /// What `config.json` says, as far as it matters here; empty if there is none.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The shard index, if there is one.
    pub fn index(&self) -> Option<&ShardIndex> {
        self.index.as_ref()
    }

    /// The other files of the folder, sorted, each with whether a copy of the model needs it. Hidden ones are passed over.
    pub fn companions(&self) -> &[Companion] {
        &self.companions
    }

    /// What is worth saying but stops nobody.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.warnings
    }
}

impl TensorSource for Checkpoint {
    fn label(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.shards.iter().flat_map(|shard| shard.file.names()))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.shards.get(self.locate(name)?)?.file.info(name)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        match self.locate(name).and_then(|i| self.shards.get(i)) {
            Some(shard) => shard.file.read(name, offset, buf),
            None => Err(Error::new(rules::READ, "no such tensor").file(&self.path).tensor(name)),
        }
    }

    fn unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| shard.file.unchanged())
    }
}
