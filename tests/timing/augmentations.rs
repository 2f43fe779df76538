//! This project's side of `tests/timing/augmentations.py`: makes one pass over some photos for every line of standard input.
//!
//! `decode` decodes every file. `views` makes two `moco-v2` views of every decoded picture and normalises them. `decode+views` does both.
//! `redraw` makes the views of pictures whose short side was resized to 256 before, as a source set holds them. Each answer is
//! the pass's milliseconds. `quit` or the end of the input ends it.

use std::hint::black_box;
use std::io::BufRead as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use shared::cli::{print, run_main};
use shared::transforms::crop::{CropBox, resize_short_side};
use shared::transforms::decode::{decode, read};
use shared::transforms::normalize::Normalization;
use shared::transforms::resize::{Interpolation, Resize, ResizeScratch, crop_resize};
use shared::transforms::{Level, PassOrder, Planes, Recipe, RgbImage, Scratch, View};
use shared::{Error, Result};

const SEED: u64 = 0;
const SHORT_SIDE: usize = 256;

/// Times decoding and augmenting photos on request, on one thread
#[derive(Debug, Parser)]
#[command(name = "augmentations")]
struct Args {
    /// Image files
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Sides of a view
    #[arg(long, default_value_t = 224)]
    size: usize,
}

/// What a pass needs.
struct Bench {
    recipe: Recipe,
    size: usize,
    scratch: Scratch,
    bytes: Vec<u8>,
    values: Vec<f32>,
    /// Changes from pass to pass, so that every pass draws other views.
    sample: u64,
}

impl Bench {
    fn views(&mut self, image: &RgbImage) -> Result<()> {
        self.sample += 1;
        for view in [View::Global(0), View::Global(1)] {
            let params = self.recipe.draw(SEED, self.sample, view, image.height(), image.width());
            self.recipe.apply(view, image, &params, self.size, &mut self.scratch, &mut self.bytes)?;
            Normalization::Imagenet.write(&self.bytes, &mut self.values);
            black_box(&self.values);
        }
        Ok(())
    }
}

/// The whole picture with its short side at [`SHORT_SIDE`], as `pack --store source` keeps it.
fn shrink(image: &RgbImage) -> Result<RgbImage> {
    let target = resize_short_side(image.height(), image.width(), SHORT_SIDE);
    let resize = Resize {
        crop: CropBox::whole(image.height(), image.width()),
        target,
        window: CropBox::whole(target.0, target.1),
        flip: false,
        order: PassOrder::default(),
        interpolation: Interpolation::Bilinear,
    };
    let mut planes = Planes::default();
    crop_resize(Level::best(), image, &resize, &mut ResizeScratch::default(), &mut planes);
    let mut pixels = vec![0; target.0 * target.1 * 3];
    planes.write_rgb(Level::best(), &mut pixels);
    RgbImage::new(target.0, target.1, pixels)
}

fn main() -> ExitCode {
    let args = Args::parse();
    run_main(|| serve(&args))
}

fn serve(args: &Args) -> Result<()> {
    let values = args.size * args.size * 3;
    let mut bench = Bench {
        recipe: Recipe::moco_v2(),
        size: args.size,
        scratch: Scratch::default(),
        bytes: vec![0; values],
        values: vec![0.0; values],
        sample: 0,
    };
    let files = args
        .files
        .iter()
        .map(|path| std::fs::read(path).map_err(Error::io("read", path)))
        .collect::<Result<Vec<Vec<u8>>>>()?;
    let pictures = args.files.iter().map(|path| read(path)).collect::<Result<Vec<RgbImage>>>()?;
    let small = pictures.iter().map(shrink).collect::<Result<Vec<_>>>()?;
    print(Level::best().name())?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(Error::io("read", "standard input"))?;
        let start = Instant::now();
        match line.as_str() {
            "decode" => {
                for file in &files {
                    black_box(decode(file).map_err(|fault| Error::invalid(fault.to_string(), ""))?);
                }
            }
            "decode+views" => {
                for file in &files {
                    bench.views(&decode(file).map_err(|fault| Error::invalid(fault.to_string(), ""))?)?;
                }
            }
            "views" => pictures.iter().try_for_each(|image| bench.views(image))?,
            "redraw" => small.iter().try_for_each(|image| bench.views(image))?,
            "quit" => break,
            other => return Err(Error::usage(format!("`{other}` is no pass"))),
        }
        print(&format!("{:.3}", start.elapsed().as_secs_f64() * 1e3))?;
    }
    Ok(())
}
