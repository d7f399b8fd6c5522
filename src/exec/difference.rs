//! The difference of two weights, or one weight by itself, as a matrix that is read in sweeps and never held: a few rows of both are read,
//! widened and subtracted, and multiplied while they are in the cache. The rows lie in fixed pieces whose sums are added in order, so that
//! the products do not depend on the number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};

use faer::{Accum, Mat, Par};
use rayon::prelude::*;

use super::load::coordinates;
use super::run::{Progress, interrupted};
use crate::error::{Error, Result};
use crate::kernel::lowrank::{Noise, Rows, STEP, Sweeps, add_transposed_times, signs, squares, subtract, times};
use crate::kernel::{Float, Isa};
use crate::rules;
use crate::tensor::TensorSource;

/// Values of one tile of the difference, about what the second cache holds beside the thin matrices.
const TILE: usize = 1 << 17;
/// Pieces that a matrix is cut into, each with sums of its own.
const PIECES: usize = 8;

/// A matrix of plain floats in a file: `(rows, cols)` from value `first` of the tensor on.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a> {
    pub(crate) source: &'a dyn TensorSource,
    pub(crate) name: &'a str,
    pub(crate) float: Float,
    pub(crate) first: u64,
}

impl Weight<'_> {
    fn read(&self, rows: &Range<usize>, cols: usize, raw: &mut Vec<u8>) -> Result<()> {
        let size = self.float.size();
        raw.resize(rows.len() * cols * size, 0);
        self.source.read(self.name, (self.first + (rows.start * cols) as u64) * size as u64, raw)
    }
}

/// What the first sweep sees.
pub(crate) struct Seen {
    /// Dᵀ·Ω `(cols, width)`.
    pub(crate) start: Vec<f32>,
    /// ‖D‖².
    pub(crate) norm_squared: f64,
    /// ‖W‖² of the base; 0 without one.
    pub(crate) base_squared: f64,
    /// What rounding added to the tuned weights, if it was asked for.
    pub(crate) noise: Option<Noise>,
}

/// Tuned minus base.
pub(crate) struct Difference<'a> {
    pub(crate) tuned: Weight<'a>,
    pub(crate) base: Option<Weight<'a>>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) isa: Isa,
    pub(crate) progress: &'a dyn Progress,
    /// A power of two by which D·X is divided before it is multiplied by Dᵀ, so that the product does not leave the range of f32: only the
    /// span of its columns matters.
    exponent: AtomicI32,
}

#[derive(Default)]
pub(super) struct Scratch {
    tuned: Vec<u8>,
    base: Vec<u8>,
    /// A tile of the difference.
    pub(super) d: Vec<f32>,
    other: Vec<f32>,
}

impl<'a> Difference<'a> {
    pub(crate) fn new(
        tuned: Weight<'a>,
        base: Option<Weight<'a>>,
        (rows, cols): (usize, usize),
        isa: Isa,
        progress: &'a dyn Progress,
    ) -> Self {
        Difference { tuned, base, rows, cols, isa, progress, exponent: AtomicI32::new(0) }
    }

