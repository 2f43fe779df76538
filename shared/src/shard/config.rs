//! What decides the bytes of a shard set: the settings that its manifest keeps and that views are redrawn from.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::jpeg::{STORED_DECODER, STORED_ENCODER};
use super::{LocalDetails, ShardSetDetails, VIEW_PARAMETERS};
use crate::transforms::Recipe;

/// What a shard holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Store {
    /// The augmented views of every sample: nothing is left to do when they are read
    #[default]
    Views,
    /// One decoded image per sample: views are redrawn when they are read, so that their number costs no space
    Source,
}

/// How pixels are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// Plain bytes, to be mapped into memory
    #[default]
    Raw,
    /// JPEG: about an eighth of the space, nearly the same pixels, decoded when they are read
    Jpeg,
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
    /// Of stored source images: the length that their short side was resized to if it was longer, 0 for no resize.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_side: Option<usize>,
    /// How JPEGs are stored; none in a set without them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jpeg: Option<StoredJpeg>,
}

/// How the JPEGs inside a set are written and read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StoredJpeg {
    /// 1 to 100.
    pub quality: u8,
    /// What writes them.
    pub encoder: String,
    /// What reads them; a program with another decoder refuses the set.
    pub decoder: String,
}

impl StoredJpeg {
    /// JPEGs of a quality, written and read by this program.
    pub fn new(quality: u8) -> Self {
        Self { quality, encoder: STORED_ENCODER.into(), decoder: STORED_DECODER.into() }
    }
}

/// Long side over short side of most photographs.
const USUAL_ASPECT: [usize; 2] = [4, 3];
/// Sides of a usual photograph of the data sets that are packed: those of ImageNet average 469 x 387.
const USUAL_PHOTOGRAPH: [usize; 2] = [469, 387];
/// Plain bytes for one of a JPEG.
const USUAL_COMPRESSION: usize = 8;

impl ShardConfig {
    /// What readers must know of a set with these settings.
    pub fn details(&self, classes: Vec<String>) -> ShardSetDetails {
        ShardSetDetails {
            views: self.views,
            height: self.size,
            width: self.size,
            classes,
            store: self.store,
            codec: self.codec,
            local: self
                .recipe
                .local
                .as_ref()
                .map(|local| LocalDetails { views: self.recipe.local_views(self.views), size: local.size }),
        }
    }

    /// Bytes of one sample in a shard: exact for raw views, what is usual for anything else.
    pub fn sample_bytes(&self) -> u64 {
        let usual = match self.codec {
            Codec::Raw => self.raw_bytes(),
            Codec::Jpeg => self.raw_bytes() / USUAL_COMPRESSION,
        };
        self.record_bytes() + usual as u64
    }

    /// Bytes of one sample in a shard, when the pixels or JPEGs of a sample were measured to take `mean_pixel_bytes` on average.
    pub fn sample_bytes_of(&self, mean_pixel_bytes: f64) -> u64 {
        match (self.store, self.codec) {
            (Store::Views, Codec::Raw) => self.sample_bytes(),
            _ => self.record_bytes() + mean_pixel_bytes.max(0.0).ceil() as u64,
        }
    }

    /// Decoded pixels of a sample.
    fn raw_bytes(&self) -> usize {
        let [long, short] = USUAL_ASPECT;
        let pixels = match (self.store, self.short_side.unwrap_or(0)) {
            (Store::Views, _) => {
                let local =
                    self.recipe.local.as_ref().map_or(0, |l| self.recipe.local_views(self.views) * l.size * l.size);
                self.views * self.size * self.size + local
            }
            (Store::Source, 0) => USUAL_PHOTOGRAPH.iter().product(),
            (Store::Source, side) => side * (side * long / short),
        };
        pixels * 3
    }

    /// Everything about a sample but its pixels.
    fn record_bytes(&self) -> u64 {
        let views = self.views + self.recipe.local_views(self.views);
        let per_view = match (self.store, self.codec) {
            (Store::Source, _) => 0,
            (Store::Views, Codec::Raw) => VIEW_PARAMETERS.len() * size_of::<f32>(),
            (Store::Views, Codec::Jpeg) => VIEW_PARAMETERS.len() * size_of::<f32>() + size_of::<u64>(),
        };
        let source = if self.store == Store::Source { size_of::<u64>() + 2 * size_of::<u32>() } else { 0 };
        (views * per_view + source + size_of::<u64>() + size_of::<i64>()) as u64
    }
}
