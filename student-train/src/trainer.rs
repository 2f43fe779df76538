//! The run from beginning to end.
//!
//! Order when starting, which is also the order when resuming:
//! 1. the shard set, the embedding set made from it, the configuration that follows from both, and the weights to start from;
//! 2. the run's directory: locked, compared with what is asked for, finished or not;
//! 3. the newest checkpoint that is whole: query and key encoder, momenta, queue and its pointer; if there is none, the
//!    weights to start from;
//! 4. `metrics.jsonl`, cut back to that checkpoint;
//! 5. the batches from its step on, made ahead;
//! 6. steps; a checkpoint when one is due, and when the training is asked to stop;
//! 7. the last checkpoint, `student.safetensors`, and `manifest.json` last.
//!
//! Orders, views and shuffles are functions of the seed and the step, so nothing else needs to be saved.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shared::checkpoint::{CHECKPOINT_DIRECTORY, Checkpoint, Checkpoints};
use shared::cli::note_cpu;
use shared::data_loader::Prefetcher;
use shared::embedding::{EmbeddingSet, SHARDS_ROLE};
use shared::io::{FileEntry, hash_file, write_atomic};
use shared::logging::{JsonLines, LogPosition};
use shared::manifest::{Identity, Manifest, Stage};
use shared::ops::{Isa, isa};
use shared::output::{Begun, OutputDir};
use shared::progress::note;
use shared::run::{
    BEST_STUDENT_FILE, BestStudent, CONFIG_FILE, Losses, METRICS_FILE, Objective, RunDetails, StepMetrics,
};
use shared::schedule::Cosine;
use shared::shard::ShardSet;
use shared::{Error, Fault, Result};

use crate::args::{LrUnit, Options};
use crate::batches::{Batches, queue_advice};
use crate::config::{Config, OptimisationConfig, Plan};
use crate::export::{write_best, write_student};
use crate::init::Init;
use crate::method::Counters;
use crate::probe::Probe;
use crate::saver::Saver;
use crate::step::{Batch, TrainingState, batch_shuffle};
use crate::stopping::{StopReason, StopWatch};
use crate::timing::Speed;
use crate::train_log::{Display, EpochSums, TrainLog};

/// The role under which a run records its embedding set.
pub const EMBEDDINGS_ROLE: &str = "embeddings";

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Progressed {
    epoch: u64,
    /// Steps done in the epoch.
    position: u64,
    counters: Counters,
    /// Means over the last whole epoch.
    last_epoch: Option<Losses>,
    metrics: LogPosition,
    epoch_sums: EpochSums,
    /// What the probe found best so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    best: Option<BestStudent>,
    /// The instruction set that computed the steps since the checkpoint before it; not known of older checkpoints.
    #[serde(default)]
    isa: Option<Isa>,
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The run was finished by this call.
    Trained(Manifest, Speed),
    /// It had been finished before.
    AlreadyFinished(Manifest),
    /// It was stopped before its end.
    Stopped {
        /// Steps done, over all calls.
        steps: u64,
        /// Steps of the whole run.
        of_steps: u64,
        /// Why.
        reason: StopReason,
        /// How fast this call was.
        speed: Speed,
    },
}

