//! Stochastic gradient descent with momentum and weight decay, as `torch.optim.SGD` without dampening and Nesterov's term.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::ops::{self, Gradients, ParameterStore};
use crate::{Error, Result};

/// The two constants of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SgdConfig {
    /// What remains of the previous step.
    pub momentum: f64,
    /// Added to every gradient, times the parameter; on batch norm and biases too, as the official code does.
    pub weight_decay: f64,
}

/// The optimiser and its momentum buffers.
///
/// Per parameter `g = gradient + weight_decay * p`, `buffer = momentum * buffer + g` (the first time `buffer = g`), `p -= lr * buffer`.
/// A parameter without a gradient is left alone.
///
/// # Source
/// The algorithm box of `torch.optim.SGD`, `PyTorch` 2.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    buffers: BTreeMap<String, Tensor>,
}

impl Sgd {
    /// An optimiser that has not made a step.
    pub fn new(config: SgdConfig) -> Self {
        Self { config, buffers: BTreeMap::new() }
    }

    /// The constants.
    pub fn config(&self) -> SgdConfig {
        self.config
    }

    /// Moves the parameters of `store` in place.
    ///
    /// # Errors
    /// `Error::Shape` when a gradient or a buffer is not the parameter's.
    pub fn step(&mut self, store: &ParameterStore, gradients: &Gradients, lr: f64) -> Result<()> {
        for (name, parameter) in store.parameters() {
            let Some(gradient) = gradients.get(name) else { continue };
            let value = parameter.var().as_tensor();
            if !self.buffers.contains_key(name) {
                self.buffers.insert(name.to_owned(), value.zeros_like()?.detach());
            }
            let SgdConfig { momentum, weight_decay } = self.config;
            ops::sgd_in_place(value, gradient, &self.buffers[name], momentum, weight_decay, lr)?;
        }
        Ok(())
    }

    /// The momentum buffers in file names and layouts, for a checkpoint; empty before the first step.
    ///
    /// # Errors
    /// `Error::Invalid` when the store is not the one that was stepped.
    pub fn to_tensors(&self, store: &ParameterStore) -> Result<BTreeMap<String, Tensor>> {
        store.to_file_layout(self.buffers.iter().map(|(name, buffer)| (name.as_str(), buffer)))
    }

    /// Takes the buffers of a checkpoint.
    ///
    /// # Errors
    /// `Error::Invalid` for a name or shape that is not the store's.
    pub fn load(&mut self, store: &ParameterStore, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for name in tensors.keys() {
            if !store.parameters().any(|(parameter, _)| parameter == name) {
                return Err(Error::invalid(format!("the model has no parameter `{name}` to hold momentum for"), ""));
            }
        }
        let converted = store.to_memory_layout(tensors)?;
        self.buffers =
            converted.into_iter().map(|(name, tensor)| Ok((name, tensor.copy()?.detach()))).collect::<Result<_>>()?;
        Ok(())
    }
}
