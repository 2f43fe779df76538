//! What is stored of one sample, from one decoded image: its views, or the image itself.

use shared::Result;
use shared::shard::{Codec, Pieces, ShardConfig, Store, VIEW_PARAMETERS, encode_jpeg};
use shared::transforms::crop::{CropBox, resize_short_side};
use shared::transforms::decode::decode_into;
use shared::transforms::resize::{Interpolation, Resize, ResizeScratch, crop_resize};
use shared::transforms::{Level, Planes, Recipe, RgbImage, Scratch, View};

use crate::memory::{LARGEST_SPARE_BYTES, MemoryBudget, Reserved, decoding_bytes};

pub use shared::shard::SampleViews;

use crate::source::{Listing, Payload, Reader, Sample};

/// What a worker keeps from sample to sample, so that it need not allocate.
#[derive(Debug, Default)]
pub struct Worker {
    reader: Reader,
    scratch: Scratch,
    spare: Vec<u8>,
    level: Level,
    pixels: Vec<u8>,
    resize: ResizeScratch,
    planes: Planes,
    budget: MemoryBudget,
    /// What the picture at hand takes of the budget.
    room: Option<Reserved>,
}

impl Worker {
    /// A worker that computes on an instruction set and shares the memory for decoding with others.
    pub(crate) fn new(level: Level, budget: MemoryBudget) -> Self {
        Self { level, scratch: Scratch::new(level), budget, ..Self::default() }
    }

    /// Ends the work on a picture, whatever came of it: its memory is there for others.
    pub(crate) fn end_picture(&mut self) {
        if self.spare.capacity() > LARGEST_SPARE_BYTES {
            self.spare = Vec::new();
        }
        self.room = None;
    }
}

/// Reads and decodes a sample; the error is a reason for people, without the name.
///
/// # Errors
/// Why the sample cannot be used.
pub fn load(listing: &Listing, sample: &Sample, worker: &mut Worker) -> Result<RgbImage, String> {
    worker.end_picture();
    match worker.reader.load(listing, sample)? {
        Payload::Encoded(bytes) => {
            worker.room = Some(worker.budget.reserve(decoding_bytes(bytes)));
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
    view: View,
    source: (usize, usize),
) -> [f32; VIEW_PARAMETERS.len()] {
    recipe.draw(seed, sample_id, view, source.0, source.1).to_row()
}

/// Makes what is stored of a sample into `views`, whose memory is used again.
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
    make_from_image(&image, sample.id, seed, config, worker, views)?;
    worker.spare = image.into_pixels();
    Ok(())
}

/// Makes what is stored of a sample from its decoded image.
///
/// # Errors
/// Why the image cannot be used.
pub fn make_from_image(
    image: &RgbImage,
    sample_id: u64,
    seed: u64,
    config: &ShardConfig,
    worker: &mut Worker,
    views: &mut SampleViews,
) -> Result<(), String> {
    views.clear();
    if config.store == Store::Source {
        return store_source(image, config, worker, views);
    }
    let SampleViews { global, local, .. } = views;
    for view in (0..config.views).map(View::Global) {
        store_view(image, (view, config.size), sample_id, seed, config, worker, global)?;
    }
    if let Some(views) = &config.recipe.local {
        for view in (0..config.recipe.local_views(config.views)).map(View::Local) {
            store_view(image, (view, views.size), sample_id, seed, config, worker, local)?;
        }
    }
    Ok(())
}

fn store_view(
    image: &RgbImage,
    (view, size): (View, usize),
    sample_id: u64,
    seed: u64,
    config: &ShardConfig,
    worker: &mut Worker,
    stored: &mut Pieces,
) -> Result<(), String> {
    let drawn = config.recipe.draw(seed, sample_id, view, image.height(), image.width());
    worker.pixels.resize(size * size * 3, 0);
    config
        .recipe
        .apply(view, image, &drawn, size, &mut worker.scratch, &mut worker.pixels)
        .map_err(|e| e.to_string())?;
    stored.params.extend(drawn.to_row());
    store(&worker.pixels, (size, size), config, stored)
}

/// The whole image, its short side resized if it is longer than asked.
fn store_source(
    image: &RgbImage,
    config: &ShardConfig,
    worker: &mut Worker,
    views: &mut SampleViews,
) -> Result<(), String> {
    let (height, width) = (image.height(), image.width());
    let short = config.short_side.unwrap_or(0);
    let (pixels, size) = if short == 0 || height.min(width) <= short {
        (image.pixels(), (height, width))
    } else {
        let target = resize_short_side(height, width, short);
        let resize = Resize {
            crop: CropBox::whole(height, width),
            target,
            window: CropBox::whole(target.0, target.1),
            flip: false,
            order: config.recipe.pass_order,
            interpolation: Interpolation::Bilinear,
        };
        let level = worker.level;
        crop_resize(level, image, &resize, &mut worker.resize, &mut worker.planes);
        worker.pixels.resize(target.0 * target.1 * 3, 0);
        worker.planes.write_rgb(level, &mut worker.pixels);
        (&worker.pixels[..], target)
    };
    views.source_size = [size.0, size.1].map(|side| u32::try_from(side).unwrap_or(u32::MAX));
    store(pixels, size, config, &mut views.global)
}

fn store(pixels: &[u8], size: (usize, usize), config: &ShardConfig, stored: &mut Pieces) -> Result<(), String> {
    let before = stored.bytes.len();
    match (config.codec, &config.jpeg) {
        (Codec::Jpeg, Some(jpeg)) => {
            encode_jpeg(pixels, size, jpeg.quality, &mut stored.bytes).map_err(|e| e.to_string())?;
        }
        _ => stored.bytes.extend_from_slice(pixels),
    }
    stored.lengths.push(stored.bytes.len() - before);
    Ok(())
}
