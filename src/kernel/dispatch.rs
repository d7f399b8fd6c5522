//! One instantiation of the kernels per instruction set, and the choice at run time. The code is the same plain Rust everywhere
//! and so are the bits; the instruction set decides only how many values go at once. The portable version ships on every machine
//! and can be asked for by name.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::float32x4_t;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m512};

use super::float::{BF16, F16, F32, F64, Float, Value};
use super::magnitude;
use super::replay::{self, Step};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::single;
use super::stochastic::{self, Dice};
use super::tile::{Part, Rounding, Sums, Tile, deltas, update};
use super::vector::Vector;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What every machine of the architecture has.
    Portable,
    /// What every aarch64 machine has: NEON, with its fused multiply-add.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// x86-64 with AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Those that this machine has, the portable one first and the best one last.
    pub(crate) fn available() -> Vec<Isa> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "elsewhere the list is fixed"))]
        let mut found = vec![
            Isa::Portable,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon,
        ];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("popcnt") {
                found.push(Isa::Avx2);
            }
            if found.contains(&Isa::Avx2)
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Isa::Avx512);
            }
        }
        found
    }

    /// The best one of this machine.
    pub(crate) fn best() -> Isa {
        Isa::available().last().copied().unwrap_or(Isa::Portable)
    }
}

/// The kernel for the formats and the rounding of the tile, all in f64.
#[inline(always)]
fn wide<V: Value, const FMA: bool>(tile: &mut Tile<'_>, parts: &[Part<'_, V>]) -> Sums {
    match tile.rounding {
        Rounding::Nearest => {}
        Rounding::Replay(steps) => return replayed::<V, FMA>(tile, parts, steps),
        Rounding::Stochastic(dice) => return by_chance::<V, FMA>(tile, parts, dice),
    }
    match (tile.from, tile.to) {
        (Float::F64, Float::F64) => update::<F64, F64, V, FMA>(tile, parts),
        (Float::F64, Float::F32) => update::<F64, F32, V, FMA>(tile, parts),
        (Float::F64, Float::F16) => update::<F64, F16, V, FMA>(tile, parts),
        (Float::F64, Float::BF16) => update::<F64, BF16, V, FMA>(tile, parts),
        (Float::F32, Float::F32) => update::<F32, F32, V, FMA>(tile, parts),
        (Float::F16, Float::F16) => update::<F16, F16, V, FMA>(tile, parts),
        (Float::BF16, Float::BF16) => update::<BF16, BF16, V, FMA>(tile, parts),
        (from, to) => unreachable!("no kernel from {from:?} to {to:?}: widen to F64 first"),
    }
}

#[inline(always)]
fn replayed<V: Value, const FMA: bool>(tile: &mut Tile<'_>, parts: &[Part<'_, V>], steps: &[Step]) -> Sums {
    match tile.to {
        Float::F64 => replay::update::<F64, V, FMA>(tile, parts, steps),
        Float::F32 => replay::update::<F32, V, FMA>(tile, parts, steps),
        Float::F16 => replay::update::<F16, V, FMA>(tile, parts, steps),
        Float::BF16 => replay::update::<BF16, V, FMA>(tile, parts, steps),
    }
}

#[inline(always)]
fn by_chance<V: Value, const FMA: bool>(tile: &mut Tile<'_>, parts: &[Part<'_, V>], dice: Dice) -> Sums {
    match tile.to {
        Float::F64 => stochastic::update::<F64, V, FMA>(tile, parts, dice),
        Float::F32 => stochastic::update::<F32, V, FMA>(tile, parts, dice),
        Float::F16 => stochastic::update::<F16, V, FMA>(tile, parts, dice),
        Float::BF16 => stochastic::update::<BF16, V, FMA>(tile, parts, dice),
    }
}

/// The kernel for the formats of the tile where there is a fused multiply-add: 16-bit weights go through f32, in groups of `ROWS` rows
/// and blocks of `K` registers, as many as the instruction set has registers for.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn fused<V: Value, R: Vector, const ROWS: usize, const K: usize>(tile: &mut Tile<'_>, parts: &[Part<'_, V>]) -> Sums {
    let mut singles = Vec::with_capacity(parts.len());
    for part in parts {
        let Some(right) = V::singles(part.right) else { return wide::<V, true>(tile, parts) };
        singles.push(Part { left: part.left, right, rank: part.rank, scale: part.scale });
    }
    match (tile.from, tile.to) {
        // Without updates there is nothing to hurry.
        _ if parts.is_empty() || tile.cols == 0 => wide::<V, true>(tile, parts),
        (Float::F16, Float::F16) => single::update::<F16, R, ROWS, K>(tile, &singles),
        (Float::BF16, Float::BF16) => single::update::<BF16, R, ROWS, K>(tile, &singles),
        _ => wide::<V, true>(tile, parts),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt")]
fn avx2<V: Value>(tile: &mut Tile<'_>, parts: &[Part<'_, V>]) -> Sums {
    fused::<V, __m256, 2, 4>(tile, parts)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<V: Value>(tile: &mut Tile<'_>, parts: &[Part<'_, V>]) -> Sums {
    fused::<V, __m512, 4, 2>(tile, parts)
}