    /// The first sweep, with a random matrix of signs of so many columns.
    ///
    /// # Errors
    /// `A-030` if a value is not finite; `E-001`, `E-004`, `E-006`.
    pub(crate) fn first(&self, width: usize, key: u64, with_noise: bool) -> Result<Seen> {
        let parts = self.each_piece(|rows, scratch| {
            let mut part = Seen {
                start: vec![0.0; self.cols * width],
                norm_squared: 0.0,
                base_squared: 0.0,
                noise: with_noise.then(|| Noise::new(self.tuned.float, self.cols)),
            };
            let mut omega = Vec::new();
            self.each_tile(rows, scratch, |tile, scratch| {
                omega.resize(tile.len() * width, 0.0);
                omega.chunks_exact_mut(width).zip(tile.clone()).for_each(|(row, i)| signs(key, i as u64, row));
                part.norm_squared += squares(self.isa, &scratch.d);
                if let Some(base) = self.base {
                    scratch.other.resize(scratch.d.len(), 0.0);
                    subtract(self.isa, (base.float, &scratch.base), None, &mut scratch.other);
                    part.base_squared += squares(self.isa, &scratch.other);
                }
                if let Some(noise) = &mut part.noise {
                    scratch.other.resize(scratch.d.len(), 0.0);
                    subtract(self.isa, (self.tuned.float, &scratch.tuned), None, &mut scratch.other);
                    let rows = scratch.other.chunks_exact(self.cols).zip(scratch.d.chunks_exact(self.cols));
                    rows.for_each(|(weights, d)| noise.add(weights, d));
                }
                let rows = Rows { d: &scratch.d, cols: self.cols, width };
                add_transposed_times(self.isa, rows, &omega, &mut part.start);
                Ok(())
            })?;
            Ok(part)
        })?;
        let mut parts = parts.into_iter();
        let Some(mut seen) = parts.next() else { return Err(Error::new(rules::READ, "an empty matrix")) };
        for part in parts {
            seen.start.iter_mut().zip(&part.start).for_each(|(x, y)| *x += y);
            seen.norm_squared += part.norm_squared;
            seen.base_squared += part.base_squared;
            seen.noise = seen.noise.zip(part.noise.as_ref()).map(|(noise, other)| noise.plus(other));
        }
        if !seen.norm_squared.is_finite() {
            return Err(self.not_finite()?);
        }
        let exponent = if seen.norm_squared > 0.0 { (seen.norm_squared.log2() / 2.0) as i32 } else { 0 };
        self.exponent.store(exponent.clamp(-100, 100), Ordering::Relaxed);
        Ok(seen)
    }

    /// ‖D‖².
    ///
    /// # Errors
    /// `A-030` if a value is not finite; `E-001`, `E-004`, `E-006`.
    pub(crate) fn norm_squared(&self) -> Result<f64> {
        let parts = self.each_piece(|rows, scratch| {
            let mut sum = 0.0;
            self.each_tile(rows, scratch, |_, scratch| {
                sum += squares(self.isa, &scratch.d);
                Ok(())
            })?;
            Ok(sum)
        })?;
        let sum: f64 = parts.into_iter().sum();
        if sum.is_finite() { Ok(sum) } else { Err(self.not_finite()?) }
    }

    /// All of it, in f64.
    ///
    /// # Errors
    /// `E-001`, `E-004`, `E-006`.
    pub(crate) fn dense(&self) -> Result<Mat<f64>> {
        let mut dense = Mat::zeros(self.rows, self.cols);
        let mut scratch = Scratch::default();
        self.each_tile(0..self.rows, &mut scratch, |tile, scratch| {
            for (i, row) in tile.clone().zip(scratch.d.chunks_exact(self.cols)) {
                row.iter().enumerate().for_each(|(j, value)| dense[(i, j)] = f64::from(*value));
            }
            Ok(())
        })?;
        Ok(dense)
    }

    /// D·X `(rows, n)` for X `(cols, n)` or, if `transposed`, Dᵀ·X `(cols, n)` for X `(rows, n)`, which holds values of f32.
    ///
    /// # Errors
    /// `E-001`, `E-004`, `E-006`.
    pub(crate) fn product(&self, x: &Mat<f64>, transposed: bool) -> Result<Mat<f64>> {
        let width = x.ncols().next_multiple_of(STEP);
        let mut thin = vec![0.0; x.nrows() * width];
        for (i, row) in thin.chunks_exact_mut(width).enumerate() {
            row.iter_mut().take(x.ncols()).enumerate().for_each(|(j, value)| *value = x[(i, j)] as f32);
        }
        let (out, by) = match transposed {
            false => (self.times(&thin, width)?, 1.0),
            true => (self.transposed_times(&thin, width)?, 2f64.powi(self.exponent.load(Ordering::Relaxed))),
        };
        Ok(Mat::from_fn(out.len() / width, x.ncols(), |i, j| by * f64::from(out[i * width + j])))
    }

