//! Looking into a finished shard set: a description, and a contact sheet of its views.

use std::fmt;
use std::io::Cursor;
use std::path::PathBuf;

use image::{ImageFormat, RgbImage};
use serde::Serialize;
use shared::io::write_atomic;
use shared::manifest::short;
use shared::shard::{Shard, ShardSet};
use shared::space::human;
use shared::{Error, Result};

use crate::args::InspectArgs;
use crate::verify::shard_config;

/// White lines between the pictures of a contact sheet.
const GAP_PX: usize = 2;
/// The longest side of a contact sheet.
const LARGEST_SHEET_PX: usize = 32_768;

/// A description of a shard set.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// The shard set.
    pub shards: PathBuf,
    /// Fingerprint of the set.
    pub fingerprint: String,
    /// Recipe by name.
    pub recipe: String,
    /// Seed of views and order.
    pub seed: u64,
    /// Number of samples.
    pub samples: usize,
    /// Views of each.
    pub views: usize,
    /// Height of a view.
    pub height: usize,
    /// Width of a view.
    pub width: usize,
    /// Number of shards.
    pub shard_files: usize,
    /// Size of all files.
    pub bytes: u64,
    /// Images that could not be used.
    pub rejects: u64,
    /// Class names with the number of their samples, in the order of the labels.
    pub classes: Vec<(String, u64)>,
    /// The contact sheet, if one was drawn.
    pub grid: Option<PathBuf>,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "shard set    `{}`, fingerprint {}", self.shards.display(), short(&self.fingerprint))?;
        writeln!(
            f,
            "samples      {} in {} shards, {}; {} images rejected",
            self.samples,
            self.shard_files,
            human(self.bytes),
            self.rejects
        )?;
        writeln!(
            f,
            "views        {} x {} x {} by `{}`, seed {}",
            self.views, self.height, self.width, self.recipe, self.seed
        )?;
        let shown: Vec<String> = self.classes.iter().take(20).map(|(name, count)| format!("{name} {count}")).collect();
        let more = if self.classes.len() > 20 { ", ..." } else { "" };
        write!(f, "classes      {}: {}{more}", self.classes.len(), shown.join(", "))?;
        if let Some(grid) = &self.grid {
            write!(f, "\ncontact sheet `{}`", grid.display())?;
        }
        Ok(())
    }
}

/// Describes a set and draws the contact sheet if asked.
///
/// # Errors
/// As [`ShardSet::open`]; [`Error::Usage`] when the sheet would be too large; [`Error::Io`].
pub fn inspect(args: &InspectArgs) -> Result<Description> {
    let set = ShardSet::open(&args.shards)?;
    let config = shard_config(&set)?;
    if let Some(path) = &args.grid {
        let sheet = contact_sheet(&set, args.samples.into(), args.views.into())?;
        let mut png = Cursor::new(Vec::new());
        sheet
            .write_to(&mut png, ImageFormat::Png)
            .map_err(|e| Error::invalid(format!("cannot encode `{}`: {e}", path.display()), ""))?;
        write_atomic(path, &png.into_inner())?;
    }
    let mut counts = vec![0; set.classes().len()];
    for label in set.shards().iter().flat_map(Shard::labels) {
        if let Some(count) = usize::try_from(*label).ok().and_then(|label| counts.get_mut(label)) {
            *count += 1;
        }
    }
    Ok(Description {
        shards: args.shards.clone(),
        fingerprint: set.manifest().fingerprint.clone(),
        recipe: config.recipe.name,
        seed: set.manifest().identity.seed,
        samples: set.len(),
        views: set.views(),
        height: set.height(),
        width: set.width(),
        shard_files: set.shards().len(),
        bytes: set.manifest().files.iter().map(|file| file.bytes).sum(),
        rejects: set.manifest().count("rejects"),
        classes: set.classes().iter().cloned().zip(counts).collect(),
        grid: args.grid.clone(),
    })
}

/// A row for each of `rows` samples, spread evenly over the set, a column for each of the first `columns` views.
fn contact_sheet(set: &ShardSet, rows: usize, columns: usize) -> Result<RgbImage> {
    let (rows, columns) = (rows.min(set.len()), columns.min(set.views()));
    let (height, width) = (rows * (set.height() + GAP_PX) + GAP_PX, columns * (set.width() + GAP_PX) + GAP_PX);
    if height.max(width) > LARGEST_SHEET_PX {
        let what =
            format!("a contact sheet of {width} x {height} pixels is too large, use fewer `--samples` or `--views`");
        return Err(Error::usage(what));
    }
    let mut sheet = vec![255u8; height * width * 3];
    for row in 0..rows {
        let sample = row * set.len() / rows;
        for column in 0..columns {
            let view = set.pixels(sample, column)?;
            for (y, line) in view.chunks_exact(set.width() * 3).enumerate() {
                let top = GAP_PX + row * (set.height() + GAP_PX) + y;
                let left = GAP_PX + column * (set.width() + GAP_PX);
                sheet[(top * width + left) * 3..][..line.len()].copy_from_slice(line);
            }
        }
    }
    let side = |px: usize| u32::try_from(px).unwrap_or(u32::MAX);
    RgbImage::from_raw(side(width), side(height), sheet)
        .ok_or_else(|| Error::invalid("the contact sheet has no pixels", ""))
}
