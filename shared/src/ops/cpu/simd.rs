//! Vectors of f32 behind one trait, and the macro that compiles a kernel for each instruction set and chooses when it runs.
//!
//! A kernel is an `#[inline(always)]` function, generic over [`Simd`]. [`dispatch!`] wraps it into one function for each instruction
//! set, compiled with that set's instructions, and calls the one in use. The choice is made once for a tile of work, not for a vector.
#![expect(unsafe_code, reason = "vector instructions and raw pointers into tiles")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    clippy::inline_always,
    reason = "each function is one intrinsic or a formula of them, and must be compiled with its caller's instructions"
)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _CMP_EQ_OQ, _CMP_GT_OQ, _CMP_NEQ_UQ, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _MM_HINT_T0, _mm_prefetch, _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_blendv_ps, _mm256_castsi256_ps,
    _mm256_cmp_ps, _mm256_cvtps_epi32, _mm256_div_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_maskload_ps, _mm256_maskstore_ps, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_round_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps, _mm512_add_ps,
    _mm512_cmp_ps_mask, _mm512_div_ps, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_mask_mov_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_ps, _mm512_storeu_ps, _mm512_sub_ps,
};

/// Coefficients of `2^f` for `f` in `[-0.5, 0.5]`, lowest first; relative error at most 7.5e-8.
const EXP2: [f32; 6] = [1.000_000_1, 0.693_146_94, 0.240_221_2, 0.055_507_13, 0.009_675_541, 0.001_327_647_1];
/// Beyond it `2^x` counts as 0 or infinity beside 1.
pub(super) const EXP2_LIMIT: f32 = 80.0;

/// A vector of f32.
///
/// # Safety
/// Every function must only be called where the instructions of the implementing type are available, which [`dispatch!`] sees to.
/// Pointers must be valid for the lanes that are read or written; they need no alignment.
pub(super) unsafe trait Simd: Copy {
    /// Numbers in a vector.
    const LANES: usize;
    /// Accumulators that a matrix kernel keeps in registers, beside the vectors it needs for its operands.
    const ACCUMULATORS: usize;

    /// Asks for the cache line of an address, valid or not, ahead of its use.
    fn prefetch(from: *const f32);
    /// The same number everywhere.
    unsafe fn splat(x: f32) -> Self;
    /// All lanes from memory.
    unsafe fn load(from: *const f32) -> Self;
    /// All lanes to memory.
    unsafe fn store(self, to: *mut f32);
    /// The first `count` lanes from memory, all of them when `count` is larger; the rest is 0.
    unsafe fn load_first(from: *const f32, count: usize) -> Self;
    /// The first `count` lanes to memory, all of them when `count` is larger.
    unsafe fn store_first(self, to: *mut f32, count: usize);
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self - other`.
    unsafe fn sub(self, other: Self) -> Self;
    /// `self * other`.
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + term`, rounded once where the machine can.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// `term - self * factor`, rounded once where the machine can.
    unsafe fn neg_mul_add(self, factor: Self, term: Self) -> Self;
    /// The smaller; `other` when one is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// The larger; `other` when one is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// `self` where `a > b`, elsewhere 0.
    unsafe fn where_greater(self, a: Self, b: Self) -> Self;
    /// `self` where `a == b`, elsewhere 0.
    unsafe fn where_equal(self, a: Self, b: Self) -> Self;
    /// `self` where `a != b` or one of them is NaN, elsewhere 0.
    unsafe fn where_unequal(self, a: Self, b: Self) -> Self;
    /// The larger; NaN when one is NaN.
    unsafe fn max_or_nan(self, other: Self) -> Self;
    /// `self / other`, correctly rounded: approximate reciprocals differ between makers of processors.
    unsafe fn div(self, other: Self) -> Self;
    /// `2^self` for finite numbers. Beyond ±[`EXP2_LIMIT`] it is some number so large or small that 1 counts for nothing beside it.
    unsafe fn exp2(self) -> Self;

    /// The polynomial of [`EXP2`].
    #[inline(always)]
    unsafe fn exp2_fraction(self) -> Self {
        // SAFETY: the caller's contract is that of each call.
        unsafe {
            let mut sum = Self::splat(EXP2[5]);
            for coefficient in EXP2[..5].iter().rev() {
                sum = sum.mul_add(self, Self::splat(*coefficient));
            }
            sum
        }
    }

