//! Single tensors in memory, for programs that load weights themselves.

use std::ops::Range;

use crate::adapter::Target;
use crate::error::{Error, Result};
use crate::exec::{self, ExecOptions};
use crate::plan::Plan;
use crate::rules;

/// Rows `rows` of the update of a target, `scale · B·A` with shape `(rows.len(), in)`, row-major, in f64. Rows are outputs of the layer:
/// rows of B; of a stack of experts, those of the first expert. Magnitudes, which need the base, are not in it.
///
/// # Errors
/// `U-001` if the target has fewer rows, `A-008` if a factor is not finite, `E-001` if it cannot be read.
pub fn delta_rows(target: &Target, rows: Range<u64>) -> Result<Vec<f64>> {
    let (out, inner) = target.out_in();
    if rows.start > rows.end || rows.end > out {
        let message = format!("rows {}..{} of {:?}, which has {out}", rows.start, rows.end, target.tensor);
        return Err(Error::new(rules::ARGUMENT, message).tensor(&target.tensor));
    }
    let rank = target.scaling.rank;
    let (b, a) = exec::read_factors(target, 0, rows)?;
    let scale = target.scaling.effective();
    let (rank, inner) = (rank as usize, inner as usize);
    let mut delta = vec![0.0; b.len() / rank * inner];
    for (row, left) in delta.chunks_exact_mut(inner).zip(b.chunks_exact(rank)) {
        for (l, right) in left.iter().zip(a.chunks_exact(inner)) {
            row.iter_mut().zip(right).for_each(|(d, r)| *d += l * r);
        }
        row.iter_mut().for_each(|d| *d *= scale);
    }
    Ok(delta)
}

/// One merged tensor, in the base's dtype, little-endian, row-major: the bytes that [`merge`](fn@crate::merge) would write.
///
/// # Errors
/// `U-001` if the plan leaves the tensor as it is; what the values can tell as in [`merge`](fn@crate::merge).
pub fn merge_tensor(plan: &Plan<'_>, tensor: &str) -> Result<Vec<u8>> {
    let change = plan.changes().find(|change| change.name == tensor);
    let change =
        change.ok_or_else(|| Error::new(rules::ARGUMENT, format!("the merge does not change {tensor:?}")).tensor(tensor))?;
    exec::compute(plan, change, &ExecOptions::default()).map(|(bytes, _)| bytes)
}
