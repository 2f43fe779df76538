//! Reading a shard set: its record, its shards, and where its views come from.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Codec, STORED_DECODER, Shard, ShardConfig, ShardSetDetails, Store, VIEW_PARAMETERS, shard_file_name};
use crate::error::{Error, Fault, Result};
use crate::manifest::{Input, MANIFEST_FILE, Manifest, Stage, short};
use crate::transforms::{Recipe, View};

/// The role under which a set without shards of its own records the set of source images that it redraws. Its path is relative to
/// the directory of the manifest, or absolute.
pub const BASE_ROLE: &str = "source-shards";

/// Views of one sample that lie so close are asked for together.
const NEAR_BYTES: usize = 64 << 10;

/// A finished shard set.
#[derive(Debug)]
pub struct ShardSet {
    directory: PathBuf,
    manifest: Manifest,
    details: ShardSetDetails,
    /// Where the shards are, when another set holds them.
    base: Option<Base>,
    /// How views are made of source images.
    recipe: Option<Recipe>,
    shards: Vec<Shard>,
    /// Index of the first sample of each shard, and the number of samples at the end.
    starts: Vec<usize>,
}

/// A set of source images that another set redraws.
#[derive(Debug)]
struct Base {
    directory: PathBuf,
    manifest: Manifest,
    details: ShardSetDetails,
}

