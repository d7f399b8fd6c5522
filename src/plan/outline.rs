//! From what changes to files: which tensors each output file holds, where they lie, and from where their bytes come. A file whose tensors
//! keep their places keeps its header, byte for byte; others get a new one, with the tensors in the order of the base.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::layout::{Change, CopyRange, Head, Keeps, Norms, Origin, OutShard, OutTensor, Patch};
use super::output::OutputOptions;
use super::quantised::{self, Quantised, Role};
use super::shape::{Contribution, Panel};
use super::tied;
use crate::adapter::Factor;
use crate::checkpoint::Checkpoint;
use crate::codec::safetensors::Layout;
use crate::tensor::{TensorInfo, TensorSource, is_plain_float};

pub(super) struct Outline<'a, 'o> {
    pub(super) base: &'a Checkpoint,
    pub(super) output: &'o OutputOptions,
    pub(super) updates: BTreeMap<String, Vec<Contribution>>,
    pub(super) replacements: BTreeMap<String, &'a Factor>,
    /// Those of them that are replaced under all names that they are tied to.
    pub(super) shared: BTreeSet<String>,
    pub(super) patches: BTreeMap<String, Vec<Patch<'a>>>,
    /// By weight.
    pub(super) quantised: BTreeMap<String, Quantised<'a>>,
    pub(super) changed: BTreeSet<String>,
}

/// A tensor of the output.
struct Item {
    name: String,
    info: TensorInfo,
    /// The base's file and the offset in it, if it is there.
    source: Option<(usize, u64)>,
    /// The dtype or the shape is not the base's.
    converted: bool,
}

impl<'a> Outline<'a, '_> {
    pub(super) fn shards(&self) -> Vec<OutShard<'a>> {
        let Some(most) = self.output.max_shard_bytes else {
            let files: Vec<_> = (0..self.base.shards().len()).map(|i| (i, self.items(i))).collect();
            return files.into_iter().map(|(i, items)| self.shard(&self.base.shards()[i].file_name, Some(i), items)).collect();
        };
        let mut files: Vec<(u64, Vec<Item>)> = Vec::new();
        for item in (0..self.base.shards().len()).flat_map(|i| self.items(i)) {
            let bytes = item.info.bytes();
            match files.last_mut().filter(|(sum, _)| sum.saturating_add(bytes) <= most) {
                Some((sum, items)) => {
                    *sum += bytes;
                    items.push(item);
                }
                None => files.push((bytes, vec![item])),
            }
        }
        let (stem, count) = (stem(self.base), files.len());
        let named = |i: usize| match count {
            1 => format!("{stem}.safetensors"),
            _ => format!("{stem}-{:05}-of-{count:05}.safetensors", i + 1),
        };
        files.into_iter().enumerate().map(|(i, (_, items))| self.shard(&named(i), None, items)).collect()
    }

    /// The tensors of one of the base's files, in the order in which they lie there, and those that are new beside them.
    fn items(&self, index: usize) -> Vec<Item> {
        let last = self.base.shards().len().saturating_sub(1);
        let header = self.base.shards()[index].file.header();
        let mut entries: Vec<_> = header.entries.iter().collect();
        entries.sort_by_key(|entry| (entry.begin, entry.end));
        let mut items: Vec<Item> =
            entries.iter().map(|entry| self.item(&entry.name, &entry.info, Some((index, entry.begin)))).collect();
        // New tensors go to the file of the tensor that they were tied to, or to the last one.
        for name in self.changed.iter().filter(|name| self.base.locate(name).is_none()) {
            let home = tied::stored_twin(self.base, name).and_then(|twin| self.base.locate(twin)).unwrap_or(last);
            if home == index {
                items.push(self.item(name, &self.added_info(name), None));
            }
        }
        items
    }

    fn item(&self, name: &str, info: &TensorInfo, source: Option<(usize, u64)>) -> Item {
        let dtype = self.output.dtype.filter(|_| is_plain_float(info.dtype)).unwrap_or(info.dtype);
        // Bound to a replacement of another shape only where the vocabulary may be resized.
        let shape = self.replacements.get(name).map_or(&info.shape, |with| &with.info().shape).clone();
        let converted = dtype != info.dtype || shape != info.shape;
        Item { name: name.to_owned(), info: TensorInfo { dtype, shape }, source, converted }
    }

    /// A file of these tensors; `whole` is the base's file that they are all of, and whose header may do.
    fn shard(&self, file_name: &str, whole: Option<usize>, items: Vec<Item>) -> OutShard<'a> {
        let kept = whole
            .filter(|_| self.base.replication().is_empty())
            .filter(|_| items.iter().all(|item| item.source.is_some() && !item.converted));
        let (head, offsets, len) = match kept {
            Some(index) => {
                let offsets = items.iter().filter_map(|item| item.source).map(|(_, begin)| begin).collect();
                (Head::Kept(index), offsets, self.base.shards()[index].file.file_len())
            }
            None => {
                let of = whole.or_else(|| items.first().and_then(|item| item.source).map(|(shard, _)| shard)).unwrap_or_default();
                let all: Vec<(&str, &TensorInfo)> = items.iter().map(|item| (item.name.as_str(), &item.info)).collect();
                let layout = Layout::new(&self.base.shards()[of].file.header().metadata, &all);
                (Head::New(layout.head), layout.offsets, layout.file_len)
            }
        };
        let (mut changes, mut tensors) = (Vec::new(), Vec::new());
        for (item, begin) in items.into_iter().zip(offsets) {
            let changed = item.converted || item.source.is_none() || self.changed.contains(&item.name);
            if changed {
                changes.push(self.change(&item.name, &item.info, begin));
            }
            let from = item.source.filter(|_| !changed);
            tensors.push(OutTensor { name: item.name, info: item.info, begin, from });
        }
        OutShard { file_name: file_name.to_owned(), head, len, changes, tensors }
    }

    /// What replaces the tensor that an added one is tied to, if it replaces it under all of its names.
    fn shared_twin(&self, name: &str) -> Option<&&'a Factor> {
        let twin = tied::stored_twin(self.base, name).filter(|twin| self.shared.contains(*twin))?;
        self.replacements.get(twin)
    }

    fn added_info(&self, name: &str) -> TensorInfo {
        let twin = tied::stored_twin(self.base, name);
        let with = self.replacements.get(name).or_else(|| self.shared_twin(name)).map(|factor| factor.info());
        let shape =
            |info: &TensorInfo| TensorInfo { shape: with.map_or(&info.shape, |with| &with.shape).clone(), ..info.clone() };
        twin.and_then(|twin| self.base.info(twin))
            .map(shape)
            .or(with.cloned())
            .unwrap_or_else(|| unreachable!("{name:?} was bound to a replacement or to a tied twin"))
    }

    fn change(&self, name: &str, info: &TensorInfo, begin: u64) -> Change<'a> {
        let of_base = |name: &str| {
            let shard = self.base.locate(name)?;
            let entry = self.base.shards().get(shard)?.file.entry(name)?;
            Some(Origin::Base { shard, begin: entry.begin, info: entry.info.clone() })
        };
        let added = self.base.locate(name).is_none();
        let twin = || tied::stored_twin(self.base, name);
        let with = self.replacements.get(name).or_else(|| self.shared_twin(name));
        let origin = match with {
            Some(with) => Some(Origin::Adapter(with)),
            None => of_base(name).or_else(|| twin().and_then(of_base)),
        };
        let origin = origin.unwrap_or_else(|| unreachable!("{name:?} was bound to a tensor of the base or a replacement"));
        let contributions = self.updates.get(name).cloned().unwrap_or_default();
        let patches = self.patches.get(name).cloned().unwrap_or_default();
        let quantised = self.quantised.get(name).cloned().or_else(|| self.scales(name));
        let (name, info) = (name.to_owned(), info.clone());
        let is_weight = contributions.iter().any(|one| one.rank > 0 && !matches!(one.left, Panel::One));
        let mixing = self.output.mixing.clone().filter(|_| is_weight);
        let (norms, keeps) = (Norms::default(), Keeps::default());
        Change { name, info, begin, origin, contributions, added, patches, norms, mixing, keeps, quantised }
    }

    /// The scales of a quantised weight, if that is what the tensor is.
    fn scales(&self, name: &str) -> Option<Quantised<'a>> {
        let weight = quantised::weight_of(name)?;
        let how = self.quantised.get(weight).filter(|how| how.scales == name)?;
        // Where the codes lie in the output is of no matter here.
        let of = self.change(weight, self.base.info(weight)?, 0);
        Some(Quantised { role: Role::Scales(Arc::new(of)), ..how.clone() })
    }
}

