//! The report of a merge, and of its dry run.

use serde::Serialize;

use super::Note;
use crate::plan::Renaming;

/// What a merge did, or would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct MergeReport {
    /// The base, as given.
    pub base: String,
    /// The output; for a dry run where it would go.
    pub output: String,
    /// True if nothing was written.
    pub dry_run: bool,
    /// True if the output is the base itself.
    pub in_place: bool,
    /// The undo log of a merge in place, if one was asked for.
    pub undo_log: Option<String>,
    /// The adapters, in the order in which they are added.
    pub adapters: Vec<AdapterUse>,
    /// The counts, which balance.
    pub balance: Balance,
    /// Every tensor that is not a copy, in the order of the files.
    pub tensors: Vec<TensorReport>,
    /// Adapter tensors that a flag left out.
    pub ignored: Vec<IgnoredReport>,
    /// Small files that were copied along.
    pub files_copied: Vec<String>,
    /// Files of the base folder that were left behind.
    pub files_left: Vec<FileLeft>,
    /// Bytes of weights written.
    pub bytes: u64,
    /// Bytes of memory that buffers take at most, all threads together.
    pub memory: u64,
    /// ⟨M − W, ΔW⟩ / ‖ΔW‖² over all updated tensors together: the share of the whole update that survived rounding; 1 is all of it.
    /// `None` in a dry run, or if the whole update is zero.
    pub survived: Option<f64>,
    /// `config.json` was changed to say that embeddings are not tied.
    pub untied: bool,
    /// How several adapters became one update: `linear` is their sum.
    pub method: &'static str,
    /// How values were rounded: `nearest`, `peft`, `peft-safe`, or `stochastic` with its seed.
    pub rounding: String,
    /// What it cost to give all floats one dtype. `None` in a dry run, or if that was not asked for.
    pub converted: Option<Converted>,
    /// The content root over all tensors of the output, if digests were asked for.
    pub content: Option<String>,
    /// Files that an interrupted run had completed, and that this one has kept.
    pub resumed: Vec<String>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// One merge for each of several adapters.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct MergeEachReport {
    /// The folder that holds the outputs.
    pub output: String,
    /// True if nothing was written.
    pub dry_run: bool,
    /// In the order of the adapters.
    pub merges: Vec<MergeReport>,
}

/// Tensors that were given another dtype than they have in the base, those that an adapter changes included.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Converted {
    /// The dtype that they have now.
    pub dtype: String,
    /// Tensors.
    pub tensors: u64,
    /// Values in them.
    pub values: u64,
    /// What rounding took of them: Frobenius norm of the loss, relative to that of the base's values.
    pub error: f64,
    /// Values that are zero now and were not before.
    pub zeroed: u64,
}

/// A file that was left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FileLeft {
    /// Its path inside the base folder.
    pub file: String,
    /// What it is taken for.
    pub reason: String,
}

/// One adapter of a merge.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct AdapterUse {
    /// The file of weights that was read.
    pub path: String,
    /// Its dialect.
    pub dialect: &'static str,
    /// The weight that it was given.
    pub weight: f64,
    /// The prefix that its names have and the one that the base has instead, if they differ.
    pub renaming: Option<Renaming>,
    /// What is known of the base: `verified` (the adapter names this base by digest), `unverified` (it names none by digest),
    /// `mismatch` (it names another one, and the user allowed that).
    pub base_identity: &'static str,
}

/// The balance: every adapter tensor is applied or ignored by a named flag, every tensor of the output is accounted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Balance {
    /// Tensors in all adapters: factors, bias updates, replacements.
    pub adapter_tensors: u64,
    /// Of these, applied.
    pub applied: u64,
    /// Of these, left out by a flag or by a weight of 0.
    pub ignored: u64,
    /// Tensors in the base.
    pub base_tensors: u64,
    /// Of these, copied byte for byte.
    pub copied: u64,
    /// Of these, updated or replaced.
    pub modified: u64,
    /// Of these, given another dtype and otherwise as they were.
    pub converted: u64,
    /// Tensors of the output that the base does not have.
    pub added: u64,
}

/// One tensor that is not a copy.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TensorReport {
    /// Its name in the base and in the output.
    pub tensor: String,
    /// The file of the output that holds it.
    pub file: String,
    /// Its dtype in the output.
    pub dtype: String,
    /// Its dtype in the base, if that is another one.
    pub converted_from: Option<String>,
    /// Its shape.
    pub shape: Vec<u64>,
    /// `update`, `rescale`, `replace`, `replace rows`, `replace+rows`, `replace+update`, `untie` (a copy under a second name), `convert`
    /// (the dtype alone changes), or `requantise` (the scales of a weight that is updated).
    pub action: &'static str,
    /// The base has no tensor of this name.
    pub added: bool,
    /// What was added to it.
    pub contributions: Vec<ContributionReport>,
    /// ‖ΔW‖ / ‖W‖, Frobenius norms. `None` in a dry run, and where W is zero.
    pub relative_norm: Option<f64>,
    /// ⟨M − W, ΔW⟩ / ‖ΔW‖²: the share of the update that survived rounding; 1 is all of it. `None` in a dry run, or without update.
    pub gain: Option<f64>,
    /// Values whose bits changed. `None` in a dry run.
    pub changed: Option<u64>,
    /// For an F32 or F64 tensor that was updated: values that would still differ from the base if the checkpoint were stored in a
    /// 16-bit format later. `None` in a dry run and for other tensors.
    pub changed_if_narrowed: Option<Narrowed>,
    /// Values in the tensor.
    pub elements: u64,
    /// Of a weight that was quantised again, and of its scales: rows and columns of a block.
    pub block: Option<[u64; 2]>,
}

/// Values that differ from the base once both are rounded to a 16-bit format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Narrowed {
    /// In BF16.
    pub bf16: u64,
    /// In F16.
    pub f16: u64,
}

/// What one adapter adds to one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ContributionReport {
    /// Index into [`MergeReport::adapters`].
    pub adapter: usize,
    /// Rank of the update.
    pub rank: u64,
    /// What multiplies B·A: weight times effective scale.
    pub scale: f64,
}

/// An adapter tensor that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct IgnoredReport {
    /// The tensor in the adapter's file.
    pub tensor: String,
    /// The flag that asked for it.
    pub flag: String,
}

impl MergeReport {
    /// Values in all updated tensors, and how many of them changed.
    pub fn changed(&self) -> (u64, u64) {
        let updated = self.tensors.iter().filter(|t| !t.contributions.is_empty());
        updated.fold((0, 0), |(all, changed), t| (all + t.elements, changed + t.changed.unwrap_or(0)))
    }

    /// How many values of the F32 and F64 tensors that were updated would differ in a 16-bit format, and how many values they have;
    /// `None` if there are none.
    pub fn changed_if_narrowed(&self) -> Option<(u64, Narrowed)> {
        let wide: Vec<_> = self.tensors.iter().filter_map(|t| Some((t.elements, t.changed_if_narrowed?))).collect();
        let sum = |all: (u64, Narrowed), (n, x): &(u64, Narrowed)| {
            (all.0 + n, Narrowed { bf16: all.1.bf16 + x.bf16, f16: all.1.f16 + x.f16 })
        };
        (!wide.is_empty()).then(|| wide.iter().fold((0, Narrowed::default()), sum))
    }
}
