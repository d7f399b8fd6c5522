//! The spectrum of an adapter: part of the report of `inspect --spectrum`.

use serde::Serialize;

/// The singular values of every update, and what they say.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SpectrumReport {
    /// The low-rank updates, sorted by tensor; of a stack one for each part that is not zero.
    pub updates: Vec<UpdateSpectrum>,
    /// Updates that are zero: never trained, or trained to nothing.
    pub dead: Vec<String>,
    /// ‖ΔW‖ (Frobenius) of all updates together.
    pub norm: f64,
    /// Ranks that keep 90 %, 99 % and 99.9 % of the square of every update, and how many parameters the factors would have then.
    pub smaller: Vec<Smaller>,
}

/// The singular values of one update.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct UpdateSpectrum {
    /// The base tensor.
    pub tensor: String,
    /// Which part of a stack of experts it is.
    pub expert: Option<u64>,
    /// The rank of the factors.
    pub rank: u64,
    /// Singular values of scale·B·A that are not zero, largest first.
    pub singular_values: Vec<f64>,
    /// ‖ΔW‖ (Frobenius).
    pub norm: f64,
    /// exp of the entropy of the values' shares of their sum (Roy and Vetterli 2007): how many components count.
    pub effective_rank: f64,
    /// ‖ΔW‖² / σ₁²: how many components as large as the first one would have the norm.
    pub stable_rank: f64,
    /// The smallest ranks that keep 90 % and 99 % of ‖ΔW‖².
    pub energy: EnergyRanks,
    /// ‖ΔW‖ / ‖W‖; `None` without a base.
    pub relative: Option<f64>,
}

/// The smallest ranks that keep a share of ‖ΔW‖².
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct EnergyRanks {
    /// 90 %.
    pub keeps_90: u64,
    /// 99 %.
    pub keeps_99: u64,
}

/// What an adapter would be at smaller ranks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Smaller {
    /// The share of the square of every update that is kept.
    pub energy: f64,
    /// The highest rank.
    pub highest_rank: u64,
    /// Values in the factors.
    pub parameters: u64,
}
