//! Validated settings: what decides the bytes of a run, and what only decides how it is carried out.

mod distill_terms;
mod distillation;
mod method;
mod optimisation;
mod plan;
mod probe;
mod time_limit;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use shared::data_loader::Order;
use shared::models::{Arch, HeadConfig, HeadKind, MlpConfig};
use shared::run::Objective;
use shared::{Error, Result};

pub use self::distill_terms::{AskedTerm, DistillTerm, DistillTerms, DistillViews};
pub use self::distillation::{DistillationConfig, Ensemble, SeedConfig, WeightedTerm};
pub use self::method::{MethodConfig, MethodName, MocoConfig, SwavConfig};
pub use self::optimisation::{CurveName, OptimisationConfig, OptimizerName};
pub use self::plan::Plan;
pub use self::probe::{ProbeConfig, ProbePaths};
pub use self::time_limit::TimeLimit;
use crate::args::Options;

/// Samples that share batch-norm statistics unless told otherwise: those of one GPU in the official setting.
const BN_GROUP_SAMPLES: usize = 32;
/// The batch size that the default learning rate is meant for.
const DEFAULT_BATCH_SIZE: usize = 256;
/// The official width of an embedding.
const DEFAULT_EMBEDDING_DIM: usize = 128;

/// What makes embeddings of the student's features.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HeadSource {
    /// A projection head of its own
    #[default]
    Own,
    /// An adapter, then the teacher's own head, frozen (Retro)
    Retro,
}

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
    /// Pieces of a batch that are computed one after the other; not named when it is one.
    #[serde(skip_serializing_if = "is_one")]
    pub accumulate: usize,
    /// Groups with batch-norm statistics of their own.
    pub bn_groups: usize,
    /// How the parameters move.
    #[serde(flatten)]
    pub optimisation: OptimisationConfig,
    /// The self-supervised method.
    #[serde(flatten)]
    pub method: MethodConfig,
    /// Whose head makes embeddings; not named when it is the student's own.
    #[serde(rename = "head", skip_serializing_if = "is_own")]
    pub head_source: HeadSource,
    /// Width of the rows that the teacher's head takes, which follows from the embedding set.
    #[serde(skip)]
    pub adapter_width: Option<usize>,
    /// Hidden width of the head; not named when it is 0, that of a linear head.
    #[serde(skip_serializing_if = "is_zero")]
    pub head_hidden: usize,
    /// D.
    pub embedding_dim: usize,
    /// What the teacher adds to the loss; none without a teacher.
    #[serde(flatten)]
    pub distillation: Option<DistillationConfig>,
    /// Whether the head comes from the weights that the run starts from.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub init_head: bool,
    /// In which an epoch takes the samples; not named when it is the usual one.
    #[serde(skip_serializing_if = "is_random")]
    pub order: Order,
    /// Of everything random.
    pub seed: u64,
    /// How the student is probed while it learns; none without a probe.
    #[serde(flatten)]
    pub probe: Option<ProbeConfig>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(number: &usize) -> bool {
    *number == 1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_own(source: &HeadSource) -> bool {
    *source == HeadSource::Own
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_random(order: &Order) -> bool {
    *order == Order::Random
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
        let epochs = options.epochs.unwrap_or(200);
        let with_optimizer = options.method.unwrap_or_default().with_usual_optimizer(options);
        let method = MethodConfig::new(objective, options, batch_size)?;
        let head_source = options.head.unwrap_or_default();
        if head_source == HeadSource::Retro {
            check_retro(objective, options, &method)?;
        }
        let linear = head_source == HeadSource::Retro || method.head_kind() == HeadKind::Linear;
        let usual_hidden = if linear { 0 } else { 2048 };
        let usual_groups = method.usual_bn_groups().unwrap_or_else(|| default_bn_groups(batch_size));
        let distillation = (objective == Objective::Distill).then(|| DistillationConfig::new(options, batch_size));
        let distillation = distillation.transpose()?;
        let config = Self {
            objective,
            student: options.student.unwrap_or(Arch::ResNet18),
            epochs,
            batch_size,
            accumulate: options.accumulate.unwrap_or(1),
            bn_groups: options.bn_groups.unwrap_or(usual_groups),
            optimisation: OptimisationConfig::new(&with_optimizer, epochs)?,
            method,
            head_source,
            adapter_width: None,
            head_hidden: options.head_hidden.unwrap_or(usual_hidden),
            embedding_dim: embedding_dim(options.embedding_dim, teacher_dim)?,
            distillation,
            init_head: options.init_head.unwrap_or(false),
            order: options.order.unwrap_or_default(),
            seed: options.seed.unwrap_or(0),
            probe: ProbeConfig::new(options)?,
        };
        config.check()?;
        Ok(config)
    }

    /// Fits the student's adapter to the teacher's head.
    pub fn reuse_head(&mut self, head: &MlpConfig) {
        self.adapter_width = Some(head.inputs());
    }

    /// The projection head that learns; before a head of the teacher, the adapter: one linear layer.
    ///
    /// # Source
    /// Retro, arXiv 2405.15311: an adapter between the student's features and the teacher's frozen projection head.
    pub fn head(&self) -> HeadConfig {
        if let Some(embedding_dim) = self.adapter_width {
            return HeadConfig { kind: HeadKind::Linear, hidden: 0, embedding_dim };
        }
        HeadConfig { kind: self.method.head_kind(), hidden: self.head_hidden, embedding_dim: self.embedding_dim }
    }

    /// This configuration as a TOML file that repeats the run; `init` tells whether that needs weights to start from.
    ///
    /// # Errors
    /// [`Error::Usage`] when a number does not fit TOML.
    pub fn to_toml(&self, init: bool) -> Result<String> {
        let mut table = toml::Table::try_from(self).map_err(|e| Error::usage(format!("no TOML form: {e}")))?;
        table.remove("objective");
        let embeddings = match &self.distillation {
            None => "",
            Some(DistillationConfig { ensemble: None, .. }) => " --embeddings EMBEDDINGS",
            Some(_) => " --embeddings EMBEDDINGS --embeddings EMBEDDINGS ...",
        };
        let init = if init { " --init INIT" } else { "" };
        let probe = if self.probe.is_some() { " --probe-train SHARDS" } else { "" };
        let name = self.objective.name();
        Ok(format!(
            "# Repeat with: student-train {name} --config config.toml --shards SHARDS{embeddings}{init}{probe} --output RUN\n{table}"
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
        at_least(
            "head-hidden",
            self.head_hidden as u64,
            u64::from(self.head_source == HeadSource::Own && self.head().kind != HeadKind::Linear),
        )?;
        at_least("embedding-dim", self.embedding_dim as u64, 1)?;
        at_least("accumulate", self.accumulate as u64, 1)?;
        let Self { batch_size, bn_groups, accumulate, .. } = *self;
        if !batch_size.is_multiple_of(bn_groups) || batch_size / bn_groups < 2 {
            return Err(Error::usage(format!(
                "`--bn-groups` {bn_groups} must divide `--batch-size` {batch_size} into groups of at least 2 samples"
            )));
        }
        if !bn_groups.is_multiple_of(accumulate) {
            return Err(Error::usage(format!(
                "`--accumulate` {accumulate} must divide the {bn_groups} batch-norm groups of a batch"
            )));
        }
        Ok(())
    }
}

/// What goes with the teacher's own head.
fn check_retro(objective: Objective, options: &Options, method: &MethodConfig) -> Result<()> {
    let message = if objective == Objective::Pretrain {
        "`pretrain` has no teacher, whose head `--head retro` reuses: use `distill`"
    } else if !matches!(method, MethodConfig::MocoV2(_) | MethodConfig::Alone) {
        "`--head retro` replaces the head of `--method moco-v2` or `none`, other methods need their own"
    } else if options.head_hidden.is_some() {
        "`--head retro` takes no `--head-hidden`: the head is the teacher's"
    } else {
        return Ok(());
    };
    Err(Error::usage(message))
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
    use crate::args::LrUnit;

    fn error(options: Options) -> String {
        let error = Config::new(Objective::Distill, &options, Some(128)).unwrap_err();
        assert_eq!(error.exit_status(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn defaults_are_the_official_settings() {
        let config = Config::new(Objective::Distill, &Options::default(), Some(64)).unwrap();
        assert_eq!((config.batch_size, config.bn_groups, config.accumulate), (256, 8, 1));
        let OptimisationConfig { lr, momentum, weight_decay, .. } = config.optimisation;
        assert_eq!((lr, momentum, weight_decay), (0.03, Some(0.9), 1e-4));
        let moco = MocoConfig { queue_size: 65536, temperature: 0.2, key_momentum: 0.999 };
        assert_eq!(config.method, MethodConfig::MocoV2(moco));
        assert_eq!((config.head_hidden, config.embedding_dim), (2048, 64));
        let mse = WeightedTerm { weight: 32.0, views: DistillViews::Both };
        let distillation = DistillationConfig { terms: [(DistillTerm::Mse, mse)].into(), seed: None, ensemble: None };
        assert_eq!(config.distillation, Some(distillation));
        let config = Config::new(Objective::Pretrain, &Options::default(), None).unwrap();
        assert_eq!((config.embedding_dim, config.distillation), (128, None));
    }

    #[test]
    fn default_groups_divide_the_batch() {
        for (batch, groups) in [(2, 1), (31, 1), (64, 2), (100, 2), (256, 8), (192, 6), (97, 1)] {
            assert_eq!(default_bn_groups(batch), groups, "{batch}");
        }
    }

    #[test]
    fn senseless_values_are_named() {
        let cases: [(Options, &str); 13] = [
            (Options { accumulate: Some(3), ..Options::default() }, "--accumulate"),
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
    fn methods_bring_their_own_defaults_and_refuse_each_others_flags() {
        let options = |method| Options { method: Some(method), ..Options::default() };
        let config = Config::new(Objective::Pretrain, &options(MethodName::MocoV1), None).unwrap();
        let moco = MocoConfig { queue_size: 65536, temperature: 0.07, key_momentum: 0.999 };
        assert_eq!(config.method, MethodConfig::MocoV1(moco));
        assert_eq!(config.head(), HeadConfig { kind: HeadKind::Linear, hidden: 0, embedding_dim: 128 });
        assert!(!config.to_toml(false).unwrap().contains("head-hidden"));
        let config = Config::new(Objective::Distill, &options(MethodName::Swav), Some(64)).unwrap();
        let swav = SwavConfig {
            prototypes: 3000,
            temperature: 0.1,
            epsilon: 0.05,
            sinkhorn_iterations: 3,
            swav_queue_size: 3840,
            queue_from_epoch: 15,
            freeze_prototypes_steps: 313,
        };
        assert_eq!((&config.method, config.bn_groups), (&MethodConfig::Swav(swav), 1));
        assert_eq!(config.head(), HeadConfig { kind: HeadKind::MlpBatchNorm, hidden: 2048, embedding_dim: 64 });
        let OptimisationConfig { optimizer, lr, final_lr, lr_unit, weight_decay, .. } = config.optimisation;
        assert_eq!((optimizer, lr_unit), (OptimizerName::Larc, Some(LrUnit::Step)));
        assert_eq!((lr, final_lr, weight_decay), (0.6, 0.0006, 1e-6));
        // Another optimiser brings its own.
        let descent = Options { optimizer: Some(OptimizerName::Sgd), ..options(MethodName::Swav) };
        let config = Config::new(Objective::Pretrain, &descent, None).unwrap();
        assert_eq!((config.optimisation.lr, config.optimisation.final_lr), (0.03, 0.0));
        // Whole batches only.
        let odd = Options { batch_size: Some(1000), ..options(MethodName::Swav) };
        let config = Config::new(Objective::Distill, &odd, None).unwrap();
        assert!(matches!(&config.method, MethodConfig::Swav(swav) if swav.swav_queue_size == 3000));
        for method in [MethodName::MocoV1, MethodName::Swav] {
            let config = Config::new(Objective::Distill, &options(method), Some(16)).unwrap();
            let read: Options = toml::from_str(&config.to_toml(false).unwrap()).unwrap();
            assert_eq!(Config::new(Objective::Distill, &read, Some(16)).unwrap(), config);
        }
        let cases: [(Options, &str); 9] = [
            (Options { head_hidden: Some(64), ..options(MethodName::MocoV1) }, "--head-hidden"),
            (Options { prototypes: Some(64), ..options(MethodName::MocoV1) }, "--prototypes"),
            (Options { epsilon: Some(0.1), ..Options::default() }, "--epsilon"),
            (Options { queue_size: Some(4096), ..options(MethodName::Swav) }, "--queue-size"),
            (Options { sinkhorn_iterations: Some(0), ..options(MethodName::Swav) }, "--sinkhorn-iterations"),
            (Options { prototypes: Some(1), ..options(MethodName::Swav) }, "--prototypes"),
            (Options { epsilon: Some(0.0), ..options(MethodName::Swav) }, "--epsilon"),
            (Options { swav_queue_size: Some(100), ..options(MethodName::Swav) }, "--swav-queue-size"),
            (Options { queue_from_epoch: Some(1), ..options(MethodName::None) }, "--queue-from-epoch"),
        ];
        for (options, flag) in cases {
            let message = error(options);
            assert!(message.contains(&format!("`{flag}`")), "{message}");
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
