//! Looking into a finished shard set: a description, a contact sheet of its views, a portrait of one sample.

mod caption;
mod contact;

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use shared::manifest::short;
use shared::shard::{Codec, Shard, ShardSet, Store, sample_id};
use shared::space::human;
use shared::transforms::View;
use shared::{Error, Result};

use crate::args::InspectArgs;
use crate::verify::shard_config;

/// Heights and widths of the images that the views were drawn from, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SizeRange {
    /// Smallest.
    pub smallest: usize,
    /// Half of the images are not larger.
    pub median: usize,
    /// Largest.
    pub largest: usize,
}

impl SizeRange {
    fn of(mut sizes: Vec<usize>) -> Option<Self> {
        sizes.sort_unstable();
        let (smallest, largest) = (*sizes.first()?, *sizes.last()?);
        Some(Self { smallest, median: sizes[sizes.len() / 2], largest })
    }
}

impl fmt::Display for SizeRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}, median {}", self.smallest, self.largest, self.median)
    }
}

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
    /// What a shard holds.
    pub store: Store,
    /// How pixels are stored.
    pub codec: Codec,
    /// Which decoders made the pixels.
    pub decoder: String,
    /// The set of source images that this one redraws, if it has no shards of its own.
    pub redraws: Option<PathBuf>,
    /// Number of samples.
    pub samples: usize,
    /// Views of each.
    pub views: usize,
    /// Height of a view.
    pub height: usize,
    /// Width of a view.
    pub width: usize,
    /// Small views of each sample.
    pub local_views: usize,
    /// Height and width of a small view.
    pub local_size: usize,
    /// Number of shards.
    pub shard_files: usize,
    /// Size of all files.
    pub bytes: u64,
    /// Images that could not be used.
    pub rejects: u64,
    /// Heights of the images that the views were drawn from.
    pub source_heights: Option<SizeRange>,
    /// Their widths.
    pub source_widths: Option<SizeRange>,
    /// Class names with the number of their samples, in the order of the labels.
    pub classes: Vec<(String, u64)>,
    /// Samples without a class.
    pub unlabelled: u64,
    /// The contact sheet, if one was drawn.
    pub grid: Option<PathBuf>,
    /// The portrait of one sample, if one was drawn.
    pub picture: Option<PathBuf>,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = self.bytes / (self.samples as u64).max(1);
        writeln!(f, "shard set    `{}`, fingerprint {}", self.shards.display(), short(&self.fingerprint))?;
        writeln!(f, "samples      {} in {} shards; {} images rejected", self.samples, self.shard_files, self.rejects)?;
        let stored = match (self.store, self.codec) {
            (Store::Views, Codec::Raw) => "views, as plain pixels",
            (Store::Views, Codec::Jpeg) => "views, as JPEG",
            (Store::Source, Codec::Raw) => "source images, as plain pixels: views are redrawn when read",
            (Store::Source, Codec::Jpeg) => "source images, as JPEG: views are redrawn when read",
        };
        writeln!(f, "bytes        {}, {} per sample", human(self.bytes), human(each))?;
        writeln!(f, "stored       {stored}")?;
        if let Some(base) = &self.redraws {
            writeln!(f, "             in `{}`", base.display())?;
        }
        writeln!(
            f,
            "views        {} x {} x {} by `{}`, seed {}",
            self.views, self.height, self.width, self.recipe, self.seed
        )?;
        if self.local_views > 0 {
            writeln!(f, "local views  {0} x {1} x {1}", self.local_views, self.local_size)?;
        }
        if let (Some(heights), Some(widths)) = (self.source_heights, self.source_widths) {
            writeln!(f, "images       height {heights}; width {widths}")?;
        }
        writeln!(f, "decoder      {}", self.decoder)?;
        write!(f, "classes      {}", self.classes.len())?;
        let by_count = |class: &&(String, u64)| class.1;
        if let (Some(few), Some(many)) =
            (self.classes.iter().min_by_key(by_count), self.classes.iter().max_by_key(by_count))
        {
            write!(f, ", of {} (`{}`) to {} (`{}`) samples", few.1, few.0, many.1, many.0)?;
        }
        if self.unlabelled > 0 {
            write!(f, "; {} samples without a class", self.unlabelled)?;
        }
        for (name, count) in self.classes.iter().take(20) {
            write!(f, "\n             {count:>8}  {name}")?;
        }
        if self.classes.len() > 20 {
            write!(f, "\n             and {} more: `--json` lists them", self.classes.len() - 20)?;
        }
        for (what, path) in [("grid", &self.grid), ("picture", &self.picture)] {
            if let Some(path) = path {
                write!(f, "\n{what:<13}`{}`", path.display())?;
            }
        }
        Ok(())
    }
}

