//! The largest magnitude among stored values, found on their bits: without the sign bit, floats are ordered as integers.

use super::float::Float;

/// The largest |x| of the values, as stored little-endian; infinite if any is not finite (NaN has larger bits than infinity).
///
/// # Panics
/// If `bytes` is not a whole number of values.
pub(crate) fn largest(format: Float, bytes: &[u8]) -> f64 {
    let mut value = [0.0f64];
    match format {
        Float::BF16 | Float::F16 => {
            // As i16, which SSE2 has a maximum of; without the sign all are positive.
            let bits = bytes.chunks_exact(2).fold(0, |max: i16, b| max.max(i16::from_le_bytes([b[0], b[1]]) & i16::MAX));
            format.widen(&bits.to_le_bytes(), &mut value);
        }
        Float::F32 => {
            let bits =
                bytes.chunks_exact(4).fold(0, |max: i32, b| max.max(i32::from_le_bytes([b[0], b[1], b[2], b[3]]) & i32::MAX));
            format.widen(&bits.to_le_bytes(), &mut value);
        }
        Float::F64 => {
            let bits = bytes
                .chunks_exact(8)
                .fold(0, |max: i64, b| max.max(i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) & i64::MAX));
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

    #[test]
    fn the_largest_is_found_whatever_its_sign() {
        for format in [Float::BF16, Float::F16, Float::F32, Float::F64] {
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
