//! All views of one sample from one decoded image.

use shared::Result;
use shared::shard::{ShardConfig, VIEW_PARAMETERS};
use shared::transforms::decode::decode_into;
use shared::transforms::{Recipe, RgbImage, Scratch, View};

use crate::source::{Listing, Payload, Reader, Sample};

/// What a worker keeps from sample to sample, so that it need not allocate.
#[derive(Debug, Default)]
pub struct Worker {
    reader: Reader,
    scratch: Scratch,
    spare: Vec<u8>,
}

/// The stored form of a sample.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct SampleViews {
    /// `(V, H, W, 3)` u8.
    pub pixels: Vec<u8>,
    /// `(V, P)` f32.
    pub params: Vec<f32>,
}

/// Reads and decodes a sample; the error is a reason for people, without the name.
///
/// # Errors
/// Why the sample cannot be used.
pub fn load(listing: &Listing, sample: &Sample, worker: &mut Worker) -> Result<RgbImage, String> {
    match worker.reader.load(listing, sample)? {
        Payload::Encoded(bytes) => {
            decode_into(bytes, std::mem::take(&mut worker.spare)).map_err(|fault| fault.to_string())
        }
        Payload::Pixels(image) => Ok(image),
    }
}

/// The row of numbers that `recipe` draws for one view of an image of a given size.
pub fn draw_row(
    recipe: &Recipe,
    seed: u64,
    sample_id: u64,
    view: usize,
    source: (usize, usize),
) -> [f32; VIEW_PARAMETERS.len()] {
    recipe.draw(seed, sample_id, View::Global(view), source.0, source.1).to_row()
}

/// Makes all views of a sample into `views`, whose memory is used again.
///
/// # Errors
/// Why the sample cannot be used.
pub fn make_views(
    listing: &Listing,
    sample: &Sample,
    seed: u64,
    config: &ShardConfig,
    worker: &mut Worker,
    views: &mut SampleViews,
) -> Result<(), String> {
    let image = load(listing, sample, worker)?;
    views.params.clear();
    views.pixels.resize(config.views * config.size * config.size * 3, 0);
    let chunks = views.pixels.chunks_exact_mut(config.size * config.size * 3);
    for (view, pixels) in chunks.enumerate() {
        let view = View::Global(view);
        let drawn = config.recipe.draw(seed, sample.id, view, image.height(), image.width());
        config
            .recipe
            .apply(view, &image, &drawn, config.size, &mut worker.scratch, pixels)
            .map_err(|e| e.to_string())?;
        views.params.extend(drawn.to_row());
    }
    worker.spare = image.into_pixels();
    Ok(())
}
