//! What a run is made from and how it is carried out; no byte of the result depends on the latter.

use std::path::PathBuf;
use std::time::Duration;

use shared::run::Objective;
use shared::{Error, Result};

use super::DistillationConfig;
use crate::args::{Options, TrainArgs};
use crate::config::{ProbePaths, TimeLimit};
use crate::saver::CheckpointPolicy;

/// How old the last checkpoint may grow unless told otherwise.
const CHECKPOINT_MINUTES: f64 = 10.0;
/// Steps between points of `TensorBoard` unless told otherwise.
const LOG_STEPS: u64 = 10;

/// What a run is made from and how it is carried out; no byte of the result depends on the latter.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The pixels.
    pub shards: PathBuf,
    /// The embeddings of every teacher; none for `pretrain`.
    pub embeddings: Vec<PathBuf>,
    /// What to start from; drawn weights if none.
    pub init: Option<PathBuf>,
    /// The run.
    pub output: PathBuf,
    /// When checkpoints are written.
    pub checkpoints: CheckpointPolicy,
    /// Checkpoints that stay.
    pub keep: usize,
    /// The sets of the probe, if there is one.
    pub probe: Option<ProbePaths>,
    /// Steps between points of `TensorBoard`.
    pub log_steps: u64,
    /// How long this call may train.
    pub time_limit: Option<Duration>,
    /// Steps after which to stop as if killed.
    pub stop_after_steps: Option<u64>,
    /// Start again.
    pub overwrite: bool,
    /// Show no progress.
    pub quiet: bool,
}

impl Plan {
    /// Picks the plan out of the options.
    ///
    /// # Errors
    /// [`Error::Usage`] when a path is missing or makes no sense, or a number is 0.
    pub fn new(objective: Objective, options: &Options, args: &TrainArgs) -> Result<Self> {
        let required = |path: &Option<PathBuf>, flag: &str| {
            path.clone().ok_or_else(|| Error::usage(format!("`{}` needs `--{flag}`", objective.name())))
        };
        let embeddings = match objective {
            Objective::Distill => {
                let given = options.embeddings.clone().filter(|sets| !sets.is_empty());
                given.ok_or_else(|| Error::usage("`distill` needs `--embeddings`"))?
            }
            Objective::Pretrain => match DistillationConfig::given(options) {
                Some(flag) => {
                    let message = format!("`pretrain` has no teacher and takes no `--{flag}`: use `distill`");
                    return Err(Error::usage(message));
                }
                None => Vec::new(),
            },
        };
        let keep = options.keep.unwrap_or(2);
        for (flag, value) in [
            ("checkpoint-steps", options.checkpoint_steps),
            ("checkpoint-epochs", options.checkpoint_epochs),
            ("keep", Some(keep as u64)),
            ("log-steps", options.log_steps),
        ] {
            if value == Some(0) {
                return Err(Error::usage(format!("`--{flag}` must be at least 1")));
            }
        }
        if options.init_head == Some(true) && options.init.is_none() {
            return Err(Error::usage("`--init-head` needs `--init`, which names the weights to take the head from"));
        }
        Ok(Self {
            shards: required(&options.shards, "shards")?,
            embeddings,
            init: options.init.clone(),
            output: required(&options.output, "output")?,
            checkpoints: CheckpointPolicy {
                steps: options.checkpoint_steps,
                epochs: options.checkpoint_epochs,
                interval: minutes("checkpoint-minutes", options.checkpoint_minutes.unwrap_or(CHECKPOINT_MINUTES))?,
            },
            keep,
            probe: options.probe_train.clone().map(|train| ProbePaths { train, val: options.probe_val.clone() }),
            log_steps: options.log_steps.unwrap_or(LOG_STEPS),
            time_limit: options.time_limit.map(TimeLimit::duration),
            stop_after_steps: args.stop_after_steps,
            overwrite: args.common.overwrite,
            quiet: args.common.quiet,
        })
    }
}

fn minutes(flag: &str, minutes: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(60.0 * minutes)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| Error::usage(format!("`--{flag}` must be a positive number, got {minutes}")))
}
