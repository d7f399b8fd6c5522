//! One instantiation of the kernels per instruction set, and the choice at run time. The code is the same plain Rust everywhere
//! and so are the bits; the instruction set decides only how many values go at once. The portable version ships on every machine
//! and can be asked for by name.
#![allow(unsafe_code)]

use super::float::{BF16, F16, F32, F64, Float};
use super::tile::{Part, Sums, Tile, update};

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What every machine of the architecture has.
    Portable,
    /// x86-64 with AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Those that this machine has, the portable one first and the best one last.
    pub(crate) fn available() -> Vec<Isa> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "only x86-64 has more than one"))]
        let mut found = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                found.push(Isa::Avx2);
            }
            if is_x86_feature_detected!("avx512f")
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

#[inline(always)]
fn any_format(tile: &mut Tile<'_>, parts: &[Part<'_>]) -> Sums {
    match (tile.from, tile.to) {
        (Float::F64, Float::F64) => update::<F64, F64>(tile, parts),
        (Float::F64, Float::F32) => update::<F64, F32>(tile, parts),
        (Float::F64, Float::F16) => update::<F64, F16>(tile, parts),
        (Float::F64, Float::BF16) => update::<F64, BF16>(tile, parts),
        (Float::F32, Float::F32) => update::<F32, F32>(tile, parts),
        (Float::F16, Float::F16) => update::<F16, F16>(tile, parts),
        (Float::BF16, Float::BF16) => update::<BF16, BF16>(tile, parts),
        (from, to) => unreachable!("no kernel from {from:?} to {to:?}: widen to F64 first"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(tile: &mut Tile<'_>, parts: &[Part<'_>]) -> Sums {
    any_format(tile, parts)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512(tile: &mut Tile<'_>, parts: &[Part<'_>]) -> Sums {
    any_format(tile, parts)
}

/// Computes `out = round(base + Σ scale · L · R)` over a tile, with the sums of the report.
///
/// # Panics
/// If a factor is shorter than `rows · rank` or `rank · cols`, if the formats are no pair of [`Tile`], or if `isa` is not one of [`Isa::available`].
pub(crate) fn update_tile(isa: Isa, tile: &mut Tile<'_>, parts: &[Part<'_>]) -> Sums {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available on this machine");
    match isa {
        Isa::Portable => any_format(tile, parts),
        // SAFETY: the assertion above says that this machine has AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(tile, parts) },
        // SAFETY: the assertion above says that this machine has these parts of AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(tile, parts) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One line per element, by the definition in the specification.
    fn oracle(float: Float, base: &[u8], cols: usize, parts: &[Part<'_>]) -> Vec<u8> {
        let mut w = vec![0.0; base.len() / float.size()];
        float.widen(base, &mut w);
        let delta = |i: usize, j: usize, p: &Part<'_>| {
            p.scale * (0..p.rank).fold(0.0, |u, k| u + p.left[i * p.rank + k] * p.right[k * cols + j])
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
            let parts: Vec<Part<'_>> = factors.iter().zip(&ranks).map(|((left, right), &rank)| Part { left, right, rank, scale: 1.7 }).collect();
            for float in [Float::F64, Float::F32, Float::F16, Float::BF16] {
                let values: Vec<f64> = (0..rows * cols).map(|_| next()).collect();
                let mut base = vec![0; values.len() * float.size()];
                float.narrow(&values, &mut base);
                let wanted = oracle(float, &base, cols, &parts);
                for isa in Isa::available() {
                    let mut out = vec![0; base.len()];
                    let sums = update_tile(isa, &mut Tile { from: float, to: float, base: &base, out: &mut out, cols, keep_nonfinite: false }, &parts);
                    prop_assert_eq!(&out, &wanted, "{:?} {:?}", isa, float);
                    prop_assert_eq!(sums.nonfinite, 0);
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
                &mut Tile { from: Float::F32, to: Float::F32, base: &base, out: &mut out, cols: 3, keep_nonfinite: false },
                &[part],
            );
            assert_eq!((out == base, sums.changed), (true, 0), "{isa:?}");
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
                &mut Tile { from: Float::F16, to: Float::F16, base: &base, out: &mut out, cols: 2, keep_nonfinite },
                &[part],
            )
        };
        assert_eq!((run(false).nonfinite, run(false).kept), (2, 0));
        assert_eq!((run(true).nonfinite, run(true).kept), (1, 1));
    }
}