    /// ‖D - B·A‖² for B `(rows, rank)` and A `(rank, cols)`, value by value: where the difference of norms would cancel.
    ///
    /// # Errors
    /// `E-001`, `E-004`, `E-006`.
    pub(crate) fn distance_squared(&self, b: &Mat<f64>, a: &Mat<f64>) -> Result<f64> {
        let parts = self.each_piece(|rows, scratch| {
            let mut sum = 0.0;
            self.each_tile(rows, scratch, |tile, scratch| {
                let mut product = Mat::<f64>::zeros(tile.len(), self.cols);
                let left = b.subrows(tile.start, tile.len());
                faer::linalg::matmul::matmul(product.as_mut(), Accum::Replace, left, a, 1.0, Par::Seq);
                for (i, row) in scratch.d.chunks_exact(self.cols).enumerate() {
                    sum += row.iter().enumerate().map(|(j, d)| (f64::from(*d) - product[(i, j)]).powi(2)).sum::<f64>();
                }
                Ok(())
            })?;
            Ok(sum)
        })?;
        Ok(parts.into_iter().sum())
    }

    /// Calls `work` for each piece, on all threads of the pool; results by order of the pieces.
    fn each_piece<T: Send>(&self, work: impl Fn(Range<usize>, &mut Scratch) -> Result<T> + Sync) -> Result<Vec<T>> {
        let tile = self.tile_rows();
        let tiles = self.rows.div_ceil(tile);
        let each = tiles.div_ceil(PIECES.min(tiles).max(1)).max(1) * tile;
        let count = self.rows.div_ceil(each);
        let piece = |n: usize| n * each..((n + 1) * each).min(self.rows);
        (0..count).into_par_iter().map_init(Scratch::default, |scratch, n| work(piece(n), scratch)).collect()
    }

    /// Calls `step` with each tile of the rows, whose difference is in the scratch.
    pub(super) fn each_tile(
        &self,
        rows: Range<usize>,
        scratch: &mut Scratch,
        mut step: impl FnMut(&Range<usize>, &mut Scratch) -> Result<()>,
    ) -> Result<()> {
        let height = self.tile_rows();
        for start in rows.clone().step_by(height) {
            if self.progress.cancelled() {
                return Err(interrupted());
            }
            let tile = start..(start + height).min(rows.end);
            self.tuned.read(&tile, self.cols, &mut scratch.tuned)?;
            if let Some(base) = self.base {
                base.read(&tile, self.cols, &mut scratch.base)?;
            }
            scratch.d.resize(tile.len() * self.cols, 0.0);
            let base = self.base.map(|base| (base.float, &scratch.base[..]));
            subtract(self.isa, (self.tuned.float, &scratch.tuned), base, &mut scratch.d);
            step(&tile, scratch)?;
            self.progress.advance((scratch.tuned.len() + scratch.base.len()) as u64);
        }
        Ok(())
    }

    /// Rows of one tile: a multiple of the rows that a kernel takes at a time.
    fn tile_rows(&self) -> usize {
        (TILE / self.cols.max(1) / 16 * 16).clamp(16, 64)
    }

    /// The error for the first value that is not finite.
    fn not_finite(&self) -> Result<Error> {
        for weight in [Some(self.tuned), self.base].into_iter().flatten() {
            let (mut raw, mut values) = (Vec::new(), vec![0.0f64; self.cols]);
            for i in 0..self.rows {
                weight.read(&(i..i + 1), self.cols, &mut raw)?;
                weight.float.widen(&raw, &mut values);
                if let Some(j) = values.iter().position(|value| !value.is_finite()) {
                    let dims = weight.source.info(weight.name).map(|info| info.shape.dims().to_vec()).unwrap_or_default();
                    let at = coordinates(&dims, weight.first + (i * self.cols + j) as u64);
                    let message = format!("{:?} holds {} at {at}", weight.name, values[j]);
                    return Ok(Error::new(rules::BASE_FINITE, message)
                        .file(weight.source.label())
                        .tensor(weight.name)
                        .help("the training diverged or the file is damaged; leave the tensor out with --exclude"));
                }
            }
        }
        let message = format!("the difference of {:?} is beyond the range of f64", self.tuned.name);
        Ok(Error::new(rules::BASE_FINITE, message).file(self.tuned.source.label()).tensor(self.tuned.name))
    }

