//! What decides the bytes of a shard set: the settings that its manifest keeps and that views are redrawn from.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::VIEW_PARAMETERS;
use crate::transforms::Recipe;

/// What a shard holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Store {
    /// The augmented views of every sample
    #[default]
    Views,
}

/// How pixels are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// Plain bytes, to be mapped into memory
    #[default]
    Raw,
}

/// In which order the samples of the listing are packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PackingOrder {
    /// All samples shuffled
    #[default]
    Random,
    /// Runs of neighbours in shuffled order, samples shuffled within a window of several runs
    Quasi,
}

/// What decides the bytes of a shard set, besides the images and the seed; kept in its manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShardConfig {
    /// The augmentations.
    pub recipe: Recipe,
    /// Views per sample.
    pub views: usize,
    /// Height and width of a view.
    pub size: usize,
    /// What a shard holds.
    pub store: Store,
    /// How pixels are stored.
    pub codec: Codec,
    /// The order of the samples.
    #[serde(default)]
    pub order: PackingOrder,
    /// Listed samples per shard.
    pub shard_samples: usize,
    /// Which decoders made the pixels.
    pub decoder: String,
}

impl ShardConfig {
    /// Bytes of one sample in a shard.
    pub fn sample_bytes(&self) -> u64 {
        let view = self.size * self.size * 3 + VIEW_PARAMETERS.len() * size_of::<f32>();
        (self.views * view + size_of::<u64>() + size_of::<i64>()) as u64
    }
}
