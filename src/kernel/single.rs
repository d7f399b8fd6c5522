//! 16-bit weights at the speed of f32, with the bits of f64. The update is computed in f32 together with a bound on how far that can
//! be from the f64 sum of the definition; a block in which some value lies nearer to a tie than the bound, where f32 could round the
//! other way, is computed again in f64. So the bits are those of [`tile`](super::tile) whatever the order of the f32 sums.
//!
//! The bound: each fused multiply-add rounds once, by at most u = 2⁻²⁴ of its result (Higham, Accuracy and Stability of Numerical
//! Algorithms, 2nd ed., eq. 2.4), and the k-th result is a prefix of a scalar product, at most ‖l₁…ₖ‖·‖r₁…ₖ‖ by Cauchy and Schwarz. The
//! norms cost little: those of R are shared by all rows of a tile, those of L by all columns of a panel. With 2¹⁶ units of f32 from tie
//! to tie of bf16 and a bound of a few units, about one value in a thousand is in doubt and is computed again by itself.

use super::float::Half;
use super::tile::{BLOCK, Lanes, PANEL, Part, Sums, Tile, exact_delta, update_block};
use super::vector::Vector;

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;
/// Beyond these magnitudes of an update, squares or sums might leave the range of f32.
const RANGE: std::ops::Range<f64> = 1e-15..1e15;
/// f32 holds sums of this many squares without harm; then they are moved to f64.
const LANES: usize = 16;

