//! Reading factors into the panels that the kernels want: f64, `(rows, rank)` on the left, `(rank, cols)` on the right, for any
//! block of the weight. Every value that is read is checked to be finite.

use std::ops::Range;

use crate::adapter::{Factor, Target};
use crate::error::{Error, Result};
use crate::kernel::{Float, Value};
use crate::plan::Panel;
use crate::rules;
use crate::tensor::{Dtype, TensorSource, pieces};

/// Rows `rows` of B `(out, rank)` and all of A `(rank, in)`, in f64; of a stack, those of one expert.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(crate) fn read_factors(target: &Target, expert: u64, rows: Range<u64>) -> Result<(Vec<f64>, Vec<f64>)> {
    let (_, inner) = target.out_in();
    let rank = target.scaling.rank;
    let slice = Slice { index: expert, count: target.experts().unwrap_or(1) };
    let (mut raw, mut b, mut a) = (Vec::new(), Vec::new(), Vec::new());
    whole(&target.b, slice.first(&target.b) + rows.start * rank, (rows.end - rows.start) * rank, &mut raw, &mut b)?;
    whole(&target.a, slice.first(&target.a), rank * inner, &mut raw, &mut a)?;
    Ok((b, a))
}

/// So many values from element `first` on, without bytes between where the source has none.
fn whole(factor: &Factor, first: u64, count: u64, raw: &mut Vec<u8>, out: &mut Vec<f64>) -> Result<()> {
    out.clear();
    out.resize(size(count), 0.0);
    match factor.values(first, out) {
        Some(done) => done,
        None => block(factor, first, 0..1, 0..count, count, raw, out),
    }
}

/// Values of an update have left the range of f64: no method can tell which of them are large (`A-031`).
pub(crate) fn overflowed(tensor: &str) -> Error {
    let message = format!("the update of {tensor:?} leaves the range of f64");
    Error::new(rules::RESULT_FINITE, message).tensor(tensor).help("the factors of an adapter, or its weight, are too large")
}

/// Checks that every value of a tensor is finite, piece by piece.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(crate) fn check_finite(factor: &Factor) -> Result<()> {
    each_value(factor, |_| {})
}

/// All values of a tensor, in f64.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(crate) fn values(factor: &Factor) -> Result<Vec<f64>> {
    let mut all = Vec::with_capacity(size(factor.info().shape.elements()));
    each_value(factor, |piece| all.extend_from_slice(piece))?;
    Ok(all)
}

/// Gives `step` all values of a tensor, piece by piece.
///
/// # Errors
/// `A-008` if one is not finite, `E-001`, `E-004`.
pub(super) fn each_value(factor: &Factor, mut step: impl FnMut(&[f64])) -> Result<()> {
    let float = float_of(factor.info().dtype).unwrap_or_else(|| unreachable!("adapters hold plain floats only"));
    let mut out = Vec::<f64>::new();
    pieces(factor.info().bytes(), |offset, raw| {
        factor.read(offset, raw)?;
        out.resize(raw.len() / float.size(), 0.0);
        widen(factor, float, offset / float.size() as u64, raw, &mut out)?;
        step(&out);
        Ok(())
    })
}

/// How many values of a tensor are not finite, and the coordinates of the first; `None` if all are, or if it is no plain float.
///
/// # Errors
/// `E-001`, `E-004`.
pub(crate) fn count_nonfinite(source: &dyn TensorSource, name: &str) -> Result<Option<(u64, String)>> {
    let Some((info, float)) = source.info(name).and_then(|info| Some((info, float_of(info.dtype)?))) else { return Ok(None) };
    let (mut out, mut count, mut place) = (Vec::<f64>::new(), 0, None);
    pieces(info.bytes(), |offset, raw| {
        source.read(name, offset, raw)?;
        out.resize(raw.len() / float.size(), 0.0);
        float.widen(raw, &mut out);
        let first = offset / float.size() as u64;
        for (i, _) in out.iter().enumerate().filter(|(_, value)| !value.is_finite()) {
            count += 1;
            place.get_or_insert_with(|| coordinates(info.shape.dims(), first + i as u64));
        }
        Ok(())
    })?;
    Ok(place.map(|place| (count, place)))
}

/// The kernel's name of a dtype; `None` for what is not a plain float.
pub(crate) fn float_of(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::F64 => Some(Float::F64),
        Dtype::F32 => Some(Float::F32),
        Dtype::F16 => Some(Float::F16),
        Dtype::BF16 => Some(Float::BF16),
        _ => None,
    }
}

/// One slice of a stack of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) index: u64,
    pub(super) count: u64,
}

impl Slice {
    /// The element of a factor with which the slice begins.
    fn first(self, factor: &Factor) -> u64 {
        factor.info().shape.elements() / self.count.max(1) * self.index
    }
}

