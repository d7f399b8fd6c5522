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
            for (out, t) in out.iter_mut().zip(tuned.chunks_exact(T::SIZE)) {
                *out = T::widen(T::load(t)) as f32;
            }
        }
        Some((Float::F64, base)) => between::<T, F64>(tuned, base, out),
        Some((Float::F32, base)) => between::<T, F32>(tuned, base, out),
        Some((Float::F16, base)) => between::<T, F16>(tuned, base, out),
        Some((Float::BF16, base)) => between::<T, BF16>(tuned, base, out),
    }
}

#[inline(always)]
fn between<T: Format, B: Format>(tuned: &[u8], base: &[u8], out: &mut [f32]) {
    let values = tuned.chunks_exact(T::SIZE).zip(base.chunks_exact(B::SIZE));
    for (out, (t, b)) in out.iter_mut().zip(values) {
        *out = (T::widen(T::load(t)) - B::widen(B::load(b))) as f32;
    }
}

/// The sum of the squares, which are exact in f64, in sixteen sums that are added in order.
#[inline(always)]
pub(super) fn squares(values: &[f32]) -> f64 {
    let mut sums = [0.0f64; 16];
    let whole = values.chunks_exact(16);
    let rest: f64 = whole.remainder().iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    for chunk in whole {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    sums.iter().sum::<f64>() + rest
}
