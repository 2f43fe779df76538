//! The run from beginning to end.
//!
//! Order when starting, which is also the order when resuming:
//! 1. the shard set, the embedding set made from it, the configuration that follows from both, and the weights to start from;
//! 2. the run's directory: locked, compared with what is asked for, finished or not;
//! 3. the newest checkpoint that is whole: query and key encoder, momenta, queue and its pointer; if there is none, the
//!    weights to start from;
//! 4. `metrics.jsonl`, cut back to that checkpoint;
//! 5. the batches from its step on, made ahead;
//! 6. steps; after each epoch, and every `--checkpoint-steps`, a checkpoint;
//! 7. `student.safetensors`, and `manifest.json` last.
//!
//! Orders, views and shuffles are functions of the seed and the step, so nothing else needs to be saved.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

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
use shared::run::{CONFIG_FILE, Losses, METRICS_FILE, Objective, RunDetails, StepMetrics};
use shared::shard::ShardSet;
use shared::{Error, Fault, Result};

use crate::args::Options;
use crate::batches::{Batches, queue_advice};
use crate::config::{Config, Plan};
use crate::export::write_student;
use crate::init::Init;
use crate::method::Counters;
use crate::step::{Batch, TrainingState, batch_shuffle};
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
    /// The instruction set that computed the steps since the checkpoint before it; not known of older checkpoints.
    #[serde(default)]
    isa: Option<Isa>,
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The run was finished by this call.
    Trained(Manifest),
    /// It had been finished before.
    AlreadyFinished(Manifest),
    /// It was stopped by `--stop-after-steps`; steps done over all calls.
    Stopped(u64),
}

/// Trains, or goes on training, until the run is finished.
///
/// # Errors
/// [`Error::Usage`] for settings that make no sense for these inputs; [`Error::Chain`] when inputs, run and settings do not belong
/// together; [`Error::Invalid`] when the loss stops being finite; what reading and writing files can give.
pub fn train(objective: Objective, options: &Options, plan: &Plan) -> Result<Outcome> {
    let shards = ShardSet::open(&plan.shards)?;
    let embeddings = plan.embeddings.as_ref().map(|path| EmbeddingSet::open(path, &shards)).transpose()?;
    let config = Config::new(objective, options, embeddings.as_ref().map(EmbeddingSet::embedding_dim))?;
    let mut inputs = vec![shards.manifest().as_input(SHARDS_ROLE, &plan.shards)];
    if let (Some(embeddings), Some(path)) = (&embeddings, &plan.embeddings) {
        inputs.push(embeddings.manifest().as_input(EMBEDDINGS_ROLE, path));
    }
    let init = Init::find(plan, &config)?;
    inputs.extend(init.as_ref().map(|init| init.input().clone()));
    let batches = Arc::new(Batches::new(shards, embeddings, config.batch_size, config.seed, config.order)?);
    let identity = Identity::new(Stage::StudentTrain, &config, config.seed, inputs)?;
    let output = match OutputDir::begin(&plan.output, &identity, plan.overwrite)? {
        Begun::Finished(manifest) => return Ok(Outcome::AlreadyFinished(manifest)),
        Begun::Writing(output) => output,
    };
    Trainer::start(&config, plan, &identity, init.as_ref(), &output, batches)?.run(output)
}

