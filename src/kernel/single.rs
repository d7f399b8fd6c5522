//! 16-bit weights at the speed of f32, with the bits of f64. The update is computed in f32 together with a bound on how far that can
//! be from the f64 sum of the definition; a value that lies nearer to a tie than the bound, where f32 could round the other way, is
//! computed again in f64. So the bits are those of [`tile`](super::tile) whatever the order of the f32 sums.
//!
//! The bound: each fused multiply-add rounds once, by at most u = 2⁻²⁴ of its result (Higham, Accuracy and Stability of Numerical
//! Algorithms, 2nd ed., eq. 2.4), and the k-th result is a prefix of a scalar product, at most ‖l₁…ₖ‖·‖r₁…ₖ‖ by Cauchy and Schwarz. The
//! norms cost little: those of R are shared by all rows of a tile, those of L by all columns. With 2¹⁶ units of f32 from tie to tie of
//! bf16 and a bound of a few units, about one value in a thousand is in doubt.

use std::ops::Range;

use super::float::Format;
use super::half::Half;
use super::tile::{BLOCK, Lanes, Part, Sums, Tile, update_block};
use super::vector::Vector;

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;
/// Beyond these magnitudes of an update, squares or sums might leave the range of f32.
const RANGE: Range<f64> = 1e-15..1e15;
/// The same for what an update is a product of. Below, squares that f32 loses would be more than the bound allows for.
const FACTOR_RANGE: Range<f64> = 1e-12..1e15;
/// Values of R that are packed at a time: 16 KiB, so that they stay in the L1 cache beside the weights.
const PACKED: usize = 8192;

/// Updates the tile in groups of `ROWS` rows, which share each load of R. A block of columns is `K` registers of kind `V`.
#[inline(always)]
pub(super) fn update<F: Half, V: Vector, const ROWS: usize, const K: usize>(
    tile: &mut Tile<'_>,
    parts: &[Part<'_, f32>],
) -> Sums {
    const { assert!(V::LANES * K == BLOCK && K.is_multiple_of(2), "a block is K registers, in pairs") };
    let mut sums = Lanes::default();
    let bytes = tile.cols * F::SIZE;
    let bounds = bounds::<F>(tile, parts);
    let grouped = bounds.len() / ROWS * ROWS;
    let (base, base_rest) = tile.base.split_at(grouped * bytes);
    let (out, out_rest) = tile.out.split_at_mut(grouped * bytes);
    let (bounds, bounds_rest) = bounds.split_at(grouped);
    let shared = Shared { cols: tile.cols, parts, keep_nonfinite: tile.keep_nonfinite };
    shared.update_rows::<F, V, ROWS, K>(0, base, out, bounds, &mut sums);
    shared.update_rows::<F, V, 1, K>(grouped, base_rest, out_rest, bounds_rest, &mut sums);
    sums.finish()
}

/// A block of columns of a right factor, on cache lines of its own and in the order of [`Vector::load_halves`].
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Block([f32; BLOCK]);

/// What the rows of a tile have in common.
struct Shared<'s, 'p> {
    cols: usize,
    parts: &'s [Part<'p, f32>],
    keep_nonfinite: bool,
}

impl Shared<'_, '_> {
    /// Updates rows from number `first` of the tile on, a multiple of `ROWS` of them.
    #[inline(always)]
    fn update_rows<F: Half, V: Vector, const ROWS: usize, const K: usize>(
        &self,
        first: usize,
        base: &[u8],
        out: &mut [u8],
        bounds: &[Option<Bound>],
        sums: &mut Lanes,
    ) {
        if bounds.is_empty() {
            return;
        }
        let left = pack_left::<ROWS>(self.parts, first..first + bounds.len());
        let rank = self.parts.iter().map(|part| part.rank).sum::<usize>().max(1);
        let panel = (PACKED / rank / BLOCK * BLOCK).max(BLOCK);
        let group = self.cols * F::SIZE * ROWS;
        let mut right = Vec::new();
        for start in (0..self.cols).step_by(panel) {
            let columns = start..self.cols.min(start + panel);
            pack_right::<V>(self.parts, &columns, self.cols, &mut right);
            let bytes = base.chunks_exact(group).zip(out.chunks_exact_mut(group));
            let factors = left.chunks(rank).zip(bounds.as_chunks::<ROWS>().0);
            for (index, ((base, out), (left, bounds))) in bytes.zip(factors).enumerate() {
                let mut group =
                    Group { row: first + ROWS * index, base, out, bounds: known(bounds), left, right: &right, shared: self };
                group.update::<F, V, K>(&columns, sums);
            }
        }
    }
}

