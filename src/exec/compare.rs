//! Holds a merged checkpoint against what a plan wants: sums and distances per changed tensor, block by block on all cores, and
//! bytes for the rest. It computes the wanted values by the plain formula and not with the kernels of the merge, so that the two
//! check each other. Memory depends on the blocks, not on the tensors, and the figures not on the number of threads.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::block::{self, Ground, in_slice, patched, rows_cols};
use super::load::{float_of, left, right};
use super::measure::{Figures, Probe};
use super::quantised::{self, Look};
use super::run::{ExecOptions, Progress, interrupted};
use super::scaled;
use super::spread::{Block, blocks, pieces};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::kernel::{Float, Isa, float8};
use crate::plan::{Change, Origin, Plan, Quantised, Rounding};
use crate::tensor::{Dtype, TensorSource};

/// Values of one block: W, D and M take 8 bytes each.
pub(super) const BLOCK: u64 = 1 << 18;
/// Values of a tensor that are looked at per alternative when the update is not the one that was wanted.
const PROBED: u64 = 1 << 16;
/// Bytes of an untouched tensor that are compared at a time.
const PIECE: u64 = 1 << 20;
/// The least that is read of a tensor in one go when only a sample is wanted.
const LEAST: u64 = 512;
/// Columns that are swept row by row before the next ones, so that their part of the right factor stays in the cache.
const PANEL: usize = 512;

/// What is compared, and how much of it.
pub(crate) struct Comparison<'p, 'a> {
    pub(crate) plan: &'p Plan<'a>,
    pub(crate) merged: &'p Checkpoint,
    /// The share of each tensor that is read; 1 is all of it.
    pub(crate) share: f64,
    pub(crate) progress: &'p dyn Progress,
}

/// A plan, with another rounding.
struct Rounded<'p, 'a> {
    plan: &'p Plan<'a>,
    rounding: Rounding,
}

impl Ground for Rounded<'_, '_> {
    fn path(&self) -> &Path {
        self.plan.path()
    }

    fn keep_nonfinite(&self) -> bool {
        true
    }

    fn rounding(&self) -> Rounding {
        self.rounding
    }

    fn read(&self, shard: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.plan.read(shard, offset, buf)
    }
}

/// How the bytes of two tensors differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Bytes of the merged tensor that were compared.
    pub(crate) compared: u64,
    /// Offset in the tensor of the first byte that differs.
    pub(crate) first: Option<u64>,
    /// Bytes that differ; values where the dtypes differ.
    pub(crate) count: u64,
}

/// Which way round an alternative update lies on the tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lay {
    AsIs,
    Transposed,
}

/// Another update that may have been added to a tensor, `factor` times.
pub(crate) struct Alternative<'p, 'a> {
    pub(crate) update: &'p Change<'a>,
    pub(crate) lay: Lay,
    pub(crate) factor: f64,
}

#[derive(Default)]
pub(super) struct Scratch {
    raw: Vec<u8>,
    pub(super) base: Vec<f64>,
    merged: Vec<u8>,
    pub(super) delta: Vec<f64>,
    turned: Vec<f64>,
    panels: (Vec<f64>, Vec<f64>),
    own: Vec<u8>,
    scales: Vec<f64>,
    /// What is there of a quantised weight, as values.
    values: Vec<f64>,
}

/// Runs `work` on as many threads as the options say.
pub fn on_threads<T: Send>(options: &ExecOptions, work: impl FnOnce() -> T + Send) -> T {
    crate::io::on_threads(options.threads.map_or(0, |n| n.get().min(256)), work)
}

impl Comparison<'_, '_> {
    /// The figures of one changed tensor, which the merged checkpoint has in the same shape and as the plain float `stored`.
    ///
    /// # Errors
    /// `E-001`, `E-004`, `A-008`, `E-006`.
    pub(crate) fn figures(&self, change: &Change<'_>, stored: Float) -> Result<Figures> {
        let parts = match self.quantised(change) {
            Some(how) if !how.is_one() => parts_of_blocks(change, how, self.share),
            _ => parts(change, BLOCK, self.share),
        };
        let found: Result<Vec<Figures>> = parts
            .into_par_iter()
            .map_init(Scratch::default, |scratch, (rows, cols)| self.figures_of_block(change, stored, rows, cols, scratch))
            .collect();
        Ok(found?.iter().fold(Figures::default(), |sum, block| sum.plus(block)))
    }

