//! Trains small vision models without labels: stage three of four.
//!
//! The stage reads a shard set and, to distill, the embedding set that a teacher made of it. Each step takes two stored views of every sample
//! of a batch. By momentum contrast, a query encoder learns to tell the two views of a sample from a queue of other samples' views;
//! a key encoder follows it slowly and feeds the queue. By `SwAV` it learns to predict from one crop what prototypes another one is
//! assigned to. When there is a teacher, it learns to give both views the teacher's embeddings. The result is a run: a directory
//! with the student, the losses, checkpoints and a manifest. A killed run resumes to the same bytes.
//!
//! Weights of other programs come in by `import`, or directly as the start of a run; students leave by `export`.

pub mod args;
pub mod averaging;
pub mod batches;
pub mod config;
pub mod distillation;
pub mod dry_run;
pub mod export;
pub mod import;
pub mod init;
pub mod method;
pub mod part;
pub mod probe;
pub mod ranks;
pub mod saver;
pub mod spread;
pub mod step;
pub mod stopping;
pub mod teachers;
pub mod timing;
pub mod train_log;
pub mod trainable;
pub mod trainer;
pub mod weights;

use std::path::PathBuf;

use serde::Serialize;
use shared::cli::{print, print_json, with_config_file, with_threads};
use shared::distributed::World;
use shared::manifest::Manifest;
use shared::run::{BestStudent, Losses, Objective, RunDetails, STUDENT_FILE};
use shared::signals;
use shared::{Error, Result};

pub use args::{Args, Command, ExportArgs, ImportArgs, Options, TrainArgs};
pub use config::{Config, Plan};
pub use dry_run::Planned;
pub use export::Exported;
pub use import::Imported;
pub use stopping::StopReason;
pub use timing::{Speed, Timing};
pub use trainer::Outcome;

/// What a command did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Summary {
    /// `pretrain` or `distill`.
    Trained(Trained),
    /// The same with `--dry-run`.
    Planned(Box<Planned>),
    /// `export`.
    Exported(Exported),
    /// `import`.
    Imported(Imported),
}

/// What a training came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Trained {
    /// The run.
    pub output: PathBuf,
    /// Whether it is finished.
    pub finished: bool,
    /// Whether it had been finished before this call.
    pub already_finished: bool,
    /// Steps done, over all calls.
    pub steps: u64,
    /// Steps of the whole run.
    pub of_steps: u64,
    /// Why it is not finished: the name of a signal, `time-limit`, or `stop-after-steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped_by: Option<StopReason>,
    /// Fingerprint of a finished run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// The exported backbone of a finished run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student_file: Option<PathBuf>,
    /// Means over the last epoch of a finished run.
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    pub final_losses: Option<Losses>,
    /// What the probe of a finished run found best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<BestStudent>,
    /// How fast this call was; none when there was nothing to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub this_call: Option<Speed>,
}

/// Runs a command.
///
/// # Errors
/// As [`trainer::train`], [`export::export`] and [`import::import`].
pub fn run(args: &Args) -> Result<Summary> {
    run_in(args, &World::alone())
}

/// Runs a command on one of several ranks; all know the summary.
///
/// # Errors
/// As [`run`]; [`Error::Usage`] for commands that are of no use to several ranks.
pub fn run_in(args: &Args, world: &World) -> Result<Summary> {
    match &args.command {
        Command::Distill(args) => train(Objective::Distill, args, world),
        Command::Pretrain(args) => train(Objective::Pretrain, args, world),
        Command::Export(_) | Command::Import(_) if !world.is_alone() => world
            .agree(Err(Error::usage("`export` and `import` run in one process: start them without an MPI launcher"))),
        Command::Export(args) => export::export(args).map(Summary::Exported),
        Command::Import(args) => import::import(args).map(Summary::Imported),
    }
}

