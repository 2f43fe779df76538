//! Validated settings: what decides the bytes of a run, and what only decides how it is carried out.

use std::path::PathBuf;

use serde::Serialize;
use shared::data_loader::Order;
use shared::models::{Arch, HeadConfig};
use shared::run::Objective;
use shared::{Error, Result};

use crate::args::{LrUnit, Options, TrainArgs};

/// Samples that share batch-norm statistics unless told otherwise: those of one GPU in the official setting.
const BN_GROUP_SAMPLES: usize = 32;
/// The batch size that the default learning rate is meant for.
const DEFAULT_BATCH_SIZE: usize = 256;
/// The official width of an embedding.
const DEFAULT_EMBEDDING_DIM: usize = 128;
/// The official sum over 32 samples per GPU, as a weight of the mean.
const DEFAULT_DISTILL_WEIGHT: f64 = 32.0;

/// Everything that decides the bytes of a run, besides its inputs; the manifest records it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    /// Whether there is a teacher.
    pub objective: Objective,
    /// The backbone.
    pub student: Arch,
    /// Passes over the set.
    pub epochs: u64,
    /// B.
    pub batch_size: usize,
    /// Groups with batch-norm statistics of their own.
    pub bn_groups: usize,
    /// At the start.
    pub lr: f64,
    /// What the cosine counts.
    pub lr_unit: LrUnit,
    /// Of the gradient descent.
    pub momentum: f64,
    /// On all parameters.
    pub weight_decay: f64,
    /// K.
    pub queue_size: usize,
    /// Of the contrastive loss.
    pub temperature: f64,
    /// What the key encoder keeps of itself.
    pub key_momentum: f64,
    /// Hidden width of the head.
    pub head_hidden: usize,
    /// D.
    pub embedding_dim: usize,
    /// Per view; none without a teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distill_weight: Option<f64>,
    /// Whether the head comes from the weights that the run starts from.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub init_head: bool,
    /// In which an epoch takes the samples; not named when it is the usual one.
    #[serde(skip_serializing_if = "is_random")]
    pub order: Order,
    /// Of everything random.
    pub seed: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_random(order: &Order) -> bool {
    *order == Order::Random
}

/// What a run is made from and how it is carried out; no byte of the result depends on the latter.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The pixels.
    pub shards: PathBuf,
    /// The teacher's embeddings; none for `pretrain`.
    pub embeddings: Option<PathBuf>,
    /// What to start from; drawn weights if none.
    pub init: Option<PathBuf>,
    /// The run.
    pub output: PathBuf,
    /// Additional checkpoints; none at epochs only.
    pub checkpoint_steps: Option<u64>,
    /// Checkpoints that stay.
    pub keep: usize,
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
            Objective::Distill => Some(required(&options.embeddings, "embeddings")?),
            Objective::Pretrain => {
                for (given, flag) in
                    [(options.embeddings.is_some(), "embeddings"), (options.distill_weight.is_some(), "distill-weight")]
                {
                    if given {
                        let message = format!("`pretrain` has no teacher and takes no `--{flag}`: use `distill`");
                        return Err(Error::usage(message));
                    }
                }
                None
            }
        };
        if options.checkpoint_steps == Some(0) || options.keep == Some(0) {
            return Err(Error::usage("`--checkpoint-steps` and `--keep` must be at least 1"));
        }
        if options.init_head == Some(true) && options.init.is_none() {
            return Err(Error::usage("`--init-head` needs `--init`, which names the weights to take the head from"));
        }
        Ok(Self {
            shards: required(&options.shards, "shards")?,
            embeddings,
            init: options.init.clone(),
            output: required(&options.output, "output")?,
            checkpoint_steps: options.checkpoint_steps,
            keep: options.keep.unwrap_or(2),
            stop_after_steps: args.stop_after_steps,
            overwrite: args.common.overwrite,
            quiet: args.common.quiet,
        })
    }
}

