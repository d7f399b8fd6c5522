//! The sums and roundings of PEFT's `merge_and_unload` on a CPU, in its order (peft 0.21.2, `tuners/lora/layer.py`): for whoever has to get
//! the very bits that PEFT writes. PEFT forms B·A in f32 (in f64 if the weight is F64), multiplies by the scale, and adds that to the weight, rounding after each step
//! and after each adapter. Its matrix product sums over the rank in ascending order with fused multiply-adds, as Intel's MKL does up to a
//! rank of 128; other libraries, and larger ranks, may differ from it in the last place of f32.

use super::float::{Format, Value};
use super::tile::{BLOCK, Lanes, Part, Sums, Tile, delta_of};

/// When an update is rounded to the format of the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// With the sum: `weight += update`.
    Sum,
    /// Before the sum, and the sum again: `weight += update.to(weight.dtype)`.
    Update,
}

/// Updates the tile, whose base is widened to F64; a step for each part.
#[inline(always)]
pub(super) fn update<G: Format, V: Value, const FMA: bool>(tile: &mut Tile<'_>, parts: &[Part<'_, V>], steps: &[Step]) -> Sums {
    let (cols, mut sums) = (tile.cols, Lanes::default());
    if cols == 0 {
        return sums.finish();
    }
    let rows = tile.base.chunks_exact(cols * 8).zip(tile.out.chunks_exact_mut(cols * G::SIZE));
    for (row, (base, out)) in rows.enumerate() {
        for at in (0..cols).step_by(BLOCK) {
            let n = (cols - at).min(BLOCK);
            let (mut w, mut m) = ([0.0; BLOCK], [0.0; BLOCK]);
            for (w, raw) in w.iter_mut().zip(base[at * 8..(at + n) * 8].as_chunks::<8>().0) {
                *w = f64::from_le_bytes(*raw);
            }
            for (m, w) in m.iter_mut().zip(&w) {
                *m = G::widen(G::narrow(*w));
            }
            for (part, step) in parts.iter().zip(steps) {
                if G::SIZE == 8 {
                    add_wide(&mut m, &wide_product(row, at, n, cols, part));
                } else {
                    add::<G>(&mut m, &product::<V, FMA>(row, at, n, cols, part), *step);
                }
            }
            for (m, raw) in m.iter().zip(out[at * G::SIZE..(at + n) * G::SIZE].chunks_exact_mut(G::SIZE)) {
                G::store(G::narrow(*m), raw);
            }
            sums.take::<G>(&w, &m, &delta_of::<V, FMA>(row, at, n, cols, parts), tile.keep_nonfinite);
        }
    }
    sums.finish()
}

/// `scale · (L · R)` of `n` values of one row, every operation rounded to f32.
#[inline(always)]
fn product<V: Value, const FMA: bool>(row: usize, at: usize, n: usize, cols: usize, part: &Part<'_, V>) -> [f32; BLOCK] {
    let mut product = [0.0f32; BLOCK];
    for (k, &l) in part.left[row * part.rank..(row + 1) * part.rank].iter().enumerate() {
        for (p, r) in product.iter_mut().zip(&part.right[k * cols + at..k * cols + at + n]) {
            *p = add_product::<FMA>(*p, l as f32, r.wide() as f32);
        }
    }
    product.map(|p| p * part.scale as f32)
}

/// Adds an update to values of the format.
#[inline(always)]
fn add<G: Format>(m: &mut [f64; BLOCK], update: &[f32; BLOCK], step: Step) {
    for (m, update) in m.iter_mut().zip(update) {
        let update = match step {
            Step::Sum => *update,
            Step::Update => G::widen(G::narrow(f64::from(*update))) as f32,
        };
        *m = G::widen(G::narrow(f64::from(*m as f32 + update)));
    }
}

/// [`product`] for a weight of F64, to which PEFT widens the factors: their products are exact, so that it does not matter whether the
/// additions are fused.
#[inline(always)]
fn wide_product<V: Value>(row: usize, at: usize, n: usize, cols: usize, part: &Part<'_, V>) -> [f64; BLOCK] {
    let mut product = [0.0f64; BLOCK];
    for (k, &l) in part.left[row * part.rank..(row + 1) * part.rank].iter().enumerate() {
        for (p, r) in product.iter_mut().zip(&part.right[k * cols + at..k * cols + at + n]) {
            *p += l * r.wide();
        }
    }
    product.map(|p| p * part.scale)
}

#[inline(always)]
fn add_wide(m: &mut [f64; BLOCK], update: &[f64; BLOCK]) {
    for (m, update) in m.iter_mut().zip(update) {
        *m += update;
    }
}

/// `sum + a · b`, rounded once to f32.
#[inline(always)]
fn add_product<const FMA: bool>(sum: f32, a: f32, b: f32) -> f32 {
    if FMA { a.mul_add(b, sum) } else { add_product_portable(sum, a, b) }
}

/// [`add_product`] without the instruction: the product is exact in f64, and the sum is rounded to odd there, so that rounding it to f32
/// is as if once (Boldo and Melquiond 2008, theorem 2).
#[inline(always)]
fn add_product_portable(sum: f32, a: f32, b: f32) -> f32 {
    let (x, y) = (f64::from(a) * f64::from(b), f64::from(sum));
    let near = x + y;
    // What the sum lost (Knuth's TwoSum).
    let back = near - x;
    let lost = (x - (near - back)) + (y - back);
    if lost == 0.0 || !near.is_finite() || near.to_bits() & 1 == 1 {
        return near as f32;
    }
    let odd = if (lost > 0.0) == (near > 0.0) { near.to_bits() + 1 } else { near.to_bits() - 1 };
    f64::from_bits(odd) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// libm's fused multiply-add is the judge.
        #[test]
        fn the_portable_product_is_fused(sum in any::<f32>(), a in any::<f32>(), b in any::<f32>(), near: bool, off in -3i32..=3) {
            // Near cancellation and near ties is where rounding twice shows.
            let sum = if near { f32::from_bits(((-a * b).to_bits() as i32).wrapping_add(off) as u32) } else { sum };
            let (ours, theirs) = (add_product_portable(sum, a, b), a.mul_add(b, sum));
            prop_assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{ours:e} {theirs:e}");
        }
    }
}
