//! Activations on vectors: value, and value with gradient.
#![expect(unsafe_code, reason = "vector instructions")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    clippy::inline_always,
    reason = "each function is one formula of vectors"
)]

use super::simd::Simd;

/// An activation as a type, so that a kernel is compiled for each.
pub(super) trait Act {
    /// `act(z)`.
    ///
    /// # Safety
    /// The instructions of `V` must be available.
    unsafe fn value<V: Simd>(z: V) -> V;

    /// `act(z)` and `gradient * act'(z)`.
    ///
    /// # Safety
    /// The instructions of `V` must be available.
    unsafe fn both<V: Simd>(z: V, gradient: V) -> (V, V);
}

/// [`crate::ops::Activation::Identity`].
#[derive(Debug)]
pub(super) struct Identity;
/// [`crate::ops::Activation::Relu`].
#[derive(Debug)]
pub(super) struct Relu;
/// [`crate::ops::Activation::Relu6`].
#[derive(Debug)]
pub(super) struct Relu6;
/// [`crate::ops::Activation::Silu`].
#[derive(Debug)]
pub(super) struct Silu;
/// [`crate::ops::Activation::HardSwish`].
#[derive(Debug)]
pub(super) struct HardSwish;
/// [`crate::ops::Activation::Gelu`].
#[derive(Debug)]
pub(super) struct Gelu;

impl Act for Identity {
    #[inline(always)]
    unsafe fn value<V: Simd>(z: V) -> V {
        z
    }
    #[inline(always)]
    unsafe fn both<V: Simd>(z: V, gradient: V) -> (V, V) {
        (z, gradient)
    }
}

impl Act for Relu {
    #[inline(always)]
    unsafe fn value<V: Simd>(z: V) -> V {
        // SAFETY: the caller's contract.
        unsafe { V::splat(0.0).max(z) }
    }
    #[inline(always)]
    unsafe fn both<V: Simd>(z: V, gradient: V) -> (V, V) {
        // SAFETY: the caller's contract.
        unsafe { (Self::value(z), gradient.where_greater(z, V::splat(0.0))) }
    }
}

impl Act for Relu6 {
    #[inline(always)]
    unsafe fn value<V: Simd>(z: V) -> V {
        // SAFETY: the caller's contract.
        unsafe { V::splat(6.0).min(V::splat(0.0).max(z)) }
    }
    #[inline(always)]
    unsafe fn both<V: Simd>(z: V, gradient: V) -> (V, V) {
        // SAFETY: the caller's contract.
        unsafe { (Self::value(z), gradient.where_greater(z, V::splat(0.0)).where_greater(V::splat(6.0), z)) }
    }
}

impl Act for Silu {
    #[inline(always)]
    unsafe fn value<V: Simd>(z: V) -> V {
        // SAFETY: the caller's contract.
        unsafe { z.div(z.one_plus_exp_of_negative()) }
    }
    #[inline(always)]
    unsafe fn both<V: Simd>(z: V, gradient: V) -> (V, V) {
        // SAFETY: the caller's contract.
        unsafe {
            let sigmoid = V::splat(1.0).div(z.one_plus_exp_of_negative());
            let value = z.mul(sigmoid);
            // sigmoid + value * (1 - sigmoid)
            let slope = value.neg_mul_add(sigmoid, sigmoid.add(value));
            (value, gradient.mul(slope))
        }
    }
}

impl Act for HardSwish {
    #[inline(always)]
    unsafe fn value<V: Simd>(z: V) -> V {
        // SAFETY: the caller's contract.
        unsafe {
            let gate = z.mul_add(V::splat(1.0 / 6.0), V::splat(0.5));
            z.mul(V::splat(1.0).min(V::splat(0.0).max(gate)))
        }
    }
    #[inline(always)]
    unsafe fn both<V: Simd>(z: V, gradient: V) -> (V, V) {
        // SAFETY: the caller's contract.
        unsafe {
            // The gradient times 0 up to -3, z / 3 + 1 / 2 between, 1 from 3 on.
            let three = V::splat(3.0);
            let bent = gradient.mul(z.mul_add(V::splat(1.0 / 3.0), V::splat(0.5)));
            let below = bent.where_greater(z, V::splat(-3.0)).where_greater(three, z);
            let above = gradient.sub(gradient.where_greater(three, z));
            (Self::value(z), below.add(above))
        }
    }
}

