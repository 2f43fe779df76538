//! Luma, and grey views in three equal channels.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "instruction sets chosen at run time"))]

use super::Planes;
use super::level::{Level, kernel};
use crate::rng::KeyedRng;

/// Whether a view turns grey: a uniform draw lies below `probability`.
pub fn draw(rng: &mut KeyedRng, probability: f32) -> bool {
    rng.unit_f32() < probability
}

/// Replaces all three planes by the luma.
pub fn apply(level: Level, planes: &mut Planes) {
    let [red, green, blue] = planes.split_mut();
    replace_by_luma(level, red, green, blue);
}

/// Luma in 16 fraction bits, rounded half up (ITU-R 601 weights).
#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
pub(super) fn luma(red: u8, green: u8, blue: u8) -> u8 {
    ((19595 * u32::from(red) + 38470 * u32::from(green) + 7471 * u32::from(blue) + 0x8000) >> 16) as u8
}

kernel! {
    fn replace_by_luma(red: &mut [u8], green: &mut [u8], blue: &mut [u8]) {
        for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
            let grey = luma(*r, *g, *b);
            (*r, *g, *b) = (grey, grey, grey);
        }
    }
}
