//! Brightness, contrast, saturation and hue, each with the bytes of Pillow's enhancers and of torchvision's `adjust_hue`.
//!
//! A blend is one f32 multiplication and one f32 addition, then truncation: never a fused multiply-add, which would change bytes.
//! Hue goes through 8-bit hue, saturation and value. Its sixth of a turn is an f32 fraction, because an exact one differs from
//! Pillow's for some colours; the way back is integer arithmetic in disguise.
#![expect(unsafe_code, reason = "instruction sets chosen at run time, float to integer without range checks")]

use super::Planes;
use super::grayscale::luma;
use super::level::{Level, kernel};
use crate::rng::KeyedRng;

/// One of the four operations; the numbers are torchvision's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JitterStep {
    /// Blend with black.
    Brightness = 0,
    /// Blend with the mean luma of the image as it is at that point.
    Contrast = 1,
    /// Blend of every pixel with its own luma.
    Saturation = 2,
    /// Turn of the hue, by a share of the circle.
    Hue = 3,
}

impl JitterStep {
    /// All four, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Brightness, Self::Contrast, Self::Saturation, Self::Hue];
}

/// Drawn parameters of one jitter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jitter {
    /// The order in which the steps are applied.
    pub order: [JitterStep; 4],
    /// Factor of each step, by its number: 1 keeps brightness, contrast and saturation, 0 keeps the hue.
    pub factors: [f32; 4],
}

/// How far the factors may stray: brightness, contrast and saturation from 1, hue from 0. A strength of 0 switches the step off.
pub type Strengths = [f32; 4];

/// Draws the order, then the four factors.
///
/// # Source
/// torchvision 0.29.2, `transforms.ColorJitter.get_params`.
pub fn draw(rng: &mut KeyedRng, strengths: Strengths) -> Jitter {
    let mut order = JitterStep::ALL;
    rng.shuffle(&mut order);
    let factors = JitterStep::ALL.map(|step| {
        let strength = strengths[step as usize];
        match step {
            JitterStep::Hue => rng.uniform_f32(-strength, strength),
            _ => rng.uniform_f32((1.0 - strength).max(0.0), 1.0 + strength),
        }
    });
    Jitter { order, factors }
}

/// Applies the steps whose strength is not 0, in the drawn order.
pub fn apply(level: Level, planes: &mut Planes, jitter: &Jitter, strengths: Strengths) {
    for step in jitter.order {
        if strengths[step as usize] > 0.0 {
            apply_step(level, planes, step, jitter.factors[step as usize]);
        }
    }
}

/// Applies one step. A factor that is not finite counts as 0.
pub fn apply_step(level: Level, planes: &mut Planes, step: JitterStep, factor: f32) {
    let factor = if factor.is_finite() { factor } else { 0.0 };
    match step {
        JitterStep::Brightness => blend_constant(level, planes.bytes_mut(), 0, factor),
        JitterStep::Contrast => {
            let mean = mean_luma(level, planes);
            blend_constant(level, planes.bytes_mut(), mean, factor);
        }
        JitterStep::Saturation => {
            let [red, green, blue] = planes.split_mut();
            blend_luma(level, red, green, blue, factor);
        }
        JitterStep::Hue => {
            let [red, green, blue] = planes.split_mut();
            turn_hue(level, red, green, blue, hue_shift(factor));
        }
    }
}

/// The step on the circle of 256 hues: truncated toward zero, then wrapped to a byte.
pub(super) fn hue_shift(factor: f32) -> u8 {
    (f64::from(factor) * 255.0) as i32 as u8
}

/// Mean luma, rounded half up.
fn mean_luma(level: Level, planes: &mut Planes) -> u8 {
    let [red, green, blue] = planes.split_mut();
    let mut sum = 0;
    sum_luma(level, red, green, blue, &mut sum);
    (sum as f64 / red.len() as f64 + 0.5) as u8
}

