//! What packing will take: samples, bytes, time and free space, told before anything is written, and what other ways of storing
//! would take.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use shared::shard::{Codec, DEFAULT_QUALITY, ShardConfig, Store, StoredJpeg};
use shared::space::{free_bytes, human, must_fit};
use shared::{Error, Result};

use crate::config::{DEFAULT_SHORT_SIDE, PackConfig};
use crate::pack::{FEWER_BYTES, PACKING, bytes_to_write, in_packing_order};
use crate::source::Listing;
use crate::views::{SampleViews, Worker, load, make_from_image};

/// How many samples are made to measure.
const MEASURED_SAMPLES: usize = 32;
/// After this long the measurement is good enough.
const MEASURED_SECS: f64 = 5.0;

/// What one way of storing takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Way {
    /// What a shard holds.
    pub store: Store,
    /// How pixels are stored.
    pub codec: Codec,
    /// Whether it is what was asked for.
    pub asked: bool,
    /// Bytes per sample: of the measured samples, exact for `views` and `raw`.
    pub sample_bytes: u64,
    /// Size of the set.
    pub bytes: u64,
    /// Samples per second and thread, measured on this machine.
    pub samples_per_sec_per_thread: f64,
    /// Time for all samples, when every thread is as fast as the one measured.
    pub estimated_secs: f64,
}

/// What packing will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// What the images are read from.
    pub input: PathBuf,
    /// How it was read: `class-folders`, `ilsvrc2012`, ...
    pub input_format: String,
    /// Images found.
    pub samples: usize,
    /// Classes found; 0 where there are none.
    pub classes: usize,
    /// Size of the encoded images.
    pub source_bytes: u64,
    /// Recipe by name.
    pub recipe: String,
    /// Views per sample.
    pub views: usize,
    /// Height and width of a view.
    pub size: usize,
    /// Small views per sample.
    pub local_views: usize,
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
    /// What every way of storing would take, the one that was asked for included.
    pub ways: Vec<Way>,
    /// How many samples were measured, and how many of them cannot be used.
    pub measured_samples: usize,
    /// Measured samples that cannot be used.
    pub measured_rejects: usize,
}

/// What was measured of one way of storing.
struct Measuring {
    config: ShardConfig,
    asked: bool,
    secs: f64,
    pixel_bytes: usize,
}

/// Plans a packing.
///
/// # Errors
/// As [`Listing::open`]; [`Error::Invalid`] when none of the measured images can be used.
pub fn plan(config: &PackConfig) -> Result<Plan> {
    let listing = Listing::open(&config.input, &config.source)?;
    let order = in_packing_order(&listing, config);
    let mut ways: Vec<Measuring> = ways_of(&config.shards);
    let (mut worker, mut views) = (Worker::default(), SampleViews::default());
    let (mut measured, mut rejects, mut first_reason, mut load_secs) = (0usize, 0usize, String::new(), 0.0);
    let start = Instant::now();
    for sample in order.iter().take(MEASURED_SAMPLES) {
        let begun = Instant::now();
        let made = load(&listing, sample, &mut worker).and_then(|image| {
            load_secs += begun.elapsed().as_secs_f64();
            for way in &mut ways {
                let begun = Instant::now();
                make_from_image(&image, sample.id, config.seed, &way.config, &mut worker, &mut views)?;
                way.secs += begun.elapsed().as_secs_f64();
                way.pixel_bytes += views.pixel_bytes();
            }
            Ok(())
        });
        measured += 1;
        if let Err(reason) = made {
            rejects += 1;
            first_reason = format!("`{}`: {reason}", sample.name);
        }
        if start.elapsed().as_secs_f64() > MEASURED_SECS {
            break;
        }
    }
    if rejects == measured {
        let what = format!("none of the {measured} images that were tried can be used, for example {first_reason}");
        return Err(Error::invalid(what, "check the input"));
    }
    let (samples, made) = (listing.samples.len(), (measured - rejects) as f64);
    let ways: Vec<Way> = ways
        .into_iter()
        .map(|way| {
            let rate = made / (load_secs + way.secs).max(1e-9);
            let sample_bytes = way.config.sample_bytes_of(way.pixel_bytes as f64 / made);
            Way {
                store: way.config.store,
                codec: way.config.codec,
                asked: way.asked,
                sample_bytes,
                bytes: sample_bytes.saturating_mul(samples as u64),
                samples_per_sec_per_thread: rate,
                estimated_secs: samples as f64 / (rate * config.threads as f64),
            }
        })
        .collect();
    let shards = &config.shards;
    let asked = ways.iter().find(|way| way.asked).unwrap_or(&ways[0]).clone();
    let output = config.output.as_deref().unwrap_or(Path::new("."));
    let to_write = bytes_to_write(config, output, samples, asked.sample_bytes);
    let free = free_bytes(output);
    Ok(Plan {
        input: config.input.clone(),
        input_format: listing.format.name(),
        samples,
        classes: listing.classes.len(),
        source_bytes: listing.samples.iter().map(|sample| sample.bytes).sum(),
        recipe: shards.recipe.name.clone(),
        views: shards.views,
        size: shards.size,
        local_views: shards.recipe.local_views(shards.views),
        sample_bytes: asked.sample_bytes,
        shards: samples.div_ceil(shards.shard_samples),
        bytes: asked.bytes,
        bytes_to_write: to_write,
        free_bytes: free,
        fits: must_fit(PACKING, output, to_write, free, FEWER_BYTES).is_ok(),
        threads: config.threads,
        samples_per_sec_per_thread: asked.samples_per_sec_per_thread,
        estimated_secs: asked.estimated_secs,
        ways,
        measured_samples: measured,
        measured_rejects: rejects,
    })
}

