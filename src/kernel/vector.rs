//! The registers of each instruction set, as far as the inner loop of [`single`](super::single) needs them: load, broadcast, fused
//! multiply-add, store. Everything else is left to the compiler, which turned that one loop into scalar code as often as not.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::{float32x4_t, vdupq_n_f32, vfmaq_f32, vld1q_f32, vst1q_f32};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_set1_ps, _mm512_storeu_ps,
};

/// A register of f32 values. An implementation is used only in kernels that are compiled for its instruction set, which
/// [`dispatch`](super::dispatch) enters only on a machine that has it.
pub(super) trait Vector: Copy {
    /// All lanes are `value`.
    fn splat(value: f32) -> Self;
    /// The first values of the slice.
    ///
    /// # Panics
    /// If there are fewer than lanes.
    fn load(from: &[f32]) -> Self;
    /// Into the first places of the slice.
    ///
    /// # Panics
    /// If there are fewer than lanes.
    fn store(self, to: &mut [f32]);
    /// `a * b + self`, rounded once.
    fn add_product(self, a: Self, b: Self) -> Self;
}

macro_rules! vector {
    ($type:ident, $lanes:literal, $splat:ident, $load:ident, $store:ident, |$acc:ident, $a:ident, $b:ident| $fma:expr) => {
        impl Vector for $type {
            #[inline(always)]
            fn splat(value: f32) -> Self {
                // SAFETY: the contract of the trait: the machine has the instruction set.
                unsafe { $splat(value) }
            }
            #[inline(always)]
            fn load(from: &[f32]) -> Self {
                assert!(from.len() >= $lanes, "a register is longer than the slice");
                // SAFETY: as above; the assertion says that all lanes lie within the slice, and no alignment is asked for.
                unsafe { $load(from.as_ptr()) }
            }
            #[inline(always)]
            fn store(self, to: &mut [f32]) {
                assert!(to.len() >= $lanes, "a register is longer than the slice");
                // SAFETY: as above.
                unsafe { $store(to.as_mut_ptr(), self) }
            }
            #[inline(always)]
            fn add_product(self, $a: Self, $b: Self) -> Self {
                let $acc = self;
                // SAFETY: as above.
                unsafe { $fma }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vector!(__m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, |acc, a, b| _mm512_fmadd_ps(a, b, acc));
#[cfg(target_arch = "x86_64")]
vector!(__m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, |acc, a, b| _mm256_fmadd_ps(a, b, acc));
#[cfg(target_arch = "aarch64")]
vector!(float32x4_t, 4, vdupq_n_f32, vld1q_f32, vst1q_f32, |acc, a, b| vfmaq_f32(acc, a, b));
