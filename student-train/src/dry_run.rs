//! What a training would be and need, without a step of it: `--dry-run`.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;
use shared::checkpoint::{CHECKPOINT_DIRECTORY, Checkpoints};
use shared::distributed::World;
use shared::manifest::{Input, short};
use shared::models::kept_values;
use shared::output::{Found, look_at};
use shared::run::Objective;
use shared::space::{free_bytes, human};
use shared::{Error, Result};

use crate::args::Options;
use crate::batches::BATCHES_IN_MEMORY;
use crate::config::Plan;
use crate::step::TrainingState;
use crate::trainer::Inputs;

/// How the run's directory would be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// A new run.
    New,
    /// Begun and goes on.
    Resumes,
    /// Finished: nothing to do.
    Finished,
    /// Replaced because of `--overwrite`.
    Replaced,
}

/// A training that was not begun.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Planned {
    /// The run.
    pub output: PathBuf,
    /// How its directory would be found.
    pub state: RunState,
    /// Steps of the last checkpoint.
    pub steps_done: u64,
    /// Every setting that decides the bytes of the run.
    pub config: Value,
    /// The same as the file that the run would hold.
    #[serde(skip)]
    pub config_toml: String,
    /// What it is made from.
    pub inputs: Vec<Input>,
    /// Of the shard set.
    pub samples: u64,
    /// Whole batches.
    pub steps_per_epoch: u64,
    /// Of the whole run.
    pub steps: u64,
    /// Trainable values.
    pub parameters: u64,
    /// Memory that a step takes, roughly.
    pub memory_bytes: u64,
    /// Of one checkpoint.
    pub checkpoint_bytes: u64,
    /// Checkpoints that stay, and one that is being written.
    pub disk_bytes: u64,
    /// Left on the disk of the run, where the system tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
}

/// Opens the inputs and resolves the configuration as a training does, and counts what it needs. Nothing is written.
///
/// # Errors
/// As [`crate::trainer::train`] before its first step.
pub fn plan(objective: Objective, options: &Options, plan: &Plan, world: &World) -> Result<Planned> {
    let Inputs { config, init, batches, identity, teacher_head, .. } = Inputs::find(objective, options, plan, world)?;
    let found = look_at(&plan.output, &identity, plan.overwrite)?;
    let steps_per_epoch = batches.steps_per_epoch();
    let steps = config.epochs * steps_per_epoch;
    let (state, steps_done) = match &found {
        Found::New => (RunState::New, 0),
        Found::Replaced => (RunState::Replaced, 0),
        Found::Finished(_) => (RunState::Finished, steps),
        Found::Unfinished => {
            let directory = plan.output.join(CHECKPOINT_DIRECTORY);
            let checkpoints = Checkpoints::reading(&directory, &identity, plan.keep);
            let done = if directory.is_dir() { checkpoints.steps()?.last().copied() } else { None };
            (RunState::Resumes, done.unwrap_or(0))
        }
    };
    let training = TrainingState::with_teacher_head(&config, teacher_head)?;
    let checkpoint_bytes = training.checkpoint_bytes()?;
    let parameters = training.num_parameters() as u64;
    let size = [batches.shards().height(), batches.shards().width()];
    let float = size_of::<f32>() as u64;
    let rows = config.batch_size as u64;
    // Activations of one view of one piece, gradients, the views of the batches ahead.
    let activations = kept_values(config.student, size)? * rows / config.accumulate as u64 * float;
    let views = BATCHES_IN_MEMORY as u64 * 2 * rows * (size[0] * size[1] * 3) as u64 * float;
    let memory_bytes = checkpoint_bytes + parameters * float + activations + views;
    Ok(Planned {
        output: plan.output.clone(),
        state,
        steps_done,
        config: identity.config.clone(),
        config_toml: config.to_toml(init.is_some())?,
        inputs: identity.inputs,
        samples: batches.shards().len() as u64,
        steps_per_epoch,
        steps,
        parameters,
        memory_bytes,
        checkpoint_bytes,
        disk_bytes: checkpoint_bytes.saturating_mul(plan.keep as u64 + 1),
        free_bytes: free_bytes(&plan.output),
    })
}

impl std::fmt::Display for Planned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.config_toml.trim_end())?;
        writeln!(f)?;
        for Input { role, path, fingerprint } in &self.inputs {
            writeln!(f, "# {role}: `{path}`, fingerprint {}", short(fingerprint))?;
        }
        let Self { samples, steps_per_epoch, steps, parameters, .. } = self;
        writeln!(f, "# {samples} samples, {steps_per_epoch} steps an epoch, {steps} steps, {parameters} parameters")?;
        let free = self.free_bytes.map(|free| format!(", {} free", human(free))).unwrap_or_default();
        let [memory, checkpoint, disk] = [self.memory_bytes, self.checkpoint_bytes, self.disk_bytes].map(human);
        writeln!(f, "# about {memory} of memory; {checkpoint} a checkpoint, {disk} of disk at most{free}")?;
        let output = self.output.display();
        match self.state {
            RunState::New => write!(f, "# `{output}` would be a new run"),
            RunState::Resumes => write!(f, "# `{output}` would go on after step {}", self.steps_done),
            RunState::Finished => write!(f, "# `{output}` is finished already: nothing to do"),
            RunState::Replaced => write!(f, "# `{output}` would be replaced"),
        }
    }
}

/// Refuses what only a training can do.
///
/// # Errors
/// [`Error::Usage`] for several ranks.
pub fn check_world(world: &World) -> Result<()> {
    if world.is_alone() {
        return Ok(());
    }
    Err(Error::usage("`--dry-run` runs in one process: start it without an MPI launcher"))
}
