//! Gaussian blur as Pillow does it: three extended box blurs across and three down, rounded to bytes after each pass.
//!
//! For standard deviations up to 2 a box has 3 or 5 taps, which are summed directly; longer boxes use running sums.
//! torchvision's `GaussianBlur` is another thing, a true convolution; MoCo v2 and its followers use Pillow's.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "instruction sets chosen at run time"))]

use super::Planes;
use super::level::{Level, kernel};
use crate::rng::KeyedRng;

/// Whether a view is blurred (a uniform draw lies at or below `probability`), and by which standard deviation.
///
/// # Source
/// `RandomApply([GaussianBlur(sigma)], p)` of MoCo v2's `main_moco.py`; torchvision's `RandomApply` skips when `p < draw`.
pub fn draw(rng: &mut KeyedRng, probability: f32, sigma: [f32; 2]) -> Option<f32> {
    (rng.unit_f32() <= probability).then(|| rng.uniform_f32(sigma[0], sigma[1]))
}

/// Memory that the blur needs.
#[derive(Debug, Default)]
pub struct BlurScratch {
    row: Vec<u8>,
    next: Vec<u8>,
    plane: Vec<u8>,
    sums: Vec<u32>,
}

/// Blurs every plane with standard deviation `sigma`, in pixels; 0 or less changes nothing.
///
/// # Source
/// Pillow 13.0.0, `src/libImaging/BoxBlur.c`.
pub fn apply(level: Level, planes: &mut Planes, sigma: f32, scratch: &mut BlurScratch) {
    if sigma <= 0.0 || !sigma.is_finite() {
        return;
    }
    let pass = BoxPass::for_sigma(sigma);
    let (height, width) = (planes.height(), planes.width());
    let size = Size { width, height };
    let BlurScratch { row, next, plane, sums } = scratch;
    plane.resize(width * height, 0);
    for data in planes.split_mut() {
        blur_rows(level, data, width, pass, row, next);
        blur_columns(level, data, plane, size, pass, sums);
        blur_columns(level, plane, data, size, pass, sums);
        blur_columns(level, data, plane, size, pass, sums);
        data.copy_from_slice(plane);
    }
}

/// Integer parameters of one extended box pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BoxPass {
    /// Whole radius.
    radius: usize,
    /// Weight of each inner sample, 24 fraction bits.
    inner: u32,
    /// Weight of each of the two outer samples.
    outer: u32,
}

impl BoxPass {
    fn for_sigma(sigma: f32) -> Self {
        let variance = sigma * sigma / 3.0;
        let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
        let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
        let mut part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance);
        part /= 6.0 * (variance - (whole + 1.0) * (whole + 1.0));
        let radius = whole + part;
        let inner = (16_777_216.0 / (radius * 2.0 + 1.0)) as u32;
        let radius = radius as usize;
        let outer = ((1u32 << 24) - (radius as u32 * 2 + 1) * inner) / 2;
        Self { radius, inner, outer }
    }
}

#[derive(Clone, Copy)]
struct Size {
    width: usize,
    height: usize,
}

#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn finish(sum: u32, ends: u32, pass: BoxPass) -> u8 {
    (sum.wrapping_mul(pass.inner).wrapping_add(ends.wrapping_mul(pass.outer)).wrapping_add(1 << 23) >> 24) as u8
}

#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn pair(one: u8, other: u8) -> u32 {
    u32::from(u16::from(one) + u16::from(other))
}

#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn three(rows: [&[u8]; 3], pass: BoxPass, out: &mut [u8]) {
    let [before, here, after] = rows;
    for (((v, b), h), a) in out.iter_mut().zip(before).zip(here).zip(after) {
        *v = finish(u32::from(*h), pair(*b, *a), pass);
    }
}

#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn five(rows: [&[u8]; 5], pass: BoxPass, out: &mut [u8]) {
    let [p0, p1, p2, p3, p4] = rows;
    for (((((v, p0), p1), p2), p3), p4) in out.iter_mut().zip(p0).zip(p1).zip(p2).zip(p3).zip(p4) {
        *v = finish(u32::from(u16::from(*p1) + u16::from(*p2) + u16::from(*p3)), pair(*p0, *p4), pass);
    }
}

