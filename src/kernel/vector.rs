//! The registers of each instruction set, as far as [`single`](super::single) needs them. The compiler turned plain loops into scalar code
//! as often as not, and kept in memory what belongs into registers; so what is in one is said here.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A register of f32 values, or of their bits. An implementation is used only in kernels that are compiled for its instruction set, which
/// [`dispatch`](super::dispatch) enters only on a machine that has it. Loads and stores panic if the slice has fewer values than lanes.
pub(super) trait Vector: Copy {
    /// How many values there are; at most 32.
    const LANES: usize;
    /// All lanes are `value`.
    fn splat(value: f32) -> Self;
    fn load(from: &[f32]) -> Self;
    fn store(x: Self, to: &mut [f32]);
    fn add(x: Self, y: Self) -> Self;
    fn sub(x: Self, y: Self) -> Self;
    fn mul(x: Self, y: Self) -> Self;
    /// `x + a * b`, rounded once.
    fn add_product(x: Self, a: Self, b: Self) -> Self;
    /// A bit for each lane in which `x <= y`, the first lane lowest.
    fn at_most(x: Self, y: Self) -> u32;

    /// Values of 16 bits, little-endian, into the high halves of the lanes of two registers, above zeros. Of eight values in a row the
    /// first four go to the first register and the others to the second, which costs each instruction set one operation.
    fn load_halves(from: &[u8]) -> (Self, Self);
    /// The high halves of two registers in the same order.
    fn store_halves(x: Self, y: Self, to: &mut [u8]);
    fn and(x: Self, y: Self) -> Self;
    fn or(x: Self, y: Self) -> Self;
    /// The sum of the bits as integers, wrapping.
    fn add_bits(x: Self, y: Self) -> Self;
    fn shift_left(x: Self, by: u32) -> Self;
    fn shift_right(x: Self, by: u32) -> Self;
    /// A bit for each lane in which the bits differ.
    fn differs(x: Self, y: Self) -> u32;
    /// All lanes have these bits.
    #[inline(always)]
    fn splat_bits(bits: u32) -> Self {
        Self::splat(f32::from_bits(bits))
    }
}

macro_rules! vector {
    ($type:ident, $lanes:literal, $($name:ident($($arg:ident: $of:ty),*) $(-> $result:ty)? = $body:expr;)*) => {
        impl Vector for $type {
            const LANES: usize = $lanes;
            $(#[inline(always)]
            fn $name($($arg: $of),*) $(-> $result)? {
                // SAFETY: the contract of the trait: the machine has the instruction set. A body that takes a pointer asserts before that
                // all lanes lie within the slice; no alignment is asked for.
                unsafe { $body }
            })*
        }
    };
}

#[cfg(target_arch = "x86_64")]
vector! { __m512, 16,
    splat(value: f32) -> Self = _mm512_set1_ps(value);
    load(from: &[f32]) -> Self = { assert!(from.len() >= 16); _mm512_loadu_ps(from.as_ptr()) };
    store(x: Self, to: &mut [f32]) = { assert!(to.len() >= 16); _mm512_storeu_ps(to.as_mut_ptr(), x) };
    add(x: Self, y: Self) -> Self = _mm512_add_ps(x, y);
    sub(x: Self, y: Self) -> Self = _mm512_sub_ps(x, y);
    mul(x: Self, y: Self) -> Self = _mm512_mul_ps(x, y);
    add_product(x: Self, a: Self, b: Self) -> Self = _mm512_fmadd_ps(a, b, x);
    at_most(x: Self, y: Self) -> u32 = u32::from(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(x, y));
    load_halves(from: &[u8]) -> (Self, Self) = {
        assert!(from.len() >= 64);
        let (zero, values) = (_mm512_setzero_si512(), _mm512_loadu_si512(from.as_ptr().cast()));
        (_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, values)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, values)))
    };
    store_halves(x: Self, y: Self, to: &mut [u8]) = {
        assert!(to.len() >= 64);
        let (x, y) = (_mm512_srli_epi32::<16>(_mm512_castps_si512(x)), _mm512_srli_epi32::<16>(_mm512_castps_si512(y)));
        _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_packus_epi32(x, y))
    };
    and(x: Self, y: Self) -> Self = _mm512_and_ps(x, y);
    or(x: Self, y: Self) -> Self = _mm512_or_ps(x, y);
    add_bits(x: Self, y: Self) -> Self =
        _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y)));
    shift_left(x: Self, by: u32) -> Self =
        _mm512_castsi512_ps(_mm512_sllv_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(by as i32)));
    shift_right(x: Self, by: u32) -> Self =
        _mm512_castsi512_ps(_mm512_srlv_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(by as i32)));
    differs(x: Self, y: Self) -> u32 =
        u32::from(_mm512_cmpneq_epi32_mask(_mm512_castps_si512(x), _mm512_castps_si512(y)));
}