/// Updates the tile in groups of `ROWS` rows, which share each load of R. A block of columns is `K` registers of kind `V`.
#[inline(always)]
pub(super) fn update<F: Half, V: Vector, const ROWS: usize, const K: usize>(
    tile: &mut Tile<'_>,
    parts: &[Part<'_, f32>],
) -> Sums {
    let (cols, mut sums) = (tile.cols, Lanes::default());
    let (mut ceilings, mut left, mut lone) = (Vec::new(), Vec::new(), Vec::new());
    let mut start = 0;
    while start < cols {
        let end = (start + PANEL).min(cols);
        set_ceilings(parts, start, end, cols, &mut ceilings);
        let group = cols * F::SIZE * ROWS;
        let whole = tile.base.len() / group.max(1);
        let (bases, outs) = (tile.base.chunks(group), tile.out.chunks_mut(group));
        for (index, (base, out)) in bases.zip(outs).enumerate() {
            let row = index * ROWS;
            let rows = Rows { row, start, end, cols, keep_nonfinite: tile.keep_nonfinite };
            if index < whole {
                group_of::<F, V, ROWS, K>(&rows, base, out, parts, &ceilings, &mut left, &mut sums);
            } else {
                for (i, (base, out)) in base.chunks_exact(cols * F::SIZE).zip(out.chunks_exact_mut(cols * F::SIZE)).enumerate() {
                    let rows = Rows { row: row + i, ..rows };
                    group_of::<F, V, 1, K>(&rows, base, out, parts, &ceilings, &mut lone, &mut sums);
                }
            }
        }
        start = end;
    }
    sums.finish()
}

/// Which rows and columns a group is.
#[derive(Clone, Copy)]
struct Rows {
    row: usize,
    start: usize,
    end: usize,
    cols: usize,
    keep_nonfinite: bool,
}

/// For each part and k, the largest norm of the first k + 1 values of a column of R, over columns `start..end`.
#[inline(always)]
fn set_ceilings(parts: &[Part<'_, f32>], start: usize, end: usize, cols: usize, out: &mut Vec<f64>) {
    out.clear();
    for part in parts {
        let mut squares = [0.0f32; PANEL];
        for row in part.right.chunks_exact(cols) {
            let mut top = 0.0f32;
            let (whole, rest) = row[start..end].as_chunks::<LANES>();
            let (sums, last) = squares[..end - start].as_chunks_mut::<LANES>();
            let mut tops = [0.0f32; LANES];
            for (sums, values) in sums.iter_mut().zip(whole) {
                for i in 0..LANES {
                    sums[i] += values[i] * values[i];
                    tops[i] = if sums[i] > tops[i] { sums[i] } else { tops[i] };
                }
            }
            for (sum, value) in last.iter_mut().zip(rest) {
                *sum += value * value;
                top = top.max(*sum);
            }
            out.push(f64::from(tops.iter().fold(top, |top, sum| top.max(*sum))).sqrt());
        }
    }
}

/// The bound of one row; `None` if its update is zero or outside the range that is safe in f32.
#[inline(always)]
fn bound<F: Half>(row: usize, parts: &[Part<'_, f32>], ceilings: &[f64]) -> Option<Bound> {
    let (mut size, mut error, mut first) = (0.0, 0.0, 0);
    for part in parts {
        let (mut square, mut prefixes, mut product) = (0.0, 0.0, 0.0);
        for (l, top) in part.left[row * part.rank..(row + 1) * part.rank].iter().zip(&ceilings[first..]) {
            square += l * l;
            product = square.sqrt() * top;
            prefixes += product;
        }
        // One rounding per product; then two for the scale and one per adapter for the sum. 2⁻¹⁴⁹ for each that may underflow.
        let roundings = U * (prefixes + (parts.len() + 2) as f64 * product) + part.rank as f64 * 2f64.powi(-149);
        error += part.scale.abs() * roundings;
        size += part.scale.abs() * product;
        first += part.rank;
    }
    // 1 % covers the roundings of the norms in f32 and products of roundings, up to a rank of 80,000.
    let top = f64::from(F::LARGEST) - 1.01 * size;
    if !RANGE.contains(&size) || first > 80_000 || top <= 0.0 {
        return None;
    }
    // Rounding down: a value whose bits are no more than these is no larger.
    Some(Bound { slack: (1.01 * error + 2f64.powi(-148)) as f32, top: F::narrow(top).saturating_sub(1) })
}

#[inline(always)]
fn group_of<F: Half, V: Vector, const ROWS: usize, const K: usize>(
    rows: &Rows,
    base: &[u8],
    out: &mut [u8],
    parts: &[Part<'_, f32>],
    ceilings: &[f64],
    left: &mut Vec<[f32; ROWS]>,
    sums: &mut Lanes,
) {
    let Rows { row, start, end, cols, keep_nonfinite } = *rows;
    let mut bounds = [Bound::default(); ROWS];
    let mut safe = true;
    for (i, b) in bounds.iter_mut().enumerate() {
        match bound::<F>(row + i, parts, ceilings) {
            Some(found) => *b = found,
            None => safe = false,
        }
    }
    left.clear();
    for part in parts {
        for k in 0..part.rank {
            left.push(std::array::from_fn(|i| part.left[(row + i) * part.rank + k] as f32));
        }
    }
    let mut squares = Squares::default();
    let mut delta = [[0.0f32; BLOCK]; ROWS];
    let mut at = start;
    while at < end {
        let n = (end - at).min(BLOCK);
        let fits = safe && n == BLOCK;
        // No closure: unless it happens to be inlined, one is compiled for the portable instruction set.
        if fits {
            products::<V, ROWS, K>(left, at, cols, parts, &mut delta);
        }
        for i in 0..ROWS {
            let bytes = (i * cols + at) * F::SIZE..(i * cols + at + n) * F::SIZE;
            let (base, out) = (&base[bytes.clone()], &mut out[bytes]);
            let place = Place { row: row + i, at, cols };
            let done = match (base.first_chunk(), out.first_chunk_mut()) {
                (Some(base), Some(out)) if fits => round::<F>(base, out, &delta[i], bounds[i], &place, parts, &mut squares),
                _ => false,
            };
            if !done {
                update_block::<F, F, f32, true>(row + i, at, n, cols, parts, base, out, keep_nonfinite, sums);
            }
        }
        at += n;
    }
    squares.move_to(sums);
}

/// `Σ scale · L · R` for `ROWS` rows and one block of columns, in f32: `K` registers per row.
#[inline(always)]
fn products<V: Vector, const ROWS: usize, const K: usize>(
    left: &[[f32; ROWS]],
    at: usize,
    cols: usize,
    parts: &[Part<'_, f32>],
    delta: &mut [[f32; BLOCK]; ROWS],
) {
    *delta = [[0.0; BLOCK]; ROWS];
    let mut first = 0;
    for part in parts {
        let mut product = [[V::splat(0.0); K]; ROWS];
        for (k, l) in left[first..first + part.rank].iter().enumerate() {
            let right = &part.right[k * cols + at..][..BLOCK];
            let mut r = [V::splat(0.0); K];
            for i in 0..K {
                r[i] = V::load(&right[i * (BLOCK / K)..]);
            }
            for row in 0..ROWS {
                let l = V::splat(l[row]);
                for i in 0..K {
                    product[row][i] = product[row][i].add_product(l, r[i]);
                }
            }
        }
        let scale = V::splat(part.scale as f32);
        for row in 0..ROWS {
            for i in 0..K {
                let place = &mut delta[row][i * (BLOCK / K)..];
                V::load(place).add_product(scale, product[row][i]).store(place);
            }
        }
        first += part.rank;
    }
}

/// What is known of a row before it is computed.
#[derive(Clone, Copy, Default)]
struct Bound {
    /// How far the f32 update can be from the one in f64.
    slack: f32,
    /// The bits of the largest base value that fits: neither its square nor its sum with the update leaves the range.
    top: u16,
}

/// Where a block starts.
struct Place {
    row: usize,
    at: usize,
    cols: usize,
}

/// Adds, rounds, stores and sums one block of one row. False, with nothing summed, if a base value is too large.
#[inline(always)]
fn round<F: Half>(
    base: &[u8; 2 * BLOCK],
    out: &mut [u8; 2 * BLOCK],
    delta: &[f32; BLOCK],
    bound: Bound,
    place: &Place,
    parts: &[Part<'_, f32>],
    squares: &mut Squares,
) -> bool {
    let mut misfits = 0u16;
    for raw in base.as_chunks::<2>().0 {
        misfits |= u16::from(F::load(raw) & 0x7fff > bound.top);
    }
    if misfits != 0 {
        return false;
    }
    let mut doubts = 0u32;
    let halves = base.as_chunks::<{ 2 * LANES }>().0.iter().zip(out.as_chunks_mut::<{ 2 * LANES }>().0);
    for ((base, out), delta) in halves.zip(delta.as_chunks::<LANES>().0) {
        // A register's width at a time from load to store: what is stored in one width and loaded in another stalls.
        let (base, out) = (base.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
        for i in 0..LANES {
            let stored = F::load(&base[i]);
            let w = F::widen_single(stored);
            let s = w + delta[i];
            let bits = F::narrow_single(s);
            doubts |= u32::from(is_near::<F>(s, bound.slack));
            squares.base[i] += w * w;
            squares.delta[i] += delta[i] * delta[i];
            squares.applied[i] += (F::widen_single(bits) - w) * delta[i];
            squares.changed[i] += u32::from(stored != bits);
            F::store(bits, &mut out[i]);
        }
    }
    if doubts != 0 {
        settle::<F>(base, out, delta, bound, place, parts, squares);
    }
    true
}

/// Computes the values of a block that are in doubt again, and puts the sums right.
#[inline(always)]
fn settle<F: Half>(
    base: &[u8; 2 * BLOCK],
    out: &mut [u8; 2 * BLOCK],
    delta: &[f32; BLOCK],
    bound: Bound,
    place: &Place,
    parts: &[Part<'_, f32>],
    squares: &mut Squares,
) {
    let (base, out) = (base.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
    let mut near = [0u8; BLOCK];
    for i in 0..BLOCK {
        near[i] = u8::from(is_near::<F>(F::widen_single(F::load(&base[i])) + delta[i], bound.slack));
    }
    // Eight at a time, for nearly all are not.
    let groups = near.as_chunks::<8>().0.iter().enumerate();
    let waiting = groups.filter(|(_, group)| u64::from_le_bytes(**group) != 0).flat_map(|(n, _)| 8 * n..8 * n + 8);
    for i in waiting.filter(|&i| near[i] != 0) {
        let (stored, before) = (F::load(&base[i]), F::load(&out[i]));
        let w = F::widen_single(stored);
        let t = exact_delta(place.row, place.at + i, place.cols, parts);
        let bits = if t == 0.0 { stored } else { F::narrow(f64::from(w) + t) };
        let lane = i % LANES;
        squares.applied[lane] += (F::widen_single(bits) - F::widen_single(before)) * delta[i];
        squares.changed[lane] = squares.changed[lane] + u32::from(stored != bits) - u32::from(stored != before);
        F::store(bits, &mut out[i]);
    }
}

/// May the exact sum round to another value than `s` does?
#[inline(always)]
fn is_near<F: Half>(s: f32, slack: f32) -> bool {
    // 2⁻²² covers the rounding of s itself and what is lost in comparing.
    ((s - F::tie(s)).abs() <= slack + s.abs() * 2.0f32.powi(-22)) | (s.abs() < F::SMALLEST)
}

/// Sums of one group of rows over one panel, in f32: at most `PANEL · ROWS / LANES` values each.
#[derive(Default)]
struct Squares {
    base: [f32; LANES],
    delta: [f32; LANES],
    applied: [f32; LANES],
    changed: [u32; LANES],
}

impl Squares {
    #[inline(always)]
    fn move_to(self, sums: &mut Lanes) {
        let total = |lanes: [f32; LANES]| lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
        sums.add_totals(
            total(self.base),
            total(self.delta),
            total(self.applied),
            self.changed.iter().map(|&n| u64::from(n)).sum(),
        );
    }
}
