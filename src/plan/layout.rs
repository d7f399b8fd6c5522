//! The plan: what every output file consists of, byte for byte, from where. Untouched bytes are ranges to copy; everything else is
//! a [`Change`]: a tensor computed from an origin and the contributions of the adapters. A shard whose tensors keep their places
//! keeps its header, byte for byte; one that gains a tensor gets a new header and the old tensors in the old order.

use std::collections::{BTreeMap, BTreeSet};

use super::bind::{Binding, Ignored};
use super::options::{BindOptions, Weighted};
use super::rename::Renaming;
use super::shape::Contribution;
use super::tied;
use crate::adapter::Factor;
use crate::checkpoint::Checkpoint;
use crate::codec::safetensors::Layout;
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource};

/// Where the values of a tensor come from before anything is added.
#[derive(Debug, Clone)]
pub(crate) enum Origin<'a> {
    /// A tensor of the base.
    Base { shard: usize, begin: u64, info: TensorInfo },
    /// A full tensor of an adapter.
    Adapter(&'a Factor),
}

/// One tensor of the output that is not a copy of the base's bytes.
#[derive(Debug, Clone)]
pub(crate) struct Change<'a> {
    pub(crate) name: String,
    pub(crate) info: TensorInfo,
    /// Offset of the first byte in the output file.
    pub(crate) begin: u64,
    pub(crate) origin: Origin<'a>,
    /// What the adapters add, in the order given; empty for a plain replacement or copy.
    pub(crate) contributions: Vec<Contribution<'a>>,
    /// The base had no tensor of this name.
    pub(crate) added: bool,
}

/// A run of bytes that is the same in base and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CopyRange {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) len: u64,
}

/// The header of an output shard.
#[derive(Debug, Clone)]
pub(crate) enum Head {
    /// The base's header; it is part of the first range to copy.
    Kept,
    /// A new one.
    New(Vec<u8>),
}

/// One file of weights of the output.
#[derive(Debug, Clone)]
pub(crate) struct OutShard<'a> {
    /// Name inside the output folder.
    pub(crate) file_name: String,
    /// Index of the base's shard.
    pub(crate) shard: usize,
    pub(crate) head: Head,
    pub(crate) len: u64,
    pub(crate) copies: Vec<CopyRange>,
    /// Tensors within these ranges.
    pub(crate) copied: u64,
    pub(crate) changes: Vec<Change<'a>>,
    /// Names that the base's shard does not have, with what they will be.
    pub(crate) added: Vec<(String, TensorInfo)>,
}

/// Everything that a merge will do.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(crate) base: &'a Checkpoint,
    pub(crate) shards: Vec<OutShard<'a>>,
    /// `config.json` must say that embeddings are no longer tied.
    pub(crate) untied: bool,
    pub(crate) keep_nonfinite: bool,
    renamings: Vec<Renaming>,
    ignored: Vec<Ignored>,
    warnings: Vec<Diagnostic>,
}

impl<'a> Plan<'a> {
    /// Binds all adapters to the base and lays out the output.
    ///
    /// # Errors
    /// Everything that is wrong with any of the bindings, at once; `A-012` if nothing would change; `A-009` if two adapters bring a
    /// replacement of the same tensor.
    pub fn new(base: &'a Checkpoint, adapters: &[Weighted<'a>], options: &BindOptions, limits: &Limits) -> Result<Self> {
        let mut problems = Vec::new();
        let mut class = None;
        let mut bindings = Vec::new();
        for (index, weighted) in adapters.iter().enumerate() {
            match Binding::new(base, *weighted, index, options, limits) {
                Ok(binding) => bindings.push(binding),
                Err(error) => {
                    class.get_or_insert(error.class());
                    problems.extend(error.into_diagnostics());
                }
            }
        }
        Error::check(problems).map_err(|e| match class {
            Some(class) => e.class_of(class),
            None => e,
        })?;
        Self::from_bindings(base, bindings, options)
    }

    fn from_bindings(base: &'a Checkpoint, bindings: Vec<Binding<'a>>, options: &BindOptions) -> Result<Self> {
        let mut updates: BTreeMap<String, Vec<Contribution<'a>>> = BTreeMap::new();
        let mut replacements: BTreeMap<String, &'a Factor> = BTreeMap::new();
        let (mut ignored, mut warnings, mut renamings) = (Vec::new(), Vec::new(), Vec::new());
        let mut problems = Vec::new();
        for binding in bindings {
            for (name, contribution) in binding.updates {
                updates.entry(name).or_default().push(contribution);
            }
            for (name, with) in binding.replacements {
                if let Some(first) = replacements.insert(name.clone(), with) {
                    let message = format!(
                        "{name:?} is replaced by two adapters, from {:?} and {:?}",
                        first.source().label(),
                        with.source().label()
                    );
                    let help = "merge one of them with --skip-replacements first";
                    problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(with.name()).help(help));
                }
            }
            ignored.extend(binding.ignored);
            warnings.extend(binding.warnings);
            renamings.push(binding.renaming);
        }
        Error::check(problems)?;
        let mut changed: BTreeSet<String> = updates.keys().chain(replacements.keys()).cloned().collect();
        if changed.is_empty() {
            let message = "nothing would change: every update is left out by a flag or has weight 0";
            return Err(Error::new(rules::ADAPTER_NOT_EMPTY, message).file(base.path()));
        }
        changed.extend(tied::heads_to_write(base, &changed));
        let untied = tied::is_broken(base, &changed);
        if untied && base.config().untied().is_none() {
            let message = "there is no config.json in the base that could say that the embeddings are no longer tied";
            let help = "give the folder of the model as the base, with its config.json";
            return Err(Error::new(rules::TIED_WEIGHTS, message).file(base.path()).help(help));
        }
        let mut outline = Outline { base, updates, replacements };
        let shards = outline.shards(&changed);
        let keep_nonfinite = options.allow_nonfinite_base;
        Ok(Plan { base, shards, untied, keep_nonfinite, renamings, ignored, warnings })
    }

    /// The base.
    pub fn base(&self) -> &'a Checkpoint {
        self.base
    }

    /// The renaming of each adapter, in order.
    pub fn renamings(&self) -> &[Renaming] {
        &self.renamings
    }

    /// Adapter tensors that are left out, each by a flag.
    pub fn ignored(&self) -> &[Ignored] {
        &self.ignored
    }

    /// What is worth saying before the merge.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.warnings
    }

    /// Bytes of weights that will be written.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().fold(0, |n, shard| n.saturating_add(shard.len))
    }

    /// All tensors that will not be copies, in the order of the files.
    pub(crate) fn changes(&self) -> impl Iterator<Item = &Change<'a>> {
        self.shards.iter().flat_map(|shard| &shard.changes)
    }
}

