//! Changes of weights that are stored as codes of E4M3 and a scale for each block (`spec/adapter-model.md`, section 4.5): dequantised, summed
//! in f64, and quantised again with the scale that the block now needs. Codes and scales are two changes, perhaps of two files; each computes
//! the blocks that it holds from the same inputs, so that they agree. There are few such models beside the others, so it is plain code.

use std::ops::Range;
use std::sync::PoisonError;

use super::block::{Ground, Scratch, rows_cols};
use super::load::{coordinates, float_of};
use super::scaled;
use crate::error::{Error, Result};
use crate::kernel::{Float, Isa, Sums, float8};
use crate::plan::{Change, Origin, Quantised, Role, Scale};
use crate::rules;

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Buffers {
    raw: Vec<u8>,
    codes: Vec<u8>,
    /// Of each block, row by row of the grid.
    scales: Vec<f64>,
    base: Vec<f64>,
    delta: Vec<f64>,
    wanted: Vec<f64>,
}

/// Bytes of values, in f64, that are looked at together for a scale of all of a tensor.
pub(super) const STRIP: u64 = 1 << 20;

/// Computes a block of the codes, whole blocks of the weight unless it has one scale, or of the scales.
///
/// # Errors
/// `A-008`, `A-030`, `A-031`, `E-001`, `E-004`.
pub(super) fn compute(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    how: &Quantised<'_>,
    (rows, cols): (&Range<u64>, &Range<u64>),
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<Sums> {
    match &how.role {
        Role::Codes => codes(ground, isa, change, how, rows, cols, scratch, out),
        Role::Scales(weight) => scales(ground, isa, weight, how, rows, cols, scratch, out),
    }
}

#[expect(clippy::too_many_arguments, reason = "one arm of compute")]
fn codes(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    how: &Quantised<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<Sums> {
    let one = if how.is_one() { Some(only_scale(ground, isa, change, how)?) } else { None };
    load(ground, isa, change, how, rows, cols, scratch)?;
    let Buffers { codes, scales, base, delta, wanted, .. } = &scratch.quantised;
    let float = format(how);
    let mut sums = Sums::default();
    for (old, lines) in scales.iter().zip(blocks(how, rows, cols)) {
        let scale = match one {
            Some(scale) => scale,
            None => Look::default().at(base, delta, wanted, &lines).scale(&change.name, float, *old)?,
        };
        for i in lines.into_iter().flatten() {
            let (w, d, m) = (base[i], delta[i], wanted[i]);
            let code = if scale.kept || !w.is_finite() { codes[i] } else { quantise(m, scale.value) };
            out[i] = code;
            if !w.is_finite() {
                sums.kept += 1;
                continue;
            }
            let stored = float8::widen(code) * scale.value;
            sums.base += w * w;
            sums.delta += d * d;
            sums.applied += (stored - w) * d;
            sums.changed += u64::from(stored.to_bits() != w.to_bits());
        }
    }
    Ok(sums)
}

#[expect(clippy::too_many_arguments, reason = "the other arm of compute")]
fn scales(
    ground: &dyn Ground,
    isa: Isa,
    weight: &Change<'_>,
    how: &Quantised<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<Sums> {
    let float = format(how);
    let size = float.size();
    let mut sums = Sums::default();
    let (grid_rows, grid_cols) = how.grid();
    debug_assert!(rows.end <= grid_rows && cols.end <= grid_cols, "a block of the scales");
    let ((high, wide), (all_rows, all_cols)) = (how.block, how.shape);
    let (of_rows, of_cols) = (rows.start * high..all_rows.min(rows.end * high), cols.start * wide..all_cols.min(cols.end * wide));
    let width = (cols.end - cols.start) as usize * size;
    for (row, line) in rows.clone().zip(out.chunks_exact_mut(width.max(1))) {
        ground.read(how.shard, how.begin + (row * grid_cols + cols.start) * size as u64, line)?;
    }
    let mut place = |out: &mut [u8], old: f64, scale: Scale| {
        if !scale.kept {
            float.narrow(&[scale.value], out);
            sums.changed += u64::from(scale.value.to_bits() != old.to_bits());
        }
    };
    if how.is_one() {
        let mut old = [0.0];
        float.widen(out, &mut old);
        place(out, old[0], only_scale(ground, isa, weight, how)?);
        return Ok(sums);
    }
    load(ground, isa, weight, how, &of_rows, &of_cols, scratch)?;
    let Buffers { scales, base, delta, wanted, .. } = &scratch.quantised;
    let found = scales.iter().zip(blocks(how, &of_rows, &of_cols)).zip(out.chunks_exact_mut(size));
    for ((old, lines), out) in found {
        place(out, *old, Look::default().at(base, delta, wanted, &lines).scale(&weight.name, float, *old)?);
    }
    Ok(sums)
}

/// The new scale of a weight that has only one, which depends on all of its values. Whoever comes first computes it.
///
/// # Errors
/// As [`compute`].
pub(super) fn only_scale(ground: &dyn Ground, isa: Isa, change: &Change<'_>, how: &Quantised<'_>) -> Result<Scale> {
    let mut cell = how.one.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(scale) = *cell {
        return Ok(scale);
    }
    let (rows, cols) = rows_cols(change);
    let high = (STRIP / (8 * cols).max(1)).max(1);
    let mut scratch = Scratch::default();
    let (mut look, mut row) = (Look::default(), 0);
    while row < rows {
        let strip = row..rows.min(row + high);
        load(ground, isa, change, how, &strip, &(0..cols), &mut scratch)?;
        let Buffers { base, delta, wanted, .. } = &scratch.quantised;
        look = look.at(base, delta, wanted, std::slice::from_ref(&(0..base.len())));
        row = strip.end;
    }
    let old = scratch.quantised.scales.first().copied().unwrap_or(0.0);
    let scale = look.scale(&change.name, format(how), old)?;
    *cell = Some(scale);
    Ok(scale)
}

/// What the values of a block say of its scale.
#[derive(Default)]
pub(super) struct Look {
    changed: bool,
    largest: f64,
}

impl Look {
    /// Takes in these values of W, D and W + D. Values of the base that are not finite stay and have no say.
    pub(super) fn at(mut self, base: &[f64], delta: &[f64], wanted: &[f64], lines: &[Range<usize>]) -> Look {
        for i in lines.iter().cloned().flatten().filter(|i| base[*i].is_finite()) {
            self.changed |= delta[i] != 0.0;
            self.largest = self.largest.max(wanted[i].abs());
        }
        self
    }

    /// The scale of the block: the largest magnitude / 448, in the dtype of the scales; the old one where there is nothing to scale.
    ///
    /// # Errors
    /// `A-031` if it overflows that dtype.
    pub(super) fn scale(&self, name: &str, float: Float, old: f64) -> Result<Scale> {
        if !self.changed || !old.is_finite() {
            return Ok(Scale { value: old, kept: true });
        }
        if self.largest == 0.0 {
            return Ok(Scale { value: old, kept: false });
        }
        let mut raw = [0; 8];
        let raw = &mut raw[..float.size()];
        let mut value = [0.0];
        float.narrow(&[self.largest / float8::LARGEST], raw);
        float.widen(raw, &mut value);
        // Only among the subnormals of the scales is the nearest so much too small.
        if self.largest / value[0] > float8::LAST_TIE {
            next(raw);
            float.widen(raw, &mut value);
        }
        if value[0].is_finite() {
            return Ok(Scale { value: value[0], kept: false });
        }
        let message =
            format!("a scale of {name:?} overflows its dtype: the largest merged value of a block is {:e}", self.largest);
        let help = "this is not the base that the adapter was trained on";
        Err(Error::new(rules::RESULT_FINITE, message).tensor(name).help(help))
    }
}

/// The next larger of positive values, which are ordered as their bits.
fn next(raw: &mut [u8]) {
    for byte in raw {
        let (next, carry) = byte.overflowing_add(1);
        *byte = next;
        if !carry {
            return;
        }
    }
}

/// The code of a value; that of a zero has its sign.
pub(super) fn quantise(value: f64, scale: f64) -> u8 {
    float8::narrow(if value == 0.0 { value } else { value / scale })
}

pub(super) fn format(how: &Quantised<'_>) -> Float {
    float_of(how.info.dtype).unwrap_or_else(|| unreachable!("scales are F32 or BF16"))
}

/// Where the blocks that a part of a weight has lie in it, row by row of the grid: one range for each line.
pub(super) fn blocks(
    how: &Quantised<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
) -> impl Iterator<Item = Vec<Range<usize>>> + use<> {
    let ((high, wide), (rows, cols)) = (how.block, (rows.clone(), cols.clone()));
    let (down, across) = (rows.start / high..rows.end.div_ceil(high), cols.start / wide..cols.end.div_ceil(wide));
    let width = cols.end - cols.start;
    let grid = down.flat_map(move |i| across.clone().map(move |j| (i, j)));
    grid.map(move |(i, j)| {
        let (first, last) = (cols.start.max(j * wide) - cols.start, cols.end.min((j + 1) * wide) - cols.start);
        let lines = rows.start.max(i * high)..rows.end.min((i + 1) * high);
        let at = |row: u64| ((row - rows.start) * width) as usize;
        lines.map(|row| at(row) + first as usize..at(row) + last as usize).collect()
    })
}

/// Reads a part of a weight through `codes` and `scales`, which fill a buffer from a byte of these tensors on: the codes into `raw`, the scales
/// of its blocks, and the values, exactly.
///
/// # Errors
/// Theirs.
pub(super) fn dequantise(
    how: &Quantised<'_>,
    (rows, cols): (&Range<u64>, &Range<u64>),
    codes: impl Fn(u64, &mut [u8]) -> Result<()>,
    scales: impl Fn(u64, &mut [u8]) -> Result<()>,
    raw: &mut Vec<u8>,
    (found, values): (&mut Vec<f64>, &mut Vec<f64>),
) -> Result<()> {
    let ((high, wide), float) = (how.block, format(how));
    let (down, across) = (rows.start / high..rows.end.div_ceil(high), cols.start / wide..cols.end.div_ceil(wide));
    found.clear();
    for row in down {
        let count = (across.end - across.start) as usize;
        raw.resize(count * float.size(), 0);
        scales((row * how.grid().1 + across.start) * float.size() as u64, raw)?;
        let first = found.len();
        found.resize(first + count, 0.0);
        float.widen(raw, &mut found[first..]);
    }
    let (total, width) = (how.shape.1, cols.end - cols.start);
    raw.resize(((rows.end - rows.start) * width) as usize, 0);
    if width == total {
        codes(rows.start * total, raw)?;
    } else {
        for (row, line) in rows.clone().zip(raw.chunks_exact_mut((width as usize).max(1))) {
            codes(row * total + cols.start, line)?;
        }
    }
    values.clear();
    values.resize(raw.len(), 0.0);
    for (scale, lines) in found.iter().zip(blocks(how, rows, cols)) {
        // Four significant bits times 24 at most: exact.
        lines.into_iter().flatten().for_each(|i| values[i] = float8::widen(raw[i]) * scale);
    }
    Ok(())
}

/// Reads a part of what a quantised weight is in the base.
///
/// # Errors
/// `E-001`, `E-004`.
pub(super) fn origin(
    change: &Change<'_>,
    how: &Quantised<'_>,
    part: (&Range<u64>, &Range<u64>),
    read: impl Fn(usize, u64, &mut [u8]) -> Result<()>,
    raw: &mut Vec<u8>,
    found: (&mut Vec<f64>, &mut Vec<f64>),
) -> Result<()> {
    let Origin::Base { shard, begin, .. } = &change.origin else { unreachable!("a quantised weight is never replaced") };
    let codes = |at: u64, buf: &mut [u8]| read(*shard, begin + at, buf);
    dequantise(how, part, codes, |at, buf| read(how.shard, how.begin + at, buf), raw, found)
}

/// A part of W, D and W + D.
fn load(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    how: &Quantised<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    scratch: &mut Scratch,
) -> Result<()> {
    let Scratch { quantised: Buffers { raw, codes, scales, base, delta, wanted }, scaled, .. } = scratch;
    let read = |shard: usize, at: u64, buf: &mut [u8]| ground.read(shard, at, buf);
    origin(change, how, (rows, cols), read, raw, (scales, base))?;
    codes.clone_from(raw);
    delta.clear();
    wanted.clear();
    if change.is_scaled() {
        scaled::sums(ground, isa, change, (rows, cols), base, scaled)?;
        wanted.extend_from_slice(&scaled.sum);
        delta.extend(wanted.iter().zip(&*base).map(|(m, w)| m - w));
    } else {
        delta.resize(base.len(), 0.0);
        for contribution in &change.contributions {
            scaled::product(isa, change, contribution, rows, cols, scaled)?;
            delta.iter_mut().zip(&scaled.delta).for_each(|(t, d)| *t += d);
        }
        wanted.extend(base.iter().zip(&*delta).map(|(w, d)| if *d == 0.0 { *w } else { w + d }));
    }
    let is_wrong = |(w, m): (&f64, &f64)| if w.is_finite() { !m.is_finite() } else { !ground.keep_nonfinite() };
    match base.iter().zip(&*wanted).position(is_wrong) {
        None => Ok(()),
        Some(at) => Err(nonfinite(ground, change, rows, cols, at, base[at])),
    }
}

fn nonfinite(ground: &dyn Ground, change: &Change<'_>, rows: &Range<u64>, cols: &Range<u64>, at: usize, w: f64) -> Error {
    let width = (cols.end - cols.start).max(1);
    let element = (rows.start + at as u64 / width) * rows_cols(change).1 + cols.start + at as u64 % width;
    let coordinates = coordinates(change.info.shape.dims(), element);
    let (rule, message, help) = if w.is_finite() {
        let message = format!("the merged value of {:?} at {coordinates} is not finite (base value {w:e})", change.name);
        (rules::RESULT_FINITE, message, "this is not the base that the adapter was trained on")
    } else {
        let message = format!("the base holds {w} in {:?} at {coordinates}", change.name);
        (rules::BASE_FINITE, message, "the base is damaged; to leave such values as they are, pass --allow-nonfinite-base")
    };
    Error::new(rule, message).file(ground.path()).tensor(&change.name).help(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(float: Float, largest: f64) -> f64 {
        Look { changed: true, largest }.scale("w", float, 3.0).unwrap().value
    }

    #[test]
    fn the_scale_is_the_nearest_to_the_largest_value_over_448() {
        assert_eq!(scale(Float::F32, 448.0), 1.0);
        assert_eq!(scale(Float::F32, 1.0), f64::from(1.0f32 / 448.0));
        // 1.00390625 is a tie of bf16, and goes to the even 1.
        assert_eq!(scale(Float::BF16, 448.0 * 1.00390625), 1.0);
        assert_eq!(scale(Float::BF16, 448.0 * 1.0040), 1.0078125);
        assert_eq!(Look { changed: true, largest: 0.0 }.scale("w", Float::F32, 3.0).unwrap(), Scale { value: 3.0, kept: false });
        assert_eq!(Look { changed: false, largest: 9.0 }.scale("w", Float::F32, 3.0).unwrap(), Scale { value: 3.0, kept: true });
    }

    /// Whatever the scale was rounded to, the largest value has a code, down to the smallest scales.
    #[test]
    fn the_largest_value_of_a_block_never_saturates() {
        for float in [Float::F32, Float::BF16] {
            for exponent in -160..100 {
                for mantissa in [1.0, 1.03, 1.25, 1.4999, 1.5, 1.75, 1.999] {
                    let largest = mantissa * 2f64.powi(exponent);
                    let code = quantise(largest, scale(float, largest));
                    assert!(code < 0x7f && (exponent < -100 || code >= 0x7d), "{float:?} {largest:e} {code:#04x}");
                }
            }
        }
    }

    #[test]
    fn a_scale_that_overflows_is_refused() {
        let error = Look { changed: true, largest: 1e41 * 2.0 }.scale("w", Float::F32, 1.0).unwrap_err();
        assert_eq!(error.diagnostics()[0].rule().id, "A-031");
    }
}
