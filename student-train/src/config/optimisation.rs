//! How the parameters move.

use serde::Serialize;
use shared::Result;

use super::within;
use crate::args::{LrUnit, Options};

/// Settings of the optimiser and of the learning rate over time.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct OptimisationConfig {
    /// At the start.
    pub lr: f64,
    /// What the cosine counts.
    pub lr_unit: LrUnit,
    /// Of the gradient descent.
    pub momentum: f64,
    /// On all parameters.
    pub weight_decay: f64,
}

impl OptimisationConfig {
    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// [`shared::Error::Usage`] that names the flag.
    pub fn new(options: &Options) -> Result<Self> {
        let config = Self {
            lr: options.lr.unwrap_or(0.03),
            lr_unit: options.lr_unit.unwrap_or_default(),
            momentum: options.momentum.unwrap_or(0.9),
            weight_decay: options.weight_decay.unwrap_or(1e-4),
        };
        within("lr", config.lr, config.lr > 0.0, "positive")?;
        within("momentum", config.momentum, (0.0..1.0).contains(&config.momentum), "at least 0 and below 1")?;
        within("weight-decay", config.weight_decay, config.weight_decay >= 0.0, "at least 0")?;
        Ok(config)
    }
}
