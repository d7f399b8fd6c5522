//! What becomes of the updates of several adapters. Δₜ is the update of adapter t, scale included, and wₜ its weight; every method works on
//! the updates, and none on A and B by themselves, because B·G and G⁻¹·A are the same adapter for any G.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::rules;

/// How updates are combined.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum CombineMethod {
    /// Σ wₜ·Δₜ (task arithmetic, Ilharco et al. 2022, section 2). Exact: the factors are put side by side, and the ranks add up.
    Linear,
    /// As [`Linear`](Self::Linear), and never with another rank.
    Cat,
    /// As [`Linear`](Self::Linear), with the best update of the highest rank that one of the adapters has, unless another one is asked for.
    Svd,
    /// From Δ₁ to Δ₂ on an arc (Shoemake 1985, section 3.3): `(sin((1-t)θ)·Δ₁ + sin(tθ)·Δ₂) / sin θ` with cos θ = ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖) and
    /// t = w₂ / (w₁ + w₂), for each target, times w₁ + w₂. Where the two are nearly parallel it is the sum. For two adapters.
    Slerp,
    /// Concatenates the updates, decomposes `[Δ₁ … Δₙ] = U·S·[V₁ … Vₙ]ᵀ`, merges the Vₜ by TIES, and takes U·S·Vᵀ (KnOTS, Stoica et al.
    /// 2024, section 4).
    Knots {
        /// The share of each wₜ·Vₜ that is kept. 1 with equal signs gives the mean.
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
}

impl CombineMethod {
    /// As the command line and the lineage spell it.
    pub fn name(self) -> &'static str {
        match self {
            CombineMethod::Linear => "linear",
            CombineMethod::Cat => "cat",
            CombineMethod::Svd => "svd",
            CombineMethod::Slerp => "slerp",
            CombineMethod::Knots { .. } => "knots",
            CombineMethod::CoreSpace { .. } => "core-space",
            CombineMethod::Tsv => "tsv",
            CombineMethod::IsoC => "iso-c",
        }
    }

    /// As it stands in a lineage.
    pub(super) fn described(self) -> Value {
        match self {
            CombineMethod::Knots { density } | CombineMethod::CoreSpace { density } => {
                json!({ "density": density, "name": self.name() })
            }
            _ => json!({ "name": self.name() }),
        }
    }

    /// # Errors
    /// `U-001` for numbers that mean nothing.
    pub(super) fn check(self) -> Result<()> {
        match self {
            CombineMethod::Knots { density } | CombineMethod::CoreSpace { density } if !(density > 0.0 && density <= 1.0) => {
                let message = format!("the density is {density}, and has to be above 0 and at most 1");
                Err(Error::new(rules::ARGUMENT, message))
            }
            _ => Ok(()),
        }
    }
}