/// Every store with every codec, with the settings that were asked for where they say anything about it.
fn ways_of(asked: &ShardConfig) -> Vec<Measuring> {
    let pairs = [Store::Views, Store::Source].into_iter().flat_map(|store| [(store, Codec::Raw), (store, Codec::Jpeg)]);
    pairs
        .map(|(store, codec)| {
            let short_side = (store == Store::Source).then(|| asked.short_side.unwrap_or(DEFAULT_SHORT_SIDE));
            let quality = asked.jpeg.as_ref().map_or(DEFAULT_QUALITY, |jpeg| jpeg.quality);
            let jpeg = (codec == Codec::Jpeg).then(|| StoredJpeg::new(quality));
            Measuring {
                config: ShardConfig { store, codec, short_side, jpeg, ..asked.clone() },
                asked: (store, codec) == (asked.store, asked.codec),
                secs: 0.0,
                pixel_bytes: 0,
            }
        })
        .collect()
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let classes = match self.classes {
            0 => "no classes".into(),
            1 => "1 class".into(),
            n => format!("{n} classes"),
        };
        let (input, format) = (self.input.display(), &self.input_format);
        writeln!(
            f,
            "input      {} images, {classes}, {} in `{input}` ({format})",
            self.samples,
            human(self.source_bytes)
        )?;
        write!(f, "views      {} x {2} x {2} by `{1}`", self.views, self.recipe, self.size)?;
        if self.local_views > 0 {
            write!(f, ", {} local views", self.local_views)?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "output     {} in {} shards, {} per sample; {} still to be written",
            human(self.bytes),
            self.shards,
            human(self.sample_bytes),
            human(self.bytes_to_write)
        )?;
        let free = self.free_bytes.map_or("unknown".into(), human);
        writeln!(f, "free disk  {free}{}", if self.fits { "" } else { ": not enough" })?;
        let rate = self.samples_per_sec_per_thread;
        writeln!(f, "speed      {rate:.1} samples/s on one thread, measured on {} samples", self.measured_samples)?;
        if self.measured_rejects > 0 {
            writeln!(f, "rejects    {} of the measured samples cannot be used", self.measured_rejects)?;
        }
        writeln!(f, "time       about {} with {} threads", duration(self.estimated_secs), self.threads)?;
        write!(f, "\n--store  --codec         size   per sample         time")?;
        for way in &self.ways {
            let (store, codec) = match (way.store, way.codec) {
                (Store::Views, Codec::Raw) => ("views", "raw"),
                (Store::Views, Codec::Jpeg) => ("views", "jpeg"),
                (Store::Source, Codec::Raw) => ("source", "raw"),
                (Store::Source, Codec::Jpeg) => ("source", "jpeg"),
            };
            let (size, each, time) = (human(way.bytes), human(way.sample_bytes), duration(way.estimated_secs));
            let asked = if way.asked { "  <- asked for" } else { "" };
            write!(f, "\n{store:<9}{codec:<8}{size:>12}{each:>13}{time:>13}{asked}")?;
        }
        Ok(())
    }
}

fn duration(secs: f64) -> String {
    match secs {
        s if s < 90.0 => format!("{} s", s.ceil()),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_change_their_unit() {
        assert_eq!([0.2, 89.0, 600.0, 7200.0].map(duration), ["1 s", "89 s", "10 min", "2.0 h"]);
    }
}