    fn figures_of_block(
        &self,
        change: &Change<'_>,
        stored: Float,
        rows: Range<u64>,
        cols: Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<Figures> {
        if self.progress.cancelled() {
            return Err(interrupted());
        }
        self.load(change, stored, &rows, &cols, scratch)?;
        wanted(self.plan, change, &rows, &cols, scratch)?;
        if let Some(how) = self.quantised(change) {
            let figures = self.figures_of_codes(change, how, (&rows, &cols), scratch)?;
            self.progress.advance(figures.bytes);
            return Ok(figures);
        }
        let mut figures = Figures::of(stored, &scratch.base, &scratch.delta, &scratch.merged);
        figures.as_base = match (&change.origin, plan_info(self.plan, change)) {
            (Origin::Base { .. }, _) => figures.as_origin,
            (Origin::Adapter(_), Some(float)) if float == stored => {
                let (_, total) = rows_cols(change);
                let read = |at: u64, buf: &mut [u8]| self.plan.base.read(&change.name, at, buf);
                read_block(total, &rows, &cols, stored.size(), &mut scratch.own, read)?;
                let size = stored.size();
                scratch.own.chunks_exact(size).zip(scratch.merged.chunks_exact(size)).filter(|(x, y)| x == y).count() as u64
            }
            _ => 0,
        };
        self.progress.advance(scratch.merged.len() as u64);
        Ok(figures)
    }

    /// How a weight is quantised, if it is in both checkpoints.
    fn quantised<'c>(&self, change: &'c Change<'_>) -> Option<&'c Quantised<'c>> {
        change.quantised.as_ref().filter(|_| self.merged.info(&change.name).is_some_and(|info| info.dtype == Dtype::F8_E4M3))
    }

    /// The figures of whole blocks of a quantised weight, by what the codes and scales mean.
    fn figures_of_codes(
        &self,
        change: &Change<'_>,
        how: &Quantised<'_>,
        (rows, cols): (&Range<u64>, &Range<u64>),
        scratch: &mut Scratch,
    ) -> Result<Figures> {
        let one = if how.is_one() { Some(quantised::only_scale(self.plan, Isa::Portable, change, how)?) } else { None };
        let (base, delta) = (&scratch.base, &scratch.delta);
        let sums: Vec<f64> = base.iter().zip(delta).map(|(w, d)| if *d == 0.0 { *w } else { w + d }).collect();
        let (mut correct, mut steps) = (base.clone(), vec![0.0; base.len()]);
        for (old, lines) in scratch.scales.iter().zip(quantised::blocks(how, rows, cols)) {
            let scale = match one {
                Some(scale) => scale,
                None => Look::default().at(base, delta, &sums, &lines).scale(&change.name, quantised::format(how), *old)?,
            };
            for i in lines.into_iter().flatten() {
                if !scale.kept && base[i].is_finite() {
                    correct[i] = float8::widen(quantised::quantise(sums[i], scale.value)) * scale.value;
                }
                steps[i] = scale.value.abs();
            }
        }
        Ok(Figures::of_codes(&scratch.base, &scratch.delta, &correct, &scratch.values, &steps))
    }

    /// Is every value of a changed tensor the one that this rounding gives?
    ///
    /// # Errors
    /// As [`figures`](Self::figures).
    pub(crate) fn is_rounded(&self, change: &Change<'_>, rounding: Rounding) -> Result<bool> {
        let ground = Rounded { plan: self.plan, rounding };
        let size = change.info.bytes().checked_div(change.info.shape.elements()).unwrap_or(1);
        let same = |(rows, cols): (Range<u64>, Range<u64>)| -> Result<bool> {
            if self.progress.cancelled() {
                return Err(interrupted());
            }
            let (_, total) = rows_cols(change);
            let mut out = vec![0; ((rows.end - rows.start) * (cols.end - cols.start) * size) as usize];
            let mut scratch = block::Scratch::default();
            block::compute_values(&ground, Isa::best(), change, rows.clone(), cols.clone(), &mut scratch, &mut out)?;
            let mut found = Vec::new();
            read_block(total, &rows, &cols, size as usize, &mut found, |at, buf| self.merged.read(&change.name, at, buf))?;
            Ok(out == found)
        };
        let found: Vec<bool> = parts(change, BLOCK, self.share).into_par_iter().map(same).collect::<Result<_>>()?;
        Ok(found.into_iter().all(|same| same))
    }

