//! The 16-bit formats in registers of f32, widened and rounded on their bits: for values that are no tie, and whose magnitude lies between
//! [`Half::SMALLEST`] and [`Half::LARGEST`]. All others go through [`Format`].

use super::float::{BF16, F16, Format};
use super::vector::Vector;

/// A 16-bit format, reached from f32 without a detour.
pub(super) trait Half: Format<Bits = u16> {
    /// Magnitudes above are rounded by dropping a fixed number of bits.
    const SMALLEST: f32;
    /// The largest magnitude that f32 arithmetic is trusted with: rounding cannot overflow, and a square not f32.
    const LARGEST: f32;
    /// How many bits of an f32 are dropped.
    const DROPPED: u32;
    /// From stored bits in the high halves, exactly.
    fn widen<V: Vector>(bits: V) -> V;
    /// To stored bits in the high halves, of what [`rounded`](Half::rounded) gave.
    fn narrow<V: Vector>(rounded: V) -> V;

    /// The nearest value of the format, as f32; at a tie the larger magnitude.
    #[inline(always)]
    fn rounded<V: Vector>(x: V) -> V {
        V::and(V::add_bits(x, V::splat_bits(1 << (Self::DROPPED - 1))), V::splat_bits(u32::MAX << Self::DROPPED))
    }

    /// [`rounded`](Half::rounded), of one value.
    #[inline(always)]
    fn rounded_single(x: f32) -> f32 {
        f32::from_bits(x.to_bits().wrapping_add(1 << (Self::DROPPED - 1)) & (u32::MAX << Self::DROPPED))
    }

    /// The tie between the two values of the format that enclose `x`.
    #[inline(always)]
    fn tie<V: Vector>(x: V) -> V {
        V::or(V::and(x, V::splat_bits(u32::MAX << Self::DROPPED)), V::splat_bits(1 << (Self::DROPPED - 1)))
    }
}

impl Half for BF16 {
    const SMALLEST: f32 = 0.0;
    const LARGEST: f32 = 1e15;
    const DROPPED: u32 = 16;
    #[inline(always)]
    fn widen<V: Vector>(bits: V) -> V {
        bits
    }
    #[inline(always)]
    fn narrow<V: Vector>(rounded: V) -> V {
        rounded
    }
}

impl Half for F16 {
    const SMALLEST: f32 = 6.103_515_6e-5;
    const LARGEST: f32 = 65504.0;
    const DROPPED: u32 = 13;
    #[inline(always)]
    fn widen<V: Vector>(bits: V) -> V {
        // The bits moved to f32's places, times 2^112 for the difference of the exponents' offsets.
        let magnitude = V::shift_right(V::and(bits, V::splat_bits(0x7fff_0000)), 3);
        let scaled = V::mul(magnitude, V::splat_bits((112 + 127) << 23));
        V::or(scaled, V::and(bits, V::splat_bits(0x8000_0000)))
    }
    #[inline(always)]
    fn narrow<V: Vector>(rounded: V) -> V {
        let magnitude = V::add_bits(V::and(rounded, V::splat_bits(0x7fff_ffff)), V::splat_bits(0u32.wrapping_sub(112 << 23)));
        V::or(V::shift_left(magnitude, 3), V::and(rounded, V::splat_bits(0x8000_0000)))
    }
}
