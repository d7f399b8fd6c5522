//! The update of one tile: widen, add the low-rank products, round once, and take the sums that the report needs, in one pass.
//!
//! A tile is a block of rows of W, `(rows, cols)`. For each adapter there is a left factor L `(rows, rank)` and a right factor
//! R `(rank, cols)`, both widened to f64: for a linear layer L is rows of B and R is A; the other kinds transpose while loading.

use super::float::{BF16, F16, Float, Format};

/// The contribution of one adapter: `scale · L · R`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    /// `(rows, rank)`, row-major.
    pub(crate) left: &'a [f64],
    /// `(rank, cols)`, row-major.
    pub(crate) right: &'a [f64],
    /// Number of columns of L and of rows of R; at least 1.
    pub(crate) rank: usize,
    /// What multiplies the product: weight times effective scale.
    pub(crate) scale: f64,
}

/// One tile of W, raw as stored, and where the result goes.
#[derive(Debug)]
pub(crate) struct Tile<'a> {
    /// Format of `base`: that of `out`, or F64.
    pub(crate) from: Float,
    /// Format of `out`.
    pub(crate) to: Float,
    /// W, `rows * cols` values.
    pub(crate) base: &'a [u8],
    /// The result, `rows * cols` values.
    pub(crate) out: &'a mut [u8],
    /// Columns.
    pub(crate) cols: usize,
    /// Leave a base value alone that is not finite, instead of reporting it.
    pub(crate) keep_nonfinite: bool,
}

/// How many values differ in each of the narrower formats.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Narrower {
    pub(crate) bf16: u64,
    pub(crate) f16: u64,
}

/// Sums over a tile. D is the wanted update before rounding, M the result.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Sums {
    /// ‖W‖².
    pub(crate) base: f64,
    /// ‖D‖².
    pub(crate) delta: f64,
    /// ⟨M − W, D⟩: what of the update arrived.
    pub(crate) applied: f64,
    /// Values whose bits changed.
    pub(crate) changed: u64,
    /// Values of an F32 or F64 result that would still differ from the base if both were rounded to BF16, and to F16.
    pub(crate) changed_in: Narrower,
    /// Results that are not finite. The caller looks for the first one.
    pub(crate) nonfinite: u64,
    /// Base values that are not finite and were left alone.
    pub(crate) kept: u64,
}

impl Sums {
    /// Adds the sums of another tile.
    pub(crate) fn add(&mut self, other: &Sums) {
        self.base += other.base;
        self.delta += other.delta;
        self.applied += other.applied;
        self.changed += other.changed;
        self.changed_in.bf16 += other.changed_in.bf16;
        self.changed_in.f16 += other.changed_in.f16;
        self.nonfinite += other.nonfinite;
        self.kept += other.kept;
    }
}

/// Columns that are computed together: 32 f64 are four AVX-512 or eight AVX2 registers, which leaves room for operands.
const BLOCK: usize = 32;
/// Columns that are swept row by row before the next ones, so that the part of R that is used stays in the L2 cache: at rank 64
/// this is 256 KiB.
const PANEL: usize = 512;

/// Updates the tile: W is stored as `F`, the result as `G`. `F` and `G` are the same format, or `F` is F64 (a base that was
/// widened before). Inlined into one function per instruction set and pair of formats.
#[inline(always)]
pub(super) fn update<F: Format, G: Format>(tile: &mut Tile<'_>, parts: &[Part<'_>]) -> Sums {
    let cols = tile.cols;
    let mut sums = Lanes::default();
    let mut start = 0;
    while start < cols {
        let end = (start + PANEL).min(cols);
        let rows = tile.base.chunks_exact(cols * F::SIZE).zip(tile.out.chunks_exact_mut(cols * G::SIZE));
        for (row, (base, out)) in rows.enumerate() {
            let mut at = start;
            while at + BLOCK <= end {
                block::<F, G, BLOCK>(base, out, row, at, cols, parts, tile.keep_nonfinite, &mut sums);
                at += BLOCK;
            }
            while at < end {
                block::<F, G, 1>(base, out, row, at, cols, parts, tile.keep_nonfinite, &mut sums);
                at += 1;
            }
        }
        start = end;
    }
    sums.finish()
}