/// The bounds of all rows, if there are.
#[inline(always)]
fn known<const ROWS: usize>(bounds: &[Option<Bound>; ROWS]) -> Option<[Bound; ROWS]> {
    let mut all = [Bound::default(); ROWS];
    for i in 0..ROWS {
        match bounds[i] {
            Some(bound) => all[i] = bound,
            None => return None,
        }
    }
    Some(all)
}

/// What is known of a row before it is computed.
#[derive(Clone, Copy, Default)]
struct Bound {
    /// How far the f32 update can be from the one in f64.
    slack: f32,
    /// Magnitudes up to here are in doubt: another tie is nearer than the one that they are compared with, or the format has fewer bits.
    low: f32,
}

/// The bounds of all rows of a tile; `None` for a row whose update is zero or that holds something outside the range that is safe in f32.
#[inline(always)]
fn bounds<F: Half>(tile: &Tile<'_>, parts: &[Part<'_, f32>]) -> Vec<Option<Bound>> {
    let (ceilings, mut products) = (ceilings(parts, tile.cols), Vec::new());
    let mut bounds = Vec::with_capacity(tile.base.len() / (tile.cols * F::SIZE));
    // No closure: unless it happens to be inlined, one is compiled for the portable instruction set.
    for (row, base) in tile.base.chunks_exact(tile.cols * F::SIZE).enumerate() {
        let mut top = 0;
        for raw in base.as_chunks::<2>().0 {
            top = top.max(F::load(raw) & 0x7fff);
        }
        bounds.push(bound::<F>(row, parts, &ceilings, top, &mut products));
    }
    bounds
}

