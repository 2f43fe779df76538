//! What is learnt from a teacher, and how much it weighs.

use serde::Serialize;
use shared::Result;

use super::within;
use crate::args::Options;

/// The official sum over 32 samples per GPU, as a weight of the mean.
const DEFAULT_DISTILL_WEIGHT: f64 = 32.0;

/// The terms that a teacher adds to the loss.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DistillationConfig {
    /// Of the squared distance, per view.
    pub distill_weight: f64,
}

impl DistillationConfig {
    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// [`shared::Error::Usage`] that names the flag.
    pub fn new(options: &Options) -> Result<Self> {
        let distill_weight = options.distill_weight.unwrap_or(DEFAULT_DISTILL_WEIGHT);
        within("distill-weight", distill_weight, distill_weight >= 0.0, "at least 0")?;
        Ok(Self { distill_weight })
    }
}
