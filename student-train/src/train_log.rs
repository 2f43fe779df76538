//! What a training reports: losses to `metrics.jsonl`, speeds and memory to `timing.jsonl`, both to the screen.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shared::io::FileEntry;
use shared::logging::{JsonLines, LogPosition};
use shared::memory::peak_memory_bytes;
use shared::ops::{Isa, isa};
use shared::progress::Progress;
use shared::run::{EpochEvent, EpochMetrics, Losses, METRICS_FILE, StepMetrics, TIMING_FILE};
use shared::{Error, Result};

/// Steps between lines of `timing.jsonl` within an epoch.
const TIMING_STEPS: u64 = 100;

/// Sums of the losses of an epoch so far. Kept as the bits of f64, so that JSON gives them back exactly.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpochSums {
    steps: u64,
    loss: u64,
    terms: BTreeMap<String, u64>,
}

impl EpochSums {
    fn add(&mut self, losses: &Losses) {
        let add = |bits: &mut u64, term: f32| *bits = (f64::from_bits(*bits) + f64::from(term)).to_bits();
        add(&mut self.loss, losses.loss);
        for (name, &term) in &losses.terms {
            add(self.terms.entry(name.clone()).or_default(), term);
        }
        self.steps += 1;
    }

    /// Means over the steps.
    fn means(&self) -> Losses {
        let mean = |bits: u64| (f64::from_bits(bits) / self.steps.max(1) as f64) as f32;
        let terms = self.terms.iter().map(|(name, &bits)| (name.clone(), mean(bits))).collect();
        Losses { loss: mean(self.loss), terms }
    }
}

/// A line of `timing.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// Steps done.
    pub step: u64,
    /// Since the line before it, or since this process began to train.
    pub seconds: f64,
    /// Samples per second in that time; each is seen in two views.
    pub images_per_second: f64,
    /// Share of that time in which the training waited for batches.
    pub data_wait_percent: f64,
    /// The most memory that this process has held at once since it began; none where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// The instruction set that computed.
    pub isa: Isa,
    /// Threads that computed.
    pub threads: usize,
}

/// The reports of a training in progress.
#[derive(Debug)]
pub struct TrainLog {
    metrics: JsonLines,
    sums: EpochSums,
    timing: File,
    timing_path: PathBuf,
    progress: Progress,
    epochs: u64,
    batch_size: usize,
    /// Since the last line of timing.
    window: Window,
}

#[derive(Debug)]
struct Window {
    start: Instant,
    steps: u64,
    waited: Duration,
}

impl Window {
    fn new() -> Self {
        Self { start: Instant::now(), steps: 0, waited: Duration::ZERO }
    }
}

/// How a training is shown.
#[derive(Debug, Clone, Copy)]
pub struct Display {
    /// Of the whole run.
    pub epochs: u64,
    /// Of the whole run.
    pub steps: u64,
    /// Samples in a step.
    pub batch_size: usize,
    /// Show no progress.
    pub quiet: bool,
}

impl TrainLog {
    /// Starts the reports, or goes on from a checkpoint's position after `steps_done`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when `metrics.jsonl` does not hold what it held at the checkpoint.
    pub fn open(
        run: &Path,
        resume: Option<(&LogPosition, EpochSums)>,
        steps_done: u64,
        display: Display,
    ) -> Result<Self> {
        let path = run.join(METRICS_FILE);
        let timing_path = run.join(TIMING_FILE);
        let (metrics, sums) = match resume {
            Some((position, sums)) => (JsonLines::resume(path, position)?, sums),
            None => (JsonLines::create(path)?, EpochSums::default()),
        };
        let timing =
            File::options().create(true).append(true).open(&timing_path).map_err(Error::io("open", &timing_path))?;
        let Display { epochs, steps, batch_size, quiet } = display;
        let progress = Progress::new("training", "steps", steps, quiet);
        progress.start_at(steps_done);
        Ok(Self { metrics, sums, timing, timing_path, progress, epochs, batch_size, window: Window::new() })
    }

    /// Reports a step; `waited` is how long its batch was not ready.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn step(&mut self, metrics: &StepMetrics, waited: Duration) -> Result<()> {
        self.metrics.append(metrics)?;
        self.sums.add(&metrics.losses);
        self.window.steps += 1;
        self.window.waited += waited;
        let StepMetrics { step, epoch, lr, losses } = metrics;
        let rate = self.window.steps as f64 * self.batch_size as f64 / self.window.start.elapsed().as_secs_f64();
        let (epochs, loss) = (self.epochs, losses.loss);
        self.progress.message(format!("epoch {}/{epochs}  loss {loss:.4}  lr {lr:.4}  {rate:.1} images/s", epoch + 1));
        self.progress.inc(1);
        if self.window.steps == TIMING_STEPS { self.write_timing(*epoch, *step) } else { Ok(()) }
    }

    /// Reports the end of an epoch, whose last step was `last`; returns the means over it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn epoch(&mut self, last: &StepMetrics) -> Result<Losses> {
        let losses = self.sums.means();
        let StepMetrics { step, epoch, lr, .. } = *last;
        let metrics = EpochMetrics { event: EpochEvent::Epoch, epoch, step, lr, losses: losses.clone() };
        self.metrics.append(&metrics)?;
        self.sums = EpochSums::default();
        if self.window.steps > 0 {
            self.write_timing(epoch, step)?;
        }
        Ok(losses)
    }

    /// Where a resumed run goes on, for a checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn position(&self) -> Result<(LogPosition, EpochSums)> {
        Ok((self.metrics.sync()?, self.sums.clone()))
    }

    /// Ends the reports; returns the manifest's entry for `metrics.jsonl`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<FileEntry> {
        self.progress.finish();
        self.metrics.finish()
    }

    fn write_timing(&mut self, epoch: u64, step: u64) -> Result<()> {
        let seconds = self.window.start.elapsed().as_secs_f64();
        let timing = Timing {
            epoch,
            step,
            seconds,
            images_per_second: self.window.steps as f64 * self.batch_size as f64 / seconds,
            data_wait_percent: 100.0 * self.window.waited.as_secs_f64() / seconds,
            peak_memory_bytes: peak_memory_bytes(),
            isa: isa(),
            threads: rayon::current_num_threads(),
        };
        self.window = Window::new();
        let mut line = serde_json::to_string(&timing)
            .map_err(|e| Error::invalid(format!("cannot write `{}`: {e}", self.timing_path.display()), ""))?;
        line.push('\n');
        self.timing.write_all(line.as_bytes()).map_err(Error::io("write", &self.timing_path))
    }
}
