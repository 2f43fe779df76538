//! How fast a shard set can be read on this machine: from the disk and from memory, in every order, as training reads it.

use std::fmt;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use shared::data_loader::{EpochSampler, Order, Prefetcher, ViewSchedule, normalized_batch};
use shared::page_cache;
use shared::rng::KeyedRng;
use shared::shard::{ShardSet, Store};
use shared::space::human;
use shared::transforms::normalize::Normalization;
use shared::{Error, Result};

use crate::args::BenchArgs;

/// Views of a sample in a batch: training compares two.
const VIEWS: usize = 2;
/// Batches that wait, as in training.
const BATCHES_AHEAD: usize = 2;
const DEFAULT_BATCH: usize = 256;

/// Speed of reading in one order.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Reading {
    /// The order of the samples: `random`, `quasi` or `sequential`.
    pub order: &'static str,
    /// Whether the files had been dropped from the page cache before.
    pub from_disk: bool,
    /// Samples a second, two views of each.
    pub samples_per_sec: f64,
    /// Stored bytes a second that these samples take.
    pub bytes_per_sec: f64,
    /// Samples that were read.
    pub samples: usize,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measured {
    /// The shard set.
    pub shards: PathBuf,
    /// Size of its files.
    pub bytes: u64,
    /// Reading threads.
    pub threads: usize,
    /// Samples in a batch.
    pub batch_size: usize,
    /// Views of a sample that are read: 2, or 1 where the set has one.
    pub views_read: usize,
    /// Whether this system can drop files from its page cache; where it cannot, nothing is measured from the disk.
    pub can_drop_cache: bool,
    /// The measurements.
    pub readings: Vec<Reading>,
    /// Normalised values a second, in bytes, of the fastest reading from memory.
    pub values_bytes_per_sec: f64,
    /// Bytes a second that as many threads copy.
    pub copy_bytes_per_sec: f64,
    /// What a training was said to need, in samples a second.
    pub need: Option<f64>,
}

impl Measured {
    fn slowest(&self) -> Option<&Reading> {
        let shuffled = self.readings.iter().filter(|reading| reading.order != "sequential");
        shuffled.min_by(|a, b| a.samples_per_sec.total_cmp(&b.samples_per_sec))
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let views = if self.views_read == 1 { "1 view" } else { "2 views" };
        writeln!(
            f,
            "`{}`, {}; batches of {} samples, {views} of each, {} threads",
            self.shards.display(),
            human(self.bytes),
            self.batch_size,
            self.threads
        )?;
        writeln!(f, "{:<12}{:<10}{:>12}{:>16}", "order", "from", "samples/s", "read")?;
        for reading in &self.readings {
            let from = if reading.from_disk { "disk" } else { "memory" };
            let rate = format!("{}/s", human(reading.bytes_per_sec as u64));
            writeln!(f, "{:<12}{from:<10}{:>12.0}{rate:>16}", reading.order, reading.samples_per_sec)?;
        }
        if !self.can_drop_cache {
            writeln!(f, "this system does not drop files from its page cache: nothing was measured from the disk")?;
        }
        writeln!(
            f,
            "normalised   {}/s of f32 values, {:.0} % of a plain copy ({}/s)",
            human(self.values_bytes_per_sec as u64),
            100.0 * self.values_bytes_per_sec / self.copy_bytes_per_sec,
            human(self.copy_bytes_per_sec as u64)
        )?;
        let Some(slowest) = self.slowest() else { return Ok(()) };
        write!(
            f,
            "feeds        {:.0} samples/s even in `{}` order{}",
            slowest.samples_per_sec,
            slowest.order,
            if slowest.from_disk { " from the disk" } else { "" }
        )?;
        let Some(need) = self.need else { return Ok(()) };
        let times = slowest.samples_per_sec / need;
        if times >= 1.0 {
            return write!(f, ": {times:.1} times the {need:.0} that training takes");
        }
        write!(f, ": less than the {need:.0} that training takes")?;
        let enough = |reading: &&Reading| reading.order == "quasi" && reading.samples_per_sec >= need;
        match self.readings.iter().filter(|reading| reading.from_disk == slowest.from_disk).find(enough) {
            Some(quasi) => write!(f, "; `--order quasi` feeds {:.0}", quasi.samples_per_sec),
            None => write!(f, "; take a faster disk, more memory, or a smaller set (`--store source`, `--codec jpeg`)"),
        }
    }
}

/// Measures a set.
///
/// # Errors
/// As [`ShardSet::open`]; [`Error::Usage`] for a batch larger than the set or a senseless time or rate; [`Error::Io`].
pub fn bench(args: &BenchArgs) -> Result<Measured> {
    if !(args.seconds > 0.0 && args.seconds <= 3600.0) {
        return Err(Error::usage(format!("`--seconds {}` must lie above 0 and at most 3600", args.seconds)));
    }
    if args.need.is_some_and(|need| need.is_nan() || need <= 0.0) {
        return Err(Error::usage("`--need` must be above 0"));
    }
    let set = ShardSet::open(&args.shards)?;
    let (samples, views_read) = (set.len(), set.views().min(VIEWS));
    let batch_size = args.batch_size.map_or(DEFAULT_BATCH.min(samples), |size| size as usize);
    EpochSampler::new(samples, batch_size, 0)?;
    let all_cores = || thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.map_or_else(all_cores, usize::from);
    let bytes: u64 = set.files_manifest().files.iter().map(|file| file.bytes).sum();
    let values_per_sample = views_read * set.height() * set.width() * 3;
    drop(set);
    let time = Duration::from_secs_f64(args.seconds);
    let (mut readings, mut can_drop_cache) = (Vec::new(), true);
    for from_disk in [true, false] {
        for order in ["random", "quasi", "sequential"] {
            if from_disk {
                can_drop_cache &= drop_files(&args.shards)?;
                if !can_drop_cache {
                    continue;
                }
            }
            let set = ShardSet::open(&args.shards)?;
            let bytes_per_sample = stored_bytes_per_sample(&set, views_read);
            let read = read(set, order, (batch_size, views_read), threads, time)?;
            readings.push(Reading {
                order,
                from_disk,
                samples_per_sec: read.0,
                bytes_per_sec: read.0 * bytes_per_sample,
                samples: read.1,
            });
        }
    }
    let fastest = readings.iter().filter(|r| !r.from_disk).map(|r| r.samples_per_sec).fold(0.0, f64::max);
    Ok(Measured {
        shards: args.shards.clone(),
        bytes,
        threads,
        batch_size,
        views_read,
        can_drop_cache,
        readings,
        values_bytes_per_sec: fastest * (values_per_sample * size_of::<f32>()) as f64,
        copy_bytes_per_sec: copy_speed(batch_size * values_per_sample, threads, time),
        need: args.need,
    })
}