    /// `1 + exp(-self)` for finite numbers; NaN stays NaN.
    #[inline(always)]
    unsafe fn one_plus_exp_of_negative(self) -> Self {
        // SAFETY: the caller's contract is that of each call.
        unsafe { self.mul(Self::splat(-std::f32::consts::LOG2_E)).exp2().add(Self::splat(1.0)) }
    }
}

// SAFETY: plain wrappers of AVX-512 intrinsics.
#[cfg(target_arch = "x86_64")]
unsafe impl Simd for __m512 {
    const LANES: usize = 16;
    const ACCUMULATORS: usize = 24;

    #[inline(always)]
    fn prefetch(from: *const f32) {
        // SAFETY: a prefetch never faults, and every x86-64 machine has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { _mm512_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        // SAFETY: the caller's contract; masked lanes are not read.
        unsafe {
            if count >= 16 { _mm512_loadu_ps(from) } else { _mm512_maskz_loadu_ps(((1u32 << count) - 1) as u16, from) }
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's contract; masked lanes are not written.
        unsafe {
            if count >= 16 {
                _mm512_storeu_ps(to, self);
            } else {
                _mm512_mask_storeu_ps(to, ((1u32 << count) - 1) as u16, self);
            }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_sub_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_mul_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_fmadd_ps(self, factor, term) }
    }
    #[inline(always)]
    unsafe fn neg_mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_fnmadd_ps(self, factor, term) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_min_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_max_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn where_greater(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), self) }
    }
    #[inline(always)]
    unsafe fn where_equal(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), self) }
    }
    #[inline(always)]
    unsafe fn where_unequal(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a, b), self) }
    }
    #[inline(always)]
    unsafe fn max_or_nan(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_mask_mov_ps(_mm512_max_ps(self, other), _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self, self), self) }
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self);
            _mm512_scalef_ps(self.sub(whole).exp2_fraction(), whole)
        }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm512_div_ps(self, other) }
    }
}

/// Masks of the first lanes: 8 - `count` numbers into it.
#[cfg(target_arch = "x86_64")]
static FIRST_LANES: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

// SAFETY: plain wrappers of AVX2 and FMA intrinsics.
#[cfg(target_arch = "x86_64")]
unsafe impl Simd for __m256 {
    const LANES: usize = 8;
    const ACCUMULATORS: usize = 12;

    #[inline(always)]
    fn prefetch(from: *const f32) {
        // SAFETY: a prefetch never faults, and every x86-64 machine has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { _mm256_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        // SAFETY: the caller's contract; the mask is read within its 16 numbers, masked lanes are not read.
        unsafe {
            if count >= 8 {
                return _mm256_loadu_ps(from);
            }
            let mask = _mm256_loadu_si256(FIRST_LANES.as_ptr().add(8 - count).cast());
            _mm256_maskload_ps(from, mask)
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's contract; the mask is read within its 16 numbers, masked lanes are not written.
        unsafe {
            if count >= 8 {
                return _mm256_storeu_ps(to, self);
            }
            let mask = _mm256_loadu_si256(FIRST_LANES.as_ptr().add(8 - count).cast());
            _mm256_maskstore_ps(to, mask, self);
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_sub_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_mul_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_fmadd_ps(self, factor, term) }
    }
    #[inline(always)]
    unsafe fn neg_mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { std::arch::x86_64::_mm256_fnmadd_ps(self, factor, term) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_min_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_max_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn where_greater(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b), self) }
    }
    #[inline(always)]
    unsafe fn where_equal(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(a, b), self) }
    }
    #[inline(always)]
    unsafe fn where_unequal(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(a, b), self) }
    }
    #[inline(always)]
    unsafe fn max_or_nan(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_blendv_ps(_mm256_max_ps(self, other), self, _mm256_cmp_ps::<_CMP_UNORD_Q>(self, self)) }
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            // The limit comes first: of a NaN and a number the second is the result.
            let power = Self::splat(EXP2_LIMIT).min(Self::splat(-EXP2_LIMIT).max(self));
            let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(power);
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
            power.sub(whole).exp2_fraction().mul(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { _mm256_div_ps(self, other) }
    }
}