/// Truncates a float that lies in 0..=2^24.
///
/// # Safety
/// - `value` is finite and representable as i32
#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
unsafe fn truncate(value: f32) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { value.to_int_unchecked::<i32>() }
}

#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn blend(base: u8, value: u8, alpha: f32) -> u8 {
    let (base, value) = (i32::from(base), i32::from(value));
    let mixed = (base as f32 + alpha * (value - base) as f32).clamp(0.0, 255.0);
    // SAFETY: clamped into 0..=255; `apply_step` keeps `alpha` finite, so a sum of two infinities (NaN) cannot arise.
    (unsafe { truncate(mixed) }) as u8
}

kernel! {
    fn blend_constant(bytes: &mut [u8], base: u8, alpha: f32) {
        for v in bytes {
            *v = blend(base, *v, alpha);
        }
    }
}

kernel! {
    fn blend_luma(red: &mut [u8], green: &mut [u8], blue: &mut [u8], alpha: f32) {
        for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
            let grey = luma(*r, *g, *b);
            *r = blend(grey, *r, alpha);
            *g = blend(grey, *g, alpha);
            *b = blend(grey, *b, alpha);
        }
    }
}

kernel! {
    fn sum_luma(red: &[u8], green: &[u8], blue: &[u8], sum: &mut u64) {
        for ((red, green), blue) in red.chunks(4096).zip(green.chunks(4096)).zip(blue.chunks(4096)) {
            let mut part = 0u32;
            for ((r, g), b) in red.iter().zip(green).zip(blue) {
                part = part.wrapping_add(u32::from(luma(*r, *g, *b)));
            }
            *sum += u64::from(part);
        }
    }
}