struct Trainer<'a> {
    config: &'a Config,
    plan: &'a Plan,
    batches: Arc<Batches>,
    checkpoints: Checkpoints,
    state: TrainingState,
    log: TrainLog,
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
            batch_size: config.batch_size,
            quiet: plan.quiet,
        };
        let position = resumed.as_ref().map(|(_, progressed)| (&progressed.metrics, progressed.epoch_sums.clone()));
        let log = TrainLog::open(run, position, step, display)?;
        let last_epoch = resumed.and_then(|(_, progressed)| progressed.last_epoch);
        Ok(Self { config, plan, batches, checkpoints, state, log, config_file, step, last_epoch })
    }

    fn run(mut self, output: OutputDir) -> Result<Outcome> {
        let total = self.config.epochs * self.batches.steps_per_epoch();
        let stop = self.plan.stop_after_steps.map_or(total, |steps| total.min(self.step.saturating_add(steps)));
        let mut batches = self.batches.prefetch(self.step..stop)?;
        while self.step < stop {
            let (metrics, waited) = self.one_step(&mut batches)?;
            self.log.step(&metrics, waited)?;
            let epoch_ends = self.step.is_multiple_of(self.batches.steps_per_epoch());
            if epoch_ends {
                self.last_epoch = Some(self.log.epoch(&metrics)?);
            }
            let due = self.plan.checkpoint_steps.is_some_and(|steps| self.step.is_multiple_of(steps));
            if epoch_ends || due {
                self.save()?;
            }
        }
        if self.step < total {
            return Ok(Outcome::Stopped(self.step));
        }
        self.finish(output)
    }

    fn one_step(&mut self, batches: &mut Prefetcher<Batch>) -> Result<(StepMetrics, std::time::Duration)> {
        let asked = Instant::now();
        let Some(batch) = batches.next() else {
            return Err(Error::invalid("the batches ended before the run", "please report this"));
        };
        let (batch, waited) = (batch?, asked.elapsed());
        let epoch = self.step / self.batches.steps_per_epoch();
        let steps_per_epoch = self.batches.steps_per_epoch();
        let lr = self.config.optimisation.schedule(self.config.epochs, steps_per_epoch).lr(self.step);
        let shuffle = batch_shuffle(self.config.batch_size, self.config.seed, self.step);
        let losses = self.state.step(&batch, &shuffle, lr).map_err(|error| self.with_last_checkpoint(error))?;
        self.step += 1;
        Ok((StepMetrics { step: self.step, epoch, lr, losses }, waited))
    }

    /// Says of a step that cannot be used where the last state is that can.
    fn with_last_checkpoint(&self, error: Error) -> Error {
        let Error::Invalid { message, hint } = error else { return error };
        let last = self.checkpoints.steps().ok().and_then(|steps| steps.last().copied());
        let last = last.map_or_else(
            || "there is no good checkpoint yet".into(),
            |step| {
                let path = self.checkpoints.directory().join(shared::checkpoint::tensors_file_name(step));
                format!("the last good checkpoint is `{}`", path.display())
            },
        );
        Error::Invalid { message: format!("{message}; {last}"), hint }
    }

    fn save(&self) -> Result<[FileEntry; 2]> {
        let (metrics, epoch_sums) = self.log.position()?;
        let steps_per_epoch = self.batches.steps_per_epoch();
        let progressed = Progressed {
            epoch: self.step / steps_per_epoch,
            position: self.step % steps_per_epoch,
            counters: self.state.counters(),
            last_epoch: self.last_epoch.clone(),
            metrics,
            epoch_sums,
            isa: Some(isa()),
        };
        self.checkpoints.save(self.step, progressed, &self.state.to_tensors()?)
    }

    fn finish(self, output: OutputDir) -> Result<Outcome> {
        let image_size = [self.batches.shards().height(), self.batches.shards().width()];
        let student = write_student(output.path(), self.state.student(), image_size)?;
        let directory = self.checkpoints.directory();
        let mut files = vec![self.config_file, student];
        for name in [shared::checkpoint::tensors_file_name(self.step), shared::checkpoint::record_file_name(self.step)]
        {
            let entry = hash_file(directory.join(name))?;
            files.push(FileEntry { path: format!("{CHECKPOINT_DIRECTORY}/{}", entry.path), ..entry });
        }
        let details = RunDetails {
            objective: self.config.objective,
            arch: self.config.student,
            feature_width: self.config.student.feature_width(),
            head_hidden: self.config.head_hidden,
            embedding_dim: self.config.embedding_dim,
            image_size,
            checkpoint: format!("{CHECKPOINT_DIRECTORY}/{}", shared::checkpoint::tensors_file_name(self.step)),
            final_losses: self.last_epoch.clone().unwrap_or_default(),
        };
        let counts = BTreeMap::from([
            ("samples".into(), self.batches.shards().len() as u64),
            ("epochs".into(), self.config.epochs),
            ("steps".into(), self.step),
            ("images".into(), self.step * self.config.batch_size as u64),
        ]);
        files.push(self.log.finish()?);
        let details = serde_json::to_value(details)
            .map_err(|e| Error::invalid(format!("the run's details have no JSON form: {e}"), ""))?;
        Ok(Outcome::Trained(output.finish(counts, details, files)?))
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
            isa: Some(Isa::Portable),
        };
        let mut json = serde_json::to_value(&named).unwrap();
        assert_eq!(serde_json::from_value::<Progressed>(json.clone()).unwrap(), named);
        assert!(json.as_object_mut().unwrap().remove("isa").is_some());
        assert_eq!(serde_json::from_value::<Progressed>(json).unwrap(), Progressed { isa: None, ..named });
    }
}
