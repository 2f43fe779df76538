//! The run from beginning to end.
//!
//! Order when starting, which is also the order when resuming:
//! 1. the shard set, the embedding set made from it, the configuration that follows from both, and the weights to start from;
//! 2. the run's directory: locked, compared with what is asked for, finished or not;
//! 3. the newest checkpoint that is whole: encoders, prototypes, momenta, queues and their pointers; if there is none, the
//!    weights to start from;
//! 4. `metrics.jsonl`, cut back to that checkpoint;
//! 5. the batches from its step on, made ahead;
//! 6. steps; a checkpoint when one is due, and when the training is asked to stop;
//! 7. the last checkpoint, `student.safetensors`, and `manifest.json` last.
//!
//! Orders, views and shuffles are functions of the seed and the step, so nothing else needs to be saved.
//!
//! Several ranks go through this together. All read; only the first writes, and all start from the checkpoint that it chose.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shared::checkpoint::{CHECKPOINT_DIRECTORY, Checkpoint, Checkpoints};
use shared::cli::note_cpu;
use shared::data_loader::Prefetcher;
use shared::distributed::World;
use shared::embedding::{HEAD_FILE, SHARDS_ROLE};
use shared::io::{FileEntry, hash_file, write_atomic};
use shared::logging::{JsonLines, LogPosition};
use shared::manifest::{Identity, Manifest, Stage};
use shared::models::MlpHead;
use shared::ops::{Isa, isa};
use shared::output::OutputDir;
use shared::progress::note;
use shared::run::{
    BEST_STUDENT_FILE, BestStudent, CONFIG_FILE, Losses, METRICS_FILE, Objective, RunDetails, StepMetrics,
};
use shared::shard::ShardSet;
use shared::{Error, Fault, Result};

use crate::args::Options;
use crate::batches::{Batches, queue_advice};
use crate::config::{Config, HeadSource, Plan};
use crate::export::{write_best, write_student};
use crate::init::Init;
use crate::method::Counters;
use crate::probe::Probe;
use crate::ranks;
use crate::saver::Saver;
use crate::step::{Batch, TrainingState, batch_shuffle};
use crate::stopping::{StopReason, StopWatch};
use crate::teachers::Teachers;
use crate::timing::Speed;
use crate::train_log::{Display, EpochSums, TrainLog};

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
    /// The run was finished by this call; how fast it was, the first rank knows.
    Trained(Manifest, Option<Speed>),
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
        /// How fast this call was; the first rank knows.
        speed: Option<Speed>,
    },
}

/// Trains, or goes on training, until the run is finished.
///
/// # Errors
/// [`Error::Usage`] for settings that make no sense for these inputs; [`Error::Chain`] when inputs, run and settings do not belong
/// together; [`Error::Invalid`] when the loss stops being finite; what reading and writing files can give.
pub fn train(objective: Objective, options: &Options, plan: &Plan, world: &World) -> Result<Outcome> {
    let watch = StopWatch::start(plan.time_limit);
    let inputs = world.agree(Inputs::find(objective, options, plan, world))?;
    ranks::check_equal(&inputs.identity, world)?;
    let output = match ranks::begin(plan, &inputs.identity, world)? {
        Ok(output) => output,
        Err(manifest) => return Ok(Outcome::AlreadyFinished(manifest)),
    };
    Trainer::start(&inputs, plan, output.as_ref(), world)?.run(output, watch)
}

/// What a run is made from.
pub(crate) struct Inputs {
    pub(crate) config: Config,
    pub(crate) init: Option<Init>,
    pub(crate) batches: Arc<Batches>,
    pub(crate) identity: Identity,
    pub(crate) probe: Option<Probe>,
    /// What the student's adapter feeds.
    pub(crate) teacher_head: Option<Arc<MlpHead>>,
}