/// Computes `out = round(base + Σ scale · L · R)` over a tile, with the sums of the report.
///
/// # Panics
/// If a factor is shorter than `rows · rank` or `rank · cols`, if the formats are no pair of [`Tile`], or if `isa` is not one of [`Isa::available`].
pub(crate) fn update_tile<V: Value>(isa: Isa, tile: &mut Tile<'_>, parts: &[Part<'_, V>]) -> Sums {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available on this machine");
    match isa {
        // Plain x86-64 has no fused multiply-add, and libm's costs a hundred times as much as to do without.
        Isa::Portable => wide::<V, false>(tile, parts),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => fused::<V, float32x4_t, 2, 8>(tile, parts),
        // SAFETY: the assertion above says that this machine has AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(tile, parts) },
        // SAFETY: the assertion above says that this machine has these parts of AVX-512, and with them AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(tile, parts) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn deltas_avx2<V: Value>(cols: usize, parts: &[Part<'_, V>], out: &mut [f64]) -> bool {
    deltas::<V, true>(cols, parts, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn deltas_avx512<V: Value>(cols: usize, parts: &[Part<'_, V>], out: &mut [f64]) -> bool {
    deltas::<V, true>(cols, parts, out)
}

/// Computes `out = Σ scale · L · R`, `(rows, cols)`: the update that [`update_tile`] adds, with the same bits. False if a value is not finite.
///
/// # Panics
/// As [`update_tile`].
#[must_use]
pub(crate) fn delta_tile<V: Value>(isa: Isa, cols: usize, parts: &[Part<'_, V>], out: &mut [f64]) -> bool {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available on this machine");
    match isa {
        Isa::Portable => deltas::<V, false>(cols, parts, out),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => deltas::<V, true>(cols, parts, out),
        // SAFETY: the assertion above says that this machine has AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { deltas_avx2(cols, parts, out) },
        // SAFETY: the assertion above says that this machine has these parts of AVX-512, and with them AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { deltas_avx512(cols, parts, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn largest_avx2(format: Float, bytes: &[u8]) -> f64 {
    magnitude::largest(format, bytes)
}

/// The largest |x| of the values in `bytes`, as stored little-endian; infinite if any is NaN or infinite. A last piece that is shorter
/// than a value is not looked at.
///
/// # Panics
/// If `isa` is not one of [`Isa::available`].
pub(crate) fn largest(isa: Isa, format: Float, bytes: &[u8]) -> f64 {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available on this machine");
    match isa {
        // SAFETY: the assertion above says that this machine has AVX2, alone or with AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { largest_avx2(format, bytes) },
        _ => magnitude::largest(format, bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One line per element, by the definition in the specification.
    fn oracle<V: Value>(float: Float, base: &[u8], cols: usize, parts: &[Part<'_, V>]) -> Vec<u8> {
        let mut w = vec![0.0; base.len() / float.size()];
        float.widen(base, &mut w);
        let delta = |i: usize, j: usize, p: &Part<'_, V>| {
            p.scale * (0..p.rank).fold(0.0, |u, k| u + p.left[i * p.rank + k] * p.right[k * cols + j].wide())
        };
        let sum: Vec<f64> =
            w.iter().enumerate().map(|(n, w)| w + parts.iter().fold(0.0, |t, p| t + delta(n / cols, n % cols, p))).collect();
        let mut out = vec![0; base.len()];
        float.narrow(&sum, &mut out);
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn every_instruction_set_gives_the_bits_of_the_oracle(
            rows in 1usize..5, cols in 1usize..600, ranks in proptest::collection::vec(1usize..9, 1..3), seed in any::<u64>(),
        ) {
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                f64::from(((state >> 40) as f32 / 16777216.0 - 0.5) * 0.1)
            };
            let factors: Vec<(Vec<f64>, Vec<f64>)> =
                ranks.iter().map(|&r| ((0..rows * r).map(|_| next()).collect(), (0..r * cols).map(|_| next()).collect())).collect();
            let parts: Vec<Part<'_, f64>> = factors.iter().zip(&ranks).map(|((left, right), &rank)| Part { left, right, rank, scale: 1.7 }).collect();
            for float in [Float::F64, Float::F32, Float::F16, Float::BF16] {
                let values: Vec<f64> = (0..rows * cols).map(|_| next()).collect();
                let mut base = vec![0; values.len() * float.size()];
                float.narrow(&values, &mut base);
                let wanted = oracle(float, &base, cols, &parts);
                for isa in Isa::available() {
                    let mut out = vec![0; base.len()];
                    let sums = update_tile(isa, &mut Tile { from: float, to: float, base: &base, out: &mut out, cols, keep_nonfinite: false, rounding: Rounding::Nearest }, &parts);
                    prop_assert_eq!(&out, &wanted, "{:?} {:?}", isa, float);
                    prop_assert_eq!(sums.nonfinite, 0);
                }
            }
        }
    }

    #[test]
    fn the_update_alone_is_that_of_a_zero_base() {
        let (rows, cols, rank) = (3, 1100, 5);
        let wave = |n: usize, by: f64| (by * n as f64 + 0.3).sin();
        let left: Vec<f64> = (0..rows * rank).map(|n| wave(n, 1.3)).collect();
        let right: Vec<f64> = (0..rank * cols).map(|n| wave(n, 0.7)).collect();
        let parts = [(1.7, &right), (-0.1, &right)].map(|(scale, right)| Part { left: &left, right, rank, scale });
        let wanted = oracle(Float::F64, &vec![0; 8 * rows * cols], cols, &parts);
        for isa in Isa::available() {
            let mut out = vec![1.0; rows * cols];
            assert!(delta_tile(isa, cols, &parts, &mut out), "{isa:?}");
            let big: Vec<f64> = left.iter().map(|l| 1e300 * l).collect();
            let huge = [Part { left: &big, right: &right, rank, scale: 1e300 }];
            assert!(!delta_tile(isa, cols, &huge, &mut out.clone()), "{isa:?}");
            let bits = |value: &f64| value.to_bits() << 1;
            let raw = wanted.as_chunks::<8>().0.iter().map(|raw| f64::from_le_bytes(*raw));
            assert!(out.iter().zip(raw).all(|(x, y)| bits(x) == bits(&y)), "{isa:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]
        /// Where f32 goes wrong: sums on ties and a hair beside them, cancellation, subnormal and huge values, rows of zeros.
        #[test]
        fn sixteen_bit_weights_have_the_bits_of_f64(
            rank in 1usize..70, rows in 1usize..7, seed in any::<u64>(), bits in 1u32..24, low in -45i32..20, high in 0i32..25, scale in -3.0f64..3.0,
        ) {
            let cols = 70;
            let mut state = seed | 1;
            let mut next = |bits: u32, low: i32, high: i32| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let mantissa = ((state >> 33) as i64 % (1 << bits)) as f64 / f64::from(1u32 << bits);
                let exponent = low + ((state >> 8) as i32 & 0xff) * (high + 1) / 256;
                f64::from((mantissa * 2f64.powi(exponent)) as f32) * if state >> 7 & 1 == 0 { 1.0 } else { -1.0 }
            };
            let left: Vec<f64> = (0..rows * rank).map(|i| if i / rank == 1 { 0.0 } else { next(bits, low, high) }).collect();
            let right: Vec<f32> = (0..rank * cols).map(|_| next(bits, -8, 4) as f32).collect();
            let part = Part { left: &left, right: &right, rank, scale: if bits % 2 == 0 { scale.round() } else { scale } };
            for float in [Float::F16, Float::BF16] {
                let values: Vec<f64> = (0..rows * cols).map(|_| next(8, low - 4, high + 4)).collect();
                let mut base = vec![0; values.len() * 2];
                float.narrow(&values, &mut base);
                let wanted = oracle(float, &base, cols, &[part]);
                let mut finite = vec![0.0f64; values.len()];
                float.widen(&wanted, &mut finite);
                for isa in Isa::available() {
                    let mut out = vec![0; base.len()];
                    let sums = update_tile(isa, &mut Tile { from: float, to: float, base: &base, out: &mut out, cols, keep_nonfinite: false, rounding: Rounding::Nearest }, &[part]);
                    let at = out.chunks(2).zip(wanted.chunks(2)).position(|(x, y)| x != y);
                    // The oracle adds a zero update, which loses the sign of a zero; the kernels leave such a value alone.
                    let at = at.filter(|&at| base[2 * at..2 * at + 2] != out[2 * at..2 * at + 2] || out[2 * at..2 * at + 2] != [0, 0x80]);
                    prop_assert_eq!(at, None, "{:?} {:?}", isa, float);
                    let infinite = finite.iter().filter(|v| !v.is_finite()).count() as u64;
                    prop_assert_eq!(sums.nonfinite > 0, infinite > 0);
                    let changed = base.chunks(2).zip(out.chunks(2)).filter(|(x, y)| x != y).count() as u64;
                    prop_assert!(infinite > 0 || sums.changed == changed, "{:?}: {} of {}", isa, sums.changed, changed);
                }
            }
        }
    }

    #[test]
    fn a_zero_update_keeps_the_sign_of_zero_and_every_other_bit() {
        let base: Vec<u8> = [-0.0f32, 1.5, f32::from_bits(1)].iter().flat_map(|v| v.to_le_bytes()).collect();
        let part = Part { left: &[0.0], right: &[1.0, -1.0, 1.0], rank: 1, scale: 2.0 };
        for isa in Isa::available() {
            let mut out = vec![0; base.len()];
            let sums = update_tile(
                isa,
                &mut Tile {
                    from: Float::F32,
                    to: Float::F32,
                    base: &base,
                    out: &mut out,
                    cols: 3,
                    keep_nonfinite: false,
                    rounding: Rounding::Nearest,
                },
                &[part],
            );
            assert_eq!((out == base, sums.changed), (true, 0), "{isa:?}");
        }
    }

    /// Cases that have gone wrong: factors or scales out of the range of f32 whose product is not, and a sum that cancels to just below a
    /// power of two, where the next tie is on the other side.
    #[test]
    fn extreme_factors_and_the_bottom_of_a_binade_have_the_bits_of_f64() {
        let cases: &[(f32, &[f64], &[f32], f64)] = &[
            (1.0, &[1e-20f32 as f64], &[1e-20], 1e39),
            (1.0, &[1e30f32 as f64], &[1e10], 1e-30),
            (1.0, &[1e-20f32 as f64], &[1e20], 1.0),
            (-12736.0, &[1.0101631f32 as f64, 1.7993957e-4f32 as f64], &[1.0021061, 3.505422e-4], 12582.353205801576),
        ];
        for (w, left, right, scale) in cases {
            let right: Vec<f32> = right.iter().flat_map(|r| [*r; 32]).collect();
            let parts = [Part { left, right: &right, rank: left.len(), scale: *scale }];
            for (isa, float) in Isa::available().into_iter().flat_map(|isa| [Float::BF16, Float::F16].map(|f| (isa, f))) {
                let mut base = vec![0; 64];
                float.narrow(&[f64::from(*w); 32], &mut base);
                let mut out = vec![0; 64];
                let (cols, rounding) = (32, Rounding::Nearest);
                let mut tile = Tile { from: float, to: float, base: &base, out: &mut out, cols, keep_nonfinite: false, rounding };
                update_tile(isa, &mut tile, &parts);
                assert_eq!(out, oracle(float, &base, 32, &parts), "{isa:?} {float:?} {w} {left:?}");
            }
        }
    }

    #[test]
    fn without_updates_a_tile_is_a_copy() {
        for (isa, float) in Isa::available().into_iter().flat_map(|isa| [Float::BF16, Float::F16, Float::F32].map(|f| (isa, f))) {
            let values: Vec<f64> = (0..300).map(|i| f64::from(i) / 7.0 - 3.0).collect();
            let mut base = vec![0; 300 * float.size()];
            float.narrow(&values, &mut base);
            let mut out = vec![1; base.len()];
            let (base, cols, rounding) = (&base, 60, Rounding::Nearest);
            let mut tile = Tile { from: float, to: float, base, out: &mut out, cols, keep_nonfinite: false, rounding };
            let sums = update_tile::<f32>(isa, &mut tile, &[]);
            assert_eq!((&out == base, sums.changed, sums.delta), (true, 0, 0.0), "{isa:?} {float:?}");
        }
    }

    #[test]
    fn overflow_is_counted_and_infinite_base_values_are_kept_on_request() {
        let base: Vec<u8> = [half::f16::MAX, half::f16::INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        let part = Part { left: &[64.0], right: &[1.0, 1.0], rank: 1, scale: 1.0 };
        let run = |keep_nonfinite| {
            let mut out = vec![0; 4];
            update_tile(
                Isa::best(),
                &mut Tile {
                    from: Float::F16,
                    to: Float::F16,
                    base: &base,
                    out: &mut out,
                    cols: 2,
                    keep_nonfinite,
                    rounding: Rounding::Nearest,
                },
                &[part],
            )
        };
        assert_eq!((run(false).nonfinite, run(false).kept), (2, 0));
        assert_eq!((run(true).nonfinite, run(true).kept), (1, 1));
    }
}
