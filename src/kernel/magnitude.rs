//! The largest magnitude among stored values, found on their bits: without the sign bit, floats are ordered as integers.

use super::float::Float;

/// The largest |x| of the values, as stored little-endian; infinite if any is not finite (NaN has larger bits than infinity).
#[inline(always)]
pub(super) fn largest(format: Float, bytes: &[u8]) -> f64 {
    let mut value = [0.0f64];
    // As signed integers, which every instruction set has a maximum of; without the sign bit all are positive.
    match format {
        Float::BF16 | Float::F16 => {
            let bits = bytes.as_chunks::<2>().0.iter().fold(0, |max, b| (i16::from_le_bytes(*b) & i16::MAX).max(max));
            format.widen(&bits.to_le_bytes(), &mut value);
        }
        Float::F32 => {
            let bits = bytes.as_chunks::<4>().0.iter().fold(0, |max, b| (i32::from_le_bytes(*b) & i32::MAX).max(max));
            format.widen(&bits.to_le_bytes(), &mut value);
        }
        Float::F64 => {
            let bits = bytes.as_chunks::<8>().0.iter().fold(0, |max, b| (i64::from_le_bytes(*b) & i64::MAX).max(max));
            format.widen(&bits.to_le_bytes(), &mut value);
        }
    }
    if value[0].is_finite() { value[0] } else { f64::INFINITY }
}

/// The largest finite value of a format.
pub(crate) fn limit(format: Float) -> f64 {
    match format {
        Float::BF16 => f64::from(f32::from_bits(0x7f7f_0000)),
        Float::F16 => 65_504.0,
        Float::F32 => f64::from(f32::MAX),
        Float::F64 => f64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::dispatch::{self, Isa};

    #[test]
    fn the_largest_is_found_whatever_its_sign() {
        let formats = [Float::BF16, Float::F16, Float::F32, Float::F64];
        let kernels = Isa::available().into_iter().flat_map(|isa| formats.map(|format| (isa, format)));
        for (isa, format) in kernels {
            let largest = |format, bytes: &[u8]| dispatch::largest(isa, format, bytes);
            let mut bytes = vec![0; 5 * format.size()];
            format.narrow(&[0.0, -0.5, 0.25, -0.0, 0.375], &mut bytes);
            assert_eq!(largest(format, &bytes), 0.5);
            for bad in [f64::NAN, f64::NEG_INFINITY] {
                format.narrow(&[1.0, bad, 2.0, 3.0, 4.0], &mut bytes);
                assert_eq!(largest(format, &bytes), f64::INFINITY);
            }
            format.narrow(&[limit(format), 1.0, 0.0, 0.0, 0.0], &mut bytes);
            assert_eq!(largest(format, &bytes), limit(format));
            let next = [limit(format) * (1.0 + 1.0 / 256.0), 0.0, 0.0, 0.0, 0.0];
            format.narrow(&next, &mut bytes);
            assert_eq!(largest(format, &bytes), f64::INFINITY);
        }
        assert_eq!(largest(Float::F32, &[]), 0.0);
    }
}