impl Config {
    /// Fills in the defaults and checks every value.
    ///
    /// `teacher_dim` is the width of the cached embeddings, which the student's must have.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the flag.
    pub fn new(objective: Objective, options: &Options, teacher_dim: Option<usize>) -> Result<Self> {
        let batch_size = options.batch_size.unwrap_or(DEFAULT_BATCH_SIZE);
        let distill_weight =
            (objective == Objective::Distill).then(|| options.distill_weight.unwrap_or(DEFAULT_DISTILL_WEIGHT));
        let config = Self {
            objective,
            student: options.student.unwrap_or(Arch::ResNet18),
            epochs: options.epochs.unwrap_or(200),
            batch_size,
            bn_groups: options.bn_groups.unwrap_or_else(|| default_bn_groups(batch_size)),
            lr: options.lr.unwrap_or(0.03),
            lr_unit: options.lr_unit.unwrap_or_default(),
            momentum: options.momentum.unwrap_or(0.9),
            weight_decay: options.weight_decay.unwrap_or(1e-4),
            queue_size: options.queue_size.unwrap_or(65536),
            temperature: options.temperature.unwrap_or(0.2),
            key_momentum: options.key_momentum.unwrap_or(0.999),
            head_hidden: options.head_hidden.unwrap_or(2048),
            embedding_dim: embedding_dim(options.embedding_dim, teacher_dim)?,
            distill_weight,
            init_head: options.init_head.unwrap_or(false),
            order: options.order.unwrap_or_default(),
            seed: options.seed.unwrap_or(0),
        };
        config.check()?;
        Ok(config)
    }

    /// The widths of the projection head.
    pub fn head(&self) -> HeadConfig {
        HeadConfig { hidden: self.head_hidden, embedding_dim: self.embedding_dim }
    }

    /// This configuration as a TOML file that repeats the run; `init` tells whether that needs weights to start from.
    ///
    /// # Errors
    /// [`Error::Usage`] when a number does not fit TOML.
    pub fn to_toml(&self, init: bool) -> Result<String> {
        let mut table = toml::Table::try_from(self).map_err(|e| Error::usage(format!("no TOML form: {e}")))?;
        table.remove("objective");
        let embeddings = if self.objective == Objective::Distill { " --embeddings EMBEDDINGS" } else { "" };
        let init = if init { " --init INIT" } else { "" };
        let name = self.objective.name();
        Ok(format!(
            "# Repeat with: student-train {name} --config config.toml --shards SHARDS{embeddings}{init} --output RUN\n{table}"
        ))
    }