/// The density of the normal distribution at 0, `1 / sqrt(2 pi)`.
pub(super) const NORMAL_DENSITY: f32 = 0.398_942_3;
/// Numbers beyond it have the tail of this one, 4e-36, which counts as 0.
const TAIL_END: f32 = 12.5;
/// The tail's middle, see [`Tail`].
const TAIL_MIDDLE: f32 = 3.0;
/// Coefficients of `(a + 3) exp(a^2 / 2) Phi(-a)` for `a` from 0 to beyond [`TAIL_END`], by powers of `(a - 3) / (a + 3)`, lowest first; relative error
/// at most 9.4e-8.
const TAIL: [f32; 9] = [
    0.729_083_66,
    -0.509_332_3,
    0.230_019_35,
    -0.047_256_1,
    -0.010_479_935,
    0.006_923_921_4,
    0.001_076_036_4,
    -0.000_903_251_7,
    -0.000_266_765_68,
];

/// The tail of the normal distribution beyond the size `a` of numbers. In f32, `Phi(-a)` is right to 1.4e-7.
struct Tail<V> {
    /// The numbers' sizes, at most [`TAIL_END`].
    size: V,
    /// `exp(-a^2 / 2)`.
    bell: V,
    /// `Phi(-a)`.
    below: V,
}

impl<V: Simd> Tail<V> {
    /// # Safety
    /// The instructions of `V` must be available.
    #[inline(always)]
    unsafe fn of(z: V) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            let size = V::splat(TAIL_END).min(z.max(V::splat(0.0).sub(z)));
            let half = size.mul(V::splat(-0.5 * std::f32::consts::LOG2_E));
            let bell = size.mul(half).exp2();
            let middle = V::splat(TAIL_MIDDLE);
            let shrink = V::splat(1.0).div(size.add(middle));
            let place = size.sub(middle).mul(shrink);
            let mut sum = V::splat(TAIL[TAIL.len() - 1]);
            for coefficient in TAIL[..TAIL.len() - 1].iter().rev() {
                sum = sum.mul_add(place, V::splat(*coefficient));
            }
            Self { size, bell, below: bell.mul(shrink.mul(sum)) }
        }
    }

    /// `z Phi(z)`, by what is missing to `z` or to 0.
    ///
    /// # Safety
    /// The instructions of `V` must be available.
    #[inline(always)]
    unsafe fn value(&self, z: V) -> V {
        // SAFETY: the caller's contract.
        unsafe { self.size.neg_mul_add(self.below, V::splat(0.0).max(z)) }
    }
}

impl Act for Gelu {
    #[inline(always)]
    unsafe fn value<V: Simd>(z: V) -> V {
        // SAFETY: the caller's contract.
        unsafe { Tail::of(z).value(z) }
    }
    #[inline(always)]
    unsafe fn both<V: Simd>(z: V, gradient: V) -> (V, V) {
        // SAFETY: the caller's contract.
        unsafe {
            let tail = Tail::of(z);
            // The slope of negative numbers is Phi(z) + z phi(z), and those of a number and its negative add up to 1.
            let negative = tail.size.mul(tail.bell).neg_mul_add(V::splat(NORMAL_DENSITY), tail.below);
            let positive = negative.neg_mul_add(V::splat(2.0), V::splat(1.0)).where_greater(z, V::splat(0.0));
            (tail.value(z), gradient.mul(negative.add(positive)))
        }
    }
}

/// Calls `$function::<V, A>` with the type of an [`crate::ops::Activation`].
macro_rules! with_activation {
    ($act:expr, $function:ident::<$v:ty $(, $constant:tt)*>($($argument:expr),* $(,)?)) => {
        match $act {
            $crate::ops::Activation::Identity => $function::<$v, $crate::ops::cpu::activation::Identity $(, $constant)*>($($argument),*),
            $crate::ops::Activation::Relu => $function::<$v, $crate::ops::cpu::activation::Relu $(, $constant)*>($($argument),*),
            $crate::ops::Activation::Relu6 => $function::<$v, $crate::ops::cpu::activation::Relu6 $(, $constant)*>($($argument),*),
            $crate::ops::Activation::Silu => $function::<$v, $crate::ops::cpu::activation::Silu $(, $constant)*>($($argument),*),
            $crate::ops::Activation::HardSwish => $function::<$v, $crate::ops::cpu::activation::HardSwish $(, $constant)*>($($argument),*),
            $crate::ops::Activation::Gelu => $function::<$v, $crate::ops::cpu::activation::Gelu $(, $constant)*>($($argument),*),
        }
    };
}
pub(super) use with_activation;
