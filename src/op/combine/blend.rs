//! One matrix of a result that is made value by value: a few rows of every update are computed from its factors, what the method drops is
//! dropped, and the rest is added up. The updates and the result are never held whole. What is kept depends on all values of an update; that
//! is found first, by reading it several times.
//!
//! A value of an update is scale · Σ b·a in f64, in the order of the rank: products of factors of up to 32 bits are exact, so that it is the
//! same on every machine, and with it what is kept.

use std::ops::Range;

use super::align::{Part, Sum};
use super::method::CombineMethod;
use crate::error::{Error, Result};
use crate::exec::{Progress, interrupted, read_factors};
use crate::kernel::fusion::{Keep, Reading, agreed, cut, kept};
use crate::kernel::{self, Float, Isa, Rounding, Tile, update_tile};

/// Values of a tile of one update, about what a cache holds with those of a few others.
const TILE: usize = 1 << 15;

/// One update.
struct Update<'p> {
    /// `(rows, rank)`.
    left: Vec<f64>,
    /// `(rank, cols)`.
    right: Vec<f64>,
    rank: usize,
    scale: f64,
    cols: usize,
    isa: Isa,
    progress: &'p dyn Progress,
}

impl Update<'_> {
    fn rows(&self) -> usize {
        self.left.len() / self.rank.max(1)
    }

    /// Some rows of it.
    fn values(&self, rows: &Range<usize>, scratch: &mut Scratch, out: &mut Vec<f64>) {
        let count = rows.len() * self.cols;
        scratch.zeros.resize(8 * count, 0);
        scratch.raw.resize(8 * count, 0);
        let left = &self.left[rows.start * self.rank..rows.end * self.rank];
        let part = kernel::Part { left, right: &self.right, rank: self.rank, scale: self.scale };
        let mut tile = Tile {
            from: Float::F64,
            to: Float::F64,
            base: &scratch.zeros[..8 * count],
            out: &mut scratch.raw[..8 * count],
            cols: self.cols,
            keep_nonfinite: true,
            rounding: Rounding::Nearest,
        };
        update_tile(self.isa, &mut tile, &[part]);
        out.resize(count, 0.0);
        Float::F64.widen(&scratch.raw[..8 * count], out);
    }
}

/// Rows of a tile of so many columns.
fn height(cols: usize) -> usize {
    (TILE / cols.max(1)).clamp(1, 64)
}

impl Reading for Update<'_> {
    type Error = Error;

    fn each(&self, step: &mut dyn FnMut(u64, &[f64])) -> Result<()> {
        let (mut scratch, mut values) = (Scratch::default(), Vec::new());
        let rows = self.rows();
        for start in (0..rows).step_by(height(self.cols)) {
            if self.progress.cancelled() {
                return Err(interrupted());
            }
            let tile = start..(start + height(self.cols)).min(rows);
            self.values(&tile, &mut scratch, &mut values);
            step((start * self.cols) as u64, &values);
        }
        Ok(())
    }
}

#[derive(Default)]
struct Scratch {
    zeros: Vec<u8>,
    raw: Vec<u8>,
}

/// What is made of several updates of one matrix.
pub(super) struct Blend<'p> {
    updates: Vec<(Update<'p>, Keep)>,
    /// Signs are elected and means taken; otherwise it is the sum.
    agrees: bool,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl<'p> Blend<'p> {
    /// Reads the factors, and finds out what is kept of each update. `roots` are the content roots of the adapters.
    ///
    /// # Errors
    /// `A-008`, `E-001`, `E-004`, `E-006`.
    pub(super) fn new(
        sum: &Sum,
        expert: u64,
        method: CombineMethod,
        roots: &[String],
        isa: Isa,
        progress: &'p dyn Progress,
    ) -> Result<Self> {
        let (out, inner) = sum.out_in();
        let mut updates = Vec::with_capacity(sum.parts.len());
        for part in &sum.parts {
            let (left, right) = read_factors(&part.target, expert, 0..out)?;
            let rank = part.target.scaling.rank as usize;
            let update = Update { left, right, rank, scale: part.scale(), cols: inner as usize, isa, progress };
            let keep = keep(&update, method, || key(method, sum, expert, part, roots))?;
            updates.push((update, keep));
        }
        let agrees = matches!(method, CombineMethod::Ties { .. } | CombineMethod::DareTies { .. } | CombineMethod::Della { .. });
        Ok(Blend { updates, agrees, rows: out as usize, cols: inner as usize })
    }

    /// Computes all rows, a few at a time, from the first to the last.
    ///
    /// # Errors
    /// `E-006`, and the first of `step`.
    pub(super) fn each(&self, mut step: impl FnMut(Range<usize>, &[f64]) -> Result<()>) -> Result<()> {
        let mut scratch = Scratch::default();
        let mut tiles: Vec<Vec<f64>> = vec![Vec::new(); self.updates.len()];
        let mut out = Vec::new();
        for start in (0..self.rows).step_by(height(self.cols)) {
            let rows = start..(start + height(self.cols)).min(self.rows);
            for ((update, keep), tile) in self.updates.iter().zip(&mut tiles) {
                if update.progress.cancelled() {
                    return Err(interrupted());
                }
                update.values(&rows, &mut scratch, tile);
                for (row, i) in tile.chunks_exact_mut(self.cols).zip(rows.clone()) {
                    keep.row(row, (i * self.cols) as u64);
                }
            }
            out.clear();
            let count = rows.len() * self.cols;
            if self.agrees {
                out.extend((0..count).map(|i| agreed(tiles.iter().map(|tile| tile[i]))));
            } else {
                out.extend((0..count).map(|i| tiles.iter().map(|tile| tile[i]).sum::<f64>()));
            }
            step(rows, &out)?;
        }
        Ok(())
    }
}

/// What a method keeps of an update.
fn keep(update: &Update<'_>, method: CombineMethod, key: impl Fn() -> u64) -> Result<Keep> {
    let len = (update.rows() * update.cols) as u64;
    Ok(match method {
        CombineMethod::Ties { density } | CombineMethod::MagnitudePrune { density } => {
            Keep::Between { first: None, last: cut(update, kept(density, len))? }
        }
        CombineMethod::Breadcrumbs { density, outliers } => {
            let kept = kept(density, len);
            let dropped = ((outliers * len as f64) as u64).min(len - kept);
            let first = if dropped > 0 { Some(cut(update, dropped)?) } else { None };
            Keep::Between { first, last: cut(update, dropped + kept)? }
        }
        CombineMethod::DareLinear { density, .. } | CombineMethod::DareTies { density, .. } => {
            Keep::ByChance { density, key: key() }
        }
        CombineMethod::Della { density, epsilon, .. } => Keep::ByRank { density, epsilon, key: key() },
        CombineMethod::Linear
        | CombineMethod::Cat
        | CombineMethod::Svd
        | CombineMethod::Slerp
        | CombineMethod::Knots { .. }
        | CombineMethod::CoreSpace { .. }
        | CombineMethod::Tsv
        | CombineMethod::IsoC => Keep::All,
    })
}

/// The key of the chance: another one for each seed, tensor, expert and adapter, whatever the order of the adapters is (FNV-1a, 64 bits).
fn key(method: CombineMethod, sum: &Sum, expert: u64, part: &Part, roots: &[String]) -> u64 {
    let root = roots.get(part.adapter).map_or("", String::as_str);
    let numbers = method.seed().unwrap_or(0).to_le_bytes().into_iter().chain(expert.to_le_bytes());
    let bytes = numbers.chain(sum.tensor.bytes()).chain(root.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
