//! Packing: scan, order, views, shards, rejects, manifest.
//!
//! The samples are put into a random order that the seed fixes and cut into shards of equally many listed samples, so that a shard
//! depends on nothing but its own samples. Workers decode and augment; the calling thread writes in order. A shard appears under
//! its name only when it is complete, so an interrupted run keeps whole shards and makes the rest.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use shared::io::{FileEntry, hash_file, write_atomic};
use shared::manifest::{Identity, Manifest, Stage, short};
use shared::output::{Begun, OutputDir};
use shared::progress::{Progress, note};
use shared::rng::KeyedRng;
use shared::shard::{Shard, ShardSetDetails, ShardWriter, shard_file_name};
use shared::space::{free_bytes, human, must_fit};
use shared::{Error, Result};

use crate::config::PackConfig;
use crate::ordered::ordered;
use crate::source::{Listing, Sample};
use crate::views::{SampleViews, Worker, make_views};

/// The file that names the images that could not be used; it is there even when it is empty.
pub const REJECTS_FILE: &str = "rejects.jsonl";

/// What a refusal for want of disk space says: what needs it, and what would need less.
pub(crate) const PACKING: &str = "packing";
pub(crate) const FEWER_BYTES: &str = "take fewer `--views` or a smaller `--size`";

/// How many finished bytes may wait to be written.
const WAITING_BYTES: usize = 256 << 20;

/// An image that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reject {
    /// Its name.
    pub path: String,
    /// Why.
    pub reason: String,
}

/// What packing came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PackSummary {
    /// The shard set.
    pub output: PathBuf,
    /// Whether it was finished before.
    pub already_finished: bool,
    /// Samples in it.
    pub samples: u64,
    /// Views of each.
    pub views: u64,
    /// Number of shards, and how many of them an earlier run had made.
    pub shards: u64,
    /// Shards that an earlier, interrupted run had made.
    pub kept_shards: u64,
    /// Images that could not be used.
    pub rejects: u64,
    /// Size of all files.
    pub bytes: u64,
    /// Fingerprint of the set.
    pub fingerprint: String,
}

impl PackSummary {
    fn new(output: &Path, manifest: &Manifest, already_finished: bool, kept_shards: u64) -> Self {
        Self {
            output: output.into(),
            already_finished,
            samples: manifest.count("samples"),
            views: manifest.count("views"),
            shards: manifest.count("shards"),
            kept_shards,
            rejects: manifest.count("rejects"),
            bytes: manifest.files.iter().map(|file| file.bytes).sum(),
            fingerprint: manifest.fingerprint.clone(),
        }
    }
}

impl fmt::Display for PackSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.already_finished { "is already finished" } else { "packed" };
        write!(f, "`{}` {verb}: {} samples x {} views", self.output.display(), self.samples, self.views)?;
        write!(f, " in {} shards, {}", self.shards, human(self.bytes))?;
        if self.kept_shards > 0 {
            write!(f, " ({} shards kept from an earlier run)", self.kept_shards)?;
        }
        if self.rejects > 0 {
            write!(f, ", {} images rejected (see {REJECTS_FILE})", self.rejects)?;
        }
        write!(f, ", fingerprint {}", short(&self.fingerprint))
    }
}

