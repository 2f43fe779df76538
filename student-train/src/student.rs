//! The student: the query encoder, which learns, and the key encoder, which follows it.

use std::collections::BTreeMap;

use candle_core::Tensor;
use shared::Result;
use shared::models::{Arch, Encoder, HeadConfig};
use shared::ops::Mode;
use shared::optim::ema_update;
use shared::run::{QUERY_PREFIX, prefixed};
use shared::tensor_file::TensorFile;

/// What the names of the key encoder's tensors begin with in a checkpoint.
pub const KEY_PREFIX: &str = "key.";

/// A backbone with its projection head, twice.
#[derive(Debug)]
pub struct Student {
    query: Encoder,
    key: Encoder,
    bn_groups: usize,
}

impl Student {
    /// A student with freshly drawn parameters; the key encoder starts as a copy of the query encoder.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(arch: Arch, head: HeadConfig, bn_groups: usize, seed: u64) -> Result<Self> {
        let query = Encoder::new(arch, Some(head), seed)?;
        let key = query.momentum_copy()?;
        Ok(Self { query, key, bn_groups })
    }

    /// Replaces some of the query encoder's tensors, names and layouts of `PyTorch`; the key encoder is its copy again.
    ///
    /// # Errors
    /// [`shared::Error::Invalid`] for a tensor that the encoder does not have, or of another shape; nothing is changed then.
    pub fn start_from(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut all = self.query.store().to_tensors()?;
        all.extend(tensors.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        self.query.store().load(&all)?;
        self.key.store().copy_from(self.query.store())
    }

    /// The encoder that learns.
    pub fn query(&self) -> &Encoder {
        &self.query
    }

    /// The encoder that follows.
    pub fn key(&self) -> &Encoder {
        &self.key
    }

    /// Embeddings by the query encoder, in training mode, with gradient.
    ///
    /// # Shapes
    /// - `view`: `(B, H, W, 3)` f32, normalised
    /// - returns: `(B, D)` f32, unit rows
    ///
    /// # Errors
    /// As [`Encoder::embeddings`].
    pub fn embed_queries(&self, view: &Tensor) -> Result<Tensor> {
        self.query.embeddings(view, Mode::Train { bn_groups: self.bn_groups })
    }

    /// Moves the key encoder a little towards the query encoder, then embeds a view by it, in training mode.
    ///
    /// The samples are shuffled before they are cut into batch-norm groups and put back afterwards. A key has then been normalised
    /// together with other samples than its query, whose statistics would give it away.
    ///
    /// # Shapes
    /// - `view`: `(B, H, W, 3)` f32, normalised
    /// - `shuffle`: a permutation of `0..B`
    /// - returns: `(B, D)` f32, unit rows, without gradient, in the order of `view`
    ///
    /// # Errors
    /// As [`Encoder::embeddings`].
    ///
    /// # Source
    /// `MoCo`, arXiv 1911.05722, section 3.3, "Shuffling BN".
    pub fn embed_keys(&self, view: &Tensor, shuffle: &[u32], key_momentum: f64) -> Result<Tensor> {
        ema_update(self.key.store(), self.query.store(), key_momentum)?;
        let order = Tensor::new(shuffle, view.device())?;
        let shuffled = view.index_select(&order, 0)?;
        let keys = self.key.embeddings(&shuffled, Mode::Train { bn_groups: self.bn_groups })?;
        let back = Tensor::new(inverse(shuffle), view.device())?;
        Ok(keys.index_select(&back, 0)?.detach())
    }

    /// Both encoders for a checkpoint, names and layouts of `PyTorch` behind a prefix.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (prefix, encoder) in [(QUERY_PREFIX, &self.query), (KEY_PREFIX, &self.key)] {
            let named = encoder.store().to_tensors()?;
            tensors.extend(named.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
        }
        Ok(tensors)
    }

    /// Takes both encoders from a checkpoint.
    ///
    /// # Errors
    /// [`shared::Error::Invalid`] that lists what is missing, unexpected or of another shape.
    pub fn load(&self, file: &TensorFile) -> Result<()> {
        for (prefix, encoder) in [(QUERY_PREFIX, &self.query), (KEY_PREFIX, &self.key)] {
            encoder.store().load(&prefixed(file, prefix)?)?;
        }
        Ok(())
    }
}

fn inverse(permutation: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; permutation.len()];
    for (to, &from) in (0..).zip(permutation) {
        inverse[from as usize] = to;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inverse_puts_everything_back() {
        assert_eq!(inverse(&[2, 0, 1]), [1, 2, 0]);
    }
}
