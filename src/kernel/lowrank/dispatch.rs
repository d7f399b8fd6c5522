//! One instantiation of [`sweep`](super::sweep) per instruction set, and the choice at run time, as in
//! [`dispatch`](super::super::dispatch).
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::float32x4_t;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m512};

use super::super::Isa;
use super::super::float::Float;
use super::difference;
use super::sweep::{Rows, STEP, backward_plain, forward_plain};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::sweep::{backward, forward};

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt")]
fn forward_avx2(rows: Rows<'_>, x: &[f32], y: &mut [f32]) {
    forward::<__m256, 6, 2>(rows, x, y);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt")]
fn backward_avx2(rows: Rows<'_>, y: &[f32], z: &mut [f32]) {
    backward::<__m256, 6, 2, 1>(rows, y, z);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
fn forward_avx512(rows: Rows<'_>, x: &[f32], y: &mut [f32]) {
    if rows.width.is_multiple_of(32) { forward::<__m512, 8, 2>(rows, x, y) } else { forward::<__m512, 16, 1>(rows, x, y) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
fn backward_avx512(rows: Rows<'_>, y: &[f32], z: &mut [f32]) {
    if rows.width.is_multiple_of(32) { backward::<__m512, 8, 2, 4>(rows, y, z) } else { backward::<__m512, 16, 1, 4>(rows, y, z) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt")]
fn subtract_avx2(tuned: (Float, &[u8]), base: Option<(Float, &[u8])>, out: &mut [f32]) {
    difference::subtract(tuned, base, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
fn subtract_avx512(tuned: (Float, &[u8]), base: Option<(Float, &[u8])>, out: &mut [f32]) {
    difference::subtract(tuned, base, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt")]
fn squares_avx2(values: &[f32]) -> f64 {
    difference::squares(values)
}

fn check(isa: Isa, rows: Rows<'_>, thin: usize, wide: usize) {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available on this machine");
    assert!(rows.width > 0 && rows.width.is_multiple_of(STEP), "{} columns", rows.width);
    assert!(rows.d.len() == rows.count() * rows.cols, "half a row");
    assert!(thin == rows.count() * rows.width && wide == rows.cols * rows.width, "thin matrices do not fit");
}

/// Y = D·X for some rows of D.
///
/// # Panics
/// If X is not `(cols, width)` or Y not `(rows, width)`, if the width is no multiple of [`STEP`], or if `isa` is not one of
/// [`Isa::available`].
pub(crate) fn times(isa: Isa, rows: Rows<'_>, x: &[f32], y: &mut [f32]) {
    check(isa, rows, y.len(), x.len());
    match isa {
        Isa::Portable => forward_plain(rows, x, y),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => forward::<float32x4_t, 4, 4>(rows, x, y),
        // SAFETY: the assertion in `check` says that this machine has AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { forward_avx2(rows, x, y) },
        // SAFETY: the assertion in `check` says that this machine has these parts of AVX-512, and with them AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { forward_avx512(rows, x, y) },
    }
}

/// Z += Dᵀ·Y for some rows of D.
///
/// # Panics
/// As [`times`].
pub(crate) fn add_transposed_times(isa: Isa, rows: Rows<'_>, y: &[f32], z: &mut [f32]) {
    check(isa, rows, y.len(), z.len());
    match isa {
        Isa::Portable => backward_plain(rows, y, z),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => backward::<float32x4_t, 4, 4, 2>(rows, y, z),
        // SAFETY: the assertion in `check` says that this machine has AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { backward_avx2(rows, y, z) },
        // SAFETY: the assertion in `check` says that this machine has these parts of AVX-512, and with them AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { backward_avx512(rows, y, z) },
    }
}

/// Stored values of `tuned` minus those of `base`, as many as fit into `out`; `tuned` as it is without a base.
///
/// # Panics
/// If `isa` is not one of [`Isa::available`].
pub(crate) fn subtract(isa: Isa, tuned: (Float, &[u8]), base: Option<(Float, &[u8])>, out: &mut [f32]) {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available on this machine");
    match isa {
        // SAFETY: the assertion above says that this machine has AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { subtract_avx2(tuned, base, out) },
        // SAFETY: the assertion above says that this machine has these parts of AVX-512, and with them AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { subtract_avx512(tuned, base, out) },
        _ => difference::subtract(tuned, base, out),
    }
}

/// The sum of the squares, in f64.
///
/// # Panics
/// If `isa` is not one of [`Isa::available`].
pub(crate) fn squares(isa: Isa, values: &[f32]) -> f64 {
    assert!(Isa::available().contains(&isa), "{isa:?} is not available on this machine");
    match isa {
        // SAFETY: the assertion above says that this machine has AVX2, alone or with AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { squares_avx2(values) },
        _ => difference::squares(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn every_instruction_set_gives_the_products(count in 1usize..40, cols in 1usize..600, width in 1usize..5, seed in any::<u32>()) {
            let width = width * STEP;
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 8) as f32 / 8388608.0 - 1.0
            };
            let mut values = |n: usize| (0..n).map(|_| next()).collect::<Vec<f32>>();
            let (d, x, z) = (values(count * cols), values(cols * width), values(cols * width));
            let rows = Rows { d: &d, cols, width };
            let sum = |terms: &mut dyn Iterator<Item = (f32, f32)>| terms.map(|(d, x)| f64::from(d) * f64::from(x)).sum::<f64>();
            let y64: Vec<f64> = (0..count * width).map(|n| {
                let (i, l) = (n / width, n % width);
                sum(&mut (0..cols).map(|j| (d[i * cols + j], x[j * width + l])))
            }).collect();
            let y: Vec<f32> = y64.iter().map(|y| *y as f32).collect();
            let z64: Vec<f64> = (0..cols * width).map(|n| {
                let (j, l) = (n / width, n % width);
                f64::from(z[n]) + sum(&mut (0..count).map(|i| (d[i * cols + j], y[i * width + l])))
            }).collect();
            let mut fused: Option<(Vec<f32>, Vec<f32>)> = None;
            for isa in Isa::available() {
                let (mut got_y, mut got_z) = (vec![9.0; y.len()], z.clone());
                times(isa, rows, &x, &mut got_y);
                add_transposed_times(isa, rows, &y, &mut got_z);
                // The bound of a sum of n products (Higham 2002, equation 3.5) with |d|, |x| <= 1, and |y| up to `cols`.
                let far = |got: &[f32], want: &[f64], bound: f64| got.iter().zip(want).any(|(g, w)| (f64::from(*g) - w).abs() > bound);
                let unit = f64::from(f32::EPSILON) / 2.0;
                prop_assert!(!far(&got_y, &y64, 1.01 * unit * (cols * cols) as f64 + 1e-30), "{:?} Y", isa);
                prop_assert!(!far(&got_z, &z64, 1.01 * unit * ((count + 1) * (count + 1) * cols) as f64), "{:?} Z", isa);
                if isa != Isa::Portable {
                    let first = fused.get_or_insert_with(|| (got_y.clone(), got_z.clone()));
                    prop_assert!(*first == (got_y, got_z), "the width of registers changes bits on {:?}", isa);
                }
            }
        }
    }
}