    /// How well each of some other updates explains what was added to a tensor, on a sample of its rows.
    ///
    /// # Errors
    /// As [`figures`](Self::figures).
    pub(crate) fn probe(&self, change: &Change<'_>, stored: Float, with: &[Alternative<'_, '_>]) -> Result<Vec<Probe>> {
        let (rows, cols) = rows_cols(change);
        let share = (PROBED as f64 / (rows * cols).max(1) as f64).min(1.0);
        let mut probes = vec![Probe::default(); with.len()];
        let mut scratch = Scratch::default();
        for (rows, cols) in parts(change, PROBED, share) {
            if self.progress.cancelled() {
                return Err(interrupted());
            }
            self.load(change, stored, &rows, &cols, &mut scratch)?;
            for (alternative, probe) in with.iter().zip(&mut probes) {
                match alternative.lay {
                    Lay::AsIs => wanted(self.plan, alternative.update, &rows, &cols, &mut scratch)?,
                    Lay::Transposed => {
                        update(alternative.update, cols.clone(), rows.clone(), &mut scratch)?;
                        turn(&mut scratch, (rows.end - rows.start) as usize);
                    }
                }
                probe.add(stored, &scratch.base, &scratch.delta, &scratch.merged, alternative.factor);
            }
        }
        Ok(probes)
    }

    /// Reads a block of W, widened, and of M, as stored.
    fn load(
        &self,
        change: &Change<'_>,
        stored: Float,
        rows: &Range<u64>,
        cols: &Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (_, total) = rows_cols(change);
        if let Some(how) = self.quantised(change) {
            let Scratch { raw, values, scales, merged, .. } = scratch;
            let codes = |at: u64, buf: &mut [u8]| self.merged.read(&change.name, at, buf);
            let of_scales = |at: u64, buf: &mut [u8]| self.merged.read(&how.scales, at, buf);
            quantised::dequantise(how, (rows, cols), codes, of_scales, raw, (scales, values))?;
            merged.resize(8 * values.len(), 0);
            Float::F64.narrow(values, merged);
            return load_origin(self.plan, change, rows, cols, scratch);
        }
        load_origin(self.plan, change, rows, cols, scratch)?;
        read_block(total, rows, cols, stored.size(), &mut scratch.merged, |at, buf| self.merged.read(&change.name, at, buf))
    }

    /// How a tensor that no adapter changes differs from the base's, both of the same shape. Of two plain float dtypes the values
    /// are compared, the base's rounded to the merged one's; otherwise the bytes.
    ///
    /// # Errors
    /// `E-001`, `E-004`, `E-006`.
    pub(crate) fn difference(&self, name: &str) -> Result<Difference> {
        let (Some(before), Some(after)) = (self.plan.base.info(name), self.merged.info(name)) else {
            return Ok(Difference::default());
        };
        let (base, merged) =
            if before.dtype == after.dtype { (None, None) } else { (float_of(before.dtype), float_of(after.dtype)) };
        let pair = base.zip(merged);
        let unit = pair.map_or(1, |(_, to)| to.size() as u64);
        let ranges = pieces(after.bytes() / unit, PIECE / unit, LEAST / unit, self.share);
        let found: Result<Vec<Difference>> = ranges
            .into_par_iter()
            .map_init(Scratch::default, |scratch, range| {
                if self.progress.cancelled() {
                    return Err(interrupted());
                }
                let count = (range.end - range.start) as usize;
                let Scratch { raw, merged, base, .. } = scratch;
                merged.resize(count * unit as usize, 0);
                self.merged.read(name, range.start * unit, merged)?;
                if let Some((from, to)) = pair {
                    raw.resize(count * from.size(), 0);
                    self.plan.base.read(name, range.start * from.size() as u64, raw)?;
                    base.resize(count, 0.0);
                    from.widen(raw, base);
                    raw.resize(count * to.size(), 0);
                    to.narrow(base, raw);
                } else {
                    raw.resize(count, 0);
                    self.plan.base.read(name, range.start, raw)?;
                }
                self.progress.advance(merged.len() as u64);
                let differs = |(x, y): (&[u8], &[u8])| x != y;
                let size = unit as usize;
                let mut different =
                    raw.chunks_exact(size).zip(merged.chunks_exact(size)).enumerate().filter(|(_, pair)| differs(*pair));
                if raw == merged {
                    return Ok(Difference { compared: merged.len() as u64, first: None, count: 0 });
                }
                let first = different.next().map(|(i, _)| (range.start + i as u64) * unit);
                let rest = different.count() as u64;
                Ok(Difference { compared: merged.len() as u64, first, count: rest + u64::from(first.is_some()) })
            })
            .collect();
        Ok(found?.iter().fold(Difference::default(), |sum, piece| Difference {
            compared: sum.compared + piece.compared,
            first: sum.first.or(piece.first),
            count: sum.count + piece.count,
        }))
    }
}

