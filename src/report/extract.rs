//! The report of `extract`.

use serde::Serialize;

use super::Note;

/// What was extracted, and what it is off by.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ExtractReport {
    /// The base; `None` if the weights themselves were factorised.
    pub base: Option<String>,
    /// The tuned checkpoint.
    pub tuned: String,
    /// As given.
    pub output: String,
    /// Dialect of the output.
    pub to: &'static str,
    /// Dtype of the factors.
    pub dtype: String,
    /// Seed of the random start.
    pub seed: u64,
    /// Weights that get factors, in the order of their names.
    pub targets: Vec<ExtractedTarget>,
    /// Weights that could get factors and do not.
    pub omitted: Vec<OmittedTarget>,
    /// Weights and other tensors that are the same in both checkpoints.
    pub unchanged: u64,
    /// Changed tensors that have no factors.
    pub rest: Vec<RestTensor>,
    /// Tensors of the base that the tuned checkpoint does not have.
    pub only_in_base: Vec<String>,
    /// Prefix of the tuned checkpoint's names that is another one in the base's; `None` if the names are the same.
    pub renamed: Option<(String, String)>,
    /// ‖D‖ (Frobenius) of all changes together.
    pub change: f64,
    /// ‖D - scale·B·A‖ / ‖D‖ over all targets together, as they are stored.
    pub error: f64,
    /// Estimate of how far the error is, before the factors are rounded, above the smallest that any factors of these ranks have, as a share
    /// of it. With statistics of the inputs: of the error of the outputs.
    pub excess: f64,
    /// The share of ‖D‖² over everything that changed that the output does not hold.
    pub lost: f64,
    /// Values in the factors.
    pub parameters: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Content root of the tensors written.
    pub content: String,
    /// What the output's dialect cannot express.
    pub losses: Vec<Note>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// One weight and its factors. A stack of experts is taken as one: norms are those of the whole, and the figures of a part are the worst of any.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ExtractedTarget {
    /// The base tensor.
    pub tensor: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The rank of the factors.
    pub rank: u64,
    /// ‖D‖ (Frobenius).
    pub norm: f64,
    /// ‖D‖ / ‖W‖; `None` without a base.
    pub relative: Option<f64>,
    /// ‖D - scale·B·A‖ / ‖D‖, as the factors are stored.
    pub error: f64,
    /// With activation statistics S: ‖(D - scale·B·A)·S‖ / ‖D·S‖, which was made small instead, and which `excess` is about.
    pub weighted_error: Option<f64>,
    /// Estimate of how far the error before rounding is above the smallest possible one at this rank, as a share of it.
    pub excess: f64,
    /// An upper bound of ‖D - scale·B·A‖₂, the largest singular value of what is left.
    pub spectral: f64,
    /// `krylov` or `exact`.
    pub method: &'static str,
    /// Krylov blocks.
    pub blocks: u64,
    /// The largest singular value that rounding to the file's dtype makes of itself; `None` unless ranks were chosen by it.
    pub noise: Option<f64>,
    /// The singular values of D that the factors hold; of a stack none.
    pub singular_values: Vec<f64>,
}

/// A weight that changed and gets no factors.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct OmittedTarget {
    /// The base tensor.
    pub tensor: String,
    /// `unrecoverable` if rounding has destroyed the difference, `noise` if nothing stands out of the noise of rounding, `budget` if the
    /// budget had no component for it.
    pub why: &'static str,
    /// ‖D‖.
    pub norm: f64,
    /// The share of the difference that survived rounding; `None` unless ranks were chosen by the noise.
    pub survived: Option<f64>,
}

/// A changed tensor without factors.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RestTensor {
    /// The base tensor.
    pub tensor: String,
    /// What it is.
    pub why: &'static str,
    /// ‖D‖; `None` if there is nothing to compare it with.
    pub norm: Option<f64>,
    /// The share of ‖D‖² over everything that changed; `None` likewise.
    pub share: Option<f64>,
    /// It is stored whole.
    pub stored: bool,
}