impl ShardSet {
    /// Opens a set: reads the manifest, maps the shards and checks their headers, not their pixels.
    ///
    /// # Errors
    /// As [`Manifest::read`], [`Manifest::check_lengths`] and [`Shard::open`]; [`Error::Chain`] when its JPEGs are meant for
    /// another decoder, or the source images that it redraws are not the ones that it was made for.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref().to_path_buf();
        let manifest = Manifest::read(&directory, Stage::DataPrep)?;
        manifest.check_lengths(&directory)?;
        let details = details_of(&directory, &manifest)?;
        let base = manifest.input(BASE_ROLE).map(|input| Base::open(&directory, input)).transpose()?;
        let recipe = recipe_of(&directory, &manifest, &details)?;
        let fault = |fault| Error::damaged(directory.join(MANIFEST_FILE), fault);
        if let Some(base) = &base {
            let found = (base.details.store, base.details.codec);
            if (details.store, details.codec) != found || details.store != Store::Source {
                return Err(fault(Fault::Value("it does not redraw the images of its base".into())));
            }
        }
        let (holder, held, layout) = match &base {
            Some(base) => (&base.directory, &base.manifest, &base.details),
            None => (&directory, &manifest, &details),
        };
        let count = held.files.iter().filter(|file| file.path.starts_with("shard-")).count();
        let mut shards = Vec::new();
        let mut starts = vec![0];
        for index in 0..count {
            let shard = Shard::open(holder.join(shard_file_name(index)), layout)?;
            starts.push(starts[index] + shard.len());
            shards.push(shard);
        }
        let (found, recorded) = (starts[count] as u64, manifest.count("samples"));
        if found != recorded {
            return Err(fault(Fault::Value(format!("{recorded} samples are recorded, the shards hold {found}"))));
        }
        Ok(Self { directory, manifest, details, base, recipe, shards, starts })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its record.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.starts[self.shards.len()]
    }

    /// Whether it holds no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The record of the set that holds the shards: this one, or the one that it redraws.
    pub fn files_manifest(&self) -> &Manifest {
        self.base.as_ref().map_or(&self.manifest, |base| &base.manifest)
    }

    /// The directory that holds the shards.
    pub fn files_directory(&self) -> &Path {
        self.base.as_ref().map_or(&self.directory, |base| &base.directory)
    }

    /// Whether the shards belong to another set, which this one redraws.
    pub fn is_redrawn(&self) -> bool {
        self.base.is_some()
    }

    /// What the shards hold.
    pub fn store(&self) -> Store {
        self.details.store
    }

    /// How their pixels are stored.
    pub fn codec(&self) -> Codec {
        self.details.codec
    }

    /// Whether reading a view is more than copying its pixels.
    pub fn makes_views(&self) -> bool {
        self.store() == Store::Source || self.codec() == Codec::Jpeg
    }

    /// V: global views per sample.
    pub fn views(&self) -> usize {
        self.details.views
    }

    /// Local views per sample; 0 unless the recipe is a multi-crop one.
    pub fn local_views(&self) -> usize {
        self.details.local.map_or(0, |local| local.views)
    }

    /// Height and width of a view.
    pub fn view_size(&self, view: View) -> (usize, usize) {
        match (view, self.details.local) {
            (View::Local(_), Some(local)) => (local.size, local.size),
            _ => (self.details.height, self.details.width),
        }
    }

    /// H in pixels.
    pub fn height(&self) -> usize {
        self.details.height
    }

    /// W in pixels.
    pub fn width(&self) -> usize {
        self.details.width
    }

    /// Class names; empty when the source has none.
    pub fn classes(&self) -> &[String] {
        &self.details.classes
    }

    /// The shards in order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The shard of a sample and its row there.
    ///
    /// # Panics
    /// When `index` is not below [`ShardSet::len`].
    pub fn locate(&self, index: usize) -> (usize, usize) {
        assert!(index < self.len(), "sample {index} is outside the set of {}", self.len());
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        (shard, index - self.starts[shard])
    }

    /// The pixels of one global view of a sample, `(H, W, 3)` RGB, in place.
    ///
    /// # Errors
    /// As [`Shard::view`]: only sets of plain views have them. A [`super::ViewReader`] reads any set.
    ///
    /// # Panics
    /// When `index` or `view` is out of range.
    pub fn pixels(&self, index: usize, view: usize) -> Result<&[u8]> {
        let (shard, row) = self.locate(index);
        self.shards[shard].view(row, view)
    }

    /// What was drawn for a view, stored or not: a row of P numbers, named by [`VIEW_PARAMETERS`].
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a set that was opened.
    ///
    /// # Panics
    /// When `index` or `view` is out of range.
    pub fn view_params(&self, index: usize, view: View) -> Result<[f32; VIEW_PARAMETERS.len()]> {
        self.assert_view(view);
        let (shard, row) = self.locate(index);
        let shard = &self.shards[shard];
        match self.recipe_of_source() {
            None => shard.stored_params(row, view),
            Some((recipe, seed)) => {
                let (height, width) = shard.source_size(row)?;
                Ok(recipe.draw(seed, self.sample_id(index), view, height, width).to_row())
            }
        }
    }

    /// Asks the system to read what the given global views need ahead of their use.
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a set that was opened.
    ///
    /// # Panics
    /// When an index or a view is out of range.
    pub fn will_need(&self, rows: &[(usize, usize)]) -> Result<()> {
        let rows: Vec<(usize, View)> = rows.iter().map(|&(index, view)| (index, View::Global(view))).collect();
        self.will_need_views(&rows)
    }

    /// As [`ShardSet::will_need`], for views of any kind.
    ///
    /// # Errors
    /// As [`ShardSet::will_need`].
    ///
    /// # Panics
    /// When an index or a view is out of range.
    pub fn will_need_views(&self, rows: &[(usize, View)]) -> Result<()> {
        let mut places = rows
            .iter()
            .map(|&(index, view)| {
                let (shard, row) = self.locate(index);
                let (tensor, range) = self.shards[shard].place(row, view)?;
                Ok((shard, tensor, range))
            })
            .collect::<Result<Vec<_>>>()?;
        places.sort_unstable_by_key(|(shard, _, range)| (*shard, range.start));
        let mut asked: Option<(usize, &'static str, Range<usize>)> = None;
        for (shard, tensor, range) in places {
            match &mut asked {
                Some((last, _, open)) if *last == shard && range.start <= open.end + NEAR_BYTES => {
                    open.end = open.end.max(range.end);
                }
                _ => {
                    if let Some((last, tensor, range)) = asked.replace((shard, tensor, range)) {
                        self.shards[last].will_need(tensor, range)?;
                    }
                }
            }
        }
        asked.map_or(Ok(()), |(shard, tensor, range)| self.shards[shard].will_need(tensor, range))
    }

    /// The identity of a sample.
    ///
    /// # Panics
    /// When `index` is out of range.
    pub fn sample_id(&self, index: usize) -> u64 {
        let (shard, row) = self.locate(index);
        self.shards[shard].sample_ids()[row]
    }

    /// The class of a sample, -1 for none.
    ///
    /// # Panics
    /// When `index` is out of range.
    pub fn label(&self, index: usize) -> i64 {
        let (shard, row) = self.locate(index);
        self.shards[shard].labels()[row]
    }

    /// The recipe and the seed of views that are redrawn; none where views are stored.
    pub(super) fn recipe_of_source(&self) -> Option<(&Recipe, u64)> {
        self.recipe.as_ref().map(|recipe| (recipe, self.manifest.identity.seed))
    }

    pub(super) fn assert_view(&self, view: View) {
        let (index, count) = match view {
            View::Global(index) => (index, self.views()),
            View::Local(index) => (index, self.local_views()),
        };
        assert!(index < count, "{view:?} is outside the {count} of the set");
    }
}