/// Packs a folder of images.
///
/// # Errors
/// As [`Listing::open`] and [`OutputDir::begin`]; [`Error::Invalid`] when the disk is too small or too many images cannot be used;
/// [`Error::Io`], with advice when the disk is full.
pub fn pack(config: &PackConfig) -> Result<PackSummary> {
    let output = config.output.as_deref().ok_or_else(|| Error::usage("`--output` is required"))?;
    let listing = Listing::open(&config.input, &config.source)?;
    must_fit(PACKING, output, bytes_to_write(config, output, listing.samples.len()), free_bytes(output), FEWER_BYTES)?;
    let identity = Identity::new(Stage::DataPrep, &config.shards, config.seed, vec![listing.as_input()])?;
    let dir = match OutputDir::begin(output, &identity, config.overwrite)? {
        Begun::Finished(manifest) => return Ok(PackSummary::new(output, &manifest, true, 0)),
        Begun::Writing(dir) => dir,
    };
    let job = Job {
        config,
        samples: in_packing_order(&listing, config.seed),
        details: config.shards.details(listing.classes.clone()),
        listing: &listing,
        directory: dir.path().to_path_buf(),
    };
    let mut packed = if dir.resumed() { job.keep_finished_shards()? } else { Packed::default() };
    let kept_shards = packed.files.len() as u64;
    job.write_missing_shards(&mut packed)?;
    let samples = listing.samples.len() - packed.rejects.len();
    let mut files: Vec<FileEntry> = packed.files.into_values().collect();
    let shards = files.len() as u64;
    files.push(write_rejects(dir.path(), &mut packed.rejects)?);
    let counts = BTreeMap::from([
        ("samples".to_string(), samples as u64),
        ("views".to_string(), config.shards.views as u64),
        ("shards".to_string(), shards),
        ("rejects".to_string(), packed.rejects.len() as u64),
    ]);
    let details = serde_json::to_value(&job.details)
        .map_err(|e| Error::invalid(format!("the class names have no JSON form: {e}"), ""))?;
    let manifest = dir.finish(counts, details, files)?;
    Ok(PackSummary::new(output, &manifest, false, kept_shards))
}

/// The samples in the random order in which they are packed.
pub(crate) fn in_packing_order(listing: &Listing, seed: u64) -> Vec<&Sample> {
    let mut samples: Vec<&Sample> = listing.samples.iter().collect();
    KeyedRng::new("pack order", seed, &[]).shuffle(&mut samples);
    samples
}

/// What the shards that are not there yet will take.
pub(crate) fn bytes_to_write(config: &PackConfig, output: &Path, samples: usize) -> u64 {
    let all = config.shards.sample_bytes().saturating_mul(samples as u64);
    let shards = samples.div_ceil(config.shards.shard_samples.max(1));
    let there = (0..shards).filter_map(|i| fs::metadata(output.join(shard_file_name(i))).ok()).map(|m| m.len());
    all.saturating_sub(there.sum())
}

fn write_rejects(directory: &Path, rejects: &mut [Reject]) -> Result<FileEntry> {
    rejects.sort();
    let mut text = String::new();
    for reject in &*rejects {
        // two strings always have a JSON form
        text += &serde_json::to_string(reject).unwrap_or_default();
        text.push('\n');
    }
    write_atomic(directory.join(REJECTS_FILE), text.as_bytes())
}

/// Shards that are complete, by index, and the images that are in none.
#[derive(Debug, Default)]
struct Packed {
    files: BTreeMap<usize, FileEntry>,
    rejects: Vec<Reject>,
    samples: usize,
}

struct Job<'a> {
    config: &'a PackConfig,
    listing: &'a Listing,
    samples: Vec<&'a Sample>,
    details: ShardSetDetails,
    directory: PathBuf,
}