impl Inputs {
    /// Opens the inputs, checks them against each other, and resolves the configuration; writes nothing.
    pub(crate) fn find(objective: Objective, options: &Options, plan: &Plan, world: &World) -> Result<Self> {
        let shards = ShardSet::open(&plan.shards)?;
        let teachers = Teachers::open(&plan.embeddings, &shards, options.ensemble)?;
        let mut config = Config::new(objective, options, teachers.as_ref().map(Teachers::embedding_dim))?;
        let teacher_head = match (&teachers, config.head_source) {
            (Some(teachers), HeadSource::Retro) => Some(Arc::new(teachers.head()?)),
            _ => None,
        };
        if let Some(head) = &teacher_head {
            config.reuse_head(head.config());
        }
        ranks::check_shares(&config, world)?;
        let mut inputs = vec![shards.manifest().as_input(SHARDS_ROLE, &plan.shards)];
        inputs.extend(teachers.iter().flat_map(Teachers::as_inputs));
        let init = Init::find(plan, &config)?;
        inputs.extend(init.as_ref().map(|init| init.input().clone()));
        let probe = match (&plan.probe, config.probe) {
            (Some(paths), Some(config)) => Some(Probe::open(paths, config, &shards)?),
            _ => None,
        };
        inputs.extend(probe.iter().flat_map(Probe::inputs));
        let batches = Batches::new(shards, teachers, config.batch_size, config.seed, config.order)?;
        let mut batches = batches.shared_out(world, config.method.shuffles_keys());
        if config.method.sees_local_views() {
            batches = batches.with_local_views()?;
        }
        let batches = Arc::new(batches);
        let identity = Identity::new(Stage::StudentTrain, &config, config.seed, inputs)?;
        Ok(Self { config, init, batches, identity, probe, teacher_head })
    }
}

struct Trainer<'a> {
    config: &'a Config,
    plan: &'a Plan,
    world: &'a World,
    batches: Arc<Batches>,
    teacher_head: Option<&'a MlpHead>,
    state: TrainingState,
    /// Of the first rank only.
    writer: Option<Writer<'a>>,
    /// Steps done.
    step: u64,
    last_epoch: Option<Losses>,
}

/// What writes the run.
struct Writer<'a> {
    saver: Saver,
    log: TrainLog,
    probe: Option<&'a Probe>,
    /// What the probe found best so far.
    best: Option<BestStudent>,
    config_file: FileEntry,
}

impl<'a> Trainer<'a> {
    fn start(inputs: &'a Inputs, plan: &'a Plan, output: Option<&OutputDir>, world: &'a World) -> Result<Self> {
        let Inputs { config, init, batches, identity, probe, teacher_head } = inputs;
        let (init, batches) = (init.as_ref(), Arc::clone(batches));
        let run = plan.output.as_path();
        let mut state = TrainingState::with_teacher_head(config, teacher_head.clone())?.in_world(world.clone());
        let directory = run.join(CHECKPOINT_DIRECTORY);
        let checkpoints = match output {
            Some(_) => Checkpoints::open(directory, identity, plan.keep)?,
            None => Checkpoints::reading(directory, identity, plan.keep),
        };
        let mut resumed = None;
        if output.is_some() {
            resumed = checkpoints.resume(
                |error| note(&format!("note: a checkpoint is passed over: {error}")),
                |checkpoint| resume(&mut state, &checkpoint, run, &batches),
            )?;
        }
        let step = world.broadcast(output.map(|_| resumed.as_ref().map(|(step, _)| *step)))?;
        if let (Some(step), None) = (step, output) {
            resumed = Some(resume(&mut state, &checkpoints.load(step)?, run, &batches)?);
        }
        let step = step.unwrap_or(0);
        let say = |text: &str| {
            if !plan.quiet {
                note(text);
            }
        };
        if let (None, Some(init)) = (&resumed, init) {
            say(&init.start(&state)?);
        }
        if !plan.quiet {
            note_cpu();
        }
        if !world.is_alone() {
            say(&format!("{} ranks, {} samples of each batch on each", world.size(), config.batch_size / world.size()));
        }
        if step > 0 {
            say(&format!("resuming after step {step}"));
        } else if let Some(advice) =
            config.method.queue_size().and_then(|size| queue_advice(size, batches.shards().len()))
        {
            say(&advice);
        }
        if let Some(before) = resumed
            .as_ref()
            .and_then(|(_, progressed)| progressed.isa)
            .filter(|before| *before != isa() && world.is_first())
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
        let writer = output
            .map(|_| {
                let config_file = write_atomic(run.join(CONFIG_FILE), config.to_toml(init.is_some())?.as_bytes())?;
                let log = TrainLog::open(run, position, step, display)?;
                let saver = Saver::new(checkpoints, plan.checkpoints, resumed.as_ref().map(|(step, _)| *step));
                let best = resumed.as_ref().and_then(|(_, progressed)| progressed.best.clone());
                Ok::<_, Error>(Writer { saver, log, probe: probe.as_ref(), best, config_file })
            })
            .transpose()?;
        let last_epoch = resumed.and_then(|(_, progressed)| progressed.last_epoch);
        let teacher_head = teacher_head.as_deref();
        Ok(Self { config, plan, world, batches, teacher_head, state, writer, step, last_epoch })
    }