kernel! {
    /// Three passes along every row. `row` and `next` are scratch.
    fn blur_rows(plane: &mut [u8], width: usize, pass: BoxPass, row: &mut Vec<u8>, next: &mut Vec<u8>) {
        let pad = pass.radius + 1;
        row.resize(width + 2 * pad, 0);
        next.resize(width + 2 * pad, 0);
        for line in plane.chunks_exact_mut(width) {
            row[pad..pad + width].copy_from_slice(line);
            for last in [false, false, true] {
                let (first, end) = (row[pad], row[pad + width - 1]);
                row[..pad].fill(first);
                row[pad + width..].fill(end);
                let out = if last { &mut *line } else { &mut next[pad..pad + width] };
                let from = |at: usize| &row[at..at + width];
                match pass.radius {
                    0 => three([from(0), from(1), from(2)], pass, out),
                    1 => five([from(0), from(1), from(2), from(3), from(4)], pass, out),
                    _ => {
                        let inner = pass.radius * 2 + 1;
                        let mut sum: u32 = row[..inner].iter().map(|v| u32::from(*v)).sum();
                        for (x, v) in out.iter_mut().enumerate() {
                            sum += u32::from(row[x + inner]);
                            sum -= u32::from(row[x]);
                            *v = finish(sum, pair(row[x], row[x + inner + 1]), pass);
                        }
                    }
                }
                if !last {
                    std::mem::swap(row, next);
                }
            }
        }
    }
}

kernel! {
    /// One pass down the columns from `source` to `out`.
    fn blur_columns(source: &[u8], out: &mut [u8], size: Size, pass: BoxPass, sums: &mut Vec<u32>) {
        let Size { width, height } = size;
        let row = |y: isize| &source[y.clamp(0, height as isize - 1) as usize * width..][..width];
        let r = pass.radius as isize;
        if r > 1 {
            sums.clear();
            sums.resize(width, 0);
            for y in -r - 1..r {
                for (sum, v) in sums.iter_mut().zip(row(y)) {
                    *sum += u32::from(*v);
                }
            }
        }
        for (y, line) in out.chunks_exact_mut(width).enumerate() {
            let y = y as isize;
            match r {
                0 => three([row(y - 1), row(y), row(y + 1)], pass, line),
                1 => five([row(y - 2), row(y - 1), row(y), row(y + 1), row(y + 2)], pass, line),
                _ => {
                    let rows = sums.iter_mut().zip(row(y - r - 1)).zip(row(y + r)).zip(row(y + r + 1));
                    for ((((sum, old), new), next), v) in rows.zip(line) {
                        *sum = sum.wrapping_add(u32::from(*new)).wrapping_sub(u32::from(*old));
                        *v = finish(*sum, pair(*old, *next), pass);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transforms::reference;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_level_equals_the_plain_formula(height in 1usize..70, width in 1usize..70, sigma in 0.01f32..6.0, seed in any::<u64>()) {
            let planes = Planes::from_rgb(&reference::noise(height, width, seed));
            let pass = BoxPass::for_sigma(sigma);
            let want = reference::box_blurs(&planes, (pass.radius, pass.inner, pass.outer));
            let mut scratch = BlurScratch::default();
            for level in Level::available() {
                let mut got = planes.clone();
                apply(level, &mut got, sigma, &mut scratch);
                prop_assert_eq!(&got, &want, "{:?}", level);
            }
        }
    }

    #[test]
    fn a_flat_image_stays_flat() {
        let mut planes = Planes::default();
        planes.reset(9, 7);
        planes.bytes_mut().fill(200);
        let before = planes.clone();
        apply(Level::best(), &mut planes, 1.7, &mut BlurScratch::default());
        assert_eq!(planes, before);
    }

    #[test]
    fn weights_of_a_box_sum_to_one() {
        for sigma in [0.1f32, 0.9, 1.41, 1.42, 2.0, 7.5] {
            let pass = BoxPass::for_sigma(sigma);
            let total = pass.inner * (2 * pass.radius as u32 + 1) + 2 * pass.outer;
            assert!((1 << 24) - total <= 1, "{sigma} {pass:?}");
        }
    }
}
