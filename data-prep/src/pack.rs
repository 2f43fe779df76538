//! Packing: scan, order, views, shards, rejects, manifest.
//!
//! The samples are put into a random order that the seed fixes and cut into shards of equally many listed samples, so that a shard
//! depends on nothing but its own samples. Workers decode and augment; the calling thread writes in order; a third kind of thread
//! syncs and names a full shard while the next one fills. A shard appears under its name only when it is complete, so an
//! interrupted run keeps whole shards and makes the rest. A hidden note beside each shard keeps its hash and its rejects until
//! the work is done. A part of a set is every n-th shard.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use shared::io::{FileEntry, hash_file, remove_files, write_atomic, write_json};
use shared::manifest::{Identity, Manifest, Stage, short};
use shared::output::{Begun, BegunPart, OutputDir, Part, PartDir};
use shared::progress::{Progress, note};
use shared::shard::{Shard, ShardSetDetails, ShardWriter, shard_file_name};
use shared::space::{free_bytes, human, must_fit};
use shared::{Error, Result};

use crate::config::PackConfig;
use crate::finish::PartOutcome;
use crate::memory::MemoryBudget;
use crate::order::packing_order;
use crate::ordered::{Window, ordered};
use crate::source::{Listing, Sample};
use crate::views::{SampleViews, Worker, make_views};

/// The file that names the images that could not be used; it is there even when it is empty.
pub const REJECTS_FILE: &str = "rejects.jsonl";

/// What a refusal for want of disk space says: what needs it, and what would need less.
pub(crate) const PACKING: &str = "packing";
pub(crate) const FEWER_BYTES: &str =
    "take fewer `--views`, a smaller `--size`, `--store source` or `--codec jpeg` (`data-prep plan` compares them)";

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
    /// The part that was packed; none for a whole set. Of a part, the numbers below are its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
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
    /// Fingerprint of the set; empty for a part.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fingerprint: String,
}