/// The format of the base's own tensor of the name of a change.
fn plan_info(plan: &Plan<'_>, change: &Change<'_>) -> Option<Float> {
    let info = plan.base.info(&change.name)?;
    float_of(info.dtype).filter(|_| info.shape == change.info.shape)
}

fn rank(change: &Change<'_>) -> u64 {
    change.contributions.iter().map(|c| c.rank).max().unwrap_or(1).max(1)
}

/// The parts of a change that are looked at, none of them in two slices, all of whole rows where a value depends on its row.
pub(super) fn parts(change: &Change<'_>, values: u64, share: f64) -> Vec<Block> {
    let (rows, cols) = rows_cols(change);
    let values = if change.needs_whole_rows() { values.max(cols.saturating_mul(rank(change))) } else { values };
    let high = change.slice_rows();
    let cut = |(rows, cols): Block| {
        let (mut parts, mut row) = (Vec::new(), rows.start);
        while row < rows.end {
            let end = rows.end.min((row / high + 1) * high);
            parts.push((row..end, cols.clone()));
            row = end;
        }
        parts
    };
    blocks(rows, cols, rank(change), values, share).into_iter().flat_map(cut).collect()
}

/// The parts of a quantised weight that are looked at: whole blocks of it.
fn parts_of_blocks(change: &Change<'_>, how: &Quantised<'_>, share: f64) -> Vec<Block> {
    let ((rows, cols), (high, wide)) = (how.shape, how.block);
    let beside = (BLOCK / (high * wide)).min(4 * BLOCK / (rank(change) * wide)).max(1);
    let step = if change.needs_whole_rows() { cols } else { beside * wide };
    let lines = pieces(how.grid().0, 1, 1, share).into_iter().flatten();
    let across = |line: u64| {
        (0..cols.div_ceil(step)).map(move |j| (line * high..rows.min((line + 1) * high), j * step..cols.min((j + 1) * step)))
    };
    lines.flat_map(across).collect()
}

