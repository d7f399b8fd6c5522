//! The four float formats: widened to f64 exactly, rounded back once, to nearest, ties to even.
//!
//! f64 to a 16-bit format goes through f32 *rounded to odd* (Boldo and Melquiond 2008, theorem 2): truncate, and set the last bit
//! if anything was lost. f32 has more than two bits more than either format, so the second rounding then sees on which side of
//! every tie the value lies and the result is the correctly rounded one. Everything is branch-free, so that it vectorises.

/// The format of stored values, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float {
    F64,
    F32,
    F16,
    BF16,
}

impl Float {
    /// Bytes of one value.
    pub(crate) fn size(self) -> usize {
        match self {
            Float::F64 => 8,
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
        }
    }

    /// Widens as many values as fit into `out`: exactly, unless F64 goes into f32.
    pub(crate) fn widen<V: Value>(self, bytes: &[u8], out: &mut [V]) {
        fn run<F: Format, V: Value>(bytes: &[u8], out: &mut [V]) {
            for (value, raw) in out.iter_mut().zip(bytes.chunks_exact(F::SIZE)) {
                *value = V::from_wide(F::widen(F::load(raw)));
            }
        }
        match self {
            Float::F64 => run::<F64, V>(bytes, out),
            Float::F32 => run::<F32, V>(bytes, out),
            Float::F16 => run::<F16, V>(bytes, out),
            Float::BF16 => run::<BF16, V>(bytes, out),
        }
    }

    /// Rounds `values` into `out`.
    pub(crate) fn narrow(self, values: &[f64], out: &mut [u8]) {
        fn run<F: Format>(values: &[f64], out: &mut [u8]) {
            for (value, raw) in values.iter().zip(out.chunks_exact_mut(F::SIZE)) {
                F::store(F::narrow(*value), raw);
            }
        }
        match self {
            Float::F64 => run::<F64>(values, out),
            Float::F32 => run::<F32>(values, out),
            Float::F16 => run::<F16>(values, out),
            Float::BF16 => run::<BF16>(values, out),
        }
    }
}

/// What factors are held as: f32, which is exact for all formats but F64, or f64.
pub(crate) trait Value: Copy + Default + Send + Sync {
    /// A product with another such value is exact in f64, so that fused and separate operations have the same bits.
    const EXACT: bool;
    fn wide(self) -> f64;
    fn from_wide(value: f64) -> Self;
    /// The slice, if it is of f32.
    fn singles(slice: &[Self]) -> Option<&[f32]>;
}

impl Value for f32 {
    const EXACT: bool = true;
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn from_wide(value: f64) -> f32 {
        value as f32
    }
    fn singles(slice: &[f32]) -> Option<&[f32]> {
        Some(slice)
    }
}

impl Value for f64 {
    const EXACT: bool = false;
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_wide(value: f64) -> f64 {
        value
    }
    fn singles(_: &[f64]) -> Option<&[f32]> {
        None
    }
}

/// A format as a type, so that a kernel is compiled once per format.
pub(super) trait Format {
    /// Bytes of one value.
    const SIZE: usize;
    /// The stored bits.
    type Bits: Copy + Default + PartialEq;
    /// Exact.
    fn widen(bits: Self::Bits) -> f64;
    /// Rounded once, to nearest even.
    fn narrow(value: f64) -> Self::Bits;
    /// From little-endian bytes, `SIZE` of them.
    fn load(raw: &[u8]) -> Self::Bits;
    /// To little-endian bytes, `SIZE` of them.
    fn store(bits: Self::Bits, raw: &mut [u8]);
    /// The next value away from zero.
    fn away(bits: Self::Bits) -> Self::Bits;
    /// The next value toward zero, which `bits` is not.
    fn toward(bits: Self::Bits) -> Self::Bits;
}

/// The part of a format that says which integer holds its bits.
macro_rules! stored_as {
    ($bits:ident) => {
        const SIZE: usize = size_of::<$bits>();
        type Bits = $bits;
        #[inline(always)]
        fn load(raw: &[u8]) -> $bits {
            $bits::from_le_bytes(*raw.first_chunk().expect("SIZE bytes"))
        }
        #[inline(always)]
        fn store(bits: $bits, raw: &mut [u8]) {
            *raw.first_chunk_mut().expect("SIZE bytes") = bits.to_le_bytes();
        }
        #[inline(always)]
        fn away(bits: $bits) -> $bits {
            bits.wrapping_add(1)
        }
        #[inline(always)]
        fn toward(bits: $bits) -> $bits {
            bits.wrapping_sub(1)
        }
    };
}

pub(super) struct F64;
pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

impl Format for F64 {
    stored_as!(u64);
    #[inline(always)]
    fn widen(bits: u64) -> f64 {
        f64::from_bits(bits)
    }
    #[inline(always)]
    fn narrow(value: f64) -> u64 {
        value.to_bits()
    }
}

impl Format for F32 {
    stored_as!(u32);
    #[inline(always)]
    fn widen(bits: u32) -> f64 {
        f64::from(f32::from_bits(bits))
    }
    #[inline(always)]
    fn narrow(value: f64) -> u32 {
        (value as f32).to_bits()
    }
}

