//! The network by which the term `simreg` predicts the teacher's embeddings from the student's features.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use shared::Result;
use shared::ops::{self, Activation, BatchNorm, Builder, Engine, Linear, Mode, ParameterStore, Pass, reference};
use shared::run::prefixed;
use shared::tensor_file::TensorFile;

use crate::trainable::Trainable;

/// Its name among what learns.
const NAME: &str = "simreg";
/// What the names of its tensors begin with in a checkpoint.
const PREFIX: &str = "simreg.";

/// Four linear layers, `F` to `2F` to `F` to `2F` to `D`; batch norm and `ReLU` follow the first and the third.
///
/// # Source
/// Navaneet et al., `SimReg`, arXiv 2201.05131, section 3; official code `mlp_arch.py` and `simreg.py`, with four layers.
#[derive(Debug)]
pub(super) struct Predictor {
    layers: [Linear; 4],
    norms: [BatchNorm; 2],
    store: ParameterStore,
}

impl Predictor {
    /// Drawn from the seed; names are those of the official layers.
    pub(super) fn new(features: usize, width: usize, seed: u64) -> Result<Self> {
        let mut builder = Builder::new(&Device::Cpu);
        let layers = [
            builder.linear("predictor.0", features, 2 * features)?,
            builder.linear("predictor.3", 2 * features, features)?,
            builder.linear("predictor.4", features, 2 * features)?,
            builder.linear("predictor.7", 2 * features, width)?,
        ];
        let norms =
            [builder.batch_norm("predictor.1", 2 * features)?, builder.batch_norm("predictor.5", 2 * features)?];
        Ok(Self { layers, norms, store: builder.finish(seed)? })
    }

    pub(super) fn trainable(&self) -> Trainable {
        Trainable { name: NAME, store: self.store.clone() }
    }

    /// Predictions in training mode.
    ///
    /// # Shapes
    /// - `features`: `(B, F)` f32
    /// - returns: `(B, D)` f32, rows of unit length
    pub(super) fn predict(&self, features: &Tensor, groups: usize) -> Result<Tensor> {
        let engine = Engine::for_device(features.device());
        let pass = Pass { mode: Mode::Train { bn_groups: groups }, record: true, engine };
        let linear = |xs: &Tensor, layer: &Linear| ops::linear(xs, layer, Activation::Identity, &pass);
        let normalised = |xs: &Tensor, norm: &BatchNorm| {
            let (rows, width) = xs.dims2()?;
            let xs = reference::batch_norm(&xs.reshape((rows, 1, 1, width))?, norm, &pass)?;
            reference::activate(&xs.reshape((rows, width))?, Activation::Relu)
        };
        let [first, second, third, last] = &self.layers;
        let xs = normalised(&linear(features, first)?, &self.norms[0])?;
        let xs = normalised(&linear(&linear(&xs, second)?, third)?, &self.norms[1])?;
        ops::l2_normalise(&linear(&xs, last)?, &pass)
    }

    pub(super) fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let tensors = self.store.to_tensors()?;
        Ok(tensors.into_iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect())
    }

    pub(super) fn load(&self, file: &TensorFile) -> Result<()> {
        self.store.load(&prefixed(file, PREFIX)?)
    }
}