/// What the names of the base's files begin with.
pub(super) fn stem(base: &Checkpoint) -> &str {
    let index = base.index().and_then(|index| index.file_name().strip_suffix(".safetensors.index.json"));
    let file = || base.shards().first().and_then(|shard| shard.file_name.strip_suffix(".safetensors"));
    index.or_else(file).filter(|stem| !stem.is_empty()).unwrap_or("model")
}

impl OutShard<'_> {
    /// Runs of bytes that are the same in base and output, neighbours joined. The header is one of them, if it is kept.
    pub(crate) fn copies(&self, base: &Checkpoint) -> Vec<CopyRange> {
        let mut ranges: Vec<CopyRange> = self.header(base).into_iter().collect();
        for next in self.tensors.iter().filter_map(OutTensor::copy) {
            match ranges.last_mut() {
                Some(last) if last.shard == next.shard && last.from + last.len == next.from && last.to + last.len == next.to => {
                    last.len += next.len;
                }
                _ if next.len == 0 => {}
                _ => ranges.push(next),
            }
        }
        ranges
    }

    /// The base's header, if it is kept.
    pub(crate) fn header(&self, base: &Checkpoint) -> Option<CopyRange> {
        match self.head {
            Head::Kept(shard) => Some(CopyRange { shard, from: 0, to: 0, len: base.shards()[shard].file.header().data_start }),
            Head::New(_) => None,
        }
    }

    /// Tensors that are copied byte for byte.
    pub(crate) fn copied(&self) -> u64 {
        self.tensors.iter().filter(|tensor| tensor.from.is_some()).count() as u64
    }
}

impl OutTensor {
    /// The bytes of the base that it is a copy of.
    pub(crate) fn copy(&self) -> Option<CopyRange> {
        self.from.map(|(shard, from)| CopyRange { shard, from, to: self.begin, len: self.info.bytes() })
    }
}
