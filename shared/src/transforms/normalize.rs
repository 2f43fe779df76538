//! Bytes to training tensors: `(v / 255 - mean) / std` per channel, through a table of 256 entries.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use serde_json::Value;

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
    /// # Shapes
    /// - `rgb`: `(.., H, W, 3)` u8
    /// - `out`: as many f32, channels-last
    ///
    /// # Panics
    /// When the lengths differ or are not whole pixels.
    pub fn write(self, rgb: &[u8], out: &mut [f32]) {
        static TABLES: LazyLock<[Normalizer; 2]> = LazyLock::new(|| {
            [Normalization::Imagenet, Normalization::Inception].map(|known| Normalizer::new(known.mean(), known.std()))
        });
        let [imagenet, inception] = &*TABLES;
        match self {
            Self::Imagenet => imagenet.write(rgb, out),
            Self::Inception => inception.write(rgb, out),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_the_formula_per_channel() {
        let rgb: Vec<u8> = (0..=255).flat_map(|v| [v; 3]).collect();
        let mut out = vec![0.0; rgb.len()];
        for normalization in [Normalization::Imagenet, Normalization::Inception] {
            normalization.write(&rgb, &mut out);
            for (i, value) in out.iter().enumerate() {
                let (v, c) = (f32::from(rgb[i]), i % 3);
                assert_eq!(*value, (v / 255.0 - normalization.mean()[c]) / normalization.std()[c]);
            }
        }
        assert_eq!((out[0], out[767]), (-1.0, 1.0));
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
