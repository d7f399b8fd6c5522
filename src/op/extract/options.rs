//! How to extract.

use super::stats::ActStats;
use crate::error::{Error, Result};
use crate::exec::ExecOptions;
use crate::io::Overwrite;
use crate::limits::Limits;
use crate::op::ConvertTo;
use crate::op::rank::RankRule;
use crate::rules;
use crate::tensor::Dtype;

/// How the singular components are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Method {
    /// Block Krylov iteration; the exact decomposition where that does not pay or, up to 2²⁵ values, does not reach the tolerance (default).
    Auto,
    /// The whole singular value decomposition in f64, which holds a matrix several times.
    Exact,
}

/// Which factor takes the singular values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Split {
    /// Both take their square roots (default): factors of like size, neither of which leaves the range of 16 bits.
    Sqrt,
    /// B takes them, and the rows of A are orthonormal.
    B,
    /// A takes them, and the columns of B are orthonormal.
    A,
}

impl Method {
    /// For the lineage.
    pub(super) fn name(self) -> &'static str {
        match self {
            Method::Auto => "auto",
            Method::Exact => "exact",
        }
    }
}

impl Split {
    /// For the lineage.
    pub(in super::super) fn name(self) -> &'static str {
        match self {
            Split::Sqrt => "sqrt",
            Split::B => "b",
            Split::A => "a",
        }
    }
}

impl RestPolicy {
    /// For the lineage.
    pub(super) fn name(self) -> &'static str {
        match self {
            RestPolicy::SkipSmall => "skip-small",
            RestPolicy::Skip => "skip",
            RestPolicy::Store => "store",
            RestPolicy::Refuse => "error",
        }
    }
}

/// What becomes of changes that have no low rank: biases, norms, tied and resized weights, the output head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestPolicy {
    /// Left out while they are at most 1 % of the whole change (of its square) and no tensor is new; refused otherwise (default).
    SkipSmall,
    /// Left out, whatever they are.
    Skip,
    /// Stored whole, beside the factors.
    Store,
    /// Refused.
    Refuse,
}

/// How to extract.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ExtractOptions {
    /// How the rank of each target is chosen. Default: 16 for all.
    pub rank: RankRule,
    /// The highest rank that a rule may choose. Default 256.
    pub max_rank: u64,
    /// How the components are found.
    pub method: Method,
    /// Excess of the error over the smallest possible one that is looked for, as a share of it. Default 0.001.
    pub tolerance: f64,
    /// Which factor takes the singular values.
    pub split: Split,
    /// Dtype of the factors: F32 (default), BF16 or F16.
    pub dtype: Dtype,
    /// Seed of the random start. Default 0.
    pub seed: u64,
    /// What becomes of changes without factors; without a base there are none, and only the default is taken.
    pub rest: RestPolicy,
    /// What the adapter calls its base. Default: the path of the base as it was given.
    pub base_name: Option<String>,
    /// A regular expression: only tensors in whose names it matches get factors. Default: all that can have some, but for the output head,
    /// and without a base but for embeddings.
    pub targets: Option<String>,
    /// A regular expression: tensors in whose names it matches are left out. Default: none.
    pub exclude: Option<String>,
    /// Root mean squares of the inputs of layers: the error of their outputs is then made small instead of that of the weights. Default none.
    pub act_stats: Option<ActStats>,
    /// What to write.
    pub to: ConvertTo,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Threads and kernels.
    pub exec: ExecOptions,
    /// Bounds on input.
    pub limits: Limits,
}

impl Default for ExtractOptions {
    fn default() -> Self {
        ExtractOptions {
            rank: RankRule::Fixed(16),
            max_rank: 256,
            method: Method::Auto,
            tolerance: 1e-3,
            split: Split::Sqrt,
            dtype: Dtype::F32,
            seed: 0,
            rest: RestPolicy::SkipSmall,
            base_name: None,
            targets: None,
            exclude: None,
            act_stats: None,
            to: ConvertTo::Peft,
            overwrite: Overwrite::Refuse,
            exec: ExecOptions::default(),
            limits: Limits::default(),
        }
    }
}

impl ExtractOptions {
    /// Refuses what cannot be carried out.
    ///
    /// # Errors
    /// `U-001`.
    pub(super) fn check(&self) -> Result<()> {
        self.rank.check()?;
        let refuse = |message: String| Err(Error::new(rules::ARGUMENT, message));
        if !(self.tolerance > 0.0 && self.tolerance < 1.0) {
            return refuse(format!("the tolerance is {}, and has to be between 0 and 1", self.tolerance));
        }
        if !matches!(self.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return refuse(format!("factors are F32, BF16 or F16, and not {}", self.dtype));
        }
        if self.rank == RankRule::Auto && self.act_stats.is_some() {
            return refuse("the noise of rounding is that of weights, and not of outputs: no rank follows from both".to_owned());
        }
        if let RankRule::Fixed(rank) = self.rank
            && rank > self.limits.rank
        {
            return refuse(format!("rank {rank} is over the limit of {}", self.limits.rank));
        }
        if self.max_rank == 0 || self.max_rank > self.limits.rank {
            return refuse(format!("the highest rank is {}, and has to be from 1 to {}", self.max_rank, self.limits.rank));
        }
        Ok(())
    }
}