    fn run(mut self, output: Option<OutputDir>, watch: StopWatch) -> Result<Outcome> {
        let total = self.config.epochs * self.batches.steps_per_epoch();
        let stop = self.plan.stop_after_steps.map_or(total, |steps| total.min(self.step.saturating_add(steps)));
        let mut batches = self.batches.prefetch(self.step..stop)?;
        while self.step < stop {
            let began = Instant::now();
            let looks = self.writer.as_ref().is_some_and(|writer| writer.log.looks_at(self.step));
            self.state.observed().look(looks);
            let (metrics, waited) = self.one_step(&mut batches)?;
            let reason = ranks::reason_to_stop(watch.reason(began.elapsed()), self.world)?;
            let reason = reason.filter(|_| self.step < total);
            self.write(&metrics, waited, reason.is_some() || self.step == total)?;
            if let Some(reason) = reason {
                return Ok(self.stopped(reason));
            }
        }
        drop(batches);
        if self.step < total {
            self.wait()?;
            return Ok(self.stopped(StopReason::Steps));
        }
        let world = self.world;
        let speed = self.speed();
        let manifest = self.finish(output)?;
        Ok(Outcome::Trained(world.broadcast(manifest)?, speed))
    }

    /// Reports a step, and saves when it is the last one of this call or a checkpoint is due.
    fn write(&mut self, metrics: &StepMetrics, waited: Duration, last: bool) -> Result<()> {
        let image_size = self.image_size();
        let Some(Writer { saver, log, probe, best, .. }) = &mut self.writer else { return Ok(()) };
        log.step(metrics, waited, self.state.observed().spread()?)?;
        let steps_per_epoch = self.batches.steps_per_epoch();
        let epoch_end = self.step.is_multiple_of(steps_per_epoch).then_some(self.step / steps_per_epoch);
        if let Some(epoch) = epoch_end {
            self.last_epoch = Some(log.epoch(metrics)?);
            if let Some(probe) = probe.filter(|probe| probe.due(epoch, self.config.epochs)) {
                let accuracy = probe.accuracy(self.state.student())?;
                log.probe(metrics.epoch, self.step, accuracy)?;
                if best.as_ref().is_none_or(|best| accuracy.top1 > best.accuracy.top1) {
                    let file = write_best(&self.plan.output, self.state.student(), image_size)?;
                    *best = Some(BestStudent { epoch: metrics.epoch, step: self.step, accuracy, file });
                }
            }
        }
        saver.check()?;
        if last || saver.due(self.step, epoch_end) {
            self.save()?;
        }
        if last { self.wait() } else { Ok(()) }
    }

    /// Waits until all checkpoints are written.
    fn wait(&mut self) -> Result<()> {
        self.writer.as_mut().map_or(Ok(()), |writer| writer.saver.wait())
    }

    fn stopped(&self, reason: StopReason) -> Outcome {
        let of_steps = self.config.epochs * self.batches.steps_per_epoch();
        Outcome::Stopped { steps: self.step, of_steps, reason, speed: self.speed() }
    }

    fn speed(&self) -> Option<Speed> {
        self.writer.as_ref().map(|writer| writer.log.speed())
    }

    fn image_size(&self) -> [usize; 2] {
        [self.batches.shards().height(), self.batches.shards().width()]
    }

    fn one_step(&mut self, batches: &mut Prefetcher<Batch>) -> Result<(StepMetrics, Duration)> {
        let asked = Instant::now();
        let Some(batch) = batches.next() else {
            return Err(Error::invalid("the batches ended before the run", "please report this"));
        };
        let (batch, waited) = (batch?, asked.elapsed());
        let steps_per_epoch = self.batches.steps_per_epoch();
        let epoch = self.step / steps_per_epoch;
        let lr = self.config.optimisation.schedule(self.config.epochs, steps_per_epoch).lr(self.step);
        let shuffle = batch_shuffle(self.config.batch_size, self.config.seed, self.step);
        let losses = match self.state.step(&batch, &shuffle, lr) {
            Ok(losses) => losses,
            Err(error) => return Err(self.with_last_checkpoint(error)),
        };
        self.step += 1;
        Ok((StepMetrics { step: self.step, epoch, lr, losses }, waited))
    }