/// For each part and k, the largest norm of the first k + 1 values of a column of R.
#[inline(always)]
fn ceilings(parts: &[Part<'_, f32>], cols: usize) -> Vec<f64> {
    let mut tops = Vec::new();
    for part in parts {
        let mut squares = vec![0.0f32; cols];
        for row in part.right.chunks_exact(cols) {
            let mut lanes = [0.0f32; 16];
            let (whole, rest) = row.as_chunks::<16>();
            let (sums, last) = squares.as_chunks_mut::<16>();
            for (sums, values) in sums.iter_mut().zip(whole) {
                for i in 0..16 {
                    sums[i] += values[i] * values[i];
                    lanes[i] = if sums[i] > lanes[i] { sums[i] } else { lanes[i] };
                }
            }
            let mut top = 0.0f32;
            for (sum, value) in last.iter_mut().zip(rest) {
                *sum += value * value;
                top = top.max(*sum);
            }
            tops.push(f64::from(lanes.iter().fold(top, |top, sum| top.max(*sum))).sqrt());
        }
    }
    tops
}

/// The bound of one row, whose largest base value has the bits `largest` but for its sign.
#[inline(always)]
fn bound<F: Half>(row: usize, parts: &[Part<'_, f32>], ceilings: &[f64], largest: u16, products: &mut Vec<f64>) -> Option<Bound> {
    let (mut size, mut error, mut first) = (0.0, 0.0, 0);
    for part in parts {
        let mut square = 0.0;
        products.clear();
        for l in &part.left[row * part.rank..(row + 1) * part.rank] {
            square += l * l;
            products.push(square);
        }
        for (product, top) in products.iter_mut().zip(&ceilings[first..]) {
            *product = product.sqrt() * top;
        }
        let mut prefixes = 0.0;
        for product in products.iter() {
            prefixes += product;
        }
        let product = products.last().copied().unwrap_or(0.0);
        let top = part.rank.checked_sub(1).and_then(|last| ceilings.get(first + last)).copied().unwrap_or(0.0);
        if square > 0.0 && ![part.scale.abs(), square.sqrt(), top].iter().all(|factor| FACTOR_RANGE.contains(factor)) {
            return None;
        }
        // One rounding per product; then two for the scale and one per adapter for the sum. 2⁻¹⁴⁹ for each that may underflow.
        let roundings = U * (prefixes + (parts.len() + 2) as f64 * product) + part.rank as f64 * 2f64.powi(-149);
        error += part.scale.abs() * roundings;
        size += part.scale.abs() * product;
        first += part.rank;
    }
    // 1 % covers the roundings of the norms in f32 and products of roundings, up to a rank of 80,000.
    let top = f64::from(F::LARGEST) - 1.01 * size;
    let fits = RANGE.contains(&size) && first <= 80_000 && <F as Format>::widen(largest) <= top;
    let slack = 1.01 * error + 2f64.powi(-148);
    // Within a binade, the ties of the neighbouring intervals are half a step away, and the nearest tie is no farther. At its bottom, the
    // tie below is a quarter of a step away, which is 2^(DROPPED - 25) of the value: only a value that this is less of than the slack can
    // lie beyond it. 1 % covers the rounding of the value.
    let low = (1.01 * slack * 2f64.powi(25 - F::DROPPED as i32)).max(f64::from(F::SMALLEST));
    fits.then_some(Bound { slack: slack as f32, low: low as f32 })
}

/// The left factors of some rows: for each group of them and each k its values.
#[inline(always)]
fn pack_left<const ROWS: usize>(parts: &[Part<'_, f32>], rows: Range<usize>) -> Vec<[f32; ROWS]> {
    let mut packed = Vec::new();
    for row in rows.step_by(ROWS) {
        for part in parts {
            for k in 0..part.rank {
                packed.push(std::array::from_fn(|i| part.left[(row + i) * part.rank + k] as f32));
            }
        }
    }
    packed
}

/// The right factors in some columns: for each whole block of them and each k its values.
#[inline(always)]
fn pack_right<V: Vector>(parts: &[Part<'_, f32>], columns: &Range<usize>, cols: usize, packed: &mut Vec<Block>) {
    packed.clear();
    for at in columns.clone().step_by(BLOCK) {
        for part in parts {
            for row in part.right.chunks_exact(cols) {
                if let Some(block) = row[at..columns.end].first_chunk() {
                    packed.push(in_registers::<V>(block));
                }
            }
        }
    }
}

/// A block in the order in which [`Vector::load_halves`] puts values into registers.
#[inline(always)]
fn in_registers<V: Vector>(block: &[f32; BLOCK]) -> Block {
    let mut ordered = [[0.0; 4]; BLOCK / 4];
    for (place, four) in ordered.iter_mut().enumerate() {
        let column = column_of::<V>(4 * place);
        four.copy_from_slice(&block[column..column + 4]);
    }
    Block(*ordered.as_flattened().first_chunk().unwrap_or(block))
}

/// The column of a block whose value lies in a lane of its registers.
#[inline(always)]
fn column_of<V: Vector>(place: usize) -> usize {
    let (register, lane) = (place / V::LANES, place % V::LANES);
    (register / 2) * 2 * V::LANES + lane / 4 * 8 + register % 2 * 4 + lane % 4
}

/// Rows that are computed together.
struct Group<'g, 'p, const ROWS: usize> {
    /// The number of the first in the tile.
    row: usize,
    base: &'g [u8],
    out: &'g mut [u8],
    /// `None` if f32 is not safe.
    bounds: Option<[Bound; ROWS]>,
    left: &'g [[f32; ROWS]],
    right: &'g [Block],
    shared: &'g Shared<'g, 'p>,
}

impl<const ROWS: usize> Group<'_, '_, ROWS> {
    #[inline(always)]
    fn update<F: Half, V: Vector, const K: usize>(&mut self, columns: &Range<usize>, sums: &mut Lanes) {
        let mut totals = Totals::<V>::zero();
        for (index, at) in columns.clone().step_by(BLOCK).enumerate() {
            let n = (columns.end - at).min(BLOCK);
            match self.bounds {
                Some(bounds) if n == BLOCK => {
                    let right = &self.right[index * self.left.len()..][..self.left.len()];
                    let delta = products::<V, ROWS, K>(self.left, right, self.shared.parts);
                    for i in 0..ROWS {
                        let doubts = self.round::<F, V, K>(i, at, &delta[i], bounds[i], &mut totals);
                        if doubts != 0 {
                            self.settle::<F, V, K>(i, at, &delta[i], doubts, right, sums);
                        }
                    }
                }
                _ => self.update_wide::<F>(at, n, sums),
            }
        }
        totals.move_to(sums);
    }

    /// Computes `n` columns in f64.
    #[inline(always)]
    fn update_wide<F: Half>(&mut self, at: usize, n: usize, sums: &mut Lanes) {
        let Shared { cols, parts, keep_nonfinite } = *self.shared;
        for i in 0..ROWS {
            let bytes = (i * cols + at) * F::SIZE..(i * cols + at + n) * F::SIZE;
            let (base, out) = (&self.base[bytes.clone()], &mut self.out[bytes]);
            update_block::<F, F, f32, true>(self.row + i, at, n, cols, parts, base, out, keep_nonfinite, sums);
        }
    }

    /// Adds, rounds, stores and sums one block of row `i`. A bit for each value that is in doubt.
    #[inline(always)]
    fn round<F: Half, V: Vector, const K: usize>(
        &mut self,
        i: usize,
        at: usize,
        delta: &[V; K],
        bound: Bound,
        totals: &mut Totals<V>,
    ) -> u32 {
        let from = (i * self.shared.cols + at) * F::SIZE;
        let (base, out) = (&self.base[from..][..BLOCK * F::SIZE], &mut self.out[from..][..BLOCK * F::SIZE]);
        let mut doubts = 0;
        for j in (0..K).step_by(2) {
            let bytes = j * V::LANES * F::SIZE..(j + 2) * V::LANES * F::SIZE;
            let (first, second) = V::load_halves(&base[bytes.clone()]);
            let (first, doubt) = round::<F, V>(<F as Half>::widen(first), delta[j], bound, totals);
            doubts |= doubt << (j * V::LANES);
            let (second, doubt) = round::<F, V>(<F as Half>::widen(second), delta[j + 1], bound, totals);
            doubts |= doubt << ((j + 1) * V::LANES);
            V::store_halves(first, second, &mut out[bytes]);
        }
        doubts
    }

    /// Computes the values of a block of row `i` that are in doubt again, in f64 and in the order of the definition, and puts the sums right.
    #[inline(always)]
    fn settle<F: Half, V: Vector, const K: usize>(
        &mut self,
        i: usize,
        at: usize,
        delta: &[V; K],
        mut doubts: u32,
        right: &[Block],
        sums: &mut Lanes,
    ) {
        let mut singles = [0.0f32; BLOCK];
        for (delta, singles) in delta.iter().zip(singles.chunks_exact_mut(V::LANES)) {
            V::store(*delta, singles);
        }
        while doubts != 0 {
            let lane = doubts.trailing_zeros() as usize;
            doubts &= doubts - 1;
            let mut factors = self.left.iter().zip(right);
            let mut exact = 0.0;
            for part in self.shared.parts {
                let mut product = 0.0f64;
                for (left, right) in factors.by_ref().take(part.rank) {
                    product = f64::from(left[i]).mul_add(f64::from(right.0[lane]), product);
                }
                exact += part.scale * product;
            }
            let place = (i * self.shared.cols + at + column_of::<V>(lane)) * F::SIZE;
            let stored = F::load(&self.base[place..][..F::SIZE]);
            let w = <F as Format>::widen(stored);
            let bits = if exact == 0.0 { stored } else { <F as Format>::narrow(w + exact) };
            F::store(bits, &mut self.out[place..][..F::SIZE]);
            let before = F::rounded_single(w as f32 + singles[lane]);
            let applied = (<F as Format>::widen(bits) - f64::from(before)) * f64::from(singles[lane]);
            sums.correct(applied, i64::from(stored != bits) - i64::from(before.to_bits() != (w as f32).to_bits()));
        }
    }
}

/// Adds, rounds and sums one register. The stored bits in the high halves, and a bit for each value that is in doubt.
#[inline(always)]
fn round<F: Half, V: Vector>(w: V, d: V, bound: Bound, totals: &mut Totals<V>) -> (V, u32) {
    let s = V::add(w, d);
    let m = F::rounded(s);
    // Might the exact sum round to another value? 2⁻²² covers the rounding of s itself and what is lost in comparing.
    let size = magnitude(s);
    let near = V::add_product(V::splat(bound.slack), size, V::splat(2.0f32.powi(-22)));
    let doubt = V::at_most(magnitude(V::sub(s, F::tie(s))), near) | V::at_most(size, V::splat(bound.low));
    totals.base = V::add_product(totals.base, w, w);
    totals.delta = V::add_product(totals.delta, d, d);
    totals.applied = V::add_product(totals.applied, V::sub(m, w), d);
    totals.changed += V::differs(w, m).count_ones();
    (<F as Half>::narrow(m), doubt)
}

/// Without the sign.
#[inline(always)]
fn magnitude<V: Vector>(x: V) -> V {
    V::and(x, V::splat_bits(0x7fff_ffff))
}

/// `Σ scale · L · R` for `ROWS` rows and one block of columns, in f32: `K` registers per row.
#[inline(always)]
fn products<V: Vector, const ROWS: usize, const K: usize>(
    left: &[[f32; ROWS]],
    right: &[Block],
    parts: &[Part<'_, f32>],
) -> [[V; K]; ROWS] {
    let mut delta = [[V::splat(0.0); K]; ROWS];
    let mut first = 0;
    for part in parts {
        let mut product = [[V::splat(0.0); K]; ROWS];
        let of_part = first..first + part.rank;
        for (left, right) in left[of_part.clone()].iter().zip(&right[of_part]) {
            let mut r = [V::splat(0.0); K];
            for (r, lanes) in r.iter_mut().zip(right.0.chunks_exact(V::LANES)) {
                *r = V::load(lanes);
            }
            for i in 0..ROWS {
                let l = V::splat(left[i]);
                for j in 0..K {
                    product[i][j] = V::add_product(product[i][j], l, r[j]);
                }
            }
        }
        let scale = V::splat(part.scale as f32);
        for i in 0..ROWS {
            for j in 0..K {
                delta[i][j] = V::add_product(delta[i][j], scale, product[i][j]);
            }
        }
        first += part.rank;
    }
    delta
}

/// Sums of one group of rows over one panel, in f32: some dozens of values in each lane.
struct Totals<V> {
    base: V,
    delta: V,
    applied: V,
    changed: u32,
}

impl<V: Vector> Totals<V> {
    #[inline(always)]
    fn zero() -> Self {
        let zero = V::splat(0.0);
        Totals { base: zero, delta: zero, applied: zero, changed: 0 }
    }

    #[inline(always)]
    fn move_to(self, sums: &mut Lanes) {
        let mut values = [[0.0; BLOCK]; 3];
        for (value, of) in values.iter_mut().zip([self.base, self.delta, self.applied]) {
            V::store(of, value);
        }
        sums.add_singles(&values, self.changed.into());
    }
}