impl Job<'_> {
    fn shard_path(&self, index: usize) -> PathBuf {
        self.directory.join(shard_file_name(index))
    }

    fn make(&self, sample: &Sample, worker: &mut Worker, views: &mut SampleViews) -> Result<(), String> {
        make_views(self.listing, sample, self.config.seed, &self.config.shards, worker, views)
    }

    /// Finds the shards that an earlier run completed.
    fn keep_finished_shards(&self) -> Result<Packed> {
        let mut packed = Packed::default();
        let mut worker = Worker::default();
        for (index, samples) in self.samples.chunks(self.config.shards.shard_samples).enumerate() {
            let path = self.shard_path(index);
            if !path.exists() {
                continue;
            }
            if let Some(rejects) = self.check_shard(&path, samples, &mut worker)? {
                packed.samples += samples.len();
                packed.rejects.extend(rejects);
                packed.files.insert(index, hash_file(&path)?);
            } else {
                note(&format!("`{}` is not what this command makes: it is made again", path.display()));
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(packed)
    }

    /// Whether a shard holds the samples it should: all of them that can be decoded, the first of them byte for byte. Gives the
    /// others with the reason.
    fn check_shard(&self, path: &Path, samples: &[&Sample], worker: &mut Worker) -> Result<Option<Vec<Reject>>> {
        let Ok(shard) = Shard::open(path, &self.details) else { return Ok(None) };
        let mut views = SampleViews::default();
        let (mut row, mut rejects) = (0, Vec::new());
        for sample in samples {
            let stored = shard.sample_ids().get(row) == Some(&sample.id) && shard.labels()[row] == sample.label;
            if stored && row > 0 {
                row += 1;
                continue;
            }
            match self.make(sample, worker, &mut views) {
                Ok(()) if stored && shard.holds(row, &views)? => row += 1,
                Ok(()) => return Ok(None),
                Err(_) if stored => return Ok(None),
                Err(reason) => rejects.push(Reject { path: sample.name.to_string(), reason }),
            }
        }
        Ok((row == shard.len()).then_some(rejects))
    }

    /// Makes the shards that are not there.
    fn write_missing_shards(&self, packed: &mut Packed) -> Result<()> {
        let config = self.config;
        let shard_samples = config.shards.shard_samples;
        let shard_of = |position: usize| position / shard_samples;
        let todo: Vec<usize> =
            (0..self.samples.len()).filter(|&position| !packed.files.contains_key(&shard_of(position))).collect();
        let progress = Progress::new("pack", "samples", self.samples.len() as u64, config.quiet);
        progress.start_at(packed.samples as u64);
        let limit = config.max_rejects.of(self.samples.len());
        let pool: Mutex<Vec<SampleViews>> = Mutex::new(Vec::new());
        let pool = || pool.lock().unwrap_or_else(PoisonError::into_inner);
        let sample_bytes = usize::try_from(config.shards.sample_bytes()).unwrap_or(usize::MAX);
        let window = (WAITING_BYTES / sample_bytes.max(1)).clamp(config.threads + 1, config.threads * 16);
        let work = |worker: &mut Worker, item: usize| {
            let mut views = pool().pop().unwrap_or_default();
            self.make(self.samples[todo[item]], worker, &mut views).map(|()| views)
        };
        let mut open: Option<(usize, ShardWriter)> = None;
        let consume = |item: usize, result: Result<SampleViews, String>| {
            let position = todo[item];
            let (index, sample) = (shard_of(position), self.samples[position]);
            let (_, writer) = match &mut open {
                Some(open) => open,
                none => none.insert((index, self.create_shard(index)?)),
            };
            match result {
                Ok(views) => {
                    writer.push_sample(sample.id, sample.label, &views)?;
                    pool().push(views);
                }
                Err(reason) => {
                    progress.note(&format!("rejected `{}`: {reason}", sample.name));
                    packed.rejects.push(Reject { path: sample.name.to_string(), reason });
                }
            }
            progress.inc(1);
            if todo.get(item + 1).is_none_or(|&next| shard_of(next) != index)
                && let Some((index, writer)) = open.take()
            {
                packed.files.insert(index, writer.finish()?);
                self.refuse_many(&mut packed.rejects, limit)?;
            }
            Ok(())
        };
        ordered((todo.len(), config.threads, window), Worker::default, work, consume)?;
        self.refuse_many(&mut packed.rejects, limit)?;
        progress.finish();
        Ok(())
    }

    fn create_shard(&self, index: usize) -> Result<ShardWriter> {
        let shards = &self.config.shards;
        let samples = shards.shard_samples.min(self.samples.len() - index * shards.shard_samples);
        ShardWriter::with_layout(self.shard_path(index), samples, &self.details)
    }

    /// Stops when more images than allowed, or all of them, cannot be used.
    fn refuse_many(&self, rejects: &mut [Reject], limit: u64) -> Result<()> {
        let (found, all) = (rejects.len(), self.samples.len());
        if found as u64 <= limit && found < all {
            return Ok(());
        }
        write_rejects(&self.directory, rejects)?;
        let first = rejects.first().map(|reject| format!("`{}`: {}", reject.path, reject.reason)).unwrap_or_default();
        let message = if found == all {
            format!("none of the {all} images can be used, the first is {first}")
        } else {
            format!("{found} of {all} images cannot be used, at most {limit} may be, the first is {first}")
        };
        let file = self.directory.join(REJECTS_FILE);
        let hint = if found == all {
            format!("`{}` names them", file.display())
        } else {
            format!("`{}` names them; repair or remove them, or raise `--max-rejects`", file.display())
        };
        Err(Error::invalid(message, hint))
    }
}