kernel! {
    /// Hue shift through 8-bit hue, saturation and value.
    fn turn_hue(red: &mut [u8], green: &mut [u8], blue: &mut [u8], shift: u8) {
        let shift = i32::from(shift);
        for ((r8, g8), b8) in red.iter_mut().zip(green).zip(blue) {
            let (r, g, b) = (i32::from(*r8), i32::from(*g8), i32::from(*b8));
            let max = r.max(g).max(b);
            let min = r.min(g).min(b);
            let range = max - min;
            let mid = r + g + b - max - min;
            let x = (max - mid) as f32 / range.max(1) as f32;
            // the hue in sixths of a turn is `k` plus or minus `x`
            let is_red = r == max;
            let is_green = g == max;
            let up = if is_red { b >= g } else if is_green { r > b } else { r <= g };
            let k = match (is_red, is_green, up) {
                (true, _, true) => -1.0,
                (true, _, false) | (false, true, true) => 1.0,
                (false, true, false) | (false, false, true) => 3.0,
                (false, false, false) => 5.0,
            };
            let turn = (k + if up { x } else { -x }) / 6.0;
            let turn = if turn < 0.0 { turn + 1.0 } else { turn };
            // SAFETY: `turn` is finite and in 0..=1.
            let hue = unsafe { truncate(turn * 255.0) };
            // SAFETY: finite and in 0..=255.
            let s = unsafe { truncate((range * 255) as f32 / max.max(1) as f32) } & 255;
            let position = ((hue.wrapping_add(shift)) & 255) * 6;
            let sector = (position * 257 + 257) >> 16; // position / 255 for positions up to 1530
            let fraction = position - sector * 255;
            let fraction = if sector & 1 == 1 { fraction } else { 255 - fraction };
            let low = ((max * (255 - s) + 127) * 257 + 257) >> 16;
            let numerator = max.wrapping_mul(65025i32.wrapping_sub(s.wrapping_mul(fraction)));
            // SAFETY: finite and in 0..=256.
            let between = unsafe { truncate(numerator as f32 * (1.0 / 65025.0) + 0.5) };
            // sector 6, which only hue 255 reaches, is sector 0
            let is_between = |one, other| sector == one || sector == other;
            *r8 = (if is_between(1, 4) { between } else if is_between(2, 3) { low } else { max }) as u8;
            *g8 = (if is_between(1, 2) { max } else if is_between(4, 5) { low } else { between }) as u8;
            *b8 = (if is_between(3, 4) { max } else if is_between(2, 5) { between } else { low }) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transforms::reference;

    fn all_colors() -> Planes {
        let mut planes = Planes::default();
        planes.reset(4096, 4096);
        let [red, green, blue] = planes.split_mut();
        for (i, ((r, g), b)) in red.iter_mut().zip(green).zip(blue).enumerate() {
            (*r, *g, *b) = ((i >> 16) as u8, (i >> 8) as u8, i as u8);
        }
        planes
    }

    #[test]
    fn hue_of_all_colors_equals_the_plain_formula_at_every_level() {
        let all = all_colors();
        for factor in [0.0f32, 0.03, -0.1] {
            let shift = hue_shift(factor);
            let mut want = all.clone();
            let [red, green, blue] = want.split_mut();
            for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
                [*r, *g, *b] = reference::turn_hue([*r, *g, *b], shift);
            }
            for level in Level::available() {
                let mut got = all.clone();
                apply_step(level, &mut got, JitterStep::Hue, factor);
                assert!(got == want, "{level:?} {factor}");
            }
        }
    }

    #[test]
    fn saturation_of_all_colors_equals_the_plain_formula_at_every_level() {
        let all = all_colors();
        for alpha in [0.6f32, 1.2] {
            let mut want = all.clone();
            let [red, green, blue] = want.split_mut();
            for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
                let grey = luma(*r, *g, *b);
                (*r, *g, *b) = (
                    reference::blend(grey, *r, alpha),
                    reference::blend(grey, *g, alpha),
                    reference::blend(grey, *b, alpha),
                );
            }
            for level in Level::available() {
                let mut got = all.clone();
                apply_step(level, &mut got, JitterStep::Saturation, alpha);
                assert!(got == want, "{level:?} {alpha}");
            }
        }
    }

    #[test]
    fn blends_are_never_fused() {
        // 0.6, 0.8, 1.1 and 1.2 are where a fused multiply-add shows: it changes 0.5 to 2.4 % of these pairs.
        for alpha in [0.6f32, 0.8, 1.1, 1.2, 0.0, 1.0, 0.37, 3.0] {
            for level in Level::available() {
                for base in 0..=255u8 {
                    let mut row: Vec<u8> = (0..=255).collect();
                    blend_constant(level, &mut row, base, alpha);
                    for (v, got) in row.iter().enumerate() {
                        assert_eq!(*got, reference::blend(base, v as u8, alpha), "{level:?} {base} {v} {alpha}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_strength_of_zero_switches_the_step_off() {
        // even a hue factor of 0 is a lossy round trip, so it must not run
        let mut planes = Planes::from_rgb(&reference::noise(20, 30, 1));
        let before = planes.clone();
        let jitter = Jitter { order: JitterStep::ALL, factors: [1.3, 1.0, 1.0, 0.0] };
        apply(Level::best(), &mut planes, &jitter, [0.0; 4]);
        assert_eq!(planes, before);
        apply_step(Level::best(), &mut planes, JitterStep::Hue, 0.0);
        assert_ne!(planes, before);
    }

    #[test]
    fn steps_have_the_numbers_of_torchvision() {
        assert_eq!(JitterStep::ALL.map(|step| step as u8), [0, 1, 2, 3]);
    }

    #[test]
    fn drawn_factors_stay_in_range() {
        for i in 0..2000 {
            let jitter = draw(&mut KeyedRng::new("test", 0, &[i]), [0.4, 0.4, 0.4, 0.1]);
            assert!(jitter.factors[..3].iter().all(|f| (0.6..=1.4).contains(f)), "{jitter:?}");
            assert!((-0.1..=0.1).contains(&jitter.factors[3]), "{jitter:?}");
            let mut order = jitter.order.map(|step| step as usize);
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2, 3]);
        }
    }
}