/// Drops the files of a set from the page cache; no when the system cannot.
fn drop_files(directory: &Path) -> Result<bool> {
    let mut dropped = true;
    let set = ShardSet::open(directory)?;
    let files: Vec<PathBuf> =
        set.files_manifest().files.iter().map(|file| set.files_directory().join(&file.path)).collect();
    // a mapped page stays
    drop(set);
    for file in files {
        dropped &= page_cache::drop_file(&file)?;
    }
    Ok(dropped)
}

/// Bytes that a batch takes from the files, for each sample.
fn stored_bytes_per_sample(set: &ShardSet, views_read: usize) -> f64 {
    let stored: u64 = set.files_manifest().files.iter().map(|file| file.bytes).sum();
    let shown = if set.store() == Store::Source { 1.0 } else { views_read as f64 / set.views() as f64 };
    stored as f64 / set.len() as f64 * shown
}

/// Samples a second, and samples read, when batches are made on `threads` threads for some time.
fn read(
    set: ShardSet,
    order: &str,
    (batch_size, views_read): (usize, usize),
    threads: usize,
    time: Duration,
) -> Result<(f64, usize)> {
    let sampler = EpochSampler::new(set.len(), batch_size, 0)?;
    let samples = match order {
        "quasi" => sampler.with_order(Order::Quasi).order(0),
        "random" => sampler.order(0),
        _ => (0..set.len()).collect(),
    };
    let schedule = (views_read == VIEWS).then(|| ViewSchedule::new(set.views(), 0)).transpose()?;
    let batches = sampler.steps_per_epoch();
    let make = move |batch: u64| {
        let rows: Vec<(usize, usize)> = sampler
            .batch(&samples, batch % batches)
            .iter()
            .flat_map(|&index| {
                let pair = schedule.map_or([0; VIEWS], |schedule| schedule.pair(set.sample_id(index), batch / batches));
                pair.into_iter().take(views_read).map(move |view| (index, view))
            })
            .collect();
        normalized_batch(&set, &rows, Normalization::Imagenet)
    };
    let start = Instant::now();
    let mut made = 0;
    for batch in Prefetcher::new(threads, BATCHES_AHEAD, 0..u64::MAX, make)? {
        black_box(batch?);
        made += 1;
        if start.elapsed() >= time {
            break;
        }
    }
    Ok(((made * batch_size) as f64 / start.elapsed().as_secs_f64(), made * batch_size))
}

/// Bytes a second when every thread copies `values` f32 from one buffer to another, again and again.
fn copy_speed(values: usize, threads: usize, time: Duration) -> f64 {
    let copied = AtomicUsize::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        for thread in 0..threads {
            let copied = &copied;
            scope.spawn(move || {
                let mut rng = KeyedRng::new("bench", 0, &[thread as u64]);
                let source: Vec<f32> = (0..values).map(|_| rng.unit_f32()).collect();
                let mut target = vec![0f32; values];
                while start.elapsed() < time {
                    target.copy_from_slice(black_box(&source));
                    black_box(&mut target);
                    copied.fetch_add(values, Ordering::Relaxed);
                }
            });
        }
    });
    (copied.into_inner() * size_of::<f32>()) as f64 / start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(rates: [f64; 2], need: Option<f64>) -> String {
        let reading = |order, samples_per_sec| Reading {
            order,
            from_disk: true,
            samples_per_sec,
            bytes_per_sec: 3e5 * samples_per_sec,
            samples: 512,
        };
        Measured {
            shards: "shards".into(),
            bytes: 1 << 30,
            threads: 2,
            batch_size: 256,
            views_read: 2,
            can_drop_cache: true,
            readings: vec![reading("random", rates[0]), reading("quasi", rates[1]), reading("sequential", 9000.0)],
            values_bytes_per_sec: 8e9,
            copy_bytes_per_sec: 1e10,
            need,
        }
        .to_string()
    }

    #[test]
    fn the_verdict_is_about_the_slowest_shuffled_order() {
        assert!(
            measured([900.0, 4000.0], None)
                .ends_with("feeds        900 samples/s even in `random` order from the disk")
        );
        assert!(measured([900.0, 4000.0], Some(450.0)).ends_with(": 2.0 times the 450 that training takes"));
        let slow = measured([90.0, 4000.0], Some(450.0));
        assert!(slow.ends_with("less than the 450 that training takes; `--order quasi` feeds 4000"), "{slow}");
        let hopeless = measured([90.0, 100.0], Some(450.0));
        assert!(hopeless.contains("take a faster disk"), "{hopeless}");
        assert!(hopeless.contains("80 % of a plain copy"), "{hopeless}");
    }
}
