//! What the end-to-end tests share: small synthetic photos, and directories compared byte for byte.

pub mod formula;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use image::{Rgb, RgbImage};
use shared::rng::KeyedRng;

/// Names of the classes that [`write_photos`] makes.
pub const CLASSES: [&str; 3] = ["blobs", "checks", "stripes"];

/// Writes a class-folder tree of `per_class` JPEG and PNG pictures for each of [`CLASSES`], each drawn by `seed`.
///
/// The classes can be told apart: blobs, checker boards and stripes, in random colours and sizes.
///
/// # Errors
/// When a file cannot be written.
pub fn write_photos(root: &Path, per_class: usize, seed: u64) -> Result<()> {
    for (class, name) in CLASSES.iter().enumerate() {
        let directory = root.join(name);
        fs::create_dir_all(&directory)?;
        for index in 0..per_class {
            let extension = if index % 4 == 3 { "png" } else { "jpg" };
            let path = directory.join(format!("{name}_{index:03}.{extension}"));
            photo(class, &mut KeyedRng::new("test photo", seed, &[class as u64, index as u64])).save(&path)?;
        }
    }
    Ok(())
}

fn photo(class: usize, rng: &mut KeyedRng) -> RgbImage {
    let (width, height) = (48 + rng.below(33) as u32, 48 + rng.below(33) as u32);
    let colours: [[f32; 3]; 2] = std::array::from_fn(|_| std::array::from_fn(|_| rng.uniform_f32(30.0, 225.0)));
    let period = rng.uniform_f32(6.0, 14.0);
    let phase = rng.uniform_f32(0.0, period);
    let mut picture = RgbImage::new(width, height);
    for (x, y, pixel) in picture.enumerate_pixels_mut() {
        let (u, v) = ((x as f32 + phase) / period, (y as f32 + phase) / period);
        let second = match class {
            0 => (u.fract() - 0.5).hypot(v.fract() - 0.5) < 0.35,
            1 => (u.floor() + v.floor()) as i32 % 2 == 0,
            _ => (u + v * 0.3).fract() < 0.5,
        };
        let grain = rng.uniform_f32(-12.0, 12.0);
        *pixel = Rgb(colours[usize::from(second)].map(|level| (level + grain) as u8));
    }
    picture
}

/// The contents of every file below a directory, by relative path; hidden files (locks), `timing.jsonl` and the files in
/// `tensorboard` (clock readings) do not count.
///
/// # Errors
/// When a file cannot be read.
pub fn contents(root: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if path.is_dir() {
                pending.extend((!path.ends_with("tensorboard")).then_some(path));
            } else if !hidden && path.file_name().is_none_or(|name| name != "timing.jsonl") {
                files.insert(path.strip_prefix(root)?.display().to_string(), fs::read(&path)?);
            }
        }
    }
    Ok(files)
}

/// Compares two directories file by file.
///
/// # Errors
/// Names the first file that differs or is missing on one side.
pub fn assert_same_contents(a: &Path, b: &Path) -> Result<()> {
    let (a, b) = (contents(a)?, contents(b)?);
    for name in a.keys().chain(b.keys()) {
        anyhow::ensure!(a.contains_key(name) && b.contains_key(name), "`{name}` exists on one side only");
        anyhow::ensure!(a[name] == b[name], "`{name}` differs");
    }
    Ok(())
}
