//! What packing will take: samples, bytes, time and free space, told before anything is written.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use shared::space::{free_bytes, human, must_fit};
use shared::{Error, Result};

use crate::config::PackConfig;
use crate::pack::{FEWER_BYTES, PACKING, bytes_to_write, in_packing_order};
use crate::scan::Listing;
use crate::views::{SampleViews, Worker, make_views};

/// How many samples are made to measure the speed.
const MEASURED_SAMPLES: usize = 32;
/// After this long the measurement is good enough.
const MEASURED_SECS: f64 = 3.0;

/// What packing will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The folder of images.
    pub input: PathBuf,
    /// Images found.
    pub samples: usize,
    /// Classes found; 0 for a flat folder.
    pub classes: usize,
    /// Size of the image files.
    pub source_bytes: u64,
    /// Recipe by name.
    pub recipe: String,
    /// Views per sample.
    pub views: usize,
    /// Height and width of a view.
    pub size: usize,
    /// Bytes per sample.
    pub sample_bytes: u64,
    /// Number of shards.
    pub shards: usize,
    /// Size of the set.
    pub bytes: u64,
    /// Of that, what is still to be written.
    pub bytes_to_write: u64,
    /// Free space where the set is going to be; none when the system does not say.
    pub free_bytes: Option<u64>,
    /// Whether it fits.
    pub fits: bool,
    /// Worker threads.
    pub threads: usize,
    /// Samples per second and thread, measured on this machine.
    pub samples_per_sec_per_thread: f64,
    /// Time for all samples, when every thread is as fast as the one measured.
    pub estimated_secs: f64,
    /// How many samples were measured, and how many of them cannot be used.
    pub measured_samples: usize,
    /// Measured samples that cannot be used.
    pub measured_rejects: usize,
}

/// Plans a packing.
///
/// # Errors
/// As [`Listing::scan`]; [`Error::Invalid`] when none of the measured images can be used.
pub fn plan(config: &PackConfig) -> Result<Plan> {
    let listing = Listing::scan(&config.input)?;
    let order = in_packing_order(&listing, config);
    let (mut worker, mut views) = (Worker::default(), SampleViews::default());
    let (mut measured, mut rejects, mut first_reason) = (0usize, 0usize, String::new());
    let start = Instant::now();
    for sample in order.iter().take(MEASURED_SAMPLES) {
        let path = listing.path_of(sample);
        if let Err(reason) = make_views(&path, sample.id, config.seed, &config.shards, &mut worker, &mut views) {
            rejects += 1;
            first_reason = format!("`{}`: {reason}", sample.path);
        }
        measured += 1;
        if start.elapsed().as_secs_f64() > MEASURED_SECS {
            break;
        }
    }
    if rejects == measured {
        let what = format!("none of the {measured} images that were tried can be used, for example {first_reason}");
        return Err(Error::invalid(what, "check the input folder"));
    }
    let rate = measured as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let samples = listing.samples.len();
    let shards = &config.shards;
    let output = config.output.as_deref().unwrap_or(Path::new("."));
    let (to_write, free) = (bytes_to_write(config, output, samples), free_bytes(output));
    Ok(Plan {
        input: config.input.clone(),
        samples,
        classes: listing.classes.len(),
        source_bytes: listing.samples.iter().map(|sample| sample.bytes).sum(),
        recipe: shards.recipe.name.clone(),
        views: shards.views,
        size: shards.size,
        sample_bytes: shards.sample_bytes(),
        shards: samples.div_ceil(shards.shard_samples),
        bytes: shards.sample_bytes() * samples as u64,
        bytes_to_write: to_write,
        free_bytes: free,
        fits: must_fit(PACKING, output, to_write, free, FEWER_BYTES).is_ok(),
        threads: config.threads,
        samples_per_sec_per_thread: rate,
        estimated_secs: samples as f64 / (rate * config.threads as f64),
        measured_samples: measured,
        measured_rejects: rejects,
    })
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let classes = match self.classes {
            0 => "no classes".into(),
            1 => "1 class".into(),
            n => format!("{n} classes"),
        };
        writeln!(
            f,
            "input      {} images, {classes}, {} in `{}`",
            self.samples,
            human(self.source_bytes),
            self.input.display()
        )?;
        writeln!(
            f,
            "views      {} x {} x {} by `{}`, {} per sample",
            self.views,
            self.size,
            self.size,
            self.recipe,
            human(self.sample_bytes)
        )?;
        writeln!(
            f,
            "output     {} in {} shards, {} still to be written",
            human(self.bytes),
            self.shards,
            human(self.bytes_to_write)
        )?;
        let free = self.free_bytes.map_or("unknown".into(), human);
        writeln!(f, "free disk  {free}{}", if self.fits { "" } else { ": not enough" })?;
        let rate = self.samples_per_sec_per_thread;
        writeln!(f, "speed      {rate:.1} samples/s on one thread, measured on {} samples", self.measured_samples)?;
        if self.measured_rejects > 0 {
            writeln!(f, "rejects    {} of the measured samples cannot be used", self.measured_rejects)?;
        }
        write!(f, "time       about {} with {} threads", duration(self.estimated_secs), self.threads)
    }
}

fn duration(secs: f64) -> String {
    match secs {
        s if s < 90.0 => format!("{} s", s.ceil()),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
