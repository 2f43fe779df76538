//! Plain versions of the pixel formulas, which the kernels are tested against at every level.
//! All float operations are single IEEE operations: Rust never contracts to fused multiply-add.

use super::resize::{Interpolation, Resize};
use super::{Planes, RgbImage};
use crate::rng::KeyedRng;

/// Random pixels.
pub(super) fn noise(height: usize, width: usize, seed: u64) -> RgbImage {
    let mut rng = KeyedRng::new("noise", seed, &[]);
    let pixels = (0..height * width * 3).map(|_| rng.next_u32() as u8).collect();
    RgbImage::new(height, width, pixels).expect("sizes agree")
}

/// `base + alpha * (value - base)` in f32, clamped, truncated.
pub(super) fn blend(base: u8, value: u8, alpha: f32) -> u8 {
    let t = f32::from(base) + alpha * f32::from(i16::from(value) - i16::from(base));
    if t <= 0.0 {
        0
    } else if t >= 255.0 {
        255
    } else {
        t as u8
    }
}

/// One pixel through Pillow's 8-bit HSV and back.
pub(super) fn turn_hue(rgb: [u8; 3], shift: u8) -> [u8; 3] {
    let [h, s, v] = rgb_to_hsv(rgb);
    hsv_to_rgb([h.wrapping_add(shift), s, v])
}

fn rgb_to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let max = r.max(g).max(b);
    let min = r.min(g).min(b);
    if max == min {
        return [0, 0, max];
    }
    let range = f32::from(max - min);
    let s = range / f32::from(max);
    let [rc, gc, bc] = [r, g, b].map(|v| f32::from(max - v) / range);
    let h = if r == max {
        bc - gc
    } else if g == max {
        (2.0 + f64::from(rc) - f64::from(bc)) as f32
    } else {
        (4.0 + f64::from(gc) - f64::from(rc)) as f32
    };
    let turn = ((f64::from(h) / 6.0 + 1.0) % 1.0) as f32;
    let [h, s] = [turn, s].map(|v| (f64::from(v) * 255.0) as i32);
    [h.clamp(0, 255) as u8, s.clamp(0, 255) as u8, max]
}

fn hsv_to_rgb([h, s, v]: [u8; 3]) -> [u8; 3] {
    if s == 0 {
        return [v; 3];
    }
    let position = f64::from(h) * 6.0 / 255.0;
    let sector = position.floor();
    let fraction = (position - sector) as f32;
    let s = (f64::from(s) / 255.0) as f32;
    let scaled = |share: f64| (f64::from(v) * (1.0 - share)).round() as u8;
    let p = scaled(f64::from(s));
    let q = scaled(f64::from(s * fraction));
    let t = scaled(f64::from(s) * (1.0 - f64::from(fraction)));
    match sector as i32 % 6 {
        0 => [v, t, p],
        1 => [q, v, p],
        2 => [p, v, t],
        3 => [p, q, v],
        4 => [t, p, v],
        _ => [v, p, q],
    }
}

/// One axis of the resize at one output position: `sample` gives the byte at a source position.
fn resample(filter: Interpolation, source: usize, target: usize, at: usize, sample: impl Fn(usize) -> u8) -> u8 {
    let scale = source as f64 / target as f64;
    let stretch = scale.max(1.0);
    let support = if filter == Interpolation::Bicubic { 2.0 * stretch } else { stretch };
    let center = (at as f64 + 0.5) * scale;
    let low = ((center - support + 0.5) as i64).max(0) as usize;
    let high = ((center + support + 0.5) as i64).min(source as i64) as usize;
    let weight = |j: usize| {
        let x = ((j as f64 - center + 0.5) * (1.0 / stretch)).abs();
        match filter {
            Interpolation::Bilinear => (1.0 - x).max(0.0),
            Interpolation::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Interpolation::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
            Interpolation::Bicubic => 0.0,
        }
    };
    let fixed = |w: f64| (w * 4_194_304.0 + if w < 0.0 { -0.5 } else { 0.5 }) as i64;
    let total: f64 = (low..high).map(weight).sum();
    let sum = (low..high).map(|j| i64::from(sample(j)) * fixed(weight(j) / total)).sum::<i64>() + 2_097_152;
    (sum >> 22).clamp(0, 255) as u8
}

/// The whole resize, then the window and the flip.
pub(super) fn crop_resize(image: &RgbImage, resize: &Resize) -> Planes {
    let Resize { crop, target, window, flip, order, interpolation } = *resize;
    let source =
        |c: usize, y: usize, x: usize| image.pixels()[((crop.top + y) * image.width() + crop.left + x) * 3 + c];
    let mut out = Planes::default();
    out.reset(window.height, window.width);
    for (c, plane) in out.split_mut().into_iter().enumerate() {
        let (rows, columns) =
            if order.vertical_first(crop, target) { (target.0, crop.width) } else { (crop.height, target.1) };
        let mut between = vec![vec![0; columns]; rows];
        for (y, line) in between.iter_mut().enumerate() {
            for (x, v) in line.iter_mut().enumerate() {
                *v = if rows == target.0 && columns == crop.width && order.vertical_first(crop, target) {
                    resample(interpolation, crop.height, target.0, y, |j| source(c, j, x))
                } else {
                    resample(interpolation, crop.width, target.1, x, |j| source(c, y, j))
                };
            }
        }
        for (i, v) in plane.iter_mut().enumerate() {
            let (y, x) = (i / window.width, i % window.width);
            let x = if flip { window.width - 1 - x } else { x };
            let (y, x) = (y + window.top, x + window.left);
            *v = if order.vertical_first(crop, target) {
                resample(interpolation, crop.width, target.1, x, |j| between[y][j])
            } else {
                resample(interpolation, crop.height, target.0, y, |j| between[j][x])
            };
        }
    }
    out
}

/// Three box passes across, then three down; `pass` is radius, inner and outer weight.
pub(super) fn box_blurs(planes: &Planes, pass: (usize, u32, u32)) -> Planes {
    let (radius, inner, outer) = pass;
    let (height, width) = (planes.height() as isize, planes.width() as isize);
    let mut all = planes.clone();
    for plane in all.split_mut() {
        for (dy, dx) in [(0, 1), (0, 1), (0, 1), (1, 0), (1, 0), (1, 0)] {
            let old = plane.to_vec();
            let at =
                |y: isize, x: isize| u64::from(old[(y.clamp(0, height - 1) * width + x.clamp(0, width - 1)) as usize]);
            for (i, v) in plane.iter_mut().enumerate() {
                let (y, x) = (i as isize / width, i as isize % width);
                let r = radius as isize;
                let sum: u64 = (-r..=r).map(|k| at(y + dy * k, x + dx * k)).sum();
                let ends = at(y - dy * (r + 1), x - dx * (r + 1)) + at(y + dy * (r + 1), x + dx * (r + 1));
                *v = ((sum * u64::from(inner) + ends * u64::from(outer) + (1 << 23)) >> 24) as u8;
            }
        }
    }
    all
}