/// Trains, or goes on training, until the run is finished.
///
/// # Errors
/// [`Error::Usage`] for settings that make no sense for these inputs; [`Error::Chain`] when inputs, run and settings do not belong
/// together; [`Error::Invalid`] when the loss stops being finite; what reading and writing files can give.
pub fn train(objective: Objective, options: &Options, plan: &Plan) -> Result<Outcome> {
    let watch = StopWatch::start(plan.time_limit);
    let shards = ShardSet::open(&plan.shards)?;
    let embeddings = plan.embeddings.as_ref().map(|path| EmbeddingSet::open(path, &shards)).transpose()?;
    let config = Config::new(objective, options, embeddings.as_ref().map(EmbeddingSet::embedding_dim))?;
    let mut inputs = vec![shards.manifest().as_input(SHARDS_ROLE, &plan.shards)];
    if let (Some(embeddings), Some(path)) = (&embeddings, &plan.embeddings) {
        inputs.push(embeddings.manifest().as_input(EMBEDDINGS_ROLE, path));
    }
    let init = Init::find(plan, &config)?;
    inputs.extend(init.as_ref().map(|init| init.input().clone()));
    let probe = match (&plan.probe, config.probe) {
        (Some(paths), Some(config)) => Some(Probe::open(paths, config, &shards)?),
        _ => None,
    };
    inputs.extend(probe.iter().flat_map(Probe::inputs));
    let batches = Arc::new(Batches::new(shards, embeddings, config.batch_size, config.seed, config.order)?);
    let identity = Identity::new(Stage::StudentTrain, &config, config.seed, inputs)?;
    let output = match OutputDir::begin(&plan.output, &identity, plan.overwrite)? {
        Begun::Finished(manifest) => return Ok(Outcome::AlreadyFinished(manifest)),
        Begun::Writing(output) => output,
    };
    Trainer::start(&config, plan, &identity, init.as_ref(), &output, batches, probe)?.run(output, watch)
}

struct Trainer<'a> {
    config: &'a Config,
    plan: &'a Plan,
    batches: Arc<Batches>,
    /// The directory.
    run: PathBuf,
    saver: Saver,
    state: TrainingState,
    log: TrainLog,
    probe: Option<Probe>,
    best: Option<BestStudent>,
    config_file: FileEntry,
    /// Steps done.
    step: u64,
    last_epoch: Option<Losses>,
}

impl<'a> Trainer<'a> {
    fn start(
        config: &'a Config,
        plan: &'a Plan,
        identity: &Identity,
        init: Option<&Init>,
        output: &OutputDir,
        batches: Arc<Batches>,
        probe: Option<Probe>,
    ) -> Result<Self> {
        let run = output.path();
        let config_file = write_atomic(run.join(CONFIG_FILE), config.to_toml(init.is_some())?.as_bytes())?;
        let checkpoints = Checkpoints::open(run.join(CHECKPOINT_DIRECTORY), identity, plan.keep)?;
        let mut state = TrainingState::new(config)?;
        let say = |text: &str| {
            if !plan.quiet {
                note(text);
            }
        };
        let resumed = checkpoints.resume(
            |error| note(&format!("note: a checkpoint is passed over: {error}")),
            |checkpoint| resume(&mut state, &checkpoint, run, &batches),
        )?;
        let step = resumed.as_ref().map_or(0, |(step, _)| *step);
        if let (None, Some(init)) = (&resumed, init) {
            say(&init.start(&state)?);
        }
        if !plan.quiet {
            note_cpu();
        }
        if step > 0 {
            say(&format!("resuming after step {step}"));
        } else if let Some(advice) =
            config.method.queue_size().and_then(|size| queue_advice(size, batches.shards().len()))
        {
            say(&advice);
        }
        if let Some(before) =
            resumed.as_ref().and_then(|(_, progressed)| progressed.isa).filter(|before| *before != isa())
        {
            note(&format!(
                "note: the run was computed with {before} and goes on with {}, its bytes will be those of neither; \
                 `--isa {before}` goes on as it began",
                isa()
            ));
        }
        let display = Display {
            epochs: config.epochs,
            steps: config.epochs * batches.steps_per_epoch(),
            steps_per_epoch: batches.steps_per_epoch(),
            batch_size: config.batch_size,
            log_steps: plan.log_steps,
            quiet: plan.quiet,
        };
        let position = resumed.as_ref().map(|(_, progressed)| (&progressed.metrics, progressed.epoch_sums.clone()));
        let log = TrainLog::open(run, position, step, display)?;
        let saver = Saver::new(checkpoints, plan.checkpoints, resumed.as_ref().map(|(step, _)| *step));
        let (last_epoch, best) =
            resumed.map(|(_, progressed)| (progressed.last_epoch, progressed.best)).unwrap_or_default();
        Ok(Self {
            config,
            plan,
            batches,
            run: run.to_path_buf(),
            saver,
            state,
            log,
            probe,
            best,
            config_file,
            step,
            last_epoch,
        })
    }

