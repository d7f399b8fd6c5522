//! The update of one tile: widen, add the low-rank products, round once, and take the sums that the report needs, in one pass.
//!
//! A tile is a block of rows of W, `(rows, cols)`. For each adapter there is a left factor L `(rows, rank)` and a right factor
//! R `(rank, cols)`, widened without loss: for a linear layer L is rows of B and R is A; the other kinds transpose while loading.

use super::float::{BF16, F16, Float, Format, Value};
use super::replay::Step;
use super::stochastic::Dice;

/// The contribution of one adapter: `scale · L · R`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a, V> {
    /// `(rows, rank)`, row-major; each is a value of `V`.
    pub(crate) left: &'a [f64],
    /// `(rank, cols)`, row-major.
    pub(crate) right: &'a [V],
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
    /// How sums become values of `out`.
    pub(crate) rounding: Rounding<'a>,
}

/// How the sum of base and updates becomes a value of the format.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rounding<'a> {
    /// The nearest, once.
    Nearest,
    /// As PEFT does it, with a step for each part. `from` is F64.
    Replay(&'a [Step]),
    /// One of the two around it, by chance. `from` is F64.
    Stochastic(Dice),
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
    /// Of a result in another format than the base: what rounding took, ‖M − W − D‖².
    pub(crate) lost: f64,
    /// Of such a result: values that are not zero before rounding, and zero after it.
    pub(crate) flushed: u64,
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
        self.lost += other.lost;
        self.flushed += other.flushed;
    }
}

/// Columns that are computed together: 32 f64 are four AVX-512 or eight AVX2 registers, which leaves room for operands.
pub(super) const BLOCK: usize = 32;
/// Columns that are swept row by row before the next ones, so that the part of R that is used stays in the L2 cache: at rank 64
/// this is 256 KiB.
pub(super) const PANEL: usize = 512;

/// Updates the tile: W is stored as `F`, the result as `G`. `F` and `G` are the same format, or `F` is F64 (a base that was
/// widened before). Inlined into one function per instruction set and pair of formats.
#[inline(always)]
pub(super) fn update<F: Format, G: Format, V: Value, const FMA: bool>(tile: &mut Tile<'_>, parts: &[Part<'_, V>]) -> Sums {
    let cols = tile.cols;
    let mut sums = Lanes::default();
    let mut start = 0;
    while start < cols {
        let end = (start + PANEL).min(cols);
        let rows = tile.base.chunks_exact(cols * F::SIZE).zip(tile.out.chunks_exact_mut(cols * G::SIZE));
        for (row, (base, out)) in rows.enumerate() {
            let mut at = start;
            while at < end {
                let n = (end - at).min(BLOCK);
                let (base, out) = (&base[at * F::SIZE..(at + n) * F::SIZE], &mut out[at * G::SIZE..(at + n) * G::SIZE]);
                update_block::<F, G, V, FMA>(row, at, n, cols, parts, base, out, tile.keep_nonfinite, &mut sums);
                at += n;
            }
        }
        start = end;
    }
    sums.finish()
}

/// The updates alone, of all rows that fit in `out`, in f64: what [`update`] adds to the base. Are all of them finite?
#[inline(always)]
pub(super) fn deltas<V: Value, const FMA: bool>(cols: usize, parts: &[Part<'_, V>], out: &mut [f64]) -> bool {
    let (mut start, mut finite) = (0, true);
    while start < cols {
        let end = (start + PANEL).min(cols);
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            let (blocks, rest) = out[start..end].as_chunks_mut::<BLOCK>();
            for (i, block) in blocks.iter_mut().enumerate() {
                *block = delta::<V, BLOCK, FMA>(row, start + i * BLOCK, cols, parts);
                finite &= all_finite(block);
            }
            let at = end - rest.len();
            rest.copy_from_slice(&short_delta::<V, FMA>(row, at, rest.len(), cols, parts)[..rest.len()]);
            finite &= all_finite(rest);
        }
        start = end;
    }
    finite
}

#[inline(always)]
fn all_finite(values: &[f64]) -> bool {
    values.iter().fold(true, |all, value| all & value.is_finite())
}

