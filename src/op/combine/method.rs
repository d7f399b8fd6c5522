//! What becomes of the updates of several adapters. Δₜ is the update of adapter t, scale included, and wₜ its weight; every method works on
//! the updates, and none on A and B by themselves, because B·G and G⁻¹·A are the same adapter for any G.

use serde_json::{Value, json};

use super::named::MethodNumbers;
use super::peft::{PeftCombination, PeftKind};
use crate::error::{Error, Result};
use crate::kernel::fusion::{ByValue, Drops, Tally};
use crate::rules;

/// How updates are combined.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum CombineMethod {
    /// Σ wₜ·Δₜ (task arithmetic, Ilharco et al. 2022, section 2). Exact: the factors are put side by side, and the ranks add up.
    #[default]
    Linear,
    /// As [`Linear`](Self::Linear), and never with another rank.
    Cat,
    /// As [`Linear`](Self::Linear), with the best update of the highest rank that one of the adapters has, unless another one is asked for.
    Svd,
    /// From Δ₁ to Δ₂ on an arc (Shoemake 1985, section 3.3): `(sin((1-t)θ)·Δ₁ + sin(tθ)·Δ₂) / sin θ` with cos θ = ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖) and
    /// t = w₂ / (w₁ + w₂), for each target, times w₁ + w₂. Where the two are nearly parallel it is the sum. For two adapters.
    Slerp,
    /// Keeps the largest values of each wₜ·Δₜ, elects a sign for each value by their sum, and takes the mean of those that have it (TIES, Yadav et
    /// al. 2023, section 3). Divided by their count and not by their weights: two equal updates give one of them, and half of an update
    /// alone gives half.
    Ties {
        /// The share of values that is kept. The paper keeps 0.2.
        density: f64,
    },
    /// The sum of the largest values of each wₜ·Δₜ (PEFT's `magnitude_prune`, on the update).
    MagnitudePrune {
        /// The share of values that is kept.
        density: f64,
    },
    /// The sum of what chance leaves of each wₜ·Δₜ, divided by the density (DARE, Yu et al. 2023, section 3.2).
    DareLinear {
        /// The probability with which a value is kept.
        density: f64,
        /// Of the chance.
        seed: u64,
    },
    /// As [`DareLinear`](Self::DareLinear), with signs elected and means taken as by [`Ties`](Self::Ties).
    DareTies {
        /// The probability with which a value is kept.
        density: f64,
        /// Of the chance.
        seed: u64,
    },
    /// Chance keeps large values of each row of wₜ·Δₜ more often than small ones; then as [`DareTies`](Self::DareTies) (DELLA, Deep et al. 2024,
    /// section 3).
    Della {
        /// The mean probability with which a value is kept.
        density: f64,
        /// By how much the probabilities of the largest and the smallest value of a row differ.
        epsilon: f64,
        /// Of the chance.
        seed: u64,
    },
    /// The sum of the wₜ·Δₜ without their largest and their smallest values (Model Breadcrumbs, Davari and Belilovsky 2023, section 3).
    Breadcrumbs {
        /// The share of values that is kept.
        density: f64,
        /// The share of the largest values, which are dropped; less where the density leaves less.
        outliers: f64,
    },
    /// Concatenates the updates, decomposes `[Δ₁ … Δₙ] = U·S·[V₁ … Vₙ]ᵀ`, merges the Vₜ by TIES, and takes U·S·Vᵀ (KnOTS, Stoica et al.
    /// 2024, section 4).
    Knots {
        /// The share of each Vₜ that is kept; weights are in the Δₜ. 1 with equal signs gives the mean.
        density: f64,
    },
    /// Projects on the spaces that all B, and all A, span together, Mₜ = Uᵀ·Δₜ·V, merges these by TIES, and projects back (Core Space, Panariello
    /// et al. 2025, section 3).
    CoreSpace {
        /// The share of each Mₜ that is kept.
        density: f64,
    },
    /// Puts the singular vectors of all wₜ·Δₜ side by side, makes them orthonormal, each side by its polar factor, and multiplies with the
    /// singular values (TSV-M, Gargiulo et al. 2024, section 3.3).
    Tsv,
    /// The sum with each of its singular values replaced by their mean (Iso-C, Marczak et al. 2025, section 4.1). The mean is that of the
    /// values that are not zero: an update of low rank has no others.
    IsoC,
    /// As PEFT's `add_weighted_adapter` does it.
    Peft(PeftCombination),
}

