//! Stochastic rounding: a sum between two values of the format becomes the upper one with the probability that makes it right on average
//! (Connolly, Higham and Mary 2021, eq. 1.1). The random bits are a function of a key and of the value's index, so that they depend neither
//! on the order of work nor on the machine.

use super::float::{Format, Value};
use super::tile::{BLOCK, Lanes, Part, Sums, Tile, delta_of};

/// Where a tile's values lie in their tensor, and the key of its random bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dice {
    /// From the seed and the tensor's name.
    pub(crate) key: u64,
    /// Index in the tensor of the tile's first value.
    pub(crate) first: u64,
    /// Columns of the tensor.
    pub(crate) total: u64,
}

impl Dice {
    /// A number in [0, 1) for an index, with 32 random bits.
    pub(crate) fn unit(key: u64, index: u64) -> f64 {
        unit(key, index)
    }
}

/// Updates the tile, whose base is widened to F64.
#[inline(always)]
pub(super) fn update<G: Format, V: Value, const FMA: bool>(tile: &mut Tile<'_>, parts: &[Part<'_, V>], dice: Dice) -> Sums {
    let (cols, mut sums) = (tile.cols, Lanes::default());
    if cols == 0 {
        return sums.finish();
    }
    let rows = tile.base.chunks_exact(cols * 8).zip(tile.out.chunks_exact_mut(cols * G::SIZE));
    for (row, (base, out)) in rows.enumerate() {
        for at in (0..cols).step_by(BLOCK) {
            let n = (cols - at).min(BLOCK);
            let delta = delta_of::<V, FMA>(row, at, n, cols, parts);
            let (mut w, mut m) = ([0.0; BLOCK], [0.0; BLOCK]);
            for (i, raw) in out[at * G::SIZE..(at + n) * G::SIZE].chunks_exact_mut(G::SIZE).enumerate() {
                w[i] = f64::from_le_bytes(base[(at + i) * 8..(at + i + 1) * 8].try_into().unwrap_or_default());
                let keep = delta[i] == 0.0 || tile.keep_nonfinite && !w[i].is_finite();
                let index = dice.first + row as u64 * dice.total + (at + i) as u64;
                let bits = if keep { G::narrow(w[i]) } else { round::<G>(w[i] + delta[i], dice.key, index) };
                G::store(bits, raw);
                m[i] = G::widen(bits);
            }
            sums.take::<G>(&w, &m, &delta, tile.keep_nonfinite);
        }
    }
    sums.finish()
}

/// One of the two values of the format around `x`.
#[inline(always)]
fn round<G: Format>(x: f64, key: u64, index: u64) -> G::Bits {
    let nearest = G::narrow(x);
    let (size, found) = (x.abs(), G::widen(nearest).abs());
    if found == size || !found.is_finite() {
        return nearest;
    }
    let (low, high) = if found < size { (nearest, G::away(nearest)) } else { (G::toward(nearest), nearest) };
    let (below, above) = (G::widen(low).abs(), G::widen(high).abs());
    // 0 where the value above is infinite.
    let share = (size - below) / (above - below);
    if unit(key, index) < share { high } else { low }
}

/// A number in [0, 1), with 32 random bits.
pub(super) fn unit(key: u64, index: u64) -> f64 {
    let words = philox([(index >> 2) as u32, (index >> 34) as u32, 0, 0], [key as u32, (key >> 32) as u32]);
    f64::from(words[(index & 3) as usize]) / 4_294_967_296.0
}

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, section 4.3).
pub(super) fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xd251_1f53;
        let b = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::float::{BF16, F16, F32};

    /// The known answers of Random123's kat_vectors.
    #[test]
    fn the_generator_is_philox() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let digits = philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(digits, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    fn mean<G: Format>(x: f64) -> f64 {
        (0..20_000).map(|i| G::widen(round::<G>(x, 7, i))).sum::<f64>() / 20_000.0
    }

    #[test]
    fn a_sum_is_kept_on_average_and_never_left_by_a_step() {
        for x in [1.001f64, -1.001, 1.003_9, 3e-40, 65_500.0, -0.1] {
            // Five standard errors of 20,000 draws between neighbours that are a step apart.
            let step = |low: f64, high: f64| 5.0 * 0.5 * (high - low) / 20_000f64.sqrt();
            let size = x.abs();
            let narrow = step(0.0, (size * 2f64.powi(-7)).max(2f64.powi(-133)));
            assert!((mean::<BF16>(x) - x).abs() <= narrow, "{x}: {}", mean::<BF16>(x));
            let half = step(0.0, (size * 2f64.powi(-10)).max(2f64.powi(-24)));
            assert!((mean::<F16>(x) - x).abs() <= half, "{x}: {}", mean::<F16>(x));
            assert!((0..1000).all(|i| (F32::widen(round::<F32>(x, 1, i)) - x).abs() <= size * 2f64.powi(-23) + 2f64.powi(-149)));
        }
    }

    #[test]
    fn what_the_format_holds_stays() {
        for x in [0.0, 1.0, -2.5, 2f64.powi(-133), f64::INFINITY] {
            assert!((0..100).all(|i| BF16::widen(round::<BF16>(x, 3, i)) == x));
        }
        // The largest value is not rounded up to infinity.
        let largest = BF16::widen(0x7f7f);
        assert!((0..100).all(|i| BF16::widen(round::<BF16>(largest * (1.0 + 1e-4), 3, i)) == largest));
    }
}