/// Updates `n` values of one row, at most a block, from column `at` on.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "a place, two slices of bytes and what goes in; a struct for it would be built per block"
)]
pub(super) fn update_block<F: Format, G: Format, V: Value, const FMA: bool>(
    row: usize,
    at: usize,
    n: usize,
    cols: usize,
    parts: &[Part<'_, V>],
    base: &[u8],
    out: &mut [u8],
    keep_nonfinite: bool,
    sums: &mut Lanes,
) {
    block::<F, G>(base, out, &delta_of::<V, FMA>(row, at, n, cols, parts), keep_nonfinite, sums);
}

/// The update of `n` values of one row. A short block is computed as a whole one whose missing values are zero: they change nothing, and
/// no sum.
#[inline(always)]
pub(super) fn delta_of<V: Value, const FMA: bool>(
    row: usize,
    at: usize,
    n: usize,
    cols: usize,
    parts: &[Part<'_, V>],
) -> [f64; BLOCK] {
    if n == BLOCK { delta::<V, BLOCK, FMA>(row, at, cols, parts) } else { short_delta::<V, FMA>(row, at, n, cols, parts) }
}

/// The update of `N` values of one row. The order of the sum over the rank is ascending, the order over adapters is as given, and both
/// are independent of `N`, so every element has the same bits wherever the tile's borders lie.
#[inline(always)]
fn delta<V: Value, const N: usize, const FMA: bool>(row: usize, at: usize, cols: usize, parts: &[Part<'_, V>]) -> [f64; N] {
    let mut delta = [0.0f64; N];
    for part in parts {
        let left = &part.left[row * part.rank..(row + 1) * part.rank];
        let mut product = [0.0f64; N];
        for (k, &l) in left.iter().enumerate() {
            let right = &part.right[k * cols + at..k * cols + at + N];
            for (p, &r) in product.iter_mut().zip(right) {
                // Where the product is exact, fusing changes no bit.
                *p = if FMA && V::EXACT { l.mul_add(r.wide(), *p) } else { *p + l * r.wide() };
            }
        }
        for (d, p) in delta.iter_mut().zip(product) {
            *d += part.scale * p;
        }
    }
    delta
}

/// [`delta`] of the last `n` values of a row.
#[inline(always)]
fn short_delta<V: Value, const FMA: bool>(row: usize, at: usize, n: usize, cols: usize, parts: &[Part<'_, V>]) -> [f64; BLOCK] {
    let mut all = [0.0; BLOCK];
    for (i, d) in all.iter_mut().enumerate().take(n) {
        [*d] = delta::<V, 1, FMA>(row, at + i, cols, parts);
    }
    all
}

/// Adds, rounds, stores and sums. Each step is a loop of its own over a whole block, since that is what the compiler vectorises.
#[inline(always)]
fn block<F: Format, G: Format>(base: &[u8], out: &mut [u8], delta: &[f64; BLOCK], keep_nonfinite: bool, sums: &mut Lanes) {
    let mut stored = [F::Bits::default(); BLOCK];
    for (bits, raw) in stored.iter_mut().zip(base.chunks_exact(F::SIZE)) {
        *bits = F::load(raw);
    }
    let mut w = [0.0f64; BLOCK];
    for (w, bits) in w.iter_mut().zip(stored) {
        *w = F::widen(bits);
    }
    let mut bits = [G::Bits::default(); BLOCK];
    for (i, bits) in bits.iter_mut().enumerate() {
        // Nothing to add, or nothing to add it to: the value stays, with the sign of a zero.
        let keep = (delta[i] == 0.0) | (keep_nonfinite & !w[i].is_finite());
        let sum = w[i] + delta[i];
        *bits = G::narrow(if keep { w[i] } else { sum });
    }
    for (bits, raw) in bits.iter().zip(out.chunks_exact_mut(G::SIZE)) {
        G::store(*bits, raw);
    }
    let mut m = [0.0f64; BLOCK];
    for (m, bits) in m.iter_mut().zip(bits) {
        *m = G::widen(bits);
    }
    if sums.add(&w, &m, delta, keep_nonfinite) && F::SIZE == G::SIZE {
        // Rounding a NaN to its own format may lose its payload; what is kept is kept bit by bit.
        for (i, (raw, place)) in base.chunks_exact(F::SIZE).zip(out.chunks_exact_mut(G::SIZE)).enumerate() {
            if !w[i].is_finite() && (keep_nonfinite || delta[i] == 0.0) {
                place.copy_from_slice(raw);
            }
        }
    }
    if G::SIZE > 2 {
        sums.narrowed::<BF16, F16>(&w, &m);
    }
    if F::SIZE > G::SIZE {
        sums.converted(&w, &m, delta);
    }
}

/// Independent partial sums, so that the compiler may keep them in vector registers.
const LANES: usize = 8;

#[derive(Default)]
pub(super) struct Lanes {
    base: [f64; LANES],
    delta: [f64; LANES],
    applied: [f64; LANES],
    /// Signed: a correction may come before what it corrects.
    changed: [i64; LANES],
    changed_bf16: [u64; LANES],
    changed_f16: [u64; LANES],
    nonfinite: u64,
    kept: u64,
    lost: [f64; LANES],
    flushed: [u64; LANES],
}

impl Lanes {
    /// Takes in a block of values of `G` that were made from wider ones.
    #[inline(always)]
    pub(super) fn take<G: Format>(&mut self, w: &[f64; BLOCK], m: &[f64; BLOCK], delta: &[f64; BLOCK], keep_nonfinite: bool) {
        self.add(w, m, delta, keep_nonfinite);
        if G::SIZE > 2 {
            self.narrowed::<BF16, F16>(w, m);
        }
        self.converted(w, m, delta);
    }

    /// What a change of format took away.
    #[inline(always)]
    fn converted(&mut self, w: &[f64; BLOCK], m: &[f64; BLOCK], delta: &[f64; BLOCK]) {
        for start in (0..BLOCK).step_by(LANES) {
            for lane in 0..LANES {
                let (sum, m) = (w[start + lane] + delta[start + lane], m[start + lane]);
                let miss = if sum.is_finite() & m.is_finite() { sum - m } else { 0.0 };
                self.lost[lane] += miss * miss;
                self.flushed[lane] += u64::from((m == 0.0) & (sum != 0.0));
            }
        }
    }

    /// Takes in a block. True if it has base values that are not finite.
    #[inline(always)]
    fn add(&mut self, w: &[f64; BLOCK], m: &[f64; BLOCK], delta: &[f64; BLOCK], keep_nonfinite: bool) -> bool {
        let mut infinite = 0u64;
        for i in 0..BLOCK {
            infinite += u64::from(!(w[i].is_finite() & m[i].is_finite()));
        }
        if infinite > 0 {
            return self.add_slowly(w, m, delta, keep_nonfinite);
        }
        for start in (0..BLOCK).step_by(LANES) {
            for lane in 0..LANES {
                let (w, m, d) = (w[start + lane], m[start + lane], delta[start + lane]);
                self.base[lane] += w * w;
                self.delta[lane] += d * d;
                self.applied[lane] += (m - w) * d;
                self.changed[lane] += i64::from(m.to_bits() != w.to_bits());
            }
        }
        false
    }

    /// Takes in lanes of sums that were made in f32: ‖W‖², ‖D‖², ⟨M − W, D⟩.
    #[inline(always)]
    pub(super) fn add_singles(&mut self, [base, delta, applied]: &[[f32; BLOCK]; 3], changed: i64) {
        for start in (0..BLOCK).step_by(LANES) {
            for lane in 0..LANES {
                self.base[lane] += f64::from(base[start + lane]);
                self.delta[lane] += f64::from(delta[start + lane]);
                self.applied[lane] += f64::from(applied[start + lane]);
            }
        }
        self.changed[0] += changed;
    }

    /// Puts right what was summed of a value that was computed again.
    #[inline(always)]
    pub(super) fn correct(&mut self, applied: f64, changed: i64) {
        self.applied[0] += applied;
        self.changed[0] += changed;
    }

    /// A block with values that are not finite: they are counted, and the sums go on without them.
    #[cold]
    fn add_slowly(&mut self, w: &[f64; BLOCK], m: &[f64; BLOCK], delta: &[f64; BLOCK], keep_nonfinite: bool) -> bool {
        let mut any = false;
        for i in 0..BLOCK {
            any |= !w[i].is_finite();
            match (w[i].is_finite(), m[i].is_finite()) {
                (true, true) => {
                    self.base[0] += w[i] * w[i];
                    self.delta[0] += delta[i] * delta[i];
                    self.applied[0] += (m[i] - w[i]) * delta[i];
                    self.changed[0] += i64::from(m[i].to_bits() != w[i].to_bits());
                }
                (false, _) if keep_nonfinite => self.kept += 1,
                _ => self.nonfinite += 1,
            }
        }
        any
    }

    /// Counts the values that differ after rounding to narrower formats.
    #[inline(always)]
    fn narrowed<H1: Format, H2: Format>(&mut self, w: &[f64; BLOCK], m: &[f64; BLOCK]) {
        for start in (0..BLOCK).step_by(LANES) {
            for lane in 0..LANES {
                let (w, m) = (w[start + lane], m[start + lane]);
                self.changed_bf16[lane] += u64::from(H1::narrow(w) != H1::narrow(m));
                self.changed_f16[lane] += u64::from(H2::narrow(w) != H2::narrow(m));
            }
        }
    }

    pub(super) fn finish(self) -> Sums {
        Sums {
            base: self.base.iter().sum(),
            delta: self.delta.iter().sum(),
            applied: self.applied.iter().sum(),
            changed: self.changed.iter().sum::<i64>().max(0) as u64,
            changed_in: Narrower { bf16: self.changed_bf16.iter().sum(), f16: self.changed_f16.iter().sum() },
            nonfinite: self.nonfinite,
            kept: self.kept,
            lost: self.lost.iter().sum(),
            flushed: self.flushed.iter().sum(),
        }
    }
}
