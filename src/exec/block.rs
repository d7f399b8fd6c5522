//! One block of one change: read what it starts from and the factors, compute, check that the result is finite. The one place where
//! the bytes of a plan become the slices of a kernel.

use std::ops::Range;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::load::{Slice, block, coordinates, float_of, left, nonfinite, right};
use super::quantised;
use super::run::ExecOptions;
use super::scaled;
use super::tasks::{rank, size_of_value, tiles};
use crate::error::{Error, Result};
use crate::kernel::{self, Dice, Float, Isa, Part, Step, Sums, Tile, Value, update_tile};
use crate::plan::{Change, Contribution, Origin, Panel, Plan, Rounding};
use crate::rules;
use crate::tensor::{Dtype, TensorInfo};

/// What blocks are computed from.
pub(crate) trait Ground: Sync {
    /// The checkpoint's name in messages.
    fn path(&self) -> &Path;

    /// Base values that are not finite are left as they are.
    fn keep_nonfinite(&self) -> bool;

    /// How values are rounded. Default: to the nearest.
    fn rounding(&self) -> Rounding {
        Rounding::Nearest
    }

    /// Fills `buf` with the bytes of the base from `offset` of its file number `shard` on.
    ///
    /// # Errors
    /// `E-001`, `E-004`.
    fn read(&self, shard: usize, offset: u64, buf: &mut [u8]) -> Result<()>;
}

impl Ground for Plan<'_> {
    fn path(&self) -> &Path {
        self.base.path()
    }

    fn keep_nonfinite(&self) -> bool {
        self.keep_nonfinite
    }

    fn rounding(&self) -> Rounding {
        self.output.rounding
    }

    fn read(&self, shard: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.base.shards()[shard].file.read_bytes(offset, buf)
    }
}

/// Buffers of one thread, reused from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    /// What the block starts from, as stored.
    pub(super) base: Vec<u8>,
    /// A result.
    pub(super) out: Vec<u8>,
    /// Several results that lie next to each other.
    pub(super) window: Vec<u8>,
    pub(super) wide: Vec<f64>,
    /// What the block starts from, as F64, where the kernel wants it so.
    widened: Vec<u8>,
    raw: Vec<u8>,
    lefts: Vec<Vec<f64>>,
    single: Rights<f32>,
    double: Rights<f64>,
    pub(super) scaled: scaled::Buffers,
    pub(super) quantised: quantised::Buffers,
    shared: Shared,
}

/// Whether a block may start from what the one before it has read.
#[derive(Default, PartialEq, Eq)]
enum Shared {
    #[default]
    No,
    /// `Scratch::base` holds these bytes of the base: file, offset, length.
    Yes(Option<(usize, u64, usize)>),
}

impl Scratch {
    /// From here on, blocks may start from the same bytes of the base, which nobody changes, or not.
    pub(super) fn share(&mut self, yes: bool) {
        self.shared = if yes { Shared::Yes(None) } else { Shared::No };
    }

    /// A buffer of `len` bytes.
    pub(super) fn buffer(&mut self, len: usize) -> &mut [u8] {
        self.base.resize(len, 0);
        &mut self.base
    }
}

/// Right panels, one per contribution, kept while the blocks of one change and the same columns follow each other.
struct Rights<V> {
    of: Option<(usize, u64, Range<u64>)>,
    panels: Vec<Vec<V>>,
}

impl<V> Default for Rights<V> {
    fn default() -> Self {
        Rights { of: None, panels: Vec::new() }
    }
}

/// Rows and columns of a change as the kernels see it: kernels of convolutions lie in the columns, the slices of a stack below each
/// other; vectors and plain copies are one long row.
pub(super) fn rows_cols(change: &Change<'_>) -> (u64, u64) {
    match change.contributions.first() {
        Some(contribution) if change.info.shape.dims().len() > 1 => change.info.shape.split(contribution.lead),
        _ => match change.quantised.as_ref().filter(|_| change.is_of_scales()) {
            Some(how) => how.grid(),
            None => (1, change.info.shape.elements()),
        },
    }
}

/// The slice in which a block lies, and its rows there.
pub(super) fn in_slice(change: &Change<'_>, rows: &Range<u64>) -> (Slice, Range<u64>) {
    let high = change.slice_rows();
    let index = rows.start / high;
    let count = rows_cols(change).0.div_ceil(high);
    (Slice { index, count }, rows.start - index * high..rows.end - index * high)
}

