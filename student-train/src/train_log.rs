//! What a training reports: losses to `metrics.jsonl`, speeds and memory to `timing.jsonl`, both to the screen and to `TensorBoard`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shared::io::FileEntry;
use shared::knn::KnnAccuracy;
use shared::logging::{JsonLines, LogPosition};
use shared::memory::peak_memory_bytes;
use shared::progress::Progress;
use shared::run::{
    EpochEvent, EpochMetrics, Losses, METRICS_FILE, ProbeEvent, ProbeMetrics, StepMetrics, TENSORBOARD_DIRECTORY,
    TIMING_FILE,
};
use shared::tensorboard::EventFile;
use shared::{Error, Result};

use crate::spread::{CollapseWatch, Spread};
use crate::timing::{Speed, Window};

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

/// The reports of a training in progress.
#[derive(Debug)]
pub struct TrainLog {
    metrics: JsonLines,
    sums: EpochSums,
    timing: File,
    timing_path: PathBuf,
    progress: Progress,
    events: EventFile,
    display: Display,
    /// The latest probe.
    probe: Option<KnnAccuracy>,
    collapse: CollapseWatch,
    /// Since the last line of timing.
    window: Window,
    /// Since this process began to train.
    call: Window,
}

/// How a training is shown.
#[derive(Debug, Clone, Copy)]
pub struct Display {
    /// Of the whole run.
    pub epochs: u64,
    /// Of the whole run.
    pub steps: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Samples in a step.
    pub batch_size: usize,
    /// Steps between points of `TensorBoard`; the last step of an epoch always is one.
    pub log_steps: u64,
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
        let events = EventFile::create(&run.join(TENSORBOARD_DIRECTORY), steps_done + 1)?;
        let progress = Progress::new("training", "steps", display.steps, display.quiet);
        progress.start_at(steps_done);
        Ok(Self {
            metrics,
            sums,
            timing,
            timing_path,
            progress,
            events,
            display,
            probe: None,
            collapse: CollapseWatch::default(),
            window: Window::new(),
            call: Window::new(),
        })
    }

    /// Whether the step after `done` steps gets a line of timing: its embeddings are looked at.
    pub fn looks_at(&self, done: u64) -> bool {
        self.window.steps() + 1 == TIMING_STEPS || (done + 1).is_multiple_of(self.display.steps_per_epoch)
    }

    /// Reports a step; `waited` is how long its batch was not ready, `spread` what was seen of its embeddings.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn step(&mut self, metrics: &StepMetrics, waited: Duration, spread: Option<Spread>) -> Result<()> {
        self.metrics.append(metrics)?;
        self.sums.add(&metrics.losses);
        self.window.step(waited);
        self.call.step(waited);
        let StepMetrics { step, epoch, lr, losses } = metrics;
        if !self.display.quiet {
            self.progress.message(self.message(metrics));
        }
        self.progress.inc(1);
        let epoch_ends = step.is_multiple_of(self.display.steps_per_epoch);
        if epoch_ends || step.is_multiple_of(self.display.log_steps) {
            let rate = [("train/lr".to_string(), *lr as f32)];
            self.events.scalars(*step, tagged("train", losses).into_iter().chain(rate))?;
            self.events.flush()?;
        }
        if epoch_ends || self.window.steps() == TIMING_STEPS {
            self.write_timing(*epoch, *step, spread)?;
        }
        if let Some(warning) = spread.and_then(|spread| self.collapse.warning(*epoch, *step, spread)) {
            self.progress.note(&warning);
        }
        Ok(())
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
        self.events.scalars(step, tagged("epoch", &losses))?;
        self.events.flush()?;
        Ok(losses)
    }

    /// Reports a probe, whose time does not count as the training's.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn probe(&mut self, epoch: u64, step: u64, accuracy: KnnAccuracy) -> Result<()> {
        self.metrics.append(&ProbeMetrics { event: ProbeEvent::Probe, epoch, step, accuracy })?;
        let values = [("probe/top1", accuracy.top1), ("probe/top5", accuracy.top5)];
        self.events.scalars(step, values.map(|(tag, value)| (tag.to_string(), value as f32)))?;
        self.events.flush()?;
        self.probe = Some(accuracy);
        self.window = Window::new();
        Ok(())
    }

    /// One line of everything that changes: losses, learning rate, speed, waiting, memory, the latest probe.
    fn message(&self, metrics: &StepMetrics) -> String {
        let StepMetrics { epoch, lr, losses, .. } = metrics;
        let Speed { images_per_second, data_wait_percent, .. } = self.window.speed(self.display.batch_size);
        let epochs = self.display.epochs;
        let terms: Vec<String> = losses.terms.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        let terms = if terms.is_empty() { String::new() } else { format!(" ({})", terms.join(", ")) };
        let memory = peak_memory_bytes().map(|bytes| format!("  {:.1} GB", bytes as f64 / 1e9)).unwrap_or_default();
        let probe = self.probe.map(|probe| format!("  k-NN {:.1} %", probe.top1)).unwrap_or_default();
        format!(
            "epoch {}/{epochs}  loss {:.4}{terms}  lr {lr:.4}  {images_per_second:.1} images/s  \
             {data_wait_percent:.1} % waiting{memory}{probe}",
            epoch + 1,
            losses.loss
        )
    }

    /// Where a resumed run goes on, for a checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn position(&self) -> Result<(LogPosition, EpochSums)> {
        Ok((self.metrics.sync()?, self.sums.clone()))
    }

    /// How fast this call has been.
    pub fn speed(&self) -> Speed {
        self.call.speed(self.display.batch_size)
    }

    /// Ends the reports; returns the manifest's entry for `metrics.jsonl`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<FileEntry> {
        self.progress.finish();
        self.metrics.finish()
    }

    fn write_timing(&mut self, epoch: u64, step: u64, spread: Option<Spread>) -> Result<()> {
        let timing = self.window.timing(epoch, step, self.display.batch_size, spread);
        self.window = Window::new();
        let mut line = serde_json::to_string(&timing)
            .map_err(|e| Error::invalid(format!("cannot write `{}`: {e}", self.timing_path.display()), ""))?;
        line.push('\n');
        self.timing.write_all(line.as_bytes()).map_err(Error::io("write", &self.timing_path))?;
        let values = [
            ("speed/images_per_second", Some(timing.images_per_second as f32)),
            ("speed/data_wait_percent", Some(timing.data_wait_percent as f32)),
            ("speed/peak_memory_bytes", timing.peak_memory_bytes.map(|bytes| bytes as f32)),
            ("embeddings/spread", timing.embedding_spread),
            ("embeddings/queue_similarity", timing.queue_similarity),
        ];
        let known = values.into_iter().filter_map(|(tag, value)| Some((tag.to_string(), value?)));
        self.events.scalars(step, known)?;
        self.events.flush()
    }
}

/// The loss and its terms, each under a tag.
fn tagged(group: &str, losses: &Losses) -> Vec<(String, f32)> {
    let terms = losses.terms.iter().map(|(name, &value)| (format!("{group}/{name}"), value));
    std::iter::once((format!("{group}/loss"), losses.loss)).chain(terms).collect()
}
