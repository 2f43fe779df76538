//! Solarisation: bytes at or above a threshold are inverted.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "instruction sets chosen at run time"))]

use super::Planes;
use super::level::{Level, kernel};
use crate::rng::KeyedRng;

/// Whether a view is solarised: a uniform draw lies below `probability`.
pub fn draw(rng: &mut KeyedRng, probability: f32) -> bool {
    rng.unit_f32() < probability
}

/// Inverts every byte at or above `threshold`.
pub fn apply(level: Level, planes: &mut Planes, threshold: u8) {
    invert(level, planes.bytes_mut(), threshold);
}

kernel! {
    fn invert(bytes: &mut [u8], threshold: u8) {
        for v in bytes {
            *v = if *v < threshold { *v } else { 255 - *v };
        }
    }
}
