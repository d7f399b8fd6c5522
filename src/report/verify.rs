//! The report of `verify`: whether a checkpoint is a base with adapters merged in, and what is known of every tensor.

use serde::Serialize;

use super::{AdapterUse, Note};

/// What a tensor, or the whole checkpoint, turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Verdict {
    /// Every value is the correctly rounded one.
    Merged,
    /// The update is there; some values are rounded otherwise, by no more than another order or another single precision explains.
    MergedOtherRounding,
    /// The update is there, computed in a precision well below that of the result.
    MergedLowerPrecision,
    /// Every value is the correctly rounded one, but the dtype is so coarse that part of the update is lost.
    RoundingLost,
    /// The tensor is the base's.
    NotMerged,
    /// The update was added twice, one merge after the other.
    MergedTwice,
    /// The update was subtracted.
    Subtracted,
    /// B·A was added without the adapter's scale.
    ScaleIgnored,
    /// Alpha was taken for the scale, without dividing by the rank.
    AlphaNotDivided,
    /// The weight that the adapter was given was left out.
    WeightIgnored,
    /// An rsLoRA adapter was scaled by alpha/rank instead of alpha/sqrt(rank).
    RsloraMissing,
    /// A standard adapter was scaled by alpha/sqrt(rank) instead of alpha/rank.
    RsloraApplied,
    /// The update was added with another factor.
    OtherScale,
    /// The update was added transposed.
    Transposed,
    /// The update of another tensor was added.
    OtherTensor,
    /// The parts of the other adapters are there, that of one is not.
    AdapterMissing,
    /// None of these.
    Different,
    /// The changed tensors are as they should be, but others are not those of the base.
    OthersDiffer,
    /// The tensors are not the ones that a merge has: some are missing, new or of another shape.
    OtherTensors,
    /// Several of these: see the tensors.
    Mixed,
}

impl Verdict {
    /// True if this is what a merge gives.
    pub fn is_merged(self) -> bool {
        use Verdict::{Merged, MergedLowerPrecision, MergedOtherRounding, RoundingLost};
        matches!(self, Merged | MergedOtherRounding | MergedLowerPrecision | RoundingLost)
    }
}

/// Whether a checkpoint is the base with the adapters merged in.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// The checkpoint that was looked at, as given.
    pub merged: String,
    /// The base, as given.
    pub base: String,
    /// The adapters, in the order in which they are added.
    pub adapters: Vec<AdapterUse>,
    /// What it turned out to be.
    pub verdict: Verdict,
    /// The answer: true if this is what a merge gives.
    pub is_merged: bool,
    /// The answer in words.
    pub says: String,
    /// Every tensor that the adapters change and that can be compared, in the order of the base.
    pub tensors: Vec<VerifiedTensor>,
    /// The tensors that no adapter changes.
    pub untouched: Untouched,
    /// Tensors that are missing, new, or of another dtype or shape.
    pub structure: Vec<StructureFinding>,
    /// Values of changed tensors that were compared.
    pub values: u64,
    /// Of these, correctly rounded ones.
    pub correct: u64,
    /// All of them by their distance from the correctly rounded value.
    pub ulps: Ulps,
    /// The share of each tensor that was asked for; `None` if everything was read.
    pub sample: Option<f64>,
    /// Bytes of weights in the merged checkpoint.
    pub bytes: u64,
    /// Bytes of it that were compared.
    pub bytes_compared: u64,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// Values by their distance from the correctly rounded one, in units in the last place of the merged dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Ulps {
    /// The correctly rounded value itself.
    pub none: u64,
    /// A neighbour of it.
    pub one: u64,
    /// Two steps away.
    pub two: u64,
    /// Three or four.
    pub to_4: u64,
    /// Five to sixteen.
    pub to_16: u64,
    /// More, or not finite.
    pub more: u64,
}

/// A tensor that the adapters change.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct VerifiedTensor {
    /// Its name in both checkpoints.
    pub tensor: String,
    /// Its dtype in the merged checkpoint.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// What it turned out to be.
    pub verdict: Verdict,
    /// The verdict in words.
    pub says: String,
    /// The other tensor whose update was added, for [`Verdict::OtherTensor`].
    pub other: Option<String>,
    /// Values that were compared.
    pub values: u64,
    /// ‖ΔW‖ / ‖W‖ over them, Frobenius norms.
    pub relative_norm: Option<f64>,
    /// ⟨M − W, ΔW⟩ / ‖ΔW‖²: how many times the update was added. `None` without update.
    pub gain: Option<f64>,
    /// The standard error of `gain`, from what is not explained by it.
    pub gain_error: Option<f64>,
    /// The gain that the correctly rounded result has; below 1 where rounding loses part of the update.
    pub gain_expected: Option<f64>,
    /// ‖M − W − gain · ΔW‖ / ‖W‖: what the update does not explain.
    pub residual: Option<f64>,
    /// The same relative to ‖ΔW‖.
    pub residual_of_update: Option<f64>,
    /// The values by their distance from the correctly rounded one.
    pub ulps: Ulps,
    /// Values of the merged tensor that are not finite.
    pub nonfinite: u64,
}

/// A checkpoint whose tensors are those that were written, by the digests that the merge recorded.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DigestReport {
    /// The checkpoint, as given.
    pub path: String,
    /// The content root over its tensors.
    pub content: String,
    /// Tensors, all of them as recorded.
    pub tensors: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// The tensors that no adapter changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Untouched {
    /// How many were compared.
    pub tensors: u64,
    /// Of these, how many are the base's, as far as was read.
    pub same: u64,
    /// The others.
    pub differ: Vec<DifferingTensor>,
}

/// A tensor that no adapter changes and that is not the base's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DifferingTensor {
    /// Its name.
    pub tensor: String,
    /// Offset of the first byte that differs, from the start of the merged tensor.
    pub offset: u64,
    /// The indices of the value that holds this byte.
    pub index: Vec<u64>,
    /// Bytes that differ; values where the dtypes differ.
    pub differing: u64,
}

/// A tensor that is not what the plan of a merge says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StructureFinding {
    /// Its name.
    pub tensor: String,
    /// `missing`, `extra`, `shape` or `dtype`. A plain float dtype in place of another is no fault: values are then compared with the
    /// correctly rounded ones.
    pub finding: &'static str,
    /// What a merge has, or `None` if it has no such tensor.
    pub expected: Option<String>,
    /// What is there, or `None` if there is no such tensor.
    pub found: Option<String>,
    /// True if this alone makes the answer "no".
    pub fault: bool,
}