/// Runs a command and, on the first rank, prints its summary on standard output.
///
/// # Errors
/// As [`run_in`], and [`signals::watch`].
pub fn run_and_print(args: &Args, world: &World) -> Result<()> {
    if matches!(args.command, Command::Distill(_) | Command::Pretrain(_)) {
        signals::watch()?;
    }
    let summary = run_in(args, world)?;
    if !world.is_first() {
        return Ok(());
    }
    let json = match &args.command {
        Command::Distill(args) | Command::Pretrain(args) => args.common.json,
        Command::Export(args) => args.json,
        Command::Import(args) => args.json,
    };
    if json { print_json(&summary) } else { print(&summary.to_string()) }
}

fn train(objective: Objective, args: &TrainArgs, world: &World) -> Result<Summary> {
    let settings = || {
        let options = with_config_file(args.config.as_deref(), &args.options)?;
        let mut plan = Plan::new(objective, &options, args)?;
        plan.quiet |= !world.is_first();
        args.compute.apply()?;
        Ok((options, plan))
    };
    let (options, plan) = world.agree(settings())?;
    if args.dry_run {
        world.agree(dry_run::check_world(world))?;
        let planned = with_threads(args.common.threads, || dry_run::plan(objective, &options, &plan, world))?;
        return Ok(Summary::Planned(Box::new(planned)));
    }
    let threads = world.default_threads()?;
    let outcome = with_threads(args.common.threads.or(threads), || trainer::train(objective, &options, &plan, world))?;
    Trained::new(plan.output, &outcome).map(Summary::Trained)
}

impl Trained {
    fn new(output: PathBuf, outcome: &Outcome) -> Result<Self> {
        let finished = |output: PathBuf, manifest: &Manifest, already_finished, this_call: Option<Speed>| {
            let details: RunDetails = serde_json::from_value(manifest.details.clone())
                .map_err(|e| Error::invalid(format!("`{}` does not describe a run: {e}", output.display()), ""))?;
            Ok(Self {
                student_file: Some(output.join(STUDENT_FILE)),
                output,
                finished: true,
                already_finished,
                steps: manifest.count("steps"),
                of_steps: manifest.count("steps"),
                stopped_by: None,
                fingerprint: Some(manifest.fingerprint.clone()),
                final_losses: Some(details.final_losses),
                best: details.best,
                this_call,
            })
        };
        match outcome {
            Outcome::Trained(manifest, speed) => finished(output, manifest, false, *speed),
            Outcome::AlreadyFinished(manifest) => finished(output, manifest, true, None),
            &Outcome::Stopped { steps, of_steps, reason, speed } => Ok(Self {
                output,
                finished: false,
                already_finished: false,
                steps,
                of_steps,
                stopped_by: Some(reason),
                fingerprint: None,
                student_file: None,
                final_losses: None,
                best: None,
                this_call: speed,
            }),
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exported(Exported { output, student, bytes, .. }) => {
                write!(f, "wrote {student} to `{}` ({bytes} bytes)", output.display())
            }
            Self::Imported(imported) => imported.fmt(f),
            Self::Planned(planned) => planned.fmt(f),
            Self::Trained(trained) => {
                let run = trained.output.display();
                match (&trained.final_losses, trained.already_finished) {
                    (None, _) => {
                        write!(f, "stopped `{run}` after step {} of {}", trained.steps, trained.of_steps)?;
                        if let Some(reason) = trained.stopped_by {
                            write!(f, " {}", reason.phrase())?;
                        }
                        f.write_str(": the same command goes on from its last checkpoint")
                    }
                    (Some(_), true) => write!(f, "`{run}` is finished already: nothing to do"),
                    (Some(losses), false) => write!(
                        f,
                        "finished `{run}` after {} steps{}: mean loss {:.4}{} in the last epoch; the student is `{}`",
                        trained.steps,
                        trained.this_call.map(phrase).unwrap_or_default(),
                        losses.loss,
                        losses.term(Losses::TOP1).map(|top1| format!(", top1 {top1:.1} %")).unwrap_or_default(),
                        trained.output.join(STUDENT_FILE).display()
                    ),
                }
            }
        }
    }
}

/// What a call came to, in words.
fn phrase(speed: Speed) -> String {
    let Speed { seconds, images_per_second, data_wait_percent } = speed;
    let time = shared::progress::time_text(seconds);
    format!(" ({time} in this call, {images_per_second:.1} images/s, {data_wait_percent:.1} % of it waiting for data)")
}