impl PackSummary {
    pub(crate) fn new(output: &Path, manifest: &Manifest, already_finished: bool, kept_shards: u64) -> Self {
        Self {
            output: output.into(),
            part: None,
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
        let part = self.part.map(|part| format!("{part} of ")).unwrap_or_default();
        write!(f, "{part}`{}` {verb}: {} samples x {} views", self.output.display(), self.samples, self.views)?;
        write!(f, " in {} shards, {}", self.shards, human(self.bytes))?;
        if self.kept_shards > 0 {
            write!(f, " ({} shards kept from an earlier run)", self.kept_shards)?;
        }
        if self.rejects > 0 {
            write!(f, ", {} images rejected", self.rejects)?;
        }
        match self.part {
            Some(_) => write!(f, "; when all parts are packed, close the set with `data-prep finish`"),
            None if self.rejects > 0 => write!(f, " (see {REJECTS_FILE}), fingerprint {}", short(&self.fingerprint)),
            None => write!(f, ", fingerprint {}", short(&self.fingerprint)),
        }
    }
}

/// Packs a folder of images, or one part of it.
///
/// # Errors
/// As [`Listing::open`], [`OutputDir::begin`] and [`PartDir::begin`]; [`Error::Invalid`] when the disk is too small or too many images
/// cannot be used; [`Error::Io`], with advice when the disk is full.
pub fn pack(config: &PackConfig) -> Result<PackSummary> {
    let output = config.output.as_deref().ok_or_else(|| Error::usage("`--output` is required"))?;
    let listing = Listing::open(&config.input, &config.source)?;
    let to_write = bytes_to_write(config, output, listing.samples.len(), config.shards.sample_bytes());
    must_fit(PACKING, output, to_write, free_bytes(output), FEWER_BYTES)?;
    let identity = Identity::new(Stage::DataPrep, &config.shards, config.seed, vec![listing.as_input()])?;
    let job = Job {
        config,
        samples: in_packing_order(&listing, config),
        details: config.shards.details(listing.classes.clone()),
        listing: &listing,
        directory: output.to_path_buf(),
    };
    match config.part {
        None => pack_whole(&job, &identity),
        Some(part) => pack_part(&job, &identity, part),
    }
}

fn pack_whole(job: &Job<'_>, identity: &Identity) -> Result<PackSummary> {
    let dir = match OutputDir::begin(&job.directory, identity, job.config.overwrite)? {
        Begun::Finished(manifest) => return Ok(PackSummary::new(&job.directory, &manifest, true, 0)),
        Begun::Writing(dir) => dir,
    };
    let (mut packed, kept_shards) = job.pack(&|| Ok(()))?;
    let shards = packed.files.len();
    let counts = counts(job.samples.len(), job.details.views, shards, packed.rejects.len());
    let mut files: Vec<FileEntry> = packed.files.into_values().collect();
    files.push(write_rejects(dir.path(), &mut packed.rejects)?);
    remove_notes(dir.path(), |_| true)?;
    let manifest = dir.finish(counts, details_json(&job.details)?, files)?;
    Ok(PackSummary::new(&job.directory, &manifest, false, kept_shards))
}

fn pack_part(job: &Job<'_>, identity: &Identity, part: Part) -> Result<PackSummary> {
    let all: Vec<String> = (0..job.shards()).filter(|&index| part.owns(index)).map(shard_file_name).collect();
    let is_mine = |name: &str| all.iter().any(|file| *file == name || note_name(file) == name);
    let (record, already_finished, kept_shards) =
        match PartDir::begin::<PartOutcome>(&job.directory, identity, part, is_mine)? {
            BegunPart::SetFinished(manifest) => return Ok(PackSummary::new(&job.directory, &manifest, true, 0)),
            BegunPart::Finished(record) => (record, true, 0),
            BegunPart::Writing(dir) => {
                let (packed, kept_shards) = job.pack(&|| dir.must_still_be_ours())?;
                let Packed { files, mut rejects, .. } = packed;
                rejects.sort();
                let outcome = PartOutcome { listed: job.samples.len(), rejects, details: job.details.clone() };
                (dir.finish(files.into_values().collect(), outcome)?, false, kept_shards)
            }
        };
    remove_notes(&job.directory, is_mine)?;
    let rejects = record.outcome.rejects.len();
    let listed: usize = (0..job.shards()).filter(|&index| part.owns(index)).map(|index| job.listed_in(index)).sum();
    Ok(PackSummary {
        output: job.directory.clone(),
        part: Some(part),
        already_finished,
        samples: (listed - rejects) as u64,
        views: job.details.views as u64,
        shards: record.files.len() as u64,
        kept_shards,
        rejects: rejects as u64,
        bytes: record.files.iter().map(|file| file.bytes).sum(),
        fingerprint: String::new(),
    })
}

/// The counts of a set's manifest.
pub(crate) fn counts(listed: usize, views: usize, shards: usize, rejects: usize) -> BTreeMap<String, u64> {
    let counts = [("samples", listed - rejects), ("views", views), ("shards", shards), ("rejects", rejects)];
    counts.map(|(name, count)| (name.to_string(), count as u64)).into()
}

/// What readers must know of a set, as its manifest keeps it.
pub(crate) fn details_json(details: &ShardSetDetails) -> Result<Value> {
    serde_json::to_value(details).map_err(|e| Error::invalid(format!("the class names have no JSON form: {e}"), ""))
}

/// The samples in the order in which they are packed.
pub(crate) fn in_packing_order<'a>(listing: &'a Listing, config: &PackConfig) -> Vec<&'a Sample> {
    let order = packing_order(listing.samples.len(), config.seed, config.shards.order);
    order.into_iter().map(|position| &listing.samples[position]).collect()
}

/// What the shards that are not there yet will take, when a sample takes `sample_bytes`.
pub(crate) fn bytes_to_write(config: &PackConfig, output: &Path, samples: usize, sample_bytes: u64) -> u64 {
    let each = config.shards.shard_samples.max(1);
    let is_missing =
        |index: usize| config.part.is_none_or(|part| part.owns(index)) && !output.join(shard_file_name(index)).exists();
    let missing = (0..samples.div_ceil(each)).filter(|&index| is_missing(index));
    let listed: usize = missing.map(|index| each.min(samples - index * each)).sum();
    sample_bytes.saturating_mul(listed as u64)
}

/// What is remembered of a complete shard until the work is done.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    file: FileEntry,
    rejects: Vec<Reject>,
}

fn note_name(shard_file: &str) -> String {
    format!(".{shard_file}.json")
}

/// Removes the notes about complete shards; `chosen` is asked for their names.
pub(crate) fn remove_notes(directory: &Path, chosen: impl Fn(&str) -> bool) -> Result<()> {
    let is_note = |name: &str| name.starts_with(".shard-") && name.ends_with(".safetensors.json");
    remove_files(directory, |name| is_note(name) && chosen(name))
}

