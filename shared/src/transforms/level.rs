//! Run-time choice of the instruction set. Every level gives the same bytes; only the speed differs.
//!
//! A kernel is one safe body that the `kernel!` macro compiles once per level. [`Level`] is a value that only the detection of
//! the processor can make, so calling a kernel is safe. Other processors than x86-64 run the body as the target compiles it.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::ops;

/// Instruction set that a kernel body is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Isa {
    /// What the target guarantees: SSE2 on x86-64.
    Scalar,
    /// SSE4.1.
    Sse41,
    /// AVX2.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// An instruction set that this machine was found to have; it cannot be made up from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(Isa);

impl Level {
    /// The plain build of every kernel, which runs anywhere.
    pub const SCALAR: Self = Self(Isa::Scalar);

    /// All levels that this machine can run, weakest first.
    pub fn available() -> Vec<Self> {
        [Isa::Scalar, Isa::Sse41, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| detected(*isa)).map(Self).collect()
    }

    /// The strongest level of this machine.
    pub fn best() -> Self {
        [Isa::Avx512, Isa::Avx2, Isa::Sse41].into_iter().find(|isa| detected(*isa)).map_or(Self::SCALAR, Self)
    }

    /// Its name: `scalar`, `sse4.1`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Isa::Scalar => "scalar",
            Isa::Sse41 => "sse4.1",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86-64 has more than one level"))]
    pub(super) fn isa(self) -> Isa {
        self.0
    }
}

/// What [`Level::default`] may reach at the most, as the number of an [`Isa`].
static LIMIT: AtomicU8 = AtomicU8::new(Isa::Avx512 as u8);

impl Level {
    /// Limits [`Level::default`], and with it every [`Scratch`](super::Scratch) that is made from here on, to what `isa` has, in the
    /// whole process. The pixels do not depend on it.
    pub fn limit(isa: ops::Isa) {
        let limit = match isa {
            ops::Isa::Portable => Isa::Scalar,
            ops::Isa::Avx2 => Isa::Avx2,
            ops::Isa::Avx512 => Isa::Avx512,
        };
        LIMIT.store(limit as u8, Ordering::Relaxed);
    }
}

/// The strongest level of this machine within the limit.
impl Default for Level {
    fn default() -> Self {
        let limit = LIMIT.load(Ordering::Relaxed);
        Self::available().into_iter().rfind(|level| level.0 as u8 <= limit).unwrap_or(Self::SCALAR)
    }
}

#[cfg(target_arch = "x86_64")]
fn detected(isa: Isa) -> bool {
    match isa {
        Isa::Scalar => true,
        Isa::Sse41 => is_x86_feature_detected!("sse4.1"),
        Isa::Avx2 => is_x86_feature_detected!("avx2"),
        Isa::Avx512 => {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detected(isa: Isa) -> bool {
    isa == Isa::Scalar
}

/// Defines a kernel whose one safe body is compiled once per level and picked at run time by its first argument.
macro_rules! kernel {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($arg:ident : $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        $visibility fn $name(level: $crate::transforms::level::Level, $($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "sse4.1")]
                fn sse41($($arg: $ty),*) { body($($arg),*); }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) { body($($arg),*); }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) { body($($arg),*); }
                match level.isa() {
                    $crate::transforms::level::Isa::Scalar => body($($arg),*),
                    // SAFETY: only the detection in `level` makes a `Level` above `SCALAR`, and it asked the processor.
                    $crate::transforms::level::Isa::Sse41 => unsafe { sse41($($arg),*) },
                    // SAFETY: as above.
                    $crate::transforms::level::Isa::Avx2 => unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    $crate::transforms::level::Isa::Avx512 => unsafe { avx512($($arg),*) },
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = level;
                body($($arg),*);
            }
        }
    };
}
pub(super) use kernel;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_rise_to_the_best() {
        let all = Level::available();
        assert_eq!(all.first(), Some(&Level::SCALAR));
        assert_eq!(all.last(), Some(&Level::best()));
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
