//! Which self-supervised method trains, and its settings.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use shared::models::HeadKind;
use shared::run::Objective;
use shared::{Error, Result};

use super::optimisation::{CurveName, OptimizerName};
use super::within;
use crate::args::{LrUnit, Options};

/// A self-supervised method by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MethodName {
    /// Momentum contrast with a two-layer head
    #[default]
    #[value(name = "moco-v2")]
    #[serde(rename = "moco-v2")]
    MocoV2,
    /// Momentum contrast with a linear head
    #[value(name = "moco-v1")]
    #[serde(rename = "moco-v1")]
    MocoV1,
    /// Prediction of cluster assignments between many crops
    Swav,
    /// None: `distill` by the teacher alone
    None,
}

impl MethodName {
    /// The options with the optimiser that the method is trained by where they name none: for `SwAV` that of the official script for
    /// batches of 256, LARC with a cosine per step that ends at a thousandth of its rate.
    pub(super) fn with_usual_optimizer(self, options: &Options) -> Options {
        let mut options = options.clone();
        let own = options.optimizer.is_some_and(|optimizer| optimizer != OptimizerName::Larc);
        if self != Self::Swav || own {
            return options;
        }
        options.optimizer = Some(OptimizerName::Larc);
        let lr = *options.lr.get_or_insert(0.6);
        options.weight_decay.get_or_insert(1e-6);
        if options.schedule.unwrap_or_default() == CurveName::Cosine {
            options.final_lr.get_or_insert(lr / 1000.0);
            options.lr_unit.get_or_insert(LrUnit::Step);
        }
        options
    }
}

/// A method with its settings; `method` names it in a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "method")]
pub enum MethodConfig {
    /// `moco-v2`.
    #[serde(rename = "moco-v2")]
    MocoV2(MocoConfig),
    /// `moco-v1`.
    #[serde(rename = "moco-v1")]
    MocoV1(MocoConfig),
    /// `swav`.
    #[serde(rename = "swav")]
    Swav(SwavConfig),
    /// `none`.
    #[serde(rename = "none")]
    Alone,
}

/// Settings of momentum contrast.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MocoConfig {
    /// K.
    pub queue_size: usize,
    /// Of the contrastive loss.
    pub temperature: f64,
    /// What the key encoder keeps of itself.
    pub key_momentum: f64,
}

/// Settings of `SwAV`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SwavConfig {
    /// P.
    pub prototypes: usize,
    /// Of the predictions.
    pub temperature: f64,
    /// What the scores are divided by before they become assignments.
    pub epsilon: f64,
    /// Turns of the Sinkhorn-Knopp algorithm.
    pub sinkhorn_iterations: usize,
    /// Embeddings of earlier steps that are assigned together with a batch, per global view: a multiple of the batch size; 0 for
    /// none.
    pub swav_queue_size: usize,
    /// The epoch, counted from 0, in which that queue begins to fill.
    pub queue_from_epoch: u64,
    /// Steps in which the prototypes stay as they were drawn.
    pub freeze_prototypes_steps: u64,
}