    fn check(&self) -> Result<()> {
        let at_least = |flag: &str, value: u64, least: u64| {
            let wrong = || Error::usage(format!("`--{flag}` must be at least {least}, got {value}"));
            if value < least { Err(wrong()) } else { Ok(()) }
        };
        at_least("epochs", self.epochs, 1)?;
        at_least("batch-size", self.batch_size as u64, 2)?;
        at_least("bn-groups", self.bn_groups as u64, 1)?;
        at_least("head-hidden", self.head_hidden as u64, 1)?;
        at_least("embedding-dim", self.embedding_dim as u64, 1)?;
        let Self { batch_size, bn_groups, queue_size, .. } = *self;
        if !batch_size.is_multiple_of(bn_groups) || batch_size / bn_groups < 2 {
            return Err(Error::usage(format!(
                "`--bn-groups` {bn_groups} must divide `--batch-size` {batch_size} into groups of at least 2 samples"
            )));
        }
        if queue_size < batch_size {
            let message =
                format!("`--queue-size` {queue_size} must hold at least one `--batch-size` of {batch_size} keys");
            return Err(Error::usage(message));
        }
        within("lr", self.lr, self.lr > 0.0, "positive")?;
        within("momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "at least 0 and below 1")?;
        within("weight-decay", self.weight_decay, self.weight_decay >= 0.0, "at least 0")?;
        within("temperature", self.temperature, self.temperature > 0.0, "positive")?;
        within("key-momentum", self.key_momentum, (0.0..=1.0).contains(&self.key_momentum), "from 0 to 1")?;
        let weight = self.distill_weight.unwrap_or(0.0);
        within("distill-weight", weight, weight >= 0.0, "at least 0")
    }
}

fn within(flag: &str, value: f64, fits: bool, range: &str) -> Result<()> {
    if fits && value.is_finite() {
        return Ok(());
    }
    Err(Error::usage(format!("`--{flag}` must be {range}, got {value}")))
}

/// One group for every 32 samples, or the next smaller number that divides the batch.
fn default_bn_groups(batch_size: usize) -> usize {
    (1..=(batch_size / BN_GROUP_SAMPLES).max(1)).rev().find(|&groups| batch_size.is_multiple_of(groups)).unwrap_or(1)
}

fn embedding_dim(asked: Option<usize>, teacher: Option<usize>) -> Result<usize> {
    match (asked, teacher) {
        (Some(asked), Some(teacher)) if asked != teacher => Err(Error::usage(format!(
            "`--embedding-dim` {asked} differs from the teacher's embeddings, {teacher} wide"
        ))),
        (asked, teacher) => Ok(teacher.or(asked).unwrap_or(DEFAULT_EMBEDDING_DIM)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(options: Options) -> String {
        let error = Config::new(Objective::Distill, &options, Some(128)).unwrap_err();
        assert_eq!(error.exit_status(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn defaults_are_the_official_settings() {
        let config = Config::new(Objective::Distill, &Options::default(), Some(64)).unwrap();
        assert_eq!((config.batch_size, config.bn_groups, config.queue_size), (256, 8, 65536));
        assert_eq!((config.lr, config.momentum, config.weight_decay), (0.03, 0.9, 1e-4));
        assert_eq!((config.temperature, config.key_momentum), (0.2, 0.999));
        assert_eq!((config.head_hidden, config.embedding_dim), (2048, 64));
        assert_eq!(config.distill_weight, Some(32.0));
        let config = Config::new(Objective::Pretrain, &Options::default(), None).unwrap();
        assert_eq!((config.embedding_dim, config.distill_weight), (128, None));
    }

    #[test]
    fn default_groups_divide_the_batch() {
        for (batch, groups) in [(2, 1), (31, 1), (64, 2), (100, 2), (256, 8), (192, 6), (97, 1)] {
            assert_eq!(default_bn_groups(batch), groups, "{batch}");
        }
    }

    #[test]
    fn senseless_values_are_named() {
        let cases: [(Options, &str); 12] = [
            (Options { epochs: Some(0), ..Options::default() }, "--epochs"),
            (Options { batch_size: Some(1), ..Options::default() }, "--batch-size"),
            (Options { bn_groups: Some(3), ..Options::default() }, "--bn-groups"),
            (Options { bn_groups: Some(256), ..Options::default() }, "--bn-groups"),
            (Options { queue_size: Some(255), ..Options::default() }, "--queue-size"),
            (Options { lr: Some(-0.1), ..Options::default() }, "--lr"),
            (Options { lr: Some(f64::NAN), ..Options::default() }, "--lr"),
            (Options { momentum: Some(1.0), ..Options::default() }, "--momentum"),
            (Options { weight_decay: Some(-1.0), ..Options::default() }, "--weight-decay"),
            (Options { temperature: Some(0.0), ..Options::default() }, "--temperature"),
            (Options { key_momentum: Some(1.5), ..Options::default() }, "--key-momentum"),
            (Options { embedding_dim: Some(64), ..Options::default() }, "--embedding-dim"),
        ];
        for (options, flag) in cases {
            let message = error(options);
            assert!(message.contains(&format!("`{flag}`")), "{message}");
        }
    }

    #[test]
    fn resolved_file_repeats_the_run() {
        for order in [None, Some(Order::Random), Some(Order::Quasi)] {
            let options = Options { lr: Some(0.1 + 0.2), batch_size: Some(64), order, ..Options::default() };
            let config = Config::new(Objective::Distill, &options, Some(16)).unwrap();
            let text = config.to_toml(false).unwrap();
            // Runs of the usual order go on whether it was named or not.
            assert_eq!(text.contains("order"), order == Some(Order::Quasi));
            let read: Options = toml::from_str(&text).unwrap();
            assert_eq!(Config::new(Objective::Distill, &read, Some(16)).unwrap(), config);
        }
    }

    #[test]
    fn experiments_are_valid() {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let mut experiments = Vec::new();
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let options: Options = toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            for objective in [Objective::Pretrain, Objective::Distill] {
                experiments.push(Config::new(objective, &options, None).unwrap());
            }
            assert!(text.lines().any(|line| line.starts_with("#   student-train ")), "{}", path.display());
        }
        let widths =
            |student| experiments.iter().filter(move |config| config.student == student).map(|c| c.head_hidden);
        // The students of the paper, and the two widths of its narrow heads.
        for student in [
            Arch::ResNet18,
            Arch::ResNet34,
            Arch::EfficientNetB0,
            Arch::EfficientNetB1,
            Arch::MobileNetV3Large,
            Arch::VitTinyPatch16,
            Arch::XcitTiny12Patch16,
        ] {
            assert!(widths(student).any(|width| width == 2048), "{student}");
        }
        assert!(widths(Arch::MobileNetV3Large).any(|width| width == 512));
        assert!(widths(Arch::EfficientNetB0).any(|width| width == 1280));
    }
}
