//! The report of `compare`.

use serde::Serialize;

use super::Note;

/// How two adapters lie to each other.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CompareReport {
    /// The files of weights.
    pub adapters: [String; 2],
    /// In a sentence or two: what to expect of their sum.
    pub verdict: String,
    /// `disjoint`, `zero`, `same`, `redundant`, `aligned`, `unrelated`, `conflicting` or `opposite`, by the cosine: docs/json.md.
    pub relation: &'static str,
    /// Over all tensors that both update.
    pub together: Overlap,
    /// The same, of the first adapter and a random one with the ranks and the norms of the second. `None` if they share no tensor.
    pub control: Option<Overlap>,
    /// √E cos² of a random adapter: beyond three times this, a cosine is no chance.
    pub chance: f64,
    /// The error of the best update of a rank for Δ₁ + Δ₂, over all tensors that both update.
    pub truncation: Vec<Truncation>,
    /// The smallest rank for all tensors that leaves at most a tenth of the sum; 0 if they share no tensor.
    pub rank_10: u64,
    /// At most a hundredth.
    pub rank_1: u64,
    /// The tensors that both update, by name.
    pub targets: Vec<ComparedTarget>,
    /// Those that the first alone updates.
    pub only_first: Vec<String>,
    /// And the second.
    pub only_second: Vec<String>,
    /// Subspace similarity φ(i, j) of the first i output directions of the one and the first j of the other (Hu et al. 2021, section 7.2),
    /// in the mean over the tensors: a row for each i.
    pub output_similarity: Vec<Vec<f64>>,
    /// Of input directions.
    pub input_similarity: Vec<Vec<f64>>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// Figures of two updates, or of all of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Overlap {
    /// ‖Δ₁‖ and ‖Δ₂‖ (Frobenius).
    pub norms: [f64; 2],
    /// ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖).
    pub cosine: f64,
    /// The share of values, of those where neither is 0, in which the signs differ; by a sample.
    pub sign_conflict: f64,
    /// arccos(cosine)/π: what it would be if the values were normal.
    pub sign_conflict_normal: f64,
    /// ‖U₁ᵀU₂‖² / min(rank₁, rank₂): the share of the output directions that both have.
    pub output_overlap: f64,
    /// Of the input directions.
    pub input_overlap: f64,
    /// ‖P₁·Δ₂·R₁‖ / ‖Δ₂‖: the part of the second that lies in the spaces of the first; and the other way round.
    pub redundancy: [f64; 2],
}

/// One tensor that both update.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ComparedTarget {
    /// The base tensor.
    pub tensor: String,
    /// Ranks, as far as singular values are more than rounding; of a stack the highest.
    pub ranks: [u64; 2],
    /// Its figures.
    #[serde(flatten)]
    pub overlap: Overlap,
    /// The smallest principal angle between output spaces, in degrees; of a stack the smallest of all.
    pub output_angle: f64,
    /// Between input spaces.
    pub input_angle: f64,
    /// The smallest rank that leaves at most a tenth of Δ₁ + Δ₂.
    pub rank_10: u64,
    /// ‖Δ‖/‖W‖ of each, if a base was given.
    pub relative: Option<[f64; 2]>,
}

/// What a rank costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Truncation {
    /// The rank of every tensor, or less where it has less.
    pub rank: u64,
    /// ‖best − (Δ₁ + Δ₂)‖ / ‖Δ₁ + Δ₂‖.
    pub error: f64,
}
