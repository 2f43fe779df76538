//! Checking a finished shard set: hashes, counts, identities, drawn parameters, and, given the images, the pixels.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use shared::manifest::MANIFEST_FILE;
use shared::progress::Progress;
use shared::rng::KeyedRng;
use shared::shard::{ShardConfig, ShardSet, Store, ViewReader, shard_file_name};
use shared::space::human;
use shared::transforms::decode::DECODER;
use shared::transforms::{View, ViewParams};
use shared::{Error, Fault, Result};

use crate::args::VerifyArgs;
use crate::pack::{REJECTS_FILE, Reject};
use crate::source::{Listing, Sample, SourceOptions};
use crate::views::{SampleViews, Worker, draw_row, make_views};

/// What was checked.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VerifySummary {
    /// The shard set.
    pub shards: PathBuf,
    /// Samples whose identity and view parameters were checked.
    pub samples: usize,
    /// Views of each.
    pub views: usize,
    /// Bytes that were read and hashed.
    pub bytes: u64,
    /// Samples that were made again from their images.
    pub compared_samples: usize,
    /// Fingerprint of the set.
    pub fingerprint: String,
}

impl fmt::Display for VerifySummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is sound: {} hashed, {} samples x {} views checked",
            self.shards.display(),
            human(self.bytes),
            self.samples,
            self.views
        )?;
        if self.compared_samples > 0 {
            write!(f, ", {} samples made again from their images with equal bytes", self.compared_samples)?;
        }
        Ok(())
    }
}

/// The part of a set's manifest that says how its views were made.
///
/// # Errors
/// [`Error::Damaged`] when it is not there.
pub fn shard_config(set: &ShardSet) -> Result<ShardConfig> {
    serde_json::from_value(set.manifest().identity.config.clone()).map_err(|e| {
        Error::damaged(
            set.directory().join(MANIFEST_FILE),
            Fault::Syntax(format!("not the configuration of a shard set: {e}")),
        )
    })
}

/// Checks a set.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Damaged`] for what is wrong with the set; [`Error::Chain`] when `--source` is another folder
/// than the set was packed from or gives other pixels; [`Error::Io`].
pub fn verify(args: &VerifyArgs) -> Result<VerifySummary> {
    let set = ShardSet::open(&args.shards)?;
    let config = shard_config(&set)?;
    let bytes = set.files_manifest().files.iter().map(|file| file.bytes).sum();
    let progress = Progress::new("verify", "bytes", bytes, args.quiet);
    set.files_manifest().verify_files(set.files_directory(), |bytes| progress.inc(bytes))?;
    progress.finish();
    check_rejects(&set)?;
    check_samples(&set, &config)?;
    check_pictures(&set, args.quiet)?;
    let compared_samples = match &args.source {
        Some(source) => compare_with_source(&set, &config, (source, &args.options), args.samples)?,
        None => 0,
    };
    Ok(VerifySummary {
        shards: args.shards.clone(),
        samples: set.len(),
        views: set.views(),
        bytes,
        compared_samples,
        fingerprint: set.manifest().fingerprint.clone(),
    })
}

fn check_rejects(set: &ShardSet) -> Result<()> {
    let path = set.files_directory().join(REJECTS_FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let rejects: Vec<Reject> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .map_err(|e| Error::damaged(&path, Fault::Syntax(format!("not a list of rejects: {e}"))))?;
    let (found, recorded) = (rejects.len() as u64, set.files_manifest().count("rejects"));
    if found == recorded {
        return Ok(());
    }
    Err(Error::damaged(path, Fault::Value(format!("{recorded} rejects are recorded, the file names {found}"))))
}

/// Every identity once, every row of parameters the one that the recipe draws.
fn check_samples(set: &ShardSet, config: &ShardConfig) -> Result<()> {
    let seed = set.manifest().identity.seed;
    let mut seen: Vec<u64> = set.shards().iter().flat_map(|shard| shard.sample_ids().iter().copied()).collect();
    seen.sort_unstable();
    let manifest = set.directory().join(MANIFEST_FILE);
    if let Some([id, ..]) = seen.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::damaged(manifest, Fault::Value(format!("sample {id:016x} occurs twice"))));
    }
    if config.store == Store::Source {
        return Ok(());
    }
    let locals = config.recipe.local_views(config.views);
    for (index, id) in (0..set.len()).map(|index| (index, set.sample_id(index))) {
        for view in (0..config.views).map(View::Global).chain((0..locals).map(View::Local)) {
            let (stored, shard) = (set.view_params(index, view)?, set.locate(index).0);
            let fault = |fault| Error::damaged(set.directory().join(shard_file_name(shard)), fault);
            let params = ViewParams::from_row(&stored).map_err(fault)?;
            if draw_row(&config.recipe, seed, id, view, params.source) != stored {
                let what = format!("{view:?} of sample {id:016x} has other parameters than its recipe draws");
                return Err(fault(Fault::Value(what)));
            }
        }
    }
    Ok(())
}

/// Every JPEG can be decoded, and a view of every source image be drawn.
fn check_pictures(set: &ShardSet, quiet: bool) -> Result<()> {
    if !set.makes_views() {
        return Ok(());
    }
    let progress = Progress::new("decode", "samples", set.len() as u64, quiet);
    let mut reader = ViewReader::default();
    let drawn = if set.store() == Store::Source { set.views().min(1) } else { set.views() };
    let locals = if set.store() == Store::Source { 0 } else { set.local_views() };
    for index in 0..set.len() {
        for view in (0..drawn).map(View::Global).chain((0..locals).map(View::Local)) {
            reader.read(set, index, view)?;
        }
        progress.inc(1);
    }
    progress.finish();
    Ok(())
}

fn compare_with_source(
    set: &ShardSet,
    config: &ShardConfig,
    (source, options): (&Path, &SourceOptions),
    samples: usize,
) -> Result<usize> {
    if config.decoder != DECODER {
        return Err(Error::Chain {
            what: "decoder".into(),
            path: set.directory().into(),
            expected: format!("{DECODER}, which this program has"),
            found: config.decoder.clone(),
            hint:
                "other decoders give other pixels: verify without `--source`, or with the program that packed the set"
                    .into(),
        });
    }
    let listing = Listing::open(source, options)?;
    let by_id: BTreeMap<u64, &Sample> = listing.samples.iter().map(|sample| (sample.id, sample)).collect();
    let seed = set.manifest().identity.seed;
    let mut chosen: Vec<usize> = (0..set.len()).collect();
    KeyedRng::new("verify", seed, &[]).shuffle(&mut chosen);
    chosen.truncate(samples);
    let (mut worker, mut views) = (Worker::default(), SampleViews::default());
    for &index in &chosen {
        let (shard, row) = set.locate(index);
        let id = set.shards()[shard].sample_ids()[row];
        let chain = |what: String, expected: &str, found: String| Error::Chain {
            what,
            path: source.into(),
            expected: expected.into(),
            found,
            hint: "give the folder that the set was packed from, or pack it again".into(),
        };
        let Some(sample) = by_id.get(&id) else {
            return Err(chain(format!("sample {id:016x}"), "an image of that identity", "none".into()));
        };
        let pixels_of = || format!("image `{}`", sample.name);
        make_views(&listing, sample, seed, config, &mut worker, &mut views)
            .map_err(|reason| chain(pixels_of(), "the image that was packed", reason))?;
        if let Some(what) = set.shards()[shard].difference(row, &views)? {
            return Err(chain(pixels_of(), "the pixels that were packed", format!("other pixels in {what}")));
        }
    }
    Ok(chosen.len())
}