/// Flags of a method, and whether they were given.
type Given = (bool, &'static str);

fn moco_flags(options: &Options) -> [Given; 2] {
    [(options.queue_size.is_some(), "queue-size"), (options.key_momentum.is_some(), "key-momentum")]
}

fn swav_flags(options: &Options) -> [Given; 6] {
    [
        (options.prototypes.is_some(), "prototypes"),
        (options.epsilon.is_some(), "epsilon"),
        (options.sinkhorn_iterations.is_some(), "sinkhorn-iterations"),
        (options.swav_queue_size.is_some(), "swav-queue-size"),
        (options.queue_from_epoch.is_some(), "queue-from-epoch"),
        (options.freeze_prototypes_steps.is_some(), "freeze-prototypes-steps"),
    ]
}

/// Refuses flags that a method does not know.
fn refuse(method: &str, given: impl IntoIterator<Item = Given>) -> Result<()> {
    match given.into_iter().find(|(given, _)| *given) {
        Some((_, flag)) => Err(Error::usage(format!("`--method {method}` takes no `--{flag}`"))),
        None => Ok(()),
    }
}

impl MethodConfig {
    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the flag.
    pub fn new(objective: Objective, options: &Options, batch_size: usize) -> Result<Self> {
        match (options.method.unwrap_or_default(), objective) {
            (MethodName::MocoV2, _) => {
                refuse("moco-v2", swav_flags(options))?;
                MocoConfig::new(options, batch_size, 0.2).map(Self::MocoV2)
            }
            (MethodName::MocoV1, _) => {
                refuse("moco-v1", swav_flags(options))?;
                refuse("moco-v1", [(options.head_hidden.is_some(), "head-hidden")])?;
                MocoConfig::new(options, batch_size, 0.07).map(Self::MocoV1)
            }
            (MethodName::Swav, _) => {
                refuse("swav", moco_flags(options))?;
                SwavConfig::new(options, batch_size).map(Self::Swav)
            }
            (MethodName::None, Objective::Pretrain) => {
                Err(Error::usage("`pretrain` learns nothing by `--method none`: name a method, or use `distill`"))
            }
            (MethodName::None, Objective::Distill) => {
                refuse("none", moco_flags(options))?;
                refuse("none", swav_flags(options))?;
                refuse("none", [(options.temperature.is_some(), "temperature")])?;
                Ok(Self::Alone)
            }
        }
    }

    /// Whether keys are embedded in a shuffled order.
    pub fn shuffles_keys(&self) -> bool {
        matches!(self, Self::MocoV2(_) | Self::MocoV1(_))
    }

    /// The size of the queue of negatives, if there is one.
    pub fn queue_size(&self) -> Option<usize> {
        match self {
            Self::MocoV2(moco) | Self::MocoV1(moco) => Some(moco.queue_size),
            Self::Swav(_) | Self::Alone => None,
        }
    }

    /// The layers of the projection head that it trains.
    pub fn head_kind(&self) -> HeadKind {
        match self {
            Self::MocoV2(_) | Self::Alone => HeadKind::Mlp,
            Self::MocoV1(_) => HeadKind::Linear,
            Self::Swav(_) => HeadKind::MlpBatchNorm,
        }
    }

    /// Whether it sees small views beside the two global ones, where a set has some.
    pub fn sees_local_views(&self) -> bool {
        matches!(self, Self::Swav(_))
    }

    /// Batch-norm groups of a batch, if the method has a usual number: `SwAV` takes statistics over all devices.
    pub fn usual_bn_groups(&self) -> Option<usize> {
        matches!(self, Self::Swav(_)).then_some(1)
    }
}

impl MocoConfig {
    fn new(options: &Options, batch_size: usize, temperature: f64) -> Result<Self> {
        let config = Self {
            queue_size: options.queue_size.unwrap_or(65536),
            temperature: options.temperature.unwrap_or(temperature),
            key_momentum: options.key_momentum.unwrap_or(0.999),
        };
        let Self { queue_size, temperature, key_momentum } = config;
        if queue_size < batch_size {
            let message =
                format!("`--queue-size` {queue_size} must hold at least one `--batch-size` of {batch_size} keys");
            return Err(Error::usage(message));
        }
        within("temperature", temperature, temperature > 0.0, "positive")?;
        within("key-momentum", key_momentum, (0.0..=1.0).contains(&key_momentum), "from 0 to 1")?;
        Ok(config)
    }
}

impl SwavConfig {
    fn new(options: &Options, batch_size: usize) -> Result<Self> {
        let queue = options.swav_queue_size.unwrap_or(3840);
        if options.swav_queue_size.is_some_and(|size| (1..batch_size).contains(&size)) {
            return Err(Error::usage(format!(
                "`--swav-queue-size` {queue} must be 0 or hold at least one `--batch-size` of {batch_size} embeddings"
            )));
        }
        let config = Self {
            prototypes: options.prototypes.unwrap_or(3000),
            temperature: options.temperature.unwrap_or(0.1),
            epsilon: options.epsilon.unwrap_or(0.05),
            sinkhorn_iterations: options.sinkhorn_iterations.unwrap_or(3),
            // Whole batches, as the official code.
            swav_queue_size: queue - queue % batch_size.max(1),
            queue_from_epoch: options.queue_from_epoch.unwrap_or(15),
            freeze_prototypes_steps: options.freeze_prototypes_steps.unwrap_or(313),
        };
        let Self { prototypes, temperature, epsilon, sinkhorn_iterations, .. } = config;
        within("prototypes", prototypes as f64, prototypes >= 2, "at least 2")?;
        within("temperature", temperature, temperature > 0.0, "positive")?;
        within("epsilon", epsilon, epsilon > 0.0, "positive")?;
        within("sinkhorn-iterations", sinkhorn_iterations as f64, sinkhorn_iterations >= 1, "at least 1")?;
        Ok(config)
    }
}
