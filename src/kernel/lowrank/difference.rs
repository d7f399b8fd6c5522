//! The difference of two lists of stored values, as f32.

use super::super::float::{BF16, F16, F32, F64, Float, Format};

/// `tuned - base`, or `tuned` without a base, rounded to f32 once. It is written in f64; but for F64 the compiler computes it in f32, which
/// gives the same bits, because f64 has more than twice as many digits (Figueroa 1995).
#[inline(always)]
pub(super) fn subtract((of, tuned): (Float, &[u8]), base: Option<(Float, &[u8])>, out: &mut [f32]) {
    match of {
        Float::F64 => from::<F64>(tuned, base, out),
        Float::F32 => from::<F32>(tuned, base, out),
        Float::F16 => from::<F16>(tuned, base, out),
        Float::BF16 => from::<BF16>(tuned, base, out),
    }
}

#[inline(always)]
fn from<T: Format>(tuned: &[u8], base: Option<(Float, &[u8])>, out: &mut [f32]) {
    match base {
        None => {
            let tuned = &tuned[..out.len() * T::SIZE];
            for i in 0..out.len() {
                out[i] = T::widen(T::load(&tuned[i * T::SIZE..(i + 1) * T::SIZE])) as f32;
            }
        }
        Some((Float::F64, base)) => between::<T, F64>(tuned, base, out),
        Some((Float::F32, base)) => between::<T, F32>(tuned, base, out),
        Some((Float::F16, base)) => between::<T, F16>(tuned, base, out),
        Some((Float::BF16, base)) => between::<T, BF16>(tuned, base, out),
    }
}

/// No iterators: unless the compiler happens to inline them, they are compiled for the portable instruction set, and a build without
/// optimisation across units takes sixteen times as long.
#[inline(always)]
fn between<T: Format, B: Format>(tuned: &[u8], base: &[u8], out: &mut [f32]) {
    let (tuned, base) = (&tuned[..out.len() * T::SIZE], &base[..out.len() * B::SIZE]);
    for i in 0..out.len() {
        let t = T::widen(T::load(&tuned[i * T::SIZE..(i + 1) * T::SIZE]));
        out[i] = (t - B::widen(B::load(&base[i * B::SIZE..(i + 1) * B::SIZE]))) as f32;
    }
}

/// The sum of the squares, which are exact in f64, in sixteen sums that are added in order.
#[inline(always)]
pub(super) fn squares(values: &[f32]) -> f64 {
    let mut sums = [0.0f64; 16];
    let (whole, last) = values.as_chunks::<16>();
    for chunk in whole {
        for i in 0..16 {
            sums[i] += f64::from(chunk[i]) * f64::from(chunk[i]);
        }
    }
    let mut rest = 0.0;
    for value in last {
        rest += f64::from(*value) * f64::from(*value);
    }
    sums.iter().sum::<f64>() + rest
}