struct Outline<'a> {
    base: &'a Checkpoint,
    updates: BTreeMap<String, Vec<Contribution<'a>>>,
    replacements: BTreeMap<String, &'a Factor>,
}

impl<'a> Outline<'a> {
    fn shards(&mut self, changed: &BTreeSet<String>) -> Vec<OutShard<'a>> {
        let shards = self.base.shards();
        // New tensors go to the shard of the tensor that they were tied to, or to the last one.
        let mut new: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
        for name in changed.iter().filter(|name| self.base.locate(name).is_none()) {
            let home = tied::stored_twin(self.base, name).and_then(|twin| self.base.locate(twin));
            new.entry(home.unwrap_or(shards.len().saturating_sub(1))).or_default().push(name);
        }
        (0..shards.len()).map(|i| self.shard(i, changed, new.get(&i).map_or(&[][..], Vec::as_slice))).collect()
    }

    fn shard(&mut self, index: usize, changed: &BTreeSet<String>, new: &[&str]) -> OutShard<'a> {
        let shard = &self.base.shards()[index];
        let header = shard.file.header();
        let mut entries: Vec<_> = header.entries.iter().collect();
        entries.sort_by_key(|entry| (entry.begin, entry.end));
        let added: Vec<(String, TensorInfo)> = new.iter().map(|name| (name.to_string(), self.added_info(name))).collect();
        let all: Vec<(&str, &TensorInfo)> =
            entries.iter().map(|e| (e.name.as_str(), &e.info)).chain(added.iter().map(|(n, i)| (n.as_str(), i))).collect();
        let (head, offsets, len) = if added.is_empty() {
            (Head::Kept, entries.iter().map(|e| e.begin).collect(), shard.file.file_len())
        } else {
            let layout = Layout::new(&header.metadata, &all);
            (Head::New(layout.head), layout.offsets, layout.file_len)
        };
        let mut copies = Copies(Vec::new());
        if matches!(head, Head::Kept) {
            copies.push(CopyRange { from: 0, to: 0, len: header.data_start });
        }
        let (mut changes, mut copied) = (Vec::new(), 0);
        for (i, (name, info)) in all.iter().enumerate() {
            let begin = offsets.get(i).copied().unwrap_or_default();
            if changed.contains(*name) {
                changes.push(self.change(name, info, begin));
            } else if let Some(entry) = entries.get(i) {
                copied += 1;
                copies.push(CopyRange { from: entry.begin, to: begin, len: entry.end - entry.begin });
            }
        }
        OutShard { file_name: shard.file_name.clone(), shard: index, head, len, copies: copies.0, copied, changes, added }
    }

    fn added_info(&self, name: &str) -> TensorInfo {
        let twin = tied::stored_twin(self.base, name).and_then(|twin| self.base.info(twin));
        let with = self.replacements.get(name).map(|factor| factor.info());
        twin.or(with).cloned().unwrap_or_else(|| unreachable!("{name:?} was bound to a replacement or to a tied twin"))
    }

    fn change(&mut self, name: &str, info: &TensorInfo, begin: u64) -> Change<'a> {
        let of_base = |name: &str| {
            let shard = self.base.locate(name)?;
            let entry = self.base.shards().get(shard)?.file.entry(name)?;
            Some(Origin::Base { shard, begin: entry.begin, info: entry.info.clone() })
        };
        let added = self.base.locate(name).is_none();
        let origin = match self.replacements.remove(name) {
            Some(with) => Some(Origin::Adapter(with)),
            None => of_base(name).or_else(|| tied::stored_twin(self.base, name).and_then(of_base)),
        };
        let origin = origin.unwrap_or_else(|| unreachable!("{name:?} was bound to a tensor of the base or a replacement"));
        let contributions = self.updates.remove(name).unwrap_or_default();
        Change { name: name.to_owned(), info: info.clone(), begin, origin, contributions, added }
    }
}

/// Ranges to copy, neighbours joined.
struct Copies(Vec<CopyRange>);

impl Copies {
    fn push(&mut self, range: CopyRange) {
        match self.0.last_mut() {
            Some(last) if last.from + last.len == range.from && last.to + last.len == range.to => last.len += range.len,
            _ if range.len == 0 => {}
            _ => self.0.push(range),
        }
    }
}