    fn run(mut self, output: OutputDir, watch: StopWatch) -> Result<Outcome> {
        let steps_per_epoch = self.batches.steps_per_epoch();
        let total = self.config.epochs * steps_per_epoch;
        let stop = self.plan.stop_after_steps.map_or(total, |steps| total.min(self.step.saturating_add(steps)));
        let mut batches = self.batches.prefetch(self.step..stop)?;
        while self.step < stop {
            let began = Instant::now();
            self.state.observed().look(self.log.looks_at(self.step));
            let (metrics, waited) = self.one_step(&mut batches)?;
            self.log.step(&metrics, waited, self.state.observed().spread()?)?;
            let epoch_end = self.step.is_multiple_of(steps_per_epoch).then_some(self.step / steps_per_epoch);
            let took = began.elapsed();
            if let Some(epoch) = epoch_end {
                self.last_epoch = Some(self.log.epoch(&metrics)?);
                self.probe(epoch)?;
            }
            self.saver.check()?;
            let reason = watch.reason(took).filter(|_| self.step < total);
            if reason.is_some() || self.step == total || self.saver.due(self.step, epoch_end) {
                self.save()?;
            }
            if let Some(reason) = reason {
                self.saver.wait()?;
                return Ok(self.stopped(reason));
            }
        }
        drop(batches);
        self.saver.wait()?;
        if self.step < total {
            return Ok(self.stopped(StopReason::Steps));
        }
        self.finish(output)
    }

    fn stopped(&self, reason: StopReason) -> Outcome {
        let of_steps = self.config.epochs * self.batches.steps_per_epoch();
        Outcome::Stopped { steps: self.step, of_steps, reason, speed: self.log.speed() }
    }

    /// Probes the student after an epoch, counted from 1, and keeps it when it is better than before.
    fn probe(&mut self, epoch: u64) -> Result<()> {
        let Some(probe) = self.probe.as_ref().filter(|probe| probe.due(epoch, self.config.epochs)) else {
            return Ok(());
        };
        let accuracy = probe.accuracy(self.state.query())?;
        let (epoch, step) = (epoch - 1, self.step);
        self.log.probe(epoch, step, accuracy)?;
        if self.best.as_ref().is_none_or(|best| accuracy.top1 > best.accuracy.top1) {
            let file = write_best(&self.run, self.state.query(), self.image_size())?;
            self.best = Some(BestStudent { epoch, step, accuracy, file });
        }
        Ok(())
    }

    fn image_size(&self) -> [usize; 2] {
        [self.batches.shards().height(), self.batches.shards().width()]
    }

    /// The best student, if its file is there; the last probe of a run that went on with other instructions may have replaced it.
    fn best(&self) -> Result<Option<(BestStudent, FileEntry)>> {
        let Some(best) = self.best.clone() else { return Ok(None) };
        let path = self.run.join(BEST_STUDENT_FILE);
        match path.exists().then(|| hash_file(&path)).transpose()? {
            Some(file) if file == best.file => Ok(Some((best, file))),
            _ => {
                note(&format!(
                    "warning: `{}` is not the student of step {} that was found best: the run does not list it",
                    path.display(),
                    best.step
                ));
                Ok(None)
            }
        }
    }

    fn one_step(&mut self, batches: &mut Prefetcher<Batch>) -> Result<(StepMetrics, Duration)> {
        let asked = Instant::now();
        let Some(batch) = batches.next() else {
            return Err(Error::invalid("the batches ended before the run", "please report this"));
        };
        let (batch, waited) = (batch?, asked.elapsed());
        let epoch = self.step / self.batches.steps_per_epoch();
        let lr = self.lr(epoch);
        let shuffle = batch_shuffle(self.config.batch_size, self.config.seed, self.step);
        let losses = self.state.step(&batch, &shuffle, lr)?;
        self.step += 1;
        Ok((StepMetrics { step: self.step, epoch, lr, losses }, waited))
    }

