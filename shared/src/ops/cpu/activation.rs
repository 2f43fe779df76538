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

/// Calls `$function::<V, A>` with the type of an [`crate::ops::Activation`].
macro_rules! with_activation {
    ($act:expr, $function:ident::<$v:ty $(, $constant:tt)*>($($argument:expr),* $(,)?)) => {
        match $act {
            $crate::ops::Activation::Identity => $function::<$v, $crate::ops::cpu::activation::Identity $(, $constant)*>($($argument),*),
            $crate::ops::Activation::Relu => $function::<$v, $crate::ops::cpu::activation::Relu $(, $constant)*>($($argument),*),
            $crate::ops::Activation::Relu6 => $function::<$v, $crate::ops::cpu::activation::Relu6 $(, $constant)*>($($argument),*),
            $crate::ops::Activation::Silu => $function::<$v, $crate::ops::cpu::activation::Silu $(, $constant)*>($($argument),*),
            $crate::ops::Activation::HardSwish => $function::<$v, $crate::ops::cpu::activation::HardSwish $(, $constant)*>($($argument),*),
        }
    };
}
pub(super) use with_activation;
