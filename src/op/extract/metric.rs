//! One matrix whose error is wanted small in what it makes of a layer's inputs, and not in its values: ‖(D - B·A)·F‖ with E[x·xᵀ] = F·Fᵀ. The
//! components of D·F give B, as in SVD-LLM (Wang et al. 2024, section 3.1); A is fitted to it, for which F needs no inverse.

use super::decompose::{Components, Decomposed, Matrix, Task, decompose};
use super::options::Split;
use crate::error::{Error, Result};
use crate::exec::{Difference, Metric, Weighted};
use crate::kernel::lowrank::{fitted_to, outer};
use crate::rules;

/// Decomposes the difference in a metric of its inputs, if there is one.
///
/// # Errors
/// As [`decompose()`]; `E-012` too if the factors are nearly dependent.
pub(super) fn decompose_in(metric: Option<&Metric>, d: &Difference<'_>, task: &Task<'_>) -> Result<Decomposed> {
    let Some(metric) = metric else { return decompose(d, task) };
    let weighted = Weighted { d, metric, inputs_are_rows: task.is_transposed };
    let width = task.width(d.rows.min(d.cols));
    let seen = d.first(width, task.key, false)?;
    let whole = weighted.squares(None)?.weighted;
    let nothing = Decomposed::nothing(seen.norm_squared, seen.base_squared);
    if whole == 0.0 {
        return Ok(nothing);
    }
    let start = weighted.start(seen.start, width);
    let matrix = Matrix { sweeps: &weighted, dense: &|| weighted.dense(), tuned: d.tuned, norm_squared: whole, edge: 0.0 };
    let Components { found, rank, method } = matrix.components(&start, task)?;
    let nothing = Decomposed { values: found.values().to_vec(), excess: found.excess, method, blocks: found.blocks, ..nothing };
    if rank == 0 {
        return Ok(nothing);
    }
    let share = match task.options.split {
        Split::Sqrt => 0.5,
        Split::B => 1.0,
        Split::A => 0.0,
    };
    let b = outer(&found, rank, task.is_transposed, share, task.float());
    let projected = d.product(&b, !task.is_transposed)?.transpose().to_owned();
    let dependent = || {
        let message = format!("the factors of {:?} are dependent after they are rounded", d.tuned.name);
        Error::new(rules::DECOMPOSED, message).tensor(d.tuned.name).help("ask for a lower rank, or for --dtype f32")
    };
    let a = fitted_to(&b, &projected, task.float()).ok_or_else(dependent)?;
    let (left, right) = if task.is_transposed { (a.transpose().to_owned(), b.transpose().to_owned()) } else { (b, a) };
    task.check_finite(d, &[&left, &right])?;
    let error = weighted.squares(Some((&left, &right)))?;
    let spectral = error.plain.sqrt();
    let relative = Some((error.weighted / whole).sqrt());
    Ok(Decomposed { rank, factors: Some((left, right)), error_squared: error.plain, spectral, weighted: relative, ..nothing })
}
