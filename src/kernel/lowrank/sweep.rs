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

/// Values of a row in [`Packed`]: an odd number of cache lines, so that rows lie in different sets of the first cache.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const PITCH: usize = COLS + 16;

/// Some columns of a few rows of D, copied from rows that lie a power of two apart, as they often do: they would push each other out of the
/// first cache.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
type Packed<const ROWS: usize> = [[f32; PITCH]; ROWS];

/// Columns `at..end` of the rows from `row` on, into `packed`.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn pack<const ROWS: usize>(rows: Rows<'_>, row: usize, at: usize, end: usize, packed: &mut Packed<ROWS>) {
    for (r, packed) in packed.iter_mut().enumerate() {
        packed[..end - at].copy_from_slice(rows.part(row + r, at, end));
    }
}

/// [`forward_plain`] with fused operations, `ROWS` rows and `K` registers at a time.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) fn forward<V: Vector, const ROWS: usize, const K: usize>(rows: Rows<'_>, x: &[f32], y: &mut [f32]) {
    y.fill(0.0);
    let (mut most, mut some, mut one) = ([[0.0; PITCH]; ROWS], [[0.0; PITCH]; 4], [[0.0; PITCH]; 1]);
    for (at, end) in rows.blocks() {
        for panel in (0..rows.width).step_by(K * V::LANES) {
            let mut row = 0;
            while row + ROWS <= rows.count() {
                forward_block::<V, ROWS, K>(rows, row, (at, end), panel, x, y, &mut most);
                row += ROWS;
            }
            while row + 4 <= rows.count() {
                forward_block::<V, 4, K>(rows, row, (at, end), panel, x, y, &mut some);
                row += 4;
            }
            while row < rows.count() {
                forward_block::<V, 1, K>(rows, row, (at, end), panel, x, y, &mut one);
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
    d: &mut Packed<ROWS>,
) {
    let width = rows.width;
    pack(rows, row, at, end, d);
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

/// [`backward_plain`] with fused operations, `ROWS` rows, `K` registers and `COLUMNS` columns of D at a time: a sum over rows is one chain of
/// operations that wait for each other, and several chains fill the time.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) fn backward<V: Vector, const ROWS: usize, const K: usize, const COLUMNS: usize>(
    rows: Rows<'_>,
    y: &[f32],
    z: &mut [f32],
) {
    let (mut most, mut some, mut one) = ([[0.0; PITCH]; ROWS], [[0.0; PITCH]; 4], [[0.0; PITCH]; 1]);
    for (at, end) in rows.blocks() {
        for panel in (0..rows.width).step_by(K * V::LANES) {
            let mut row = 0;
            while row + ROWS <= rows.count() {
                backward_block::<V, ROWS, K, COLUMNS>(rows, row, (at, end), panel, y, z, &mut most);
                row += ROWS;
            }
            while row + 4 <= rows.count() {
                backward_block::<V, 4, K, COLUMNS>(rows, row, (at, end), panel, y, z, &mut some);
                row += 4;
            }
            while row < rows.count() {
                backward_block::<V, 1, K, COLUMNS>(rows, row, (at, end), panel, y, z, &mut one);
                row += 1;
            }
        }
    }
}

#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn backward_block<V: Vector, const ROWS: usize, const K: usize, const COLUMNS: usize>(
    rows: Rows<'_>,
    row: usize,
    (at, end): (usize, usize),
    panel: usize,
    y: &[f32],
    z: &mut [f32],
    d: &mut Packed<ROWS>,
) {
    let width = rows.width;
    pack(rows, row, at, end, d);
    let mut left = [[V::splat(0.0); K]; ROWS];
    for r in 0..ROWS {
        left[r] = registers(&y[(row + r) * width + panel..]);
    }
    let z = &mut z[at * width + panel..];
    let mut j = 0;
    while j + COLUMNS <= end - at {
        backward_columns::<V, ROWS, K, COLUMNS>(d, &left, j, width, z);
        j += COLUMNS;
    }
    while j < end - at {
        backward_columns::<V, ROWS, K, 1>(d, &left, j, width, z);
        j += 1;
    }
}

#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn backward_columns<V: Vector, const ROWS: usize, const K: usize, const COLUMNS: usize>(
    d: &Packed<ROWS>,
    left: &[[V; K]; ROWS],
    j: usize,
    width: usize,
    z: &mut [f32],
) {
    let mut sums = [[V::splat(0.0); K]; COLUMNS];
    for c in 0..COLUMNS {
        sums[c] = registers::<V, K>(&z[(j + c) * width..]);
    }
    for r in 0..ROWS {
        for c in 0..COLUMNS {
            let value = V::splat(d[r][j + c]);
            for k in 0..K {
                sums[c][k] = V::add_product(sums[c][k], value, left[r][k]);
            }
        }
    }
    for c in 0..COLUMNS {
        for k in 0..K {
            V::store(sums[c][k], &mut z[(j + c) * width + k * V::LANES..]);
        }
    }
}