impl Format for BF16 {
    stored_as!(u16);
    #[inline(always)]
    fn widen(bits: u16) -> f64 {
        f64::from(f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    fn narrow(value: f64) -> u16 {
        bf16_bits(round_to_odd(value))
    }
}

impl Format for F16 {
    stored_as!(u16);
    #[inline(always)]
    fn widen(bits: u16) -> f64 {
        f64::from(f16_value(bits))
    }
    #[inline(always)]
    fn narrow(value: f64) -> u16 {
        f16_bits(round_to_odd(value))
    }
}

/// f64 to f32 by truncation, with the last bit set if anything was lost. Beyond the range of f32 the result is the largest finite
/// value (which is odd), so that the rounding that follows overflows to infinity as it must.
#[inline(always)]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    let truncated = if back.abs() > value.abs() { bits.wrapping_sub(1) } else { bits };
    f32::from_bits(if back == value { bits } else { truncated | 1 })
}

/// f32 to bf16, to nearest even. NaN stays NaN (quiet).
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    (if value.is_nan() { (bits >> 16) | 0x40 } else { rounded }) as u16
}

/// f32 to f16, to nearest even. Subnormal results are rounded by an addition whose last place is the last place of f16.
#[inline(always)]
fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let normal = (magnitude.wrapping_add(0xfff + ((magnitude >> 13) & 1)) >> 13).wrapping_sub(112 << 10);
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
    let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    (sign | if magnitude >= 0x477f_f000 { special } else { finite }) as u16
}

/// f16 to f32, exactly: the bits moved to f32's places, times 2^112 for the difference of the exponents' offsets.
#[inline(always)]
fn f16_value(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits((112 + 127) << 23);
    let special = f32::from_bits(magnitude | 0x7f80_0000);
    let value = if magnitude >= 0x7c00 << 13 { special } else { scaled };
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn store(format: Float, value: f64) -> u16 {
        let mut raw = [0; 2];
        format.narrow(&[value], &mut raw);
        u16::from_le_bytes(raw)
    }

    fn load(format: Float, bits: u16) -> f64 {
        let mut out = [0.0];
        format.widen(&bits.to_le_bytes(), &mut out);
        out[0]
    }

    /// The `half` crate is the outside judge of widening: all 65,536 patterns of both formats.
    #[test]
    fn widening_agrees_with_half_on_every_pattern() {
        for bits in 0..=u16::MAX {
            let (f, b) = (half::f16::from_bits(bits).to_f64(), half::bf16::from_bits(bits).to_f64());
            assert!(load(Float::F16, bits) == f || f.is_nan() && load(Float::F16, bits).is_nan(), "f16 {bits:#06x}");
            assert!(load(Float::BF16, bits) == b || b.is_nan() && load(Float::BF16, bits).is_nan(), "bf16 {bits:#06x}");
        }
    }

    #[test]
    fn what_was_widened_narrows_back() {
        for bits in 0..=u16::MAX {
            for format in [Float::F16, Float::BF16] {
                let value = load(format, bits);
                if !value.is_nan() {
                    assert_eq!(store(format, value), bits, "{format:?} {bits:#06x}");
                } else {
                    assert!(load(format, store(format, value)).is_nan());
                }
            }
        }
    }

    /// Rounding by definition: of the two neighbours take the nearer, at a tie the even one. Neighbouring patterns of one sign are
    /// neighbouring values; one past the largest finite one stands for the next power of two.
    fn oracle(format: Float, value: f64) -> u16 {
        let (infinity, beyond) = match format {
            Float::F16 => (0x7c00u16, 65536.0),
            _ => (0x7f80, 2f64.powi(128)),
        };
        let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
        let magnitude = value.abs();
        let at = |bits: u16| if bits == infinity { beyond } else { load(format, bits) };
        let (mut low, mut high) = (0u16, infinity);
        if magnitude >= beyond {
            return sign | infinity;
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if at(middle) <= magnitude { low = middle } else { high = middle }
        }
        let (below, above) = (magnitude - at(low), at(high) - magnitude);
        sign | if below < above || (below == above && low % 2 == 0) { low } else { high }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn any_f64_is_rounded_once(value in any::<f64>().prop_filter("finite", |v| v.is_finite())) {
            prop_assert_eq!(store(Float::F16, value), oracle(Float::F16, value));
            prop_assert_eq!(store(Float::BF16, value), oracle(Float::BF16, value));
        }

        /// Values a hair beside a tie, where rounding twice goes wrong.
        #[test]
        fn ties_and_their_neighbours_are_rounded_once(bits in 0u16..0x7bff, up in -2i64..=2, negative: bool) {
            for format in [Float::F16, Float::BF16] {
                let tie = (load(format, bits) + load(format, bits + 1)) / 2.0;
                let beside = f64::from_bits((tie.to_bits() as i64 + up) as u64);
                let value = if negative { -beside } else { beside };
                prop_assert_eq!(store(format, value), oracle(format, value), "{:?} {:e}", format, value);
            }
        }
    }

    #[test]
    fn the_edges_of_the_ranges() {
        assert_eq!(store(Float::F16, 65519.999), 0x7bff);
        assert_eq!(store(Float::F16, 65520.0), 0x7c00);
        assert_eq!(store(Float::F16, 2f64.powi(-25)), 0x0000);
        assert_eq!(store(Float::F16, 2f64.powi(-25) * 1.000001), 0x0001);
        assert_eq!(store(Float::F16, -0.0), 0x8000);
        assert_eq!(store(Float::BF16, f64::MAX), 0x7f80);
        assert_eq!(store(Float::BF16, 1e-300), 0x0000);
    }
}
