//! Shard sets: a directory of augmented views, or of images from which views are redrawn, ready to be mapped into memory.
//!
//! ```text
//! manifest.json                 what it is and how it was made (see [`crate::manifest`])
//! shard-00000.safetensors …     n samples each:
//!     sample_ids   [n]              u64   see [`sample_id`]
//!     labels       [n]              i64   class index, -1: none
//!   with stored views:
//!     view_params  [n, V, P]        f32   what was drawn for each view, P = 18: see [`VIEW_PARAMETERS`]
//!     pixels       [n, V, H, W, 3]  u8    RGB; with codec `raw`
//!     bytes        [total]          u8    JPEG files one after the other; with codec `jpeg`
//!     offsets      [n * V + 1]      u64   where each begins in `bytes`, and their total
//!   with stored source images:
//!     bytes        [total]          u8    RGB of one image after the other, or JPEG files
//!     offsets      [n + 1]          u64   where each begins in `bytes`, and their total
//!     sizes        [n, 2]           u32   height and width
//!   with stored views of a multi-crop recipe, beside those of the global views:
//!     local_pixels or local_bytes and local_offsets, local_view_params, of W views of h x w pixels
//! rejects.jsonl                 images that could not be used, and why
//! ```
//!
//! `pixels` or `bytes` starts on a 4096-byte boundary. Samples are packed in a seeded random order, so that reading shards from
//! front to back is already well mixed.
//!
//! Views of source images are redrawn from `(seed, sample_id, view)` whenever they are read, with the same bytes anywhere.
//! [`ViewReader`] reads views of any set. A set may also be a manifest alone, which names a set of source images and other
//! views of it: see [`BASE_ROLE`].

mod config;
mod jpeg;
mod labelled;
mod reader;
mod sample;
mod shard_file;
mod view_reader;
mod writer;

pub use config::{Codec, PackingOrder, ShardConfig, Store, StoredJpeg};
pub use jpeg::{DEFAULT_QUALITY, STORED_DECODER, STORED_ENCODER, encode as encode_jpeg};
pub use labelled::{check_classes, open_labelled};
pub use reader::{BASE_ROLE, ShardSet};
pub use sample::{Pieces, SampleViews};
pub use shard_file::Shard;
pub use view_reader::ViewReader;
pub use writer::ShardWriter;

use serde::{Deserialize, Serialize};

/// Names of the numbers that describe a view, in their order in a `view_params` row.
///
/// The crop box and the source size are in pixels of the image that the view was drawn from: the decoded file, or the stored
/// source image. The order names 0 brightness, 1 contrast, 2 saturation, 3 hue; -1 means that the view was not jittered.
/// `blur_sigma` 0 means no blur, `solarize_threshold` -1 no solarisation.
pub const VIEW_PARAMETERS: [&str; 18] = [
    "crop_top",
    "crop_left",
    "crop_height",
    "crop_width",
    "flip",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order_0",
    "order_1",
    "order_2",
    "order_3",
    "grayscale",
    "blur_sigma",
    "solarize_threshold",
    "source_height",
    "source_width",
];

/// What a reader must know of a shard set, kept as the manifest's `details`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardSetDetails {
    /// V: views per sample.
    pub views: usize,
    /// H in pixels.
    pub height: usize,
    /// W in pixels.
    pub width: usize,
    /// Class names; a label is an index into them. Empty when the source has no classes.
    pub classes: Vec<String>,
    /// What a shard holds.
    #[serde(default, skip_serializing_if = "is_default")]
    pub store: Store,
    /// How pixels are stored.
    #[serde(default, skip_serializing_if = "is_default")]
    pub codec: Codec,
    /// The small views of multi-crop; none for other recipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalDetails>,
}

/// Number and size of the small views of multi-crop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalDetails {
    /// W: local views per sample.
    pub views: usize,
    /// Height and width in pixels.
    pub size: usize,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// File name of a shard.
pub fn shard_file_name(index: usize) -> String {
    format!("shard-{index:05}.safetensors")
}

/// The identity of a sample: the first eight bytes (little-endian) of the BLAKE3 hash of its path relative to the input
/// root, with `/` separators. It does not depend on listing order, subset, machine or thread count.
pub fn sample_id(relative_path: &str) -> u64 {
    let hash = blake3::hash(relative_path.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_id_is_pinned() {
        // A change here breaks every shard and embedding set: it needs a new format version.
        assert_eq!(sample_id("n01440764/n01440764_10026.JPEG"), 9_027_538_356_504_390_648);
    }
}