#[cfg(target_arch = "x86_64")]
vector! { __m256, 8,
    splat(value: f32) -> Self = _mm256_set1_ps(value);
    load(from: &[f32]) -> Self = { assert!(from.len() >= 8); _mm256_loadu_ps(from.as_ptr()) };
    store(x: Self, to: &mut [f32]) = { assert!(to.len() >= 8); _mm256_storeu_ps(to.as_mut_ptr(), x) };
    add(x: Self, y: Self) -> Self = _mm256_add_ps(x, y);
    sub(x: Self, y: Self) -> Self = _mm256_sub_ps(x, y);
    mul(x: Self, y: Self) -> Self = _mm256_mul_ps(x, y);
    add_product(x: Self, a: Self, b: Self) -> Self = _mm256_fmadd_ps(a, b, x);
    at_most(x: Self, y: Self) -> u32 = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(x, y)) as u32;
    load_halves(from: &[u8]) -> (Self, Self) = {
        assert!(from.len() >= 32);
        let (zero, values) = (_mm256_setzero_si256(), _mm256_loadu_si256(from.as_ptr().cast()));
        (_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, values)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, values)))
    };
    store_halves(x: Self, y: Self, to: &mut [u8]) = {
        assert!(to.len() >= 32);
        let (x, y) = (_mm256_srli_epi32::<16>(_mm256_castps_si256(x)), _mm256_srli_epi32::<16>(_mm256_castps_si256(y)));
        _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm256_packus_epi32(x, y))
    };
    and(x: Self, y: Self) -> Self = _mm256_and_ps(x, y);
    or(x: Self, y: Self) -> Self = _mm256_or_ps(x, y);
    add_bits(x: Self, y: Self) -> Self =
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
    shift_left(x: Self, by: u32) -> Self =
        _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(by as i32)));
    shift_right(x: Self, by: u32) -> Self =
        _mm256_castsi256_ps(_mm256_srlv_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(by as i32)));
    differs(x: Self, y: Self) -> u32 = {
        let same = _mm256_cmpeq_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y));
        0xff ^ _mm256_movemask_ps(_mm256_castsi256_ps(same)) as u32
    };
}

#[cfg(target_arch = "aarch64")]
vector! { float32x4_t, 4,
    splat(value: f32) -> Self = vdupq_n_f32(value);
    load(from: &[f32]) -> Self = { assert!(from.len() >= 4); vld1q_f32(from.as_ptr()) };
    store(x: Self, to: &mut [f32]) = { assert!(to.len() >= 4); vst1q_f32(to.as_mut_ptr(), x) };
    add(x: Self, y: Self) -> Self = vaddq_f32(x, y);
    sub(x: Self, y: Self) -> Self = vsubq_f32(x, y);
    mul(x: Self, y: Self) -> Self = vmulq_f32(x, y);
    add_product(x: Self, a: Self, b: Self) -> Self = vfmaq_f32(x, a, b);
    at_most(x: Self, y: Self) -> u32 = neon_mask(vcleq_f32(x, y));
    load_halves(from: &[u8]) -> (Self, Self) = {
        assert!(from.len() >= 16);
        let values = vreinterpretq_u16_u8(vld1q_u8(from.as_ptr()));
        let high = |values| vreinterpretq_f32_u32(vshll_n_u16::<16>(values));
        (high(vget_low_u16(values)), high(vget_high_u16(values)))
    };
    store_halves(x: Self, y: Self, to: &mut [u8]) = {
        assert!(to.len() >= 16);
        let halves = |x| vshrn_n_u32::<16>(vreinterpretq_u32_f32(x));
        vst1q_u8(to.as_mut_ptr(), vreinterpretq_u8_u16(vcombine_u16(halves(x), halves(y))))
    };
    and(x: Self, y: Self) -> Self = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vreinterpretq_u32_f32(y)));
    or(x: Self, y: Self) -> Self = vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(x), vreinterpretq_u32_f32(y)));
    add_bits(x: Self, y: Self) -> Self = vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x), vreinterpretq_u32_f32(y)));
    shift_left(x: Self, by: u32) -> Self = vreinterpretq_f32_u32(vshlq_u32(vreinterpretq_u32_f32(x), vdupq_n_s32(by as i32)));
    shift_right(x: Self, by: u32) -> Self = vreinterpretq_f32_u32(vshlq_u32(vreinterpretq_u32_f32(x), vdupq_n_s32(-(by as i32))));
    differs(x: Self, y: Self) -> u32 = neon_mask(vmvnq_u32(vceqq_u32(vreinterpretq_u32_f32(x), vreinterpretq_u32_f32(y))));
}

/// A bit for each lane of a comparison's result.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
unsafe fn neon_mask(lanes: uint32x4_t) -> u32 {
    // SAFETY: the caller's: the machine has NEON.
    unsafe { vaddvq_u32(vandq_u32(lanes, vld1q_u32([1, 2, 4, 8].as_ptr()))) }
}
