//! Bytes to training tensors: `(v / 255 - mean) / std` per channel, through a table of 256 entries.

use std::sync::LazyLock;

/// Mean of ImageNet's training pixels in 0..1, by channel (red, green, blue).
pub const IMAGENET_DEFAULT_MEAN: [f32; 3] = [0.485, 0.456, 0.406];

/// Standard deviation of ImageNet's training pixels in 0..1, by channel.
pub const IMAGENET_DEFAULT_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// The normalised value of every byte, for each channel.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalizer {
    table: [[f32; 256]; 3],
}

impl Normalizer {
    /// The table for a mean and a standard deviation in 0..1. Both divisions are true f32 divisions, as in torchvision's `ToTensor`
    /// and `Normalize`, so the values are theirs bit for bit.
    pub fn new(mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { table: std::array::from_fn(|c| std::array::from_fn(|v| (v as f32 / 255.0 - mean[c]) / std[c])) }
    }

    /// Writes the normalised values of interleaved pixels.
    ///
    /// # Shapes
    /// - `rgb`: `(.., H, W, 3)` u8
    /// - `out`: as many f32, channels-last
    ///
    /// # Panics
    /// When the lengths differ or are not whole pixels.
    pub fn write(&self, rgb: &[u8], out: &mut [f32]) {
        assert!(rgb.len() == out.len() && rgb.len().is_multiple_of(3), "one value for each byte of whole pixels");
        let [red, green, blue] = &self.table;
        for (values, pixel) in out.as_chunks_mut::<3>().0.iter_mut().zip(rgb.as_chunks::<3>().0) {
            *values = [red[pixel[0] as usize], green[pixel[1] as usize], blue[pixel[2] as usize]];
        }
    }
}

/// Writes the values of interleaved pixels, normalised by ImageNet's mean and standard deviation, into a row of a batch.
///
/// # Shapes
/// - `rgb`: `(.., H, W, 3)` u8
/// - `out`: as many f32, channels-last
///
/// # Panics
/// When the lengths differ or are not whole pixels.
pub fn write_normalized(rgb: &[u8], out: &mut [f32]) {
    static IMAGENET: LazyLock<Normalizer> =
        LazyLock::new(|| Normalizer::new(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD));
    IMAGENET.write(rgb, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_the_formula_per_channel() {
        let rgb: Vec<u8> = (0..=255).flat_map(|v| [v; 3]).collect();
        let mut out = vec![0.0; rgb.len()];
        write_normalized(&rgb, &mut out);
        for (i, value) in out.iter().enumerate() {
            let (v, c) = (f32::from(rgb[i]), i % 3);
            assert_eq!(*value, (v / 255.0 - IMAGENET_DEFAULT_MEAN[c]) / IMAGENET_DEFAULT_STD[c]);
        }
    }
}