/// Describes a set and draws what is asked for.
///
/// # Errors
/// As [`ShardSet::open`]; [`Error::Usage`] when a sheet would be too large or there is no such sample; [`Error::Io`].
pub fn inspect(args: &InspectArgs) -> Result<Description> {
    let set = ShardSet::open(&args.shards)?;
    let config = shard_config(&set)?;
    if let Some(path) = &args.grid {
        contact::grid(&set, args.samples.into(), args.views.into())?.save(path)?;
    }
    if let (Some(path), Some(sample)) = (&args.picture, &args.sample) {
        contact::portrait(&set, find(&set, sample)?, args.views.into())?.save(path)?;
    }
    let mut counts = vec![0; set.classes().len()];
    let mut unlabelled = 0;
    for label in set.shards().iter().flat_map(Shard::labels) {
        match usize::try_from(*label).ok().and_then(|label| counts.get_mut(label)) {
            Some(count) => *count += 1,
            None => unlabelled += 1,
        }
    }
    let (mut heights, mut widths) = (Vec::with_capacity(set.len()), Vec::with_capacity(set.len()));
    for index in 0..set.len() {
        let (height, width) = contact::drawn(&set, index, View::Global(0))?.source;
        heights.push(height);
        widths.push(width);
    }
    Ok(Description {
        shards: args.shards.clone(),
        fingerprint: set.manifest().fingerprint.clone(),
        recipe: config.recipe.name,
        seed: set.manifest().identity.seed,
        store: config.store,
        codec: config.codec,
        decoder: config.decoder,
        samples: set.len(),
        views: set.views(),
        height: set.height(),
        width: set.width(),
        local_views: set.local_views(),
        local_size: if set.local_views() > 0 { set.view_size(View::Local(0)).0 } else { 0 },
        redraws: set.is_redrawn().then(|| set.files_directory().to_path_buf()),
        shard_files: set.shards().len(),
        bytes: set.files_manifest().files.iter().map(|file| file.bytes).sum(),
        rejects: set.files_manifest().count("rejects"),
        source_heights: SizeRange::of(heights),
        source_widths: SizeRange::of(widths),
        classes: set.classes().iter().cloned().zip(counts).collect(),
        unlabelled,
        grid: args.grid.clone(),
        picture: args.picture.clone(),
    })
}

/// The sample that a user means: by its place in the set, by its identity (16 hexadecimal digits), or by its name.
fn find(set: &ShardSet, text: &str) -> Result<usize> {
    if let Some(index) = text.parse::<usize>().ok().filter(|&index| index < set.len()) {
        return Ok(index);
    }
    let by_digits = (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
    let wanted = by_digits.unwrap_or_else(|| sample_id(text));
    (0..set.len()).find(|&index| set.sample_id(index) == wanted).ok_or_else(|| {
        Error::usage(format!(
            "the set has no sample `{text}`: give its place, 0 to {}, its identity, or its name as it was packed, such as \
             n01440764/n01440764_10026.JPEG",
            set.len() - 1
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_ranges_have_the_upper_median() {
        assert_eq!(SizeRange::of(vec![5, 1, 3, 9]), Some(SizeRange { smallest: 1, median: 5, largest: 9 }));
        assert_eq!(SizeRange::of(vec![]), None);
    }
}
