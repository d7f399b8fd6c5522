//! How two updates of one matrix lie to each other: all of it from the small cores between the bases that both share, so that no matrix of
//! full size is formed. In f64.

use faer::Mat;

use super::super::lowrank::product;
use super::core::{Shared, Svd, Term};

/// Singular values below this share of ‖Δ₁‖ + ‖Δ₂‖ are the rounding of f64.
const RESOLUTION: f64 = 1e-13;

/// What is known of two updates Δ₁ and Δ₂ of one matrix.
pub(crate) struct Relation {
    /// ‖Δ₁‖² and ‖Δ₂‖².
    pub(crate) squares: [f64; 2],
    /// ⟨Δ₁, Δ₂⟩.
    pub(crate) inner: f64,
    /// Ranks, as far as singular values are not rounding.
    pub(crate) ranks: [usize; 2],
    /// (U₁ᵀ·U₂)², entry by entry: how much of an output direction of the one is one of the other.
    pub(crate) outputs: Mat<f64>,
    /// (V₁ᵀ·V₂)², likewise for inputs.
    pub(crate) inputs: Mat<f64>,
    /// Cosines of the principal angles between the spaces of outputs, largest first.
    pub(crate) output_cosines: Vec<f64>,
    /// And between those of inputs.
    pub(crate) input_cosines: Vec<f64>,
    /// ‖P·Δ₂·R‖² with P and R the projections on the spaces of Δ₁, and the other way round.
    pub(crate) within: [f64; 2],
    /// Singular values of Δ₁ + Δ₂, largest first.
    pub(crate) sum: Vec<f64>,
}

/// The relation of two updates; `None` if no decomposition was found.
pub(crate) fn relation(one: Term<'_>, two: Term<'_>) -> Option<Relation> {
    let shared = Shared::of(&[one, two]);
    let [first, second] = &shared.cores[..] else { return None };
    let (x, y) = (Svd::of(first.as_ref())?, Svd::of(second.as_ref())?);
    let outputs = product(x.u.transpose(), y.u.as_ref());
    let inputs = product(x.v.transpose(), y.v.as_ref());
    let within =
        |of: &Mat<f64>, by: &Svd| product(product(by.u.transpose(), of.as_ref()).as_ref(), by.v.as_ref()).squared_norm_l2();
    let size = first.norm_l2() + second.norm_l2();
    let sum = (first + second).singular_values().ok()?;
    let cosines = |matrix: &Mat<f64>| matrix.singular_values().ok().map(|all| all.into_iter().map(|x| x.min(1.0)).collect());
    let squared = |matrix: &Mat<f64>| Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)].powi(2));
    let entries = (0..first.ncols()).flat_map(|j| (0..first.nrows()).map(move |i| (i, j)));
    Some(Relation {
        squares: [first.squared_norm_l2(), second.squared_norm_l2()],
        inner: entries.map(|at| first[at] * second[at]).sum(),
        ranks: [x.s.len(), y.s.len()],
        output_cosines: cosines(&outputs)?,
        input_cosines: cosines(&inputs)?,
        outputs: squared(&outputs),
        inputs: squared(&inputs),
        within: [within(second, &x), within(first, &y)],
        sum: sum.into_iter().take_while(|value| *value > RESOLUTION * size).collect(),
    })
}