impl CombineMethod {
    /// As the command line and the lineage spell it.
    pub fn name(self) -> &'static str {
        match self {
            CombineMethod::Linear => "linear",
            CombineMethod::Cat => "cat",
            CombineMethod::Svd => "svd",
            CombineMethod::Slerp => "slerp",
            CombineMethod::Ties { .. } => "ties",
            CombineMethod::MagnitudePrune { .. } => "magnitude-prune",
            CombineMethod::DareLinear { .. } => "dare-linear",
            CombineMethod::DareTies { .. } => "dare-ties",
            CombineMethod::Della { .. } => "della",
            CombineMethod::Breadcrumbs { .. } => "breadcrumbs",
            CombineMethod::Knots { .. } => "knots",
            CombineMethod::CoreSpace { .. } => "core-space",
            CombineMethod::Tsv => "tsv",
            CombineMethod::IsoC => "iso-c",
            CombineMethod::Peft(peft) => peft.kind.name(),
        }
    }

    /// Does it look at single values of the updates, so that its result has no low rank of its own?
    pub(in super::super) fn is_by_value(self) -> bool {
        match self {
            CombineMethod::Peft(peft) => peft.kind.is_by_value(),
            method => method.by_value() != ByValue { drops: Drops::Nothing, tally: Tally::Sum },
        }
    }

    /// What it does with single values; of other methods the sum of all.
    pub(in super::super) fn by_value(self) -> ByValue {
        let (drops, tally) = match self {
            CombineMethod::Ties { density } => (Drops::Small { density }, Tally::Elected),
            CombineMethod::MagnitudePrune { density } => (Drops::Small { density }, Tally::Sum),
            CombineMethod::DareLinear { density, seed } => (Drops::ByChance { density, seed }, Tally::Sum),
            CombineMethod::DareTies { density, seed } => (Drops::ByChance { density, seed }, Tally::Elected),
            CombineMethod::Della { density, epsilon, seed } => (Drops::ByRank { density, epsilon, seed }, Tally::Elected),
            CombineMethod::Breadcrumbs { density, outliers } => (Drops::SmallAndLarge { density, outliers }, Tally::Sum),
            CombineMethod::Peft(peft) => return peft.by_value(),
            CombineMethod::Linear
            | CombineMethod::Cat
            | CombineMethod::Svd
            | CombineMethod::Slerp
            | CombineMethod::Knots { .. }
            | CombineMethod::CoreSpace { .. }
            | CombineMethod::Tsv
            | CombineMethod::IsoC => (Drops::Nothing, Tally::Sum),
        };
        ByValue { drops, tally }
    }

    /// The numbers that it takes, by name.
    pub(super) fn numbers(self) -> Vec<(&'static str, f64)> {
        match self {
            CombineMethod::Ties { density }
            | CombineMethod::MagnitudePrune { density }
            | CombineMethod::Knots { density }
            | CombineMethod::CoreSpace { density }
            | CombineMethod::DareLinear { density, .. }
            | CombineMethod::DareTies { density, .. } => vec![("density", density)],
            CombineMethod::Peft(peft) if !peft.kind.takes_density() => Vec::new(),
            CombineMethod::Peft(peft) => vec![("density", peft.density)],
            CombineMethod::Della { density, epsilon, .. } => vec![("density", density), ("epsilon", epsilon)],
            CombineMethod::Breadcrumbs { density, outliers } => vec![("density", density), ("outliers", outliers)],
            CombineMethod::Linear
            | CombineMethod::Cat
            | CombineMethod::Svd
            | CombineMethod::Slerp
            | CombineMethod::Tsv
            | CombineMethod::IsoC => Vec::new(),
        }
    }

    /// The seed of its chance, if it leaves something to chance.
    pub fn seed(self) -> Option<u64> {
        match self {
            CombineMethod::DareLinear { seed, .. } | CombineMethod::DareTies { seed, .. } | CombineMethod::Della { seed, .. } => {
                Some(seed)
            }
            CombineMethod::Peft(peft) => peft.kind.takes_seed().then_some(peft.seed),
            _ => None,
        }
    }

    /// Its numbers, all given.
    pub(super) fn given(self) -> MethodNumbers {
        let number = |wanted: &str| self.numbers().iter().find(|(name, _)| *name == wanted).map(|(_, number)| *number);
        MethodNumbers {
            density: number("density"),
            epsilon: number("epsilon"),
            outliers: number("outliers"),
            seed: self.seed(),
            majority: match self {
                CombineMethod::Peft(peft) => peft.kind.takes_majority().then_some(peft.majority),
                _ => None,
            },
        }
    }

    /// As it stands in a lineage.
    pub(in super::super) fn described(self) -> Value {
        let mut value = serde_json::Map::new();
        self.numbers().into_iter().for_each(|(name, number)| drop(value.insert(name.to_owned(), json!(number))));
        value.insert("name".to_owned(), json!(self.name()));
        self.seed().into_iter().for_each(|seed| drop(value.insert("seed".to_owned(), json!(seed))));
        if let CombineMethod::Peft(peft) = self {
            value.insert("majority_sign".to_owned(), json!(peft.majority.name()));
        }
        value.sort_keys();
        Value::Object(value)
    }

    /// Is what it makes of a single update with weight 1 that update?
    pub(super) fn keeps_single_updates(self) -> bool {
        match self {
            CombineMethod::Linear | CombineMethod::Cat | CombineMethod::Svd | CombineMethod::Slerp => true,
            CombineMethod::Peft(peft) => matches!(peft.kind, PeftKind::Linear | PeftKind::Cat | PeftKind::Svd),
            _ => false,
        }
    }

    /// # Errors
    /// `U-001` for numbers that mean nothing.
    pub(in super::super) fn check(self) -> Result<()> {
        let refuse = |message: String| Err(Error::new(rules::ARGUMENT, message));
        for (name, number) in self.numbers() {
            let is_share = if name == "density" { number > 0.0 && number <= 1.0 } else { (0.0..1.0).contains(&number) };
            if !is_share {
                let least = if name == "density" { "above 0 and at most 1" } else { "0 or more and below 1" };
                return refuse(format!("the {name} is {number}, and has to be {least}"));
            }
        }
        if let CombineMethod::Della { density, epsilon, .. } = self
            && (density - epsilon / 2.0 <= 0.0 || density + epsilon / 2.0 > 1.0)
        {
            let (low, high) = (density - epsilon / 2.0, density + epsilon / 2.0);
            return refuse(format!("with density {density} and epsilon {epsilon} probabilities are from {low} to {high}"));
        }
        Ok(())
    }
}
