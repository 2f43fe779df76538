//! All views of one sample from one decoded image.

use std::fs;
use std::path::Path;

use shared::Result;
use shared::shard::{ShardConfig, VIEW_PARAMETERS};
use shared::space::human;
use shared::transforms::decode::decode_into;
use shared::transforms::{Level, Recipe, RgbImage, Scratch, View};

use crate::memory::{LARGEST_SPARE_BYTES, MemoryBudget, Reserved, decoding_bytes};

/// No image file is larger.
const LARGEST_FILE_BYTES: u64 = 1 << 30;

/// What a worker keeps from sample to sample, so that it need not allocate.
#[derive(Debug, Default)]
pub struct Worker {
    scratch: Scratch,
    spare: Vec<u8>,
    budget: MemoryBudget,
    /// What the picture at hand takes of the budget.
    room: Option<Reserved>,
}

impl Worker {
    /// A worker that computes on an instruction set and shares the memory for decoding with others.
    pub(crate) fn new(level: Level, budget: MemoryBudget) -> Self {
        Self { scratch: Scratch::new(level), budget, ..Self::default() }
    }

    /// Ends the work on a picture, whatever came of it: its memory is there for others.
    pub(crate) fn end_picture(&mut self) {
        if self.spare.capacity() > LARGEST_SPARE_BYTES {
            self.spare = Vec::new();
        }
        self.room = None;
    }
}

/// The stored form of a sample.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct SampleViews {
    /// `(V, H, W, 3)` u8.
    pub pixels: Vec<u8>,
    /// `(V, P)` f32.
    pub params: Vec<f32>,
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
    worker.end_picture();
    worker.room = Some(worker.budget.reserve(decoding_bytes(&file)));
    decode_into(&file, std::mem::take(&mut worker.spare)).map_err(|fault| fault.to_string())
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

/// Makes all views of the sample at `path` into `views`, whose memory is used again.
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
    views.params.clear();
    views.pixels.resize(config.views * config.size * config.size * 3, 0);
    let chunks = views.pixels.chunks_exact_mut(config.size * config.size * 3);
    for (view, pixels) in chunks.enumerate() {
        let view = View::Global(view);
        let drawn = config.recipe.draw(seed, sample_id, view, image.height(), image.width());
        config
            .recipe
            .apply(view, &image, &drawn, config.size, &mut worker.scratch, pixels)
            .map_err(|e| e.to_string())?;
        views.params.extend(drawn.to_row());
    }
    worker.spare = image.into_pixels();
    Ok(())
}