pub(crate) fn write_rejects(directory: &Path, rejects: &mut [Reject]) -> Result<FileEntry> {
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
    /// Number of shards of the whole set.
    fn shards(&self) -> usize {
        self.samples.len().div_ceil(self.config.shards.shard_samples)
    }

    /// Samples that were listed for a shard.
    fn listed_in(&self, index: usize) -> usize {
        let shard_samples = self.config.shards.shard_samples;
        shard_samples.min(self.samples.len() - index * shard_samples)
    }

    fn is_mine(&self, index: usize) -> bool {
        self.config.part.is_none_or(|part| part.owns(index))
    }

    /// Makes the shards, with the number of those that an earlier run had made. `may_go_on` is asked after each shard.
    fn pack(&self, may_go_on: &(dyn Fn() -> Result<()> + Sync)) -> Result<(Packed, u64)> {
        let mut packed = self.keep_finished_shards()?;
        let kept_shards = packed.files.len() as u64;
        self.write_missing_shards(&mut packed, may_go_on)?;
        Ok((packed, kept_shards))
    }

    fn shard_path(&self, index: usize) -> PathBuf {
        self.directory.join(shard_file_name(index))
    }

    fn make(&self, sample: &Sample, worker: &mut Worker, views: &mut SampleViews) -> Result<(), String> {
        let made = make_views(self.listing, sample, self.config.seed, &self.config.shards, worker, views);
        worker.end_picture();
        made
    }

    fn note_path(&self, index: usize) -> PathBuf {
        self.directory.join(note_name(&shard_file_name(index)))
    }

    fn read_note(&self, index: usize) -> Option<Note> {
        let text = fs::read_to_string(self.note_path(index)).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Finds the shards that an earlier run completed.
    fn keep_finished_shards(&self) -> Result<Packed> {
        let mut packed = Packed::default();
        let mut worker = Worker::new(self.config.level, MemoryBudget::default());
        for (index, samples) in self.samples.chunks(self.config.shards.shard_samples).enumerate() {
            let path = self.shard_path(index);
            if !self.is_mine(index) || !path.exists() {
                continue;
            }
            let length = fs::metadata(&path).map_err(Error::io("read", &path))?.len();
            let noted = self.read_note(index).filter(|noted| noted.file.bytes == length);
            let known = noted.as_ref().map_or(&[][..], |noted| &noted.rejects);
            if let Some(rejects) = self.check_shard(&path, samples, known, &mut worker)? {
                packed.samples += samples.len();
                packed.rejects.extend(rejects);
                packed.files.insert(index, noted.map_or_else(|| hash_file(&path), |noted| Ok(noted.file))?);
            } else {
                note(&format!("`{}` is not what this command makes: it is made again", path.display()));
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(packed)
    }

    /// Whether a shard holds the samples it should: all of them that can be decoded, the first of them byte for byte. Gives the
    /// others with the reason: those that are `known`, and those that cannot be used now.
    fn check_shard(
        &self,
        path: &Path,
        samples: &[&Sample],
        known: &[Reject],
        worker: &mut Worker,
    ) -> Result<Option<Vec<Reject>>> {
        let Ok(shard) = Shard::open(path, &self.details) else { return Ok(None) };
        let mut views = SampleViews::default();
        let (mut row, mut rejects) = (0, Vec::new());
        for sample in samples {
            let stored = shard.sample_ids().get(row) == Some(&sample.id) && shard.labels()[row] == sample.label;
            if stored && row > 0 {
                row += 1;
                continue;
            }
            if let Some(reject) = known.iter().find(|reject| !stored && reject.path == *sample.name) {
                rejects.push(reject.clone());
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
    fn write_missing_shards(&self, packed: &mut Packed, may_go_on: &(dyn Fn() -> Result<()> + Sync)) -> Result<()> {
        let config = self.config;
        let shard_samples = config.shards.shard_samples;
        let shard_of = |position: usize| position / shard_samples;
        let is_missing = |index: usize| self.is_mine(index) && !packed.files.contains_key(&index);
        let todo: Vec<usize> = (0..self.samples.len()).filter(|&position| is_missing(shard_of(position))).collect();
        let progress = Progress::new("pack", "samples", (packed.samples + todo.len()) as u64, config.quiet);
        progress.start_at(packed.samples as u64);
        let limit = config.max_rejects.of(self.samples.len());
        let pool: Mutex<Vec<SampleViews>> = Mutex::new(Vec::new());
        let pool = || pool.lock().unwrap_or_else(PoisonError::into_inner);
        let sample_bytes = usize::try_from(config.shards.sample_bytes()).unwrap_or(usize::MAX);
        let items = (WAITING_BYTES / sample_bytes.max(1)).clamp(config.threads + 1, config.threads * 16);
        let window = Window { items, bytes: WAITING_BYTES };
        let size = |result: &Result<SampleViews, String>| result.as_ref().map_or(0, kept_bytes);
        let budget = MemoryBudget::of_threads(config.threads);
        let worker = || Worker::new(config.level, budget.clone());
        let work = |worker: &mut Worker, item: usize| {
            let mut views = pool().pop().unwrap_or_default();
            self.make(self.samples[todo[item]], worker, &mut views).map(|()| views)
        };
        let Packed { files, rejects, .. } = packed;
        std::thread::scope(|scope| {
            // Syncing a shard takes as long as the disk wants: one waits for it while the next one fills, not more.
            let (full, fulls) = sync_channel::<(usize, ShardWriter, Vec<Reject>)>(0);
            let finisher = scope.spawn(move || {
                for (index, writer, rejects) in fulls {
                    let file = writer.finish()?;
                    write_json(self.note_path(index), &Note { file: file.clone(), rejects })?;
                    files.insert(index, file);
                    may_go_on()?;
                }
                Ok(())
            });
            let mut open: Option<(usize, ShardWriter, usize)> = None;
            let consume = |item: usize, result: Result<SampleViews, String>| {
                let position = todo[item];
                let (index, sample) = (shard_of(position), self.samples[position]);
                let (_, writer, _) = match &mut open {
                    Some(open) => open,
                    none => none.insert((index, self.create_shard(index)?, rejects.len())),
                };
                match result {
                    Ok(views) => {
                        writer.push_sample(sample.id, sample.label, &views)?;
                        // memory of a sample that is large for this set is not kept
                        if kept_bytes(&views) <= WAITING_BYTES / items {
                            pool().push(views);
                        }
                    }
                    Err(reason) => {
                        progress.note(&format!("rejected `{}`: {reason}", sample.name));
                        rejects.push(Reject { path: sample.name.to_string(), reason });
                    }
                }
                progress.inc(1);
                if todo.get(item + 1).is_none_or(|&next| shard_of(next) != index)
                    && let Some((index, writer, first_reject)) = open.take()
                {
                    let of_shard = rejects[first_reject..].to_vec();
                    // a finisher that ended tells why below
                    full.send((index, writer, of_shard))
                        .map_err(|_ended| Error::invalid("a shard cannot be finished", ""))?;
                    self.refuse_many(rejects, limit)?;
                }
                Ok(())
            };
            let written = ordered((todo.len(), config.threads, window), worker, work, size, consume);
            drop(full);
            let finished: Result<()> = finisher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            finished.and(written)
        })?;
        self.refuse_many(&mut packed.rejects, limit)?;
        progress.finish();
        Ok(())
    }

    fn create_shard(&self, index: usize) -> Result<ShardWriter> {
        ShardWriter::with_layout(self.shard_path(index), self.listed_in(index), &self.details)
    }

    /// Stops when there are more rejects than allowed. A part counts its own ones only: `finish` counts them all.
    fn refuse_many(&self, rejects: &mut [Reject], limit: u64) -> Result<()> {
        match self.config.part {
            None => refuse_many(&self.directory, rejects, self.samples.len(), limit),
            Some(_) if rejects.len() as u64 <= limit => Ok(()),
            Some(part) => Err(Error::invalid(
                format!(
                    "{} images of {part} cannot be used, at most {limit} of all {} may be, the first is {}",
                    rejects.len(),
                    self.samples.len(),
                    first_of(rejects)
                ),
                "repair or remove them, or raise `--max-rejects`",
            )),
        }
    }
}

/// The memory that a finished sample keeps.
fn kept_bytes(views: &SampleViews) -> usize {
    views.global.bytes.capacity() + views.local.bytes.capacity()
}

fn first_of(rejects: &[Reject]) -> String {
    rejects.first().map(|reject| format!("`{}`: {}", reject.path, reject.reason)).unwrap_or_default()
}

/// Stops when more images than allowed, or all of them, cannot be used, and lists them in the directory.
pub(crate) fn refuse_many(directory: &Path, rejects: &mut [Reject], all: usize, limit: u64) -> Result<()> {
    let found = rejects.len();
    if found as u64 <= limit && found < all {
        return Ok(());
    }
    write_rejects(directory, rejects)?;
    let first = first_of(rejects);
    let message = if found == all {
        format!("none of the {all} images can be used, the first is {first}")
    } else {
        format!("{found} of {all} images cannot be used, at most {limit} may be, the first is {first}")
    };
    let file = directory.join(REJECTS_FILE);
    let hint = if found == all {
        format!("`{}` names them", file.display())
    } else {
        format!("`{}` names them; repair or remove them, or raise `--max-rejects`", file.display())
    };
    Err(Error::invalid(message, hint))
}
