//! The instruction set that the CPU engine computes with: the best of the machine, or one that was asked for.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A set of vector instructions. One binary holds code for all of them and chooses when it runs.
///
/// Sums run in another order in wider vectors, so results differ between instruction sets in their last bits; on one of them they
/// are the same on every machine and at any number of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Isa {
    /// What the compiler makes of portable code: SSE2 on x86-64, NEON on aarch64.
    Portable = 1,
    /// AVX2 and FMA, 8 numbers at a time.
    Avx2 = 2,
    /// AVX-512 F, DQ, BW and VL, 16 numbers at a time.
    Avx512 = 3,
}

/// The `repr` of the set in use; 0 until it is first needed.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

impl Isa {
    /// What this machine has, from narrow to wide.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The name in flags: `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Self::Portable
    }

    fn best() -> Self {
        [Self::Avx512, Self::Avx2].into_iter().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            Error::usage(format!("`{name}` is no known instruction set, these are: portable, avx2, avx512"))
        })
    }
}

/// The instruction set in use.
#[inline]
pub fn isa() -> Isa {
    match CHOSEN.load(Ordering::Relaxed) {
        1 => Isa::Portable,
        2 => Isa::Avx2,
        3 => Isa::Avx512,
        _ => {
            let best = Isa::best();
            CHOSEN.store(best as u8, Ordering::Relaxed);
            best
        }
    }
}

/// Computes with this instruction set from here on, in the whole process. Call it before any work begins: weights that an
/// operation in progress has arranged for one set do not fit another.
///
/// # Errors
/// [`Error::Usage`] when the machine does not have it.
pub fn force_isa(isa: Isa) -> Result<()> {
    if !isa.is_available() {
        let known: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
        return Err(Error::usage(format!("this machine has no {isa} instructions, it has: {}", known.join(", "))));
    }
    CHOSEN.store(isa as u8, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_the_same_word_in_flags_and_files() {
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            assert_eq!(serde_json::to_value(isa).unwrap(), isa.name());
            assert_eq!(clap::ValueEnum::to_possible_value(&isa).unwrap().get_name(), isa.name());
        }
    }

    #[test]
    fn names_are_read_back_and_the_best_is_available() {
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        assert!("sse9".parse::<Isa>().is_err());
        assert!(Isa::available().contains(&Isa::best()));
        assert!(Isa::best().is_available());
    }
}
