//! Loads what was recognised, or says in one error everything that does not fit.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::prefixes::Source;
use super::{BATCH_COUNT, Recognised};
use crate::error::{Error, Result};
use crate::models::MlpHead;
use crate::weights::Checkpoint;

impl Recognised {
    /// The network's tensors under their own names, for [`crate::ops::ParameterStore::load`], without its head and without
    /// the counts of batches, which are of no use in evaluation.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the network is not complete or the file has further layers, listing them, or when a weight is
    /// not of a floating-point type; [`Error::Damaged`] when the numbers cannot be read.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<BTreeMap<String, Tensor>> {
        if !self.is_complete() || self.has_further_layers() {
            return Err(self.refusal(checkpoint));
        }
        let read = |(name, source): (&String, &Source)| {
            let tensor = weight(checkpoint, &source.name)?;
            let part = match source.first_row {
                Some(first) => tensor.narrow(0, first, source.shape[0])?.contiguous()?,
                None => tensor,
            };
            Ok((name.clone(), part))
        };
        self.sources.iter().map(read).collect()
    }

    /// The counts of batches that the file has, under the network's own names: `f32`, for a network that is trained on.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the numbers cannot be read.
    pub fn load_batch_counts(&self, checkpoint: &Checkpoint) -> Result<BTreeMap<String, Tensor>> {
        let mut counts = BTreeMap::new();
        for (name, source) in &self.sources {
            let beside = |name: &str| Some(format!("{}{BATCH_COUNT}", name.strip_suffix("running_mean")?));
            let (Some(count), Some(found)) = (beside(name), beside(&source.name)) else { continue };
            if checkpoint.entry(&found).is_ok_and(|entry| entry.shape().is_empty()) {
                counts.insert(count, checkpoint.tensor(&found)?);
            }
        }
        Ok(counts)
    }

    /// The head with its weights, if the embedding has one.
    ///
    /// # Errors
    /// As [`Recognised::load`].
    pub fn load_head(&self, checkpoint: &Checkpoint) -> Result<Option<MlpHead>> {
        let Some(config) = &self.head else { return Ok(None) };
        if !self.is_complete() {
            return Err(self.refusal(checkpoint));
        }
        let names = config.names_and_shapes().into_iter();
        let tensors = names.map(|(name, _)| Ok((name.clone(), weight(checkpoint, &name)?))).collect::<Result<_>>()?;
        MlpHead::new(config, &tensors).map(Some)
    }

    /// The one error that tells all: what is missing, of another shape, and unexpected.
    pub fn refusal(&self, checkpoint: &Checkpoint) -> Error {
        let place = if self.prefix.is_empty() { String::new() } else { format!(" under `{}`", self.prefix) };
        let summary = format!(
            "`{}` does not hold the weights of {} ({}){place}: {} tensors fit",
            checkpoint.path().display(),
            self.arch,
            self.method,
            self.matched
        );
        let lists =
            [("missing", &self.missing), ("of another shape", &self.mismatched), ("unexpected", &self.unexpected)];
        let parts = lists.iter().filter(|(_, names)| !names.is_empty());
        let parts = parts.map(|(what, names)| format!("{} {what}: {}", names.len(), listed(names)));
        let message = std::iter::once(summary).chain(parts).collect::<Vec<_>>().join("; ");
        let hint = format!("`teacher-embed describe {}` tells what it holds", checkpoint.path().display());
        Error::invalid(message, hint)
    }
}

/// A tensor that must hold floating-point numbers: converted from anything else it would be a weight by accident.
fn weight(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let dtype = checkpoint.entry(name)?.dtype();
    if !dtype.is_float() {
        return Err(Error::invalid(
            format!("`{}` holds `{}` as {dtype}, weights are floats", checkpoint.path().display(), name.escape_debug()),
            "save the weights as f32, f16 or bf16; quantised networks are not read",
        ));
    }
    checkpoint.tensor(name)
}

/// The first names of a list, and how many more there are.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 6;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{}`", name.escape_debug())).collect();
    let rest = names.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    shown.join(", ") + &more
}
