//! Bytes to training tensors: `(v / 255 - mean) / std` per channel.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "instruction sets chosen at run time"))]

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::level::{Level, kernel};
use crate::error::{Error, Result};

/// Mean of ImageNet's training pixels in 0..1, by channel (red, green, blue).
pub const IMAGENET_DEFAULT_MEAN: [f32; 3] = [0.485, 0.456, 0.406];

/// Standard deviation of ImageNet's training pixels in 0..1, by channel.
pub const IMAGENET_DEFAULT_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Half of the range: the mean and the standard deviation that lay 0..1 out from -1 to 1, as the Inception networks did.
pub const IMAGENET_INCEPTION_MEAN: [f32; 3] = [0.5; 3];

/// As [`IMAGENET_INCEPTION_MEAN`].
pub const IMAGENET_INCEPTION_STD: [f32; 3] = [0.5; 3];

/// The mean and standard deviation of pixels that a network was trained with.
///
/// # Source
/// The constants have timm's names (`timm/data/constants.py`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Normalization {
    /// ImageNet's mean 0.485, 0.456, 0.406 and deviation 0.229, 0.224, 0.225: torchvision, most of timm, self-supervised teachers
    #[default]
    Imagenet,
    /// Mean and deviation 0.5, so that pixels lie between -1 and 1: timm's EfficientNet-Lite and augreg vision transformers
    Inception,
}

impl Normalization {
    /// Mean of each channel, in 0..1.
    pub fn mean(self) -> [f32; 3] {
        match self {
            Self::Imagenet => IMAGENET_DEFAULT_MEAN,
            Self::Inception => IMAGENET_INCEPTION_MEAN,
        }
    }

    /// Standard deviation of each channel, in 0..1.
    pub fn std(self) -> [f32; 3] {
        match self {
            Self::Imagenet => IMAGENET_DEFAULT_STD,
            Self::Inception => IMAGENET_INCEPTION_STD,
        }
    }

    /// The name in flags and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Imagenet => "imagenet",
            Self::Inception => "inception",
        }
    }

    /// What the `mean` among a weight file's text entries says, as an exported student has it; none for any other text or
    /// no such entry.
    pub fn recorded(metadata: &BTreeMap<String, Value>) -> Option<Self> {
        let mean = metadata.get("mean")?.as_str()?;
        [Self::Imagenet, Self::Inception].into_iter().find(|known| format!("{:?}", known.mean()) == mean)
    }

    /// Writes the values of interleaved pixels into a row of a batch.
    ///
    /// Subtraction and division by the deviation are those of torchvision's `Normalize` in f32, after a division by 255 that is
    /// rounded as `ToTensor` rounds it: the values are theirs bit for bit.
    ///
    /// # Shapes
    /// - `rgb`: `(.., H, W, 3)` u8
    /// - `out`: as many f32, channels-last
    ///
    /// # Panics
    /// When the lengths differ or are not whole pixels.
    pub fn write(self, rgb: &[u8], out: &mut [f32]) {
        self.write_at(Level::best(), rgb, out);
    }

    /// As [`Normalization::write`], by the kernel of a given level: all give the same values.
    ///
    /// # Panics
    /// As [`Normalization::write`].
    pub fn write_at(self, level: Level, rgb: &[u8], out: &mut [f32]) {
        assert!(rgb.len() == out.len() && rgb.len().is_multiple_of(3), "one value for each byte of whole pixels");
        normalize(level, rgb, out, self.mean(), self.std());
    }
}

/// Values that are computed together: the channels of 16 pixels, which are whole registers of 4, 8 or 16.
const LANES: usize = 48;

/// 1 / 255 in two parts. The first has 16 significant bits, so that a byte times it is exact; the second is the rest. Their
/// products with a byte add up to the byte over 255, rounded once: all 256 are checked below.
const INVERSE_HIGH: f32 = 32_896.0 / 8_388_608.0;
const INVERSE_LOW: f32 = (1.0 / 255.0 - 32_896.0f64 / 8_388_608.0) as f32;

#[expect(clippy::inline_always, reason = "a part of the kernel, to be compiled for its level")]
#[inline(always)]
fn normalized(byte: u8, mean: f32, std: f32) -> f32 {
    let value = f32::from(byte);
    (value * INVERSE_HIGH + value * INVERSE_LOW - mean) / std
}

kernel! {
    fn normalize(rgb: &[u8], out: &mut [f32], mean: [f32; 3], std: [f32; 3]) {
        let means: [f32; LANES] = std::array::from_fn(|i| mean[i % 3]);
        let stds: [f32; LANES] = std::array::from_fn(|i| std[i % 3]);
        let (blocks, rest) = rgb.as_chunks::<LANES>();
        let (out_blocks, out_rest) = out.as_chunks_mut::<LANES>();
        for (out, block) in out_blocks.iter_mut().zip(blocks) {
            for i in 0..LANES {
                out[i] = normalized(block[i], means[i], stds[i]);
            }
        }
        for (i, (out, byte)) in out_rest.iter_mut().zip(rest).enumerate() {
            *out = normalized(*byte, mean[i % 3], std[i % 3]);
        }
    }
}

impl fmt::Display for Normalization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Normalization {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        [Self::Imagenet, Self::Inception].into_iter().find(|known| known.name() == name).ok_or_else(|| {
            Error::usage(format!("`{name}` is no known pixel normalisation, these are: imagenet, inception"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_the_formula_at_every_level() {
        // Every byte in every lane, and rows that do not fill the last registers.
        for pixels in [1, 15, 16, 17, 256, 256 * 17] {
            let rgb: Vec<u8> = (0..pixels * 3).map(|i| (i / 3 + i / 768) as u8).collect();
            let mut out = vec![0.0; rgb.len()];
            for (normalization, level) in [Normalization::Imagenet, Normalization::Inception]
                .into_iter()
                .flat_map(|normalization| Level::available().into_iter().map(move |level| (normalization, level)))
            {
                normalization.write_at(level, &rgb, &mut out);
                for (i, value) in out.iter().enumerate() {
                    let (v, c) = (f32::from(rgb[i]), i % 3);
                    let expected = (v / 255.0 - normalization.mean()[c]) / normalization.std()[c];
                    assert_eq!(value.to_bits(), expected.to_bits(), "{v} of channel {c}");
                }
            }
        }
        let mut ends = [0.0; 6];
        Normalization::Inception.write(&[0, 0, 0, 255, 255, 255], &mut ends);
        assert_eq!(ends, [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn names_and_recorded_means_are_told_apart() {
        for known in [Normalization::Imagenet, Normalization::Inception] {
            assert_eq!(known.to_string().parse::<Normalization>().unwrap(), known);
            assert_eq!(serde_json::to_value(known).unwrap(), known.name());
            let metadata = BTreeMap::from([("mean".to_owned(), Value::from(format!("{:?}", known.mean())))]);
            assert_eq!(Normalization::recorded(&metadata), Some(known));
        }
        assert_eq!("zero".parse::<Normalization>().unwrap_err().exit_status(), 2);
        for mean in [Value::from("[0, 0, 0]"), Value::from(0.5), Value::Null] {
            assert_eq!(Normalization::recorded(&BTreeMap::from([("mean".to_owned(), mean)])), None);
        }
        assert_eq!(Normalization::recorded(&BTreeMap::new()), None);
    }
}
