//! Which self-supervised method trains, and its settings.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use shared::run::Objective;
use shared::{Error, Result};

use super::within;
use crate::args::Options;

/// A self-supervised method by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MethodName {
    /// Momentum contrast with a two-layer head
    #[default]
    #[value(name = "moco-v2")]
    #[serde(rename = "moco-v2")]
    MocoV2,
    /// None: `distill` by the teacher alone
    None,
}

/// A method with its settings; `method` names it in a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "method")]
pub enum MethodConfig {
    /// `moco-v2`.
    #[serde(rename = "moco-v2")]
    MocoV2(MocoConfig),
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

impl MethodConfig {
    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the flag.
    pub fn new(objective: Objective, options: &Options, batch_size: usize) -> Result<Self> {
        match (options.method.unwrap_or_default(), objective) {
            (MethodName::MocoV2, _) => MocoConfig::new(options, batch_size).map(Self::MocoV2),
            (MethodName::None, Objective::Pretrain) => {
                Err(Error::usage("`pretrain` learns nothing by `--method none`: name a method, or use `distill`"))
            }
            (MethodName::None, Objective::Distill) => {
                let given = [
                    (options.queue_size.is_some(), "queue-size"),
                    (options.temperature.is_some(), "temperature"),
                    (options.key_momentum.is_some(), "key-momentum"),
                ];
                match given.into_iter().find(|(given, _)| *given) {
                    Some((_, flag)) => Err(Error::usage(format!("`--method none` takes no `--{flag}`"))),
                    None => Ok(Self::Alone),
                }
            }
        }
    }

    /// Whether keys are embedded in a shuffled order.
    pub fn shuffles_keys(&self) -> bool {
        matches!(self, Self::MocoV2(_))
    }

    /// The size of the queue of negatives, if there is one.
    pub fn queue_size(&self) -> Option<usize> {
        match self {
            Self::MocoV2(moco) => Some(moco.queue_size),
            Self::Alone => None,
        }
    }
}

impl MocoConfig {
    fn new(options: &Options, batch_size: usize) -> Result<Self> {
        let config = Self {
            queue_size: options.queue_size.unwrap_or(65536),
            temperature: options.temperature.unwrap_or(0.2),
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