    fn shrink(&self, y: &mut [f32]) {
        let factor = 2f32.powi(-self.exponent.load(Ordering::Relaxed));
        y.iter_mut().for_each(|y| *y *= factor);
    }
}

/// What the pieces found: rows one after the other, sums added in order.
fn joined(parts: Vec<(Vec<f32>, Vec<f32>)>) -> (Vec<f32>, Vec<f32>) {
    let mut parts = parts.into_iter();
    let (mut y, mut z) = parts.next().unwrap_or_default();
    for (rows, sums) in parts {
        y.extend_from_slice(&rows);
        z.iter_mut().zip(&sums).for_each(|(x, y)| *x += y);
    }
    (y, z)
}

impl Sweeps for Difference<'_> {
    type Error = Error;

    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn times(&self, x: &[f32], width: usize) -> Result<Vec<f32>> {
        let parts = self.each_piece(|rows, scratch| {
            let mut y = vec![0.0; rows.len() * width];
            let first = rows.start;
            self.each_tile(rows, scratch, |tile, scratch| {
                let part = &mut y[(tile.start - first) * width..(tile.end - first) * width];
                times(self.isa, Rows { d: &scratch.d, cols: self.cols, width }, x, part);
                Ok(())
            })?;
            Ok((y, Vec::new()))
        })?;
        Ok(joined(parts).0)
    }

    fn transposed_times(&self, y: &[f32], width: usize) -> Result<Vec<f32>> {
        let mut small = y.to_vec();
        self.shrink(&mut small);
        let parts = self.each_piece(|rows, scratch| {
            let mut z = vec![0.0; self.cols * width];
            self.each_tile(rows, scratch, |tile, scratch| {
                let part = &small[tile.start * width..tile.end * width];
                add_transposed_times(self.isa, Rows { d: &scratch.d, cols: self.cols, width }, part, &mut z);
                Ok(())
            })?;
            Ok((Vec::new(), z))
        })?;
        Ok(joined(parts).1)
    }

    fn both(&self, x: &[f32], width: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let parts = self.each_piece(|rows, scratch| {
            let (mut y, mut z) = (vec![0.0; rows.len() * width], vec![0.0; self.cols * width]);
            let first = rows.start;
            let mut small = Vec::new();
            self.each_tile(rows, scratch, |tile, scratch| {
                let part = &mut y[(tile.start - first) * width..(tile.end - first) * width];
                let rows = Rows { d: &scratch.d, cols: self.cols, width };
                times(self.isa, rows, x, part);
                small.clear();
                small.extend_from_slice(part);
                self.shrink(&mut small);
                add_transposed_times(self.isa, rows, &small, &mut z);
                Ok(())
            })?;
            Ok((y, z))
        })?;
        Ok(joined(parts))
    }
}

/// ‖tuned - base‖² of so many values of two tensors of one shape.
///
/// # Errors
/// `A-030` if a value is not finite; `E-001`, `E-004`, `E-006`.
pub(crate) fn change_squared(tuned: Weight<'_>, base: Weight<'_>, values: u64, progress: &dyn Progress) -> Result<f64> {
    let width = values.clamp(1, TILE as u64) as usize;
    let isa = Isa::best();
    let of = |first: u64, shape: (usize, usize)| {
        let (tuned, base) = (Weight { first: tuned.first + first, ..tuned }, Weight { first: base.first + first, ..base });
        let difference = Difference::new(tuned, Some(base), shape, isa, progress);
        difference.norm_squared()
    };
    let rows = values / width as u64;
    let rest = (values % width as u64) as usize;
    let whole = if rows > 0 { of(0, (rows as usize, width))? } else { 0.0 };
    Ok(whole + if rest > 0 { of(rows * width as u64, (1, rest))? } else { 0.0 })
}