/// Four numbers in plain code, which compilers turn into the vectors that every machine of the target has.
#[derive(Debug, Clone, Copy)]
#[repr(align(16))]
pub(super) struct Portable([f32; 4]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let (a, b) = (self.0, other.0);
        Self([f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])])
    }
}

/// `a * b + c`, rounded once where that costs nothing.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

// SAFETY: plain code; only the pointers of loads and stores are the caller's business.
unsafe impl Simd for Portable {
    const LANES: usize = 4;
    const ACCUMULATORS: usize = 12;

    #[inline(always)]
    fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's contract.
        Self(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            if count >= 4 {
                return Self::load(from);
            }
            let mut lanes = [0.0; 4];
            for (lane, slot) in lanes.iter_mut().enumerate().take(count) {
                *slot = *from.add(lane);
            }
            Self(lanes)
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            if count >= 4 {
                return self.store(to);
            }
            for (lane, value) in self.0.iter().enumerate().take(count) {
                *to.add(lane) = *value;
            }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        let (a, b, c) = (self.0, factor.0, term.0);
        Self([fused(a[0], b[0], c[0]), fused(a[1], b[1], c[1]), fused(a[2], b[2], c[2]), fused(a[3], b[3], c[3])])
    }
    #[inline(always)]
    unsafe fn neg_mul_add(self, factor: Self, term: Self) -> Self {
        let (a, b, c) = (self.0, factor.0, term.0);
        Self([fused(-a[0], b[0], c[0]), fused(-a[1], b[1], c[1]), fused(-a[2], b[2], c[2]), fused(-a[3], b[3], c[3])])
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn where_greater(self, a: Self, b: Self) -> Self {
        let mut lanes = self.0;
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = if a.0[lane] > b.0[lane] { *value } else { 0.0 };
        }
        Self(lanes)
    }
    #[inline(always)]
    unsafe fn where_equal(self, a: Self, b: Self) -> Self {
        let mut lanes = self.0;
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = if a.0[lane] == b.0[lane] { *value } else { 0.0 };
        }
        Self(lanes)
    }
    #[inline(always)]
    unsafe fn where_unequal(self, a: Self, b: Self) -> Self {
        let mut lanes = self.0;
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = if a.0[lane] == b.0[lane] { 0.0 } else { *value };
        }
        Self(lanes)
    }
    #[inline(always)]
    unsafe fn max_or_nan(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b || a.is_nan() { a } else { b })
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        /// Adding and subtracting it rounds small numbers to whole ones.
        const ROUNDER: f32 = 12_582_912.0;
        let mut scales = [0.0; 4];
        let mut fractions = [0.0; 4];
        // SAFETY: plain code.
        let power = unsafe { Self::splat(EXP2_LIMIT).min(Self::splat(-EXP2_LIMIT).max(self)) };
        for (lane, x) in power.0.into_iter().enumerate() {
            let whole = (x + ROUNDER) - ROUNDER;
            fractions[lane] = x - whole;
            scales[lane] = f32::from_bits((((whole as i32) + 127) << 23) as u32);
        }
        // SAFETY: plain code.
        unsafe { Self(fractions).exp2_fraction().mul(Self(scales)) }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
}

/// Defines `unsafe fn $name` that runs `$kernel::<V>` compiled for the instruction set in use.
macro_rules! dispatch {
    ($(#[$attribute:meta])* $name:ident = $kernel:ident($($argument:ident: $type:ty),* $(,)?)) => {
        $(#[$attribute])*
        unsafe fn $name($($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,bmi2")]
            unsafe fn avx512($($argument: $type),*) {
                // SAFETY: the caller's contract; the instructions are enabled here.
                unsafe { $kernel::<std::arch::x86_64::__m512>($($argument),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($argument: $type),*) {
                // SAFETY: the caller's contract; the instructions are enabled here.
                unsafe { $kernel::<std::arch::x86_64::__m256>($($argument),*) }
            }
            match $crate::ops::isa::isa() {
                // SAFETY: the caller's contract; a set is in use only when the machine has it.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::isa::Isa::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::isa::Isa::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: the caller's contract.
                _ => unsafe { $kernel::<$crate::ops::cpu::simd::Portable>($($argument),*) },
            }
        }
    };
}
pub(super) use dispatch;
