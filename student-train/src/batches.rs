//! The batches of a run: which samples and views every step sees, made ahead of their use.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use shared::Result;
use shared::data_loader::{EpochSampler, Prefetcher, ViewSchedule, embedding_batch, normalized_batch};
use shared::embedding::EmbeddingSet;
use shared::shard::ShardSet;
use shared::transforms::normalize::Normalization;

use crate::step::Batch;

/// Threads that make batches; one normalises several hundred views of 224 x 224 a second.
const WORKERS: usize = 2;
/// Batches that wait, besides one in the hands of each worker: memory is bounded by their sum.
const BATCHES_AHEAD: usize = 2;

/// Makes the batch of any step.
#[derive(Debug)]
pub struct Batches {
    shards: ShardSet,
    embeddings: Option<EmbeddingSet>,
    sampler: EpochSampler,
    views: ViewSchedule,
    /// The orders of the epochs that the workers are in.
    orders: Mutex<BTreeMap<u64, Arc<Vec<usize>>>>,
}

impl Batches {
    /// The batches that a seed draws from a shard set.
    ///
    /// # Errors
    /// [`shared::Error::Usage`] when the batch is larger than the set; [`shared::Error::Invalid`] when the set stores a single view.
    pub fn new(shards: ShardSet, embeddings: Option<EmbeddingSet>, batch_size: usize, seed: u64) -> Result<Self> {
        let views = ViewSchedule::new(shards.views(), seed)?;
        let sampler = EpochSampler::new(shards.len(), batch_size, seed)?;
        Ok(Self { shards, embeddings, sampler, views, orders: Mutex::default() })
    }

    /// Whole batches in an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.sampler.steps_per_epoch()
    }

    /// The pixels.
    pub fn shards(&self) -> &ShardSet {
        &self.shards
    }

    /// The batch of a step, counted from 0 over the whole run.
    ///
    /// # Errors
    /// [`shared::Error::Tensor`] when memory cannot become a tensor.
    pub fn batch(&self, step: u64) -> Result<Batch> {
        let (epoch, position) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = self.order(epoch);
        let samples = self.sampler.batch(&order, position);
        let sample_ids: Vec<u64> = samples.iter().map(|&index| self.shards.sample_id(index)).collect();
        let pairs: Vec<[usize; 2]> = sample_ids.iter().map(|&id| self.views.pair(id, epoch)).collect();
        let [query_rows, key_rows] =
            [0, 1].map(|view| samples.iter().zip(&pairs).map(|(&index, pair)| (index, pair[view])).collect::<Vec<_>>());
        let teacher = match &self.embeddings {
            Some(embeddings) => {
                Some([embedding_batch(embeddings, &query_rows)?, embedding_batch(embeddings, &key_rows)?])
            }
            None => None,
        };
        let query_view = normalized_batch(&self.shards, &query_rows, Normalization::Imagenet)?;
        let key_view = normalized_batch(&self.shards, &key_rows, Normalization::Imagenet)?;
        Ok(Batch { step, sample_ids, query_view, key_view, teacher })
    }

    /// Makes the batches of a range of steps on threads of their own.
    ///
    /// # Errors
    /// [`shared::Error::Invalid`] when the system refuses the threads.
    pub fn prefetch(self: &Arc<Self>, steps: Range<u64>) -> Result<Prefetcher<Batch>> {
        let batches = Arc::clone(self);
        Prefetcher::new(WORKERS, BATCHES_AHEAD, steps, move |step| batches.batch(step))
    }

    fn order(&self, epoch: u64) -> Arc<Vec<usize>> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let order = Arc::clone(orders.entry(epoch).or_insert_with(|| Arc::new(self.sampler.order(epoch))));
        // Workers are a few batches apart, so no one needs the epoch before the last.
        orders.retain(|&known, _| known + 1 >= epoch);
        order
    }
}

/// Refuses a queue that would hold several keys of every sample: they would be taken for negatives of themselves.
pub fn queue_advice(queue_size: usize, samples: usize) -> Option<String> {
    (queue_size > samples).then(|| {
        format!(
            "note: the queue of {queue_size} keys is larger than the set of {samples} samples, which then meet themselves as \
             negatives; consider a `--queue-size` of at most {samples}"
        )
    })
}