/// Left panel, rows `rows` of the slice's `(rows, rank)`.
pub(super) fn left(
    panel: &Panel,
    slice: Slice,
    rows: Range<u64>,
    rank: u64,
    raw: &mut Vec<u8>,
    out: &mut Vec<f64>,
) -> Result<()> {
    match panel {
        Panel::Direct(factor) => block(factor, slice.first(factor), rows, 0..rank, rank, raw, out),
        Panel::Transposed(factor) => transposed(factor, slice.first(factor), rows, rank, raw, out),
        Panel::One => {
            out.clear();
            out.resize(size(rows.end - rows.start), 1.0);
            Ok(())
        }
    }
}

/// Right panel, columns `cols` of the slice's `(rank, total)`.
pub(super) fn right<V: Value>(
    panel: &Panel,
    slice: Slice,
    cols: Range<u64>,
    rank: u64,
    total: u64,
    raw: &mut Vec<u8>,
    out: &mut Vec<V>,
) -> Result<()> {
    match panel {
        Panel::Direct(factor) => block(factor, slice.first(factor), 0..rank, cols, total, raw, out),
        // B (cols, rank): its rows are contiguous, the panel wants its columns.
        Panel::Transposed(factor) => {
            let mut plain = Vec::new();
            let n = size(cols.end - cols.start);
            block(factor, slice.first(factor), cols, 0..rank, rank, raw, &mut plain)?;
            let rank = size(rank);
            out.clear();
            out.resize(plain.len(), V::default());
            for (j, row) in plain.chunks_exact(rank).enumerate() {
                for (k, value) in row.iter().enumerate() {
                    out[k * n + j] = *value;
                }
            }
            Ok(())
        }
        Panel::One => unreachable!("only left panels are the constant 1"),
    }
}

/// Columns `cols` of A `(rank, total)`, transposed: `(cols, rank)`.
fn transposed(factor: &Factor, first: u64, cols: Range<u64>, rank: u64, raw: &mut Vec<u8>, out: &mut Vec<f64>) -> Result<()> {
    let total = factor.info().shape.dims().last().copied().unwrap_or(0);
    let mut plain = Vec::new();
    let n = size(cols.end - cols.start);
    block(factor, first, 0..rank, cols, total, raw, &mut plain)?;
    let rank = size(rank);
    out.clear();
    out.resize(plain.len(), 0.0);
    for (k, row) in plain.chunks_exact(n.max(1)).enumerate() {
        for (j, value) in row.iter().enumerate() {
            out[j * rank + k] = *value;
        }
    }
    Ok(())
}

/// A block of a row-major matrix with `total` columns that begins at element `first`, in one read if the rows are whole.
pub(super) fn block<V: Value>(
    factor: &Factor,
    first: u64,
    rows: Range<u64>,
    cols: Range<u64>,
    total: u64,
    raw: &mut Vec<u8>,
    out: &mut Vec<V>,
) -> Result<()> {
    let float = float_of(factor.info().dtype).unwrap_or_else(|| unreachable!("adapters hold plain floats only"));
    let width = cols.end - cols.start;
    out.clear();
    out.resize(size((rows.end - rows.start) * width), V::default());
    if width == total {
        return range(factor, float, first + rows.start * total, raw, out);
    }
    for (row, part) in rows.zip(out.chunks_exact_mut(size(width).max(1))) {
        range(factor, float, first + row * total + cols.start, raw, part)?;
    }
    Ok(())
}

/// Consecutive values from element `first` on.
fn range<V: Value>(factor: &Factor, float: Float, first: u64, raw: &mut Vec<u8>, out: &mut [V]) -> Result<()> {
    raw.clear();
    raw.resize(out.len() * float.size(), 0);
    factor.read(first * float.size() as u64, raw)?;
    widen(factor, float, first, raw, out)
}

/// Widens the values from element `first` on, all of which must be finite.
fn widen<V: Value>(factor: &Factor, float: Float, first: u64, raw: &[u8], out: &mut [V]) -> Result<()> {
    float.widen(raw, out);
    // Unlike a search this vectorises.
    let any = out.iter().fold(false, |any, value| any | !value.wide().is_finite());
    match out.iter().position(|value| any && !value.wide().is_finite()) {
        None => Ok(()),
        Some(at) => Err(nonfinite(factor, first + at as u64, out[at].wide())),
    }
}

/// The error for a value of an adapter that is not finite.
pub(super) fn nonfinite(factor: &Factor, element: u64, value: f64) -> Error {
    let dims = factor.info().shape.dims();
    let message = format!("{:?} holds {value} at {}", factor.name(), coordinates(dims, element));
    Error::new(rules::FACTORS_FINITE, message)
        .file(factor.source().label())
        .tensor(factor.name())
        .help("the training diverged or the file is damaged; use an earlier checkpoint of the adapter")
}

/// An element's index in every dimension, outermost first.
pub(super) fn coordinates(dims: &[u64], element: u64) -> String {
    let mut rest = element;
    let mut at: Vec<String> = dims
        .iter()
        .rev()
        .map(|&dim| {
            let index = rest % dim.max(1);
            rest /= dim.max(1);
            index.to_string()
        })
        .collect();
    at.reverse();
    format!("[{}]", at.join(", "))
}

/// A count of elements of a block that is in memory.
fn size(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
