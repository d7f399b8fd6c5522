//! The unmerged update of a layer, `y += (x·Aᵀ)·Bᵀ`, in f32: two products that are thin in the rank. The products themselves are faer's; what
//! is here is how rows are shared among threads, in blocks of a fixed size, so that no result depends on the number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows that one thread takes at a time: the intermediate `(64, rank)` stays in the first-level cache.
const ROWS: usize = 64;

/// Adds `(x·Aᵀ)·Bᵀ` to `y`. x is `(n, inner)`, A `(rank, inner)`, B `(out, rank)`, y `(n, out)`, all row-major.
///
/// # Panics
/// If the slices are not as long as the shapes say.
pub(crate) fn add_thin(x: &[f32], a: &[f32], b: &[f32], y: &mut [f32], (inner, rank, out): (usize, usize, usize)) {
    if x.is_empty() || rank == 0 || inner == 0 || out == 0 {
        return;
    }
    let a = MatRef::from_row_major_slice(a, rank, inner);
    let b = MatRef::from_row_major_slice(b, out, rank);
    let one = |(x, y): (&[f32], &mut [f32])| {
        let n = x.len() / inner;
        let mut between = vec![0.0_f32; n * rank];
        let x = MatRef::from_row_major_slice(x, n, inner);
        let mut u = MatMut::from_row_major_slice_mut(&mut between, n, rank);
        matmul(u.as_mut(), Accum::Replace, x, a.transpose(), 1.0, Par::Seq);
        let y = MatMut::from_row_major_slice_mut(y, n, out);
        matmul(y, Accum::Add, u.as_ref(), b.transpose(), 1.0, Par::Seq);
    };
    if x.len() <= ROWS * inner {
        return one((x, y));
    }
    x.par_chunks(ROWS * inner).zip(y.par_chunks_mut(ROWS * out)).for_each(one);
}
