//! Which part of the image a view shows: random resized crops, and the centre crop of a resized image.

use crate::rng::KeyedRng;

/// A box in whole pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl CropBox {
    /// The whole of `height` x `width` pixels.
    pub fn whole(height: usize, width: usize) -> Self {
        Self { top: 0, left: 0, height, width }
    }

    /// Whether the box is not empty and lies inside `height` x `width` pixels.
    pub fn is_inside(&self, height: usize, width: usize) -> bool {
        let fits = |from: usize, len: usize, all: usize| len > 0 && from <= all && len <= all - from;
        fits(self.top, self.height, height) && fits(self.left, self.width, width)
    }
}

/// Draws a box whose share of the area is uniform in `scale` and whose aspect (width over height) is log-uniform in `ratio`:
/// ten attempts, then the largest central box inside the limits of the aspect.
///
/// The box always lies inside the image. `height` and `width` must not be 0.
///
/// # Source
/// torchvision 0.29.2, `transforms.RandomResizedCrop.get_params`, in its order of draws.
///
/// # Deviation
/// `exp` and `ln` come from `libm`, not from the system, so that the draws are the same bits on every machine; they agree with
/// torchvision's in distribution, not draw by draw.
pub fn draw(rng: &mut KeyedRng, height: usize, width: usize, scale: [f32; 2], ratio: [f32; 2]) -> CropBox {
    let area = height as f64 * width as f64;
    let logs = ratio.map(libm::logf);
    for _ in 0..10 {
        let target = area * f64::from(rng.uniform_f32(scale[0], scale[1]));
        let aspect = f64::from(libm::expf(rng.uniform_f32(logs[0], logs[1])));
        let columns = (target * aspect).sqrt().round_ties_even() as usize;
        let rows = (target / aspect).sqrt().round_ties_even() as usize;
        if 0 < columns && columns <= width && 0 < rows && rows <= height {
            let top = rng.below(height - rows + 1);
            let left = rng.below(width - columns + 1);
            return CropBox { top, left, height: rows, width: columns };
        }
    }
    let ratio = ratio.map(f64::from);
    let aspect = width as f64 / height as f64;
    let (mut rows, mut columns) = (height, width);
    if aspect < ratio[0] {
        rows = ((width as f64 / ratio[0]).round_ties_even() as usize).clamp(1, height);
    } else if aspect > ratio[1] {
        columns = ((height as f64 * ratio[1]).round_ties_even() as usize).clamp(1, width);
    }
    CropBox { top: (height - rows) / 2, left: (width - columns) / 2, height: rows, width: columns }
}

/// Rows and columns of an image whose short side is resized to `short`, the long side in proportion, rounded down.
///
/// # Source
/// torchvision 0.29.2, `transforms.functional._compute_resized_output_size`.
pub fn resize_short_side(height: usize, width: usize, short: usize) -> (usize, usize) {
    let long = |long: usize, side: usize| ((short * long) as f64 / side as f64) as usize;
    if width <= height { (long(height, width), short) } else { (short, long(width, height)) }
}

/// The central `size` x `size` window of `height` x `width` pixels, neither of which may be below `size`.
///
/// # Source
/// torchvision 0.29.2, `transforms.functional.center_crop`: halves are rounded to the even neighbour.
pub fn center(height: usize, width: usize, size: usize) -> CropBox {
    let start = |side: usize| ((side - size) as f64 / 2.0).round_ties_even() as usize;
    CropBox { top: start(height), left: start(width), height: size, width: size }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn crop_stays_inside(height in 1usize..5000, width in 1usize..5000, seed in any::<u64>(), low in 0.01f32..1.0) {
            let mut rng = KeyedRng::new("test", seed, &[]);
            let crop = draw(&mut rng, height, width, [low, 1.0], [0.75, 4.0 / 3.0]);
            prop_assert!(crop.is_inside(height, width), "{:?}", crop);
        }

        #[test]
        fn center_window_stays_inside(height in 1usize..5000, width in 1usize..5000, size in 1usize..300) {
            let short = (size as f64 / 0.875).round() as usize;
            let (rows, columns) = resize_short_side(height, width, short);
            prop_assert!(center(rows, columns, size).is_inside(rows, columns));
        }
    }

    #[test]
    fn extreme_shapes_take_the_central_fallback() {
        let mut rng = KeyedRng::new("test", 3, &[]);
        let mut drawn = |height, width| draw(&mut rng, height, width, [0.2, 1.0], [0.75, 4.0 / 3.0]);
        assert_eq!(drawn(1, 1), CropBox::whole(1, 1));
        assert_eq!(drawn(10_000, 3), CropBox { top: 4998, left: 0, height: 4, width: 3 });
        assert_eq!(drawn(3, 10_000), CropBox { top: 0, left: 4998, height: 3, width: 4 });
    }

    #[test]
    fn sizes_are_rounded_as_torchvision_does() {
        assert_eq!(resize_short_side(333, 500, 256), (256, 384));
        assert_eq!(resize_short_side(500, 333, 256), (384, 256));
        assert_eq!(resize_short_side(10_000, 3, 256), (853_333, 256));
        assert_eq!(center(256, 383, 224), CropBox { top: 16, left: 80, height: 224, width: 224 });
        assert_eq!(center(256, 381, 224), CropBox { top: 16, left: 78, height: 224, width: 224 });
    }

    #[test]
    fn drawn_shares_and_aspects_have_the_stated_distributions() {
        // A box that always fits: the share is uniform in 0.2..0.5 and the log of the aspect uniform.
        let (n, mut area, mut area2, mut log, mut log2) = (20_000u64, 0.0, 0.0, 0.0, 0.0);
        for i in 0..n {
            let crop = draw(&mut KeyedRng::new("test", 0, &[i]), 1000, 1000, [0.2, 0.5], [0.75, 4.0 / 3.0]);
            let (a, l) = ((crop.height * crop.width) as f64 / 1e6, (crop.width as f64 / crop.height as f64).ln());
            area += a;
            area2 += a * a;
            log += l;
            log2 += l * l;
        }
        let n = n as f64;
        let spread = (4.0f64 / 3.0).ln();
        // four standard errors
        assert!((area / n - 0.35).abs() < 0.0025, "{}", area / n);
        assert!((area2 / n - (area / n).powi(2) - 0.09 / 12.0).abs() < 0.0003);
        assert!((log / n).abs() < 4.0 * spread / (3.0 * n).sqrt(), "{}", log / n);
        assert!((log2 / n - spread * spread / 3.0).abs() < 0.001);
    }
}