/// `N` values of one row. The order of the sum over the rank is ascending, the order over adapters is as given, and both are
/// independent of `N`, so every element has the same bits wherever the tile's borders lie.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "an inner loop, inlined; a struct would only rename them")]
fn block<F: Format, G: Format, const N: usize>(
    base: &[u8],
    out: &mut [u8],
    row: usize,
    at: usize,
    cols: usize,
    parts: &[Part<'_>],
    keep_nonfinite: bool,
    sums: &mut Lanes,
) {
    let mut delta = [0.0f64; N];
    for part in parts {
        let left = &part.left[row * part.rank..(row + 1) * part.rank];
        let mut product = [0.0f64; N];
        for (k, &l) in left.iter().enumerate() {
            let right = &part.right[k * cols + at..k * cols + at + N];
            for (p, &r) in product.iter_mut().zip(right) {
                *p += l * r;
            }
        }
        for (d, p) in delta.iter_mut().zip(product) {
            *d += part.scale * p;
        }
    }
    let base = &base[at * F::SIZE..(at + N) * F::SIZE];
    let out = &mut out[at * G::SIZE..(at + N) * G::SIZE];
    for i in 0..N {
        let raw = &base[i * F::SIZE..(i + 1) * F::SIZE];
        let place = &mut out[i * G::SIZE..(i + 1) * G::SIZE];
        let w = F::load(raw);
        let d = delta[i];
        G::store(w + d, place);
        // Nothing to add, or nothing to add it to: the bits stay, with the sign of a zero and the payload of a NaN.
        let keep = d == 0.0 || (keep_nonfinite && !w.is_finite());
        if keep {
            if F::SIZE == G::SIZE { place.copy_from_slice(raw) } else { G::store(w, place) }
        }
        let m = G::load(place);
        let lane = i % LANES;
        let (wf, kept) = if w.is_finite() { (w, 0) } else { (0.0, u64::from(keep_nonfinite)) };
        let nonfinite = !m.is_finite() && kept == 0;
        let moved = if m.is_finite() && w.is_finite() { m - w } else { 0.0 };
        sums.base[lane] += wf * wf;
        sums.delta[lane] += d * d;
        sums.applied[lane] += moved * d;
        sums.changed[lane] += u64::from(m.to_bits() != w.to_bits());
        if G::SIZE > 2 {
            sums.changed_bf16[lane] += u64::from(differ::<BF16>(w, m));
            sums.changed_f16[lane] += u64::from(differ::<F16>(w, m));
        }
        sums.nonfinite[lane] += u64::from(nonfinite);
        sums.kept[lane] += kept;
    }
}

/// Do two values differ after rounding to a 16-bit format?
#[inline(always)]
fn differ<H: Format>(w: f64, m: f64) -> bool {
    let bits = |value| {
        let mut raw = [0; 2];
        H::store(value, &mut raw);
        raw
    };
    bits(w) != bits(m)
}

/// Independent partial sums, so that the compiler may keep them in vector registers.
const LANES: usize = 8;

#[derive(Default)]
struct Lanes {
    base: [f64; LANES],
    delta: [f64; LANES],
    applied: [f64; LANES],
    changed: [u64; LANES],
    changed_bf16: [u64; LANES],
    changed_f16: [u64; LANES],
    nonfinite: [u64; LANES],
    kept: [u64; LANES],
}

impl Lanes {
    fn finish(self) -> Sums {
        Sums {
            base: self.base.iter().sum(),
            delta: self.delta.iter().sum(),
            applied: self.applied.iter().sum(),
            changed: self.changed.iter().sum(),
            changed_in: Narrower { bf16: self.changed_bf16.iter().sum(), f16: self.changed_f16.iter().sum() },
            nonfinite: self.nonfinite.iter().sum(),
            kept: self.kept.iter().sum(),
        }
    }
}
