//! Momentum contrast: a key encoder that follows the query encoder, and a queue of its keys as negatives.

use std::collections::BTreeMap;

use candle_core::Tensor;
use shared::losses::info_nce;
use shared::models::Encoder;
use shared::ops::Mode;
use shared::optim::ema_update;
use shared::run::{Losses, prefixed};
use shared::tensor_file::TensorFile;
use shared::{Error, Result};

use super::{Contrast, Counters, Queue, StepInput, narrow, two_views};
use crate::config::MocoConfig;
use crate::part::Part;
use crate::trainable::GradientSum;

/// What the names of the key encoder's tensors begin with in a checkpoint.
pub const KEY_PREFIX: &str = "key.";
/// The name of the queue in a checkpoint.
pub const QUEUE_NAME: &str = "queue";
/// Where the next key goes, in a checkpoint.
const QUEUE_POINTER: &str = "queue_pointer";

/// The key encoder and its queue.
#[derive(Debug)]
pub struct Moco {
    key: Encoder,
    queue: Queue,
    temperature: f64,
    key_momentum: f64,
    /// The keys of the step in progress.
    entering: Option<Tensor>,
}

impl Moco {
    /// The state before the first step.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(config: &MocoConfig, query: &Encoder, seed: u64) -> Result<Self> {
        Self::from_parts(config, query, Queue::random(config.queue_size, query.embedding_dim(), seed)?)
    }

    /// A state with a given queue.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn from_parts(config: &MocoConfig, query: &Encoder, queue: Queue) -> Result<Self> {
        let MocoConfig { temperature, key_momentum, .. } = *config;
        Ok(Self { key: query.momentum_copy()?, queue, temperature, key_momentum, entering: None })
    }

    /// The encoder of the keys.
    pub(super) fn key(&self) -> &Encoder {
        &self.key
    }

    /// The negatives.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(super) fn restart(&self, query: &Encoder) -> Result<()> {
        self.key.store().copy_from(query.store())
    }

    /// # Source
    /// `MoCo`, arXiv 1911.05722, algorithm 1; `DisCo`, arXiv 2104.09124, section 3; official `DisCo` code @ 1d732c8,
    /// `moco/builder_kq_mse_largeembedding_2048.py`, `forward`.
    pub(super) fn gradients(&mut self, input: &StepInput<'_>, gradients: &mut GradientSum) -> Result<Losses> {
        let keys = self.embed_keys(input)?; // (B, D), of all ranks
        input.observed.keys(&keys, self.queue.keys())?;
        let own = narrow(&keys, &input.world.share(keys.dim(0)?))?;
        let losses = two_views(input, Some(Contrast { moco: self, keys: &own }), gradients)?;
        self.entering = Some(keys);
        Ok(losses)
    }

    /// The contrastive loss of some queries.
    ///
    /// # Shapes
    /// - `queries`, `keys`: `(B, D)` f32, unit rows
    ///
    /// # Errors
    /// [`Error::Shape`] when the shapes do not fit together.
    pub(super) fn part(&self, queries: &Tensor, keys: &Tensor) -> Result<Part> {
        let contrast = info_nce(queries, keys, self.queue.keys(), self.temperature)?;
        let terms = vec![(Losses::INFO_NCE.into(), contrast.loss.clone()), (Losses::TOP1.into(), contrast.top1)];
        Ok(Part { loss: contrast.loss, terms })
    }

    pub(super) fn after_step(&mut self) -> Result<()> {
        self.entering.take().map_or(Ok(()), |keys| self.queue.enqueue(&keys))
    }

    /// Moves the key encoder a little towards the query encoder, then embeds the key's view by it, in training mode.
    ///
    /// The samples are shuffled before they are cut into batch-norm groups and put back afterwards. A key has then been normalised
    /// together with other samples than its query, whose statistics would give it away. Several ranks shuffle the samples of all:
    /// each embeds its share of the shuffled batch.
    ///
    /// Returns `(B, D)` f32, unit rows, without gradient, in the order of the batch of all ranks.
    ///
    /// # Source
    /// `MoCo`, arXiv 1911.05722, section 3.3, "Shuffling BN".
    fn embed_keys(&self, input: &StepInput<'_>) -> Result<Tensor> {
        ema_update(self.key.store(), input.query.store(), self.key_momentum)?;
        let view = &input.batch.views[1];
        let shuffled = match &input.batch.shuffled_keys {
            Some(share) => share.clone(),
            None => view.index_select(&Tensor::new(input.shuffle, view.device())?, 0)?,
        };
        let keys = self.key.embeddings(&shuffled, Mode::Train { bn_groups: input.bn_groups })?;
        let back = Tensor::new(inverse(input.shuffle), view.device())?;
        Ok(input.world.all_gather(&keys)?.index_select(&back, 0)?)
    }

    pub(super) fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let key = self.key.store().to_tensors()?;
        let mut tensors: BTreeMap<String, Tensor> =
            key.into_iter().map(|(name, tensor)| (format!("{KEY_PREFIX}{name}"), tensor)).collect();
        tensors.insert(QUEUE_NAME.into(), self.queue.keys().clone());
        Ok(tensors)
    }

    pub(super) fn counters(&self) -> Counters {
        Counters::from([(QUEUE_POINTER.into(), self.queue.pointer() as u64)])
    }

    pub(super) fn load(&mut self, file: &TensorFile, counters: &Counters) -> Result<()> {
        let (size, width) = self.queue.keys().dims2()?;
        file.view_shaped::<f32>(QUEUE_NAME, &[size, width], "[K, D]")?;
        self.key.store().load(&prefixed(file, KEY_PREFIX)?)?;
        let pointer = counters.get(QUEUE_POINTER).and_then(|&pointer| usize::try_from(pointer).ok());
        let pointer = pointer.ok_or_else(|| Error::invalid("the checkpoint has no `queue_pointer`", ""))?;
        self.queue = Queue::from_keys(file.tensor(QUEUE_NAME)?, pointer)?;
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
