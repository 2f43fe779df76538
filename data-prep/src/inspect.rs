//! Looking into a finished shard set: a description, and a contact sheet of its views.

use std::fmt;
use std::io::Cursor;
use std::path::PathBuf;

use image::{ImageFormat, RgbImage};
use serde::Serialize;
use shared::io::write_atomic;
use shared::manifest::short;
use shared::shard::{Codec, Shard, ShardSet, Store, ViewReader};
use shared::space::human;
use shared::transforms::View;
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
    /// Local views of each sample, of a multi-crop recipe.
    pub local_views: usize,
    /// What the shards hold.
    pub store: Store,
    /// How pixels are stored.
    pub codec: Codec,
    /// The set of source images that this one redraws, if it has no shards of its own.
    pub redraws: Option<PathBuf>,
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
        if self.local_views > 0 {
            writeln!(f, "             and {} local views", self.local_views)?;
        }
        let stored = match (self.store, self.codec) {
            (Store::Views, Codec::Raw) => "views, as plain pixels",
            (Store::Views, Codec::Jpeg) => "views, as JPEG",
            (Store::Source, Codec::Raw) => "source images, as plain pixels: views are redrawn when read",
            (Store::Source, Codec::Jpeg) => "source images, as JPEG: views are redrawn when read",
        };
        write!(f, "stored       {stored}")?;
        match &self.redraws {
            Some(base) => writeln!(f, "; they lie in `{}`", base.display())?,
            None => writeln!(f)?,
        }
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
        local_views: set.local_views(),
        store: set.store(),
        codec: set.codec(),
        redraws: set.is_redrawn().then(|| set.files_directory().to_path_buf()),
        shard_files: set.shards().len(),
        bytes: set.files_manifest().files.iter().map(|file| file.bytes).sum(),
        rejects: set.files_manifest().count("rejects"),
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
    let mut reader = ViewReader::default();
    let mut sheet = vec![255u8; height * width * 3];
    for row in 0..rows {
        let sample = row * set.len() / rows;
        for column in 0..columns {
            let view = reader.read(set, sample, View::Global(column))?;
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