/// Reads a block of what a change starts from into `scratch.base`, widened.
pub(super) fn load_origin(
    plan: &Plan<'_>,
    change: &Change<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    scratch: &mut Scratch,
) -> Result<()> {
    let (_, total) = rows_cols(change);
    if let Some(how) = &change.quantised {
        let Scratch { raw, base, scales, .. } = scratch;
        let read = |shard: usize, at: u64, buf: &mut [u8]| plan.base.shards()[shard].file.read_bytes(at, buf);
        return quantised::origin(change, how, (rows, cols), read, raw, (scales, base));
    }
    let info = match &change.origin {
        Origin::Base { info, .. } => info,
        Origin::Adapter(factor) => factor.info(),
    };
    let float = float_of(info.dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    let Scratch { raw, base, .. } = scratch;
    read_block(total, rows, cols, float.size(), raw, |at, buf| match &change.origin {
        Origin::Base { shard, begin, .. } => plan.base.shards()[*shard].file.read_bytes(begin + at, buf),
        Origin::Adapter(factor) => factor.read(at, buf),
    })?;
    base.clear();
    base.resize(raw.len() / float.size(), 0.0);
    float.widen(raw, base);
    patched(change, rows, cols, raw, base)
}

/// A block of what is wanted beyond the base, D, into `scratch.delta`; the base's block is in `scratch.base`.
fn wanted(plan: &Plan<'_>, change: &Change<'_>, rows: &Range<u64>, cols: &Range<u64>, scratch: &mut Scratch) -> Result<()> {
    if !change.is_scaled() {
        return update(change, rows.clone(), cols.clone(), scratch);
    }
    let mut total = scratch.base.clone();
    for (i, contribution) in change.contributions.iter().enumerate() {
        let alone = Change { contributions: vec![contribution.clone()], ..change.clone() };
        update(&alone, rows.clone(), cols.clone(), scratch)?;
        total.iter_mut().zip(&scratch.delta).for_each(|(t, d)| *t += d);
        if let Some(gain) = &contribution.gain {
            let Scratch { base, delta, .. } = scratch;
            let norms = || scaled::norms_of_columns(plan, Isa::Portable, change);
            let by = scaled::factors(change, i, gain, (base, delta), (rows, cols), norms)?;
            scaled::multiply(&mut total, gain.along, &by, (cols.end - cols.start) as usize);
        }
    }
    let Scratch { base, delta, .. } = scratch;
    delta.clear();
    delta.extend(total.iter().zip(base.iter()).map(|(t, w)| t - w));
    Ok(())
}

/// Reads a block of a row-major matrix with `total` columns, in one go if the rows are whole.
fn read_block(
    total: u64,
    rows: &Range<u64>,
    cols: &Range<u64>,
    size: usize,
    out: &mut Vec<u8>,
    read: impl Fn(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let (size, width) = (size as u64, cols.end - cols.start);
    out.clear();
    out.resize(((rows.end - rows.start) * width * size) as usize, 0);
    if width == total {
        return read(rows.start * total * size, out);
    }
    for (row, part) in rows.clone().zip(out.chunks_exact_mut((width * size).max(1) as usize)) {
        read((row * total + cols.start) * size, part)?;
    }
    Ok(())
}

/// A block of the wanted update D into `scratch.delta`: Σ scale · left · right, in f64, in the order that A-034 states.
pub(super) fn update(change: &Change<'_>, rows: Range<u64>, cols: Range<u64>, scratch: &mut Scratch) -> Result<()> {
    let (_, total) = rows_cols(change);
    let width = (cols.end - cols.start) as usize;
    let Scratch { raw, delta, panels: (l, r), .. } = scratch;
    delta.clear();
    delta.resize((rows.end - rows.start) as usize * width, 0.0);
    let mut sum = [0.0; PANEL];
    let (slice, within) = in_slice(change, &rows);
    for contribution in change.contributions.iter().filter(|contribution| contribution.rank > 0) {
        let rank = contribution.rank as usize;
        left(&contribution.left, slice, within.clone(), contribution.rank, raw, l)?;
        right(&contribution.right, slice, cols.clone(), contribution.rank, total, raw, r)?;
        let mut start = 0;
        while start < width {
            let end = (start + PANEL).min(width);
            let sum = &mut sum[..end - start];
            for (factors, row) in l.chunks_exact(rank).zip(delta.chunks_exact_mut(width)) {
                sum.fill(0.0);
                for (factor, line) in factors.iter().zip(r.chunks_exact(width)) {
                    sum.iter_mut().zip(&line[start..end]).for_each(|(s, x)| *s += factor * x);
                }
                row[start..end].iter_mut().zip(&*sum).for_each(|(d, s)| *d += contribution.scale * s);
            }
            start = end;
        }
    }
    Ok(())
}

/// Transposes `scratch.delta`, which has `rows` columns.
fn turn(scratch: &mut Scratch, rows: usize) {
    let Scratch { delta, turned, .. } = scratch;
    let cols = delta.len() / rows.max(1);
    turned.clear();
    turned.resize(delta.len(), 0.0);
    for (j, line) in delta.chunks_exact(rows.max(1)).enumerate() {
        for (i, value) in line.iter().enumerate() {
            turned[i * cols + j] = *value;
        }
    }
    std::mem::swap(delta, turned);
}