impl Base {
    fn open(directory: &Path, input: &Input) -> Result<Self> {
        let path = directory.join(&input.path);
        let manifest = Manifest::read(&path, Stage::DataPrep)?;
        if manifest.fingerprint != input.fingerprint {
            return Err(Error::Chain {
                what: "fingerprint of the source images".into(),
                path: directory.into(),
                expected: short(&input.fingerprint).into(),
                found: format!("{} in `{}`", short(&manifest.fingerprint), path.display()),
                hint: "the set that it redraws was made again: run `data-prep redraw` again, too".into(),
            });
        }
        manifest.check_lengths(&path)?;
        let details = details_of(&path, &manifest)?;
        // The base decides how its images are read.
        recipe_of(&path, &manifest, &details)?;
        Ok(Self { directory: path, manifest, details })
    }
}

fn details_of(directory: &Path, manifest: &Manifest) -> Result<ShardSetDetails> {
    serde_json::from_value(manifest.details.clone()).map_err(|e| {
        let fault = Fault::Syntax(format!("not the details of a shard set: {e}"));
        Error::damaged(directory.join(MANIFEST_FILE), fault)
    })
}

/// The recipe of a set of source images, after checking that this program reads the set's pictures as the one that packed it.
fn recipe_of(directory: &Path, manifest: &Manifest, details: &ShardSetDetails) -> Result<Option<Recipe>> {
    if details.store == Store::Views && details.codec == Codec::Raw {
        return Ok(None);
    }
    let fault = |fault| Error::damaged(directory.join(MANIFEST_FILE), fault);
    let config: ShardConfig = serde_json::from_value(manifest.identity.config.clone())
        .map_err(|e| fault(Fault::Syntax(format!("not the configuration of a shard set: {e}"))))?;
    let recipe = &config.recipe;
    let makes_views = !recipe.global.is_empty() && recipe.local.as_ref().is_none_or(|local| !local.view.is_empty());
    if !makes_views || config.details(details.classes.clone()) != *details {
        return Err(fault(Fault::Value("its details are not those of its configuration".into())));
    }
    let decoder = config.jpeg.as_ref().map(|jpeg| jpeg.decoder.as_str());
    if details.codec == Codec::Jpeg && decoder != Some(STORED_DECODER) {
        return Err(Error::Chain {
            what: "decoder".into(),
            path: directory.into(),
            expected: format!("{STORED_DECODER}, which this program has"),
            found: decoder.unwrap_or("none").into(),
            hint: "another decoder gives other pixels: use the program that packed the set, or pack it again".into(),
        });
    }
    Ok((details.store == Store::Source).then_some(config.recipe))
}