    /// Says of a step that cannot be used where the last state is that can.
    fn with_last_checkpoint(&mut self, error: Error) -> Error {
        let Error::Invalid { message, hint } = error else { return error };
        let Some(Writer { saver, .. }) = &mut self.writer else { return Error::Invalid { message, hint } };
        // One may be on its way; if it cannot be written, those before it count.
        drop(saver.wait());
        let checkpoints = saver.checkpoints();
        let last = checkpoints.steps().ok().and_then(|steps| steps.last().copied());
        let last = last.map_or_else(
            || "there is no good checkpoint yet".into(),
            |step| {
                let path = checkpoints.directory().join(shared::checkpoint::tensors_file_name(step));
                format!("the last good checkpoint is `{}`", path.display())
            },
        );
        Error::Invalid { message: format!("{message}; {last}"), hint }
    }

    fn save(&mut self) -> Result<()> {
        let Some(Writer { saver, log, best, .. }) = &mut self.writer else { return Ok(()) };
        let (metrics, epoch_sums) = log.position()?;
        let steps_per_epoch = self.batches.steps_per_epoch();
        let progressed = Progressed {
            epoch: self.step / steps_per_epoch,
            position: self.step % steps_per_epoch,
            counters: self.state.counters(),
            last_epoch: self.last_epoch.clone(),
            metrics,
            epoch_sums,
            best: best.clone(),
            isa: Some(isa()),
        };
        saver.save(self.step, progressed, self.state.to_tensors()?)
    }

    /// The manifest of the finished run; none but on the first rank.
    fn finish(self, output: Option<OutputDir>) -> Result<Option<Manifest>> {
        let image_size = self.image_size();
        let (Some(Writer { saver, log, best, config_file, .. }), Some(output)) = (self.writer, output) else {
            return Ok(None);
        };
        let student = write_student(output.path(), self.state.student(), image_size)?;
        let directory = saver.checkpoints().directory();
        let mut files = vec![config_file, student];
        if let Some(head) = self.teacher_head {
            files.push(head.write(output.path().join(HEAD_FILE))?);
        }
        for name in [shared::checkpoint::tensors_file_name(self.step), shared::checkpoint::record_file_name(self.step)]
        {
            let entry = hash_file(directory.join(name))?;
            files.push(FileEntry { path: format!("{CHECKPOINT_DIRECTORY}/{}", entry.path), ..entry });
        }
        let best = best.map(|best| check_best(output.path(), best)).transpose()?.flatten();
        files.extend(best.iter().map(|best| best.file.clone()));
        let details = RunDetails {
            objective: self.config.objective,
            arch: self.config.student,
            feature_width: self.config.student.feature_width(),
            head: self.config.head().kind,
            head_hidden: self.config.head_hidden,
            embedding_dim: self.config.embedding_dim,
            adapter_width: self.config.adapter_width,
            image_size,
            checkpoint: format!("{CHECKPOINT_DIRECTORY}/{}", shared::checkpoint::tensors_file_name(self.step)),
            averaged: self.config.optimisation.ema_decay.is_some(),
            final_losses: self.last_epoch.clone().unwrap_or_default(),
            best,
        };
        let counts = BTreeMap::from([
            ("samples".into(), self.batches.shards().len() as u64),
            ("epochs".into(), self.config.epochs),
            ("steps".into(), self.step),
            ("images".into(), self.step * self.config.batch_size as u64),
        ]);
        files.push(log.finish()?);
        let details = serde_json::to_value(details)
            .map_err(|e| Error::invalid(format!("the run's details have no JSON form: {e}"), ""))?;
        output.finish(counts, details, files).map(Some)
    }
}

/// The best student, if its file is there still: a later one replaces it, which a run that goes on with another instruction set
/// may not find again.
fn check_best(run: &Path, best: BestStudent) -> Result<Option<BestStudent>> {
    let path = run.join(BEST_STUDENT_FILE);
    let found = path.exists().then(|| hash_file(&path)).transpose()?;
    if found.as_ref() == Some(&best.file) {
        return Ok(Some(best));
    }
    let step = best.step;
    note(&format!(
        "warning: `{}` is not the student that was found best, in step {step}: it is left out",
        path.display()
    ));
    Ok(None)
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
