//! Products of a wide matrix with a thin one, both ways: Y = D·X and Z += Dᵀ·Y for rows of D `(rows, cols)` that lie in the cache, with
//! X `(cols, width)`, Y `(rows, width)`, Z `(cols, width)`, all row-major. Called for the same rows one after the other, they are one step
//! of a Krylov iteration in one reading of D.
//!
//! A general product is made for panels that are thick both ways and reaches half of the machine's rate here. Here a register holds a
//! piece of a row of the thin matrix, and a value of D is spread over a register: each of the `width` columns is summed by itself, by
//! ascending index, so that the width of a register changes no bit. Sums are in f32, by blocks of [`COLS`] columns of D.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::super::vector::Vector;

/// Columns of the thin matrices come in multiples of so many.
pub(crate) const STEP: usize = 16;
/// Columns of D that are swept before the next ones, so that their part of X or Z stays in the first cache.
const COLS: usize = 256;

/// The rows of D that are being swept.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// `(rows, cols)`, row-major.
    pub(crate) d: &'a [f32],
    pub(crate) cols: usize,
    /// Columns of the thin matrices, a multiple of [`STEP`].
    pub(crate) width: usize,
}

impl Rows<'_> {
    pub(super) fn count(&self) -> usize {
        self.d.len() / self.cols.max(1)
    }

    /// Columns `at..end` of row `row`.
    #[inline(always)]
    fn part(&self, row: usize, at: usize, end: usize) -> &[f32] {
        &self.d[row * self.cols + at..row * self.cols + end]
    }

    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let cols = self.cols;
        (0..cols).step_by(COLS).map(move |at| (at, (at + COLS).min(cols)))
    }
}

/// Y = D·X, by definition, with a multiplication and an addition each: for machines without a fused one.
pub(super) fn forward_plain(rows: Rows<'_>, x: &[f32], y: &mut [f32]) {
    let width = rows.width;
    y.fill(0.0);
    let mut sums = vec![0.0; width];
    for (at, end) in rows.blocks() {
        for (row, y) in y.chunks_exact_mut(width).enumerate() {
            sums.fill(0.0);
            for (d, x) in rows.part(row, at, end).iter().zip(x[at * width..].chunks_exact(width)) {
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum += d * x;
                }
            }
            y.iter_mut().zip(&sums).for_each(|(y, sum)| *y += sum);
        }
    }
}

/// Z += Dᵀ·Y, likewise.
pub(super) fn backward_plain(rows: Rows<'_>, y: &[f32], z: &mut [f32]) {
    let width = rows.width;
    for (at, end) in rows.blocks() {
        for (row, y) in y.chunks_exact(width).enumerate() {
            for (d, z) in rows.part(row, at, end).iter().zip(z[at * width..].chunks_exact_mut(width)) {
                for (z, y) in z.iter_mut().zip(y) {
                    *z += d * y;
                }
            }
        }
    }
}

/// The next values in registers. Here and below there are no closures and few iterators: unless the compiler happens to inline them, they are
/// compiled for the portable instruction set.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn registers<V: Vector, const K: usize>(from: &[f32]) -> [V; K] {
    let mut registers = [V::splat(0.0); K];
    for k in 0..K {
        registers[k] = V::load(&from[k * V::LANES..]);
    }
    registers
}

/// Columns `at..end` of the rows from `row` on.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn parts<'a, const ROWS: usize>(rows: Rows<'a>, row: usize, at: usize, end: usize) -> [&'a [f32]; ROWS] {
    let mut parts = [&rows.d[..0]; ROWS];
    for (r, part) in parts.iter_mut().enumerate() {
        *part = &rows.d[(row + r) * rows.cols..][at..end];
        assert!(part.len() == end - at);
    }
    parts
}

/// [`forward_plain`] with fused operations, `ROWS` rows and `K` registers at a time.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) fn forward<V: Vector, const ROWS: usize, const K: usize>(rows: Rows<'_>, x: &[f32], y: &mut [f32]) {
    y.fill(0.0);
    for (at, end) in rows.blocks() {
        for panel in (0..rows.width).step_by(K * V::LANES) {
            let mut row = 0;
            while row + ROWS <= rows.count() {
                forward_block::<V, ROWS, K>(rows, row, (at, end), panel, x, y);
                row += ROWS;
            }
            while row + 4 <= rows.count() {
                forward_block::<V, 4, K>(rows, row, (at, end), panel, x, y);
                row += 4;
            }
            while row < rows.count() {
                forward_block::<V, 1, K>(rows, row, (at, end), panel, x, y);
                row += 1;
            }
        }
    }
}

#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn forward_block<V: Vector, const ROWS: usize, const K: usize>(
    rows: Rows<'_>,
    row: usize,
    (at, end): (usize, usize),
    panel: usize,
    x: &[f32],
    y: &mut [f32],
) {
    let width = rows.width;
    let d = parts::<ROWS>(rows, row, at, end);
    let mut sums = [[V::splat(0.0); K]; ROWS];
    for j in 0..end - at {
        let x = &x[(at + j) * width + panel..][..K * V::LANES];
        let x = registers::<V, K>(x);
        for r in 0..ROWS {
            let value = V::splat(d[r][j]);
            for k in 0..K {
                sums[r][k] = V::add_product(sums[r][k], value, x[k]);
            }
        }
    }
    for r in 0..ROWS {
        for k in 0..K {
            let y = &mut y[(row + r) * width + panel + k * V::LANES..];
            V::store(V::add(V::load(y), sums[r][k]), y);
        }
    }
}

/// [`backward_plain`] with fused operations, `ROWS` rows and `K` registers at a time.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) fn backward<V: Vector, const ROWS: usize, const K: usize>(rows: Rows<'_>, y: &[f32], z: &mut [f32]) {
    for (at, end) in rows.blocks() {
        for panel in (0..rows.width).step_by(K * V::LANES) {
            let mut row = 0;
            while row + ROWS <= rows.count() {
                backward_block::<V, ROWS, K>(rows, row, (at, end), panel, y, z);
                row += ROWS;
            }
            while row + 4 <= rows.count() {
                backward_block::<V, 4, K>(rows, row, (at, end), panel, y, z);
                row += 4;
            }
            while row < rows.count() {
                backward_block::<V, 1, K>(rows, row, (at, end), panel, y, z);
                row += 1;
            }
        }
    }
}

#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn backward_block<V: Vector, const ROWS: usize, const K: usize>(
    rows: Rows<'_>,
    row: usize,
    (at, end): (usize, usize),
    panel: usize,
    y: &[f32],
    z: &mut [f32],
) {
    let width = rows.width;
    let d = parts::<ROWS>(rows, row, at, end);
    let mut left = [[V::splat(0.0); K]; ROWS];
    for r in 0..ROWS {
        left[r] = registers(&y[(row + r) * width + panel..]);
    }
    for j in 0..end - at {
        let z = &mut z[(at + j) * width + panel..][..K * V::LANES];
        let mut sums = registers::<V, K>(z);
        for r in 0..ROWS {
            let value = V::splat(d[r][j]);
            for k in 0..K {
                sums[k] = V::add_product(sums[k], value, left[r][k]);
            }
        }
        for k in 0..K {
            V::store(sums[k], &mut z[k * V::LANES..]);
        }
    }
}