/// The whole result of one change, in memory, for programs that want a single tensor.
pub(crate) fn compute(ground: &dyn Ground, change: &Change<'_>, options: &ExecOptions) -> Result<(Vec<u8>, Sums)> {
    let isa = if options.portable { Isa::Portable } else { Isa::best() };
    let mut scratch = Scratch::default();
    let (mut bytes, mut sums) = (Vec::new(), Sums::default());
    for (rows, cols) in tiles(change, rank(change), options.tile_bytes.max(64) as u64, true) {
        let count = (rows.end - rows.start) * (cols.end - cols.start) * size_of_value(change);
        let first = bytes.len();
        bytes.resize(first + count as usize, 0);
        sums.add(&compute_block(ground, isa, change, rows, cols, &mut scratch, &mut bytes[first..])?);
    }
    Ok((bytes, sums))
}

/// Computes one block into `out`, which has its length.
///
/// # Errors
/// `A-008`, `A-030`, `A-031`, `E-001`, `E-004`.
pub(super) fn compute_block(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    rows: Range<u64>,
    cols: Range<u64>,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<Sums> {
    let sums = compute_values(ground, isa, change, rows.clone(), cols.clone(), scratch, out)?;
    if sums.nonfinite > 0 {
        return Err(first_nonfinite(ground, change, rows, cols, scratch, out));
    }
    Ok(sums)
}

/// [`compute_block`], whatever the results are.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(super) fn compute_values(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    rows: Range<u64>,
    cols: Range<u64>,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<Sums> {
    if let Some(how) = &change.quantised {
        return quantised::compute(ground, isa, change, how, (&rows, &cols), scratch, out);
    }
    let (_, total) = rows_cols(change);
    let count = ((rows.end - rows.start) * (cols.end - cols.start)) as usize;
    let to = float_of(change.info.dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    let stored = read_origin(ground, change, &rows, &cols, total, scratch)?;
    let from = format_between(ground, change, stored, to);
    if from != stored || is_widened(ground, change) {
        scratch.wide.resize(count, 0.0);
        stored.widen(&scratch.base, &mut scratch.wide);
        patch(change, &rows, &cols, scratch)?;
        scratch.widened.resize(count * 8, 0);
        Float::F64.narrow(&scratch.wide, &mut scratch.widened);
    }
    if change.is_scaled() {
        return scaled::compute(ground, isa, change, &rows, &cols, scratch, out);
    }
    // Taken out, so that the rest of the scratch can be borrowed beside them, and put back for the next block.
    if is_single(change) {
        let mut rights = std::mem::take(&mut scratch.single);
        let sums = apply(ground, isa, change, (from, to), &rows, &cols, scratch, &mut rights, out);
        scratch.single = rights;
        sums
    } else {
        let mut rights = std::mem::take(&mut scratch.double);
        let sums = apply(ground, isa, change, (from, to), &rows, &cols, scratch, &mut rights, out);
        scratch.double = rights;
        sums
    }
}

/// The format in which a kernel takes values that are stored as `stored` and become `to`.
fn format_between(ground: &dyn Ground, change: &Change<'_>, stored: Float, to: Float) -> Float {
    let as_stored = stored == to && ground.rounding() == Rounding::Nearest && change.patches.is_empty() && !change.is_scaled();
    if as_stored { to } else { Float::F64 }
}

/// Are the values of the base widened to F64 before the kernel gets them?
pub(super) fn is_widened(ground: &dyn Ground, change: &Change<'_>) -> bool {
    match (float_of(origin_info(change).dtype), float_of(change.info.dtype)) {
        (Some(stored), Some(to)) => {
            let between = format_between(ground, change, stored, to);
            between != stored || !change.patches.is_empty() || change.is_scaled()
        }
        _ => false,
    }
}

/// Is f32 enough for all factors?
fn is_single(change: &Change<'_>) -> bool {
    change.contributions.iter().flat_map(Contribution::factors).all(|factor| factor.info().dtype != Dtype::F64)
}

/// Loads the panels and computes.
#[expect(clippy::too_many_arguments, reason = "the second half of compute_block, once per width of the panels")]
fn apply<V: Value>(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    (from, to): (Float, Float),
    rows: &Range<u64>,
    cols: &Range<u64>,
    scratch: &mut Scratch,
    rights: &mut Rights<V>,
    out: &mut [u8],
) -> Result<Sums> {
    let (_, total) = rows_cols(change);
    let count = change.contributions.len();
    // A plan's changes stay where they are while it is carried out: the address says which one it is.
    let (slice, within) = in_slice(change, rows);
    let of = (std::ptr::from_ref(change).addr(), slice.index, cols.clone());
    let held = rights.of.replace(of.clone()) == Some(of);
    scratch.lefts.resize_with(count.max(scratch.lefts.len()), Default::default);
    rights.panels.resize_with(count.max(rights.panels.len()), Default::default);
    for ((contribution, l), r) in change.contributions.iter().zip(&mut scratch.lefts).zip(&mut rights.panels) {
        let rank = contribution.rank;
        left(&contribution.left, slice, within.clone(), rank, &mut scratch.raw, l)?;
        if !held && let Err(error) = right(&contribution.right, slice, cols.clone(), rank, total, &mut scratch.raw, r) {
            rights.of = None;
            return Err(error);
        }
    }
    let panels = scratch.lefts.iter().zip(&rights.panels);
    let parts: Vec<Part<'_, V>> = change.contributions.iter().zip(panels).map(|(c, (l, r))| part_of(c, l, r)).collect();
    let steps: Vec<Step> = change.contributions.iter().map(|c| step(ground.rounding(), c)).collect();
    let rounding = match ground.rounding() {
        Rounding::Nearest => kernel::Rounding::Nearest,
        Rounding::Peft | Rounding::PeftSafe => kernel::Rounding::Replay(&steps),
        Rounding::Stochastic { seed } => {
            kernel::Rounding::Stochastic(Dice { key: key(seed, &change.name), first: rows.start * total + cols.start, total })
        }
    };
    let mut tile = Tile {
        from,
        to,
        rounding,
        base: if is_widened(ground, change) { &scratch.widened } else { &scratch.base },
        out,
        cols: (cols.end - cols.start) as usize,
        keep_nonfinite: keeps_nonfinite(ground, change),
    };
    Ok(update_tile(isa, &mut tile, &parts))
}

/// A tensor that only changes its dtype may hold what it likes: nobody adds to it.
pub(super) fn keeps_nonfinite(ground: &dyn Ground, change: &Change<'_>) -> bool {
    matches!(change.origin, Origin::Base { .. }) && (ground.keep_nonfinite() || change.contributions.is_empty())
}

/// When PEFT rounds an update: that of an embedding or of a stack always before the sum, that of a bias never.
fn step(rounding: Rounding, contribution: &Contribution) -> Step {
    let is_bias = matches!(contribution.left, Panel::One);
    match rounding {
        _ if contribution.rounded_apart => Step::Update,
        Rounding::PeftSafe if !is_bias => Step::Update,
        _ => Step::Sum,
    }
}

/// The key of a tensor's random bits, as section 4.3 of `spec/adapter-model.md` defines it.
fn key(seed: u64, tensor: &str) -> u64 {
    let mut hash = Sha256::new();
    hash.update(b"loratool.stochastic.v1\0");
    hash.update(seed.to_le_bytes());
    hash.update(tensor.as_bytes());
    hash.finalize().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn part_of<'s, V>(contribution: &Contribution, left: &'s [f64], right: &'s [V]) -> Part<'s, V> {
    Part { left, right, rank: contribution.rank as usize, scale: contribution.scale }
}

/// What the change starts from.
fn origin_info<'c>(change: &'c Change<'_>) -> &'c TensorInfo {
    match &change.origin {
        Origin::Base { info, .. } => info,
        Origin::Adapter(factor) => factor.info(),
    }
}

/// Reads a block of the values that the change starts from into `scratch.base`, as stored.
fn read_origin(
    ground: &dyn Ground,
    change: &Change<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    total: u64,
    scratch: &mut Scratch,
) -> Result<Float> {
    let float = float_of(origin_info(change).dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    let size = float.size() as u64;
    let width = cols.end - cols.start;
    let read = |element: u64, buf: &mut [u8]| match &change.origin {
        Origin::Base { shard, begin, .. } => ground.read(*shard, begin + element * size, buf),
        Origin::Adapter(factor) => factor.read(element * size, buf),
    };
    let len = ((rows.end - rows.start) * width * size) as usize;
    if let (Shared::Yes(held), Origin::Base { shard, begin, .. }) = (&mut scratch.shared, &change.origin) {
        let wanted = Some((*shard, begin + (rows.start * total + cols.start) * size, len));
        if width == total && *held == wanted && scratch.base.len() == len {
            return Ok(float);
        }
        *held = wanted.filter(|_| width == total);
    }
    scratch.base.resize(len, 0);
    if width == total {
        read(rows.start * total, &mut scratch.base)?;
    } else {
        for (row, buf) in rows.clone().zip(scratch.base.chunks_exact_mut((width * size).max(1) as usize)) {
            read(row * total + cols.start, buf)?;
        }
    }
    Ok(float)
}

/// Reads a block of what a change starts from into `scratch.wide`.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(super) fn widened_origin(
    ground: &dyn Ground,
    change: &Change<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    scratch: &mut Scratch,
) -> Result<()> {
    if let Some(how) = &change.quantised {
        let read = |shard: usize, at: u64, buf: &mut [u8]| ground.read(shard, at, buf);
        let mut scales = Vec::new();
        return quantised::origin(change, how, (rows, cols), read, &mut scratch.raw, (&mut scales, &mut scratch.wide));
    }
    let stored = read_origin(ground, change, rows, cols, rows_cols(change).1, scratch)?;
    scratch.wide.resize(scratch.base.len() / stored.size(), 0.0);
    stored.widen(&scratch.base, &mut scratch.wide);
    patch(change, rows, cols, scratch)
}

/// Puts the rows that are replaced into `scratch.wide`.
fn patch(change: &Change<'_>, rows: &Range<u64>, cols: &Range<u64>, scratch: &mut Scratch) -> Result<()> {
    let Scratch { wide, raw, .. } = scratch;
    patched(change, rows, cols, raw, wide)
}

/// Puts the rows that are replaced into a block of a change, widened.
pub(super) fn patched(
    change: &Change<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    raw: &mut Vec<u8>,
    wide: &mut [f64],
) -> Result<()> {
    if change.patches.is_empty() {
        return Ok(());
    }
    // Without contributions a change is one long row of values.
    let width = change.info.shape.split(1).1.max(1);
    debug_assert!(*rows == (0..1), "a change with replaced rows is one long row");
    let from = change.patches.partition_point(|patch| (patch.row + 1) * width <= cols.start);
    let mut values = Vec::<f64>::new();
    for patch in change.patches[from..].iter().take_while(|patch| patch.row * width < cols.end) {
        let (begin, end) = ((patch.row * width).max(cols.start), ((patch.row + 1) * width).min(cols.end));
        let inside = begin - patch.row * width..end - patch.row * width;
        block(patch.with, 0, patch.index..patch.index + 1, inside, width, raw, &mut values)?;
        wide[(begin - cols.start) as usize..(end - cols.start) as usize].copy_from_slice(&values);
    }
    Ok(())
}

/// Finds the first value of a block that is not finite and says whose fault it is.
fn first_nonfinite(
    ground: &dyn Ground,
    change: &Change<'_>,
    rows: Range<u64>,
    cols: Range<u64>,
    scratch: &Scratch,
    result: &[u8],
) -> Error {
    let (_, total) = rows_cols(change);
    let plain = |dtype| float_of(dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    let to = plain(change.info.dtype);
    let from = if is_widened(ground, change) { Float::F64 } else { to };
    let width = (cols.end - cols.start) as usize;
    let (mut base, mut out) = (vec![0.0f64; result.len() / to.size()], vec![0.0f64; result.len() / to.size()]);
    from.widen(if is_widened(ground, change) { &scratch.widened } else { &scratch.base }, &mut base);
    to.widen(result, &mut out);
    let at = out
        .iter()
        .zip(&base)
        .position(|(m, w)| !m.is_finite() && (w.is_finite() || !keeps_nonfinite(ground, change)))
        .unwrap_or(0);
    let element = (rows.start + (at / width.max(1)) as u64) * total + cols.start + (at % width.max(1)) as u64;
    let coordinates = coordinates(change.info.shape.dims(), element);
    let dtype = change.info.dtype;
    if base[at].is_finite() {
        let what = if change.contributions.is_empty() { "value" } else { "merged value" };
        let message = format!("the {what} of {:?} at {coordinates} overflows {dtype} (base value {:e})", change.name, base[at]);
        return Error::new(rules::RESULT_FINITE, message)
            .file(ground.path())
            .tensor(&change.name)
            .help("write a wider dtype, such as --dtype f32");
    }
    match &change.origin {
        Origin::Adapter(factor) => nonfinite(factor, element, base[at]),
        Origin::Base { .. } => {
            let message = format!("the base holds {} in {:?} at {coordinates}", base[at], change.name);
            Error::new(rules::BASE_FINITE, message)
                .file(ground.path())
                .tensor(&change.name)
                .help("the base is damaged; to leave such values as they are, pass --allow-nonfinite-base")
        }
    }
}