    fn lr(&self, epoch: u64) -> f64 {
        let epochs = self.config.epochs;
        let OptimisationConfig { lr, lr_unit, .. } = self.config.optimisation;
        match lr_unit {
            LrUnit::Epoch => Cosine { lr, total: epochs }.lr(epoch),
            LrUnit::Step => Cosine { lr, total: epochs * self.batches.steps_per_epoch() }.lr(self.step),
        }
    }

    fn save(&mut self) -> Result<()> {
        let (metrics, epoch_sums) = self.log.position()?;
        let steps_per_epoch = self.batches.steps_per_epoch();
        let progressed = Progressed {
            epoch: self.step / steps_per_epoch,
            position: self.step % steps_per_epoch,
            counters: self.state.counters(),
            last_epoch: self.last_epoch.clone(),
            metrics,
            epoch_sums,
            best: self.best.clone(),
            isa: Some(isa()),
        };
        self.saver.save(self.step, progressed, self.state.to_tensors()?)
    }

    fn finish(self, output: OutputDir) -> Result<Outcome> {
        let image_size = self.image_size();
        let student = write_student(output.path(), self.state.query(), image_size)?;
        let directory = self.saver.checkpoints().directory();
        let mut files = vec![self.config_file.clone(), student];
        for name in [shared::checkpoint::tensors_file_name(self.step), shared::checkpoint::record_file_name(self.step)]
        {
            let entry = hash_file(directory.join(name))?;
            files.push(FileEntry { path: format!("{CHECKPOINT_DIRECTORY}/{}", entry.path), ..entry });
        }
        let best = self.best()?.map(|(best, file)| {
            files.push(file);
            best
        });
        let details = RunDetails {
            objective: self.config.objective,
            arch: self.config.student,
            feature_width: self.config.student.feature_width(),
            head_hidden: self.config.head_hidden,
            embedding_dim: self.config.embedding_dim,
            image_size,
            checkpoint: format!("{CHECKPOINT_DIRECTORY}/{}", shared::checkpoint::tensors_file_name(self.step)),
            final_losses: self.last_epoch.clone().unwrap_or_default(),
            best,
        };
        let counts = BTreeMap::from([
            ("samples".into(), self.batches.shards().len() as u64),
            ("epochs".into(), self.config.epochs),
            ("steps".into(), self.step),
            ("images".into(), self.step * self.config.batch_size as u64),
        ]);
        let speed = self.log.speed();
        files.push(self.log.finish()?);
        let details = serde_json::to_value(details)
            .map_err(|e| Error::invalid(format!("the run's details have no JSON form: {e}"), ""))?;
        Ok(Outcome::Trained(output.finish(counts, details, files)?, speed))
    }
}

/// Takes a state from a checkpoint, after checking what it says about itself.
fn resume(
    state: &mut TrainingState,
    checkpoint: &Checkpoint<Progressed>,
    run: &Path,
    batches: &Batches,
) -> Result<(u64, Progressed)> {
    let step = checkpoint.record.step;
    let progressed = checkpoint.record.state.clone();
    let steps_per_epoch = batches.steps_per_epoch();
    if (progressed.epoch, progressed.position) != (step / steps_per_epoch, step % steps_per_epoch) {
        let what = format!("step {step} is not position {} of epoch {}", progressed.position, progressed.epoch);
        return Err(checkpoint.tensors.fault(Fault::Value(what)));
    }
    JsonLines::check(run.join(METRICS_FILE), &progressed.metrics)?;
    state.load(checkpoint, &progressed.counters)?;
    Ok((step, progressed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_need_not_name_its_instruction_set() {
        let named = Progressed {
            epoch: 1,
            position: 2,
            counters: Counters::from([("queue_pointer".into(), 3)]),
            last_epoch: None,
            metrics: LogPosition { bytes: 4, blake3: String::new() },
            epoch_sums: EpochSums::default(),
            best: None,
            isa: Some(Isa::Portable),
        };
        let mut json = serde_json::to_value(&named).unwrap();
        assert_eq!(serde_json::from_value::<Progressed>(json.clone()).unwrap(), named);
        assert!(json.as_object_mut().unwrap().remove("isa").is_some());
        assert_eq!(serde_json::from_value::<Progressed>(json).unwrap(), Progressed { isa: None, ..named });
    }
}
