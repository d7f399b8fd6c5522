//! The combinations that PEFT 0.21.2 has (`add_weighted_adapter` of `peft/tuners/lora/model.py`), by their names, and what each of them takes.

use crate::kernel::fusion::peft::Majority;
use crate::kernel::fusion::{ByValue, Drops, Tally};

/// A combination as PEFT makes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PeftCombination {
    /// PEFT's `combination_type`.
    pub kind: PeftKind,
    /// The share of values that is kept, for types that drop some.
    pub density: f64,
    /// PEFT's `majority_sign_method`, for types that elect signs.
    pub majority: MajoritySign,
    /// Of the chance, which in PEFT is that of torch.
    pub seed: u64,
}

/// PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeftKind {
    /// A = Σ ±√|wₜ·sₜ|·Aₜ and B = Σ √|wₜ·sₜ|·Bₜ.
    Linear,
    /// The sum, with the factors side by side.
    Cat,
    /// The sum, with the best update of the highest rank.
    Svd,
    /// TIES of the A, and of the B.
    Ties,
    /// TIES of the updates, with the best update of the highest rank.
    TiesSvd,
    /// DARE of the A, and of the B.
    DareLinear,
    /// DARE and TIES of the A, and of the B.
    DareTies,
    /// DARE of the updates.
    DareLinearSvd,
    /// DARE and TIES of the updates.
    DareTiesSvd,
    /// The largest values of the A, and of the B.
    MagnitudePrune,
    /// The largest values of the updates.
    MagnitudePruneSvd,
}

/// PEFT's `majority_sign_method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sign of the sum.
    Total,
    /// The sign that most have.
    Frequency,
}

impl MajoritySign {
    pub(super) fn name(self) -> &'static str {
        match self {
            MajoritySign::Total => "total",
            MajoritySign::Frequency => "frequency",
        }
    }

    pub(super) fn kernel(self) -> Majority {
        match self {
            MajoritySign::Total => Majority::Total,
            MajoritySign::Frequency => Majority::Frequency,
        }
    }
}

impl PeftKind {
    /// All eleven.
    pub const ALL: [PeftKind; 11] = [
        PeftKind::Linear,
        PeftKind::Cat,
        PeftKind::Svd,
        PeftKind::Ties,
        PeftKind::TiesSvd,
        PeftKind::DareLinear,
        PeftKind::DareTies,
        PeftKind::DareLinearSvd,
        PeftKind::DareTiesSvd,
        PeftKind::MagnitudePrune,
        PeftKind::MagnitudePruneSvd,
    ];

    /// PEFT's name of it, behind `peft:`.
    pub fn name(self) -> &'static str {
        match self {
            PeftKind::Linear => "peft:linear",
            PeftKind::Cat => "peft:cat",
            PeftKind::Svd => "peft:svd",
            PeftKind::Ties => "peft:ties",
            PeftKind::TiesSvd => "peft:ties_svd",
            PeftKind::DareLinear => "peft:dare_linear",
            PeftKind::DareTies => "peft:dare_ties",
            PeftKind::DareLinearSvd => "peft:dare_linear_svd",
            PeftKind::DareTiesSvd => "peft:dare_ties_svd",
            PeftKind::MagnitudePrune => "peft:magnitude_prune",
            PeftKind::MagnitudePruneSvd => "peft:magnitude_prune_svd",
        }
    }

    /// Drops values, as many as a density says.
    pub fn takes_density(self) -> bool {
        !matches!(self, PeftKind::Linear | PeftKind::Cat | PeftKind::Svd)
    }

    /// Leaves something to chance.
    pub fn takes_seed(self) -> bool {
        matches!(self, PeftKind::DareLinear | PeftKind::DareTies | PeftKind::DareLinearSvd | PeftKind::DareTiesSvd)
    }

    /// Elects signs.
    pub fn takes_majority(self) -> bool {
        matches!(self, PeftKind::Ties | PeftKind::TiesSvd | PeftKind::DareTies | PeftKind::DareTiesSvd)
    }

    /// Works on single values of the updates, and then takes the best of a rank.
    pub(super) fn is_by_value(self) -> bool {
        matches!(self, PeftKind::TiesSvd | PeftKind::DareLinearSvd | PeftKind::DareTiesSvd | PeftKind::MagnitudePruneSvd)
    }

    /// Works on A and B by themselves.
    pub(super) fn is_by_factor(self) -> bool {
        !self.is_by_value() && !matches!(self, PeftKind::Cat | PeftKind::Svd)
    }
}

impl PeftCombination {
    /// What it does with single values.
    pub(super) fn by_value(self) -> ByValue {
        let (density, seed) = (self.density, self.seed);
        let drops = match self.kind {
            kind if kind.takes_seed() => Drops::ByChance { density, seed },
            kind if kind.takes_density() => Drops::Small { density },
            _ => Drops::Nothing,
        };
        let tally = match self.majority {
            _ if !self.kind.takes_majority() => Tally::Sum,
            MajoritySign::Total => Tally::Elected,
            MajoritySign::Frequency => Tally::MostSigns,
        };
        ByValue { drops, tally }
    }
}
