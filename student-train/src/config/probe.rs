//! Settings of the probe: how often a k-NN classifier looks at the student while it learns.

use std::path::PathBuf;

use serde::Serialize;
use shared::{Error, Result};

use crate::args::Options;

/// Epochs between probes unless told otherwise.
const PROBE_EPOCHS: u64 = 10;
/// Neighbours that vote unless told otherwise.
const PROBE_K: usize = 20;

/// What decides the lines of a probe, besides its sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProbeConfig {
    /// After so many epochs and multiples of that; the end of a run always has one.
    pub probe_epochs: u64,
    /// k.
    pub probe_k: usize,
}

impl ProbeConfig {
    /// Picks the settings out of the options; none without `--probe-train`.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the flag.
    pub fn new(options: &Options) -> Result<Option<Self>> {
        let Options { probe_train, probe_val, probe_epochs, probe_k, .. } = options;
        if probe_train.is_none() {
            let given = [
                (probe_val.is_some(), "probe-val"),
                (probe_epochs.is_some(), "probe-epochs"),
                (probe_k.is_some(), "probe-k"),
            ];
            return match given.iter().find(|(given, _)| *given) {
                Some((_, flag)) => Err(Error::usage(format!("`--{flag}` needs `--probe-train`, a labelled shard set"))),
                None => Ok(None),
            };
        }
        let config = Self { probe_epochs: probe_epochs.unwrap_or(PROBE_EPOCHS), probe_k: probe_k.unwrap_or(PROBE_K) };
        if config.probe_epochs == 0 || config.probe_k == 0 {
            return Err(Error::usage("`--probe-epochs` and `--probe-k` must be at least 1"));
        }
        Ok(Some(config))
    }
}

/// The sets of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbePaths {
    /// Neighbours are looked for here.
    pub train: PathBuf,
    /// What is classified; the samples of `train`, each by the others, if none.
    pub val: Option<PathBuf>,
}
