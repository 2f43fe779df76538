//! What is stored of one sample, from one decoded image: its views, or the image itself.

use std::fs;
use std::path::Path;

use shared::Result;
use shared::shard::{Codec, ShardConfig, Store, VIEW_PARAMETERS, encode_jpeg};
use shared::space::human;
use shared::transforms::crop::{CropBox, resize_short_side};
use shared::transforms::decode::decode_into;
use shared::transforms::resize::{Resize, ResizeScratch, crop_resize};
use shared::transforms::{Level, Planes, Recipe, RgbImage, Scratch, View};

use shared::shard::Pieces;
pub use shared::shard::SampleViews;

/// No image file is larger.
const LARGEST_FILE_BYTES: u64 = 1 << 30;

/// What a worker keeps from sample to sample, so that it need not allocate.
#[derive(Debug, Default)]
pub struct Worker {
    scratch: Scratch,
    spare: Vec<u8>,
    pixels: Vec<u8>,
    resize: ResizeScratch,
    planes: Planes,
}

/// Reads and decodes a file; the error is a reason for people, without the path.
///
/// # Errors
/// Why the file cannot be used.
pub fn load(path: &Path, worker: &mut Worker) -> Result<RgbImage, String> {
    let unreadable = |e: std::io::Error| format!("cannot read it: {e}");
    let bytes = fs::metadata(path).map_err(unreadable)?.len();
    if bytes > LARGEST_FILE_BYTES {
        return Err(format!("the file has {}, the limit is {}", human(bytes), human(LARGEST_FILE_BYTES)));
    }
    let file = fs::read(path).map_err(unreadable)?;
    decode_into(&file, std::mem::take(&mut worker.spare)).map_err(|fault| fault.to_string())
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

/// Makes what is stored of the sample at `path` into `views`, whose memory is used again.
///
/// # Errors
/// Why the file cannot be used.
pub fn make_views(
    path: &Path,
    sample_id: u64,
    seed: u64,
    config: &ShardConfig,
    worker: &mut Worker,
    views: &mut SampleViews,
) -> Result<(), String> {
    let image = load(path, worker)?;
    make_from_image(&image, sample_id, seed, config, worker, views)?;
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
        };
        let level = Level::best();
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
