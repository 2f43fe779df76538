//! The batches of a run: which samples and views every step sees, made ahead of their use.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use rayon::ThreadPool;
use shared::Result;
use shared::data_loader::{
    EpochSampler, LocalSchedule, Order, Prefetcher, ViewSchedule, normalized_batch, normalized_views,
};
use shared::shard::ShardSet;
use shared::transforms::View;
use shared::transforms::normalize::Normalization;

use crate::step::Batch;
use crate::teachers::Teachers;

/// Threads that make batches; one normalises several thousand plain views of 224 x 224 a second.
const WORKERS: usize = 2;
/// Batches that wait, besides one in the hands of each worker: memory is bounded by their sum.
const BATCHES_AHEAD: usize = 2;

/// Makes the batch of any step.
#[derive(Debug)]
pub struct Batches {
    shards: ShardSet,
    teachers: Option<Teachers>,
    seed: u64,
    sampler: EpochSampler,
    views: ViewSchedule,
    /// None unless the method sees local views.
    locals: Option<LocalSchedule>,
    /// Threads that decode or redraw the views of a batch, besides those that train: the system shares the cores between them, so
    /// that no step waits behind an image. None for plain views.
    makers: Option<ThreadPool>,
    /// The orders of the epochs that the workers are in.
    orders: Mutex<BTreeMap<u64, Arc<Vec<usize>>>>,
}

impl Batches {
    /// The batches that a seed draws from a shard set.
    ///
    /// # Errors
    /// [`shared::Error::Usage`] when the batch is larger than the set; [`shared::Error::Invalid`] when the set stores a single view,
    /// or the system refuses the threads that make views.
    pub fn new(
        shards: ShardSet,
        teachers: Option<Teachers>,
        batch_size: usize,
        seed: u64,
        order: Order,
    ) -> Result<Self> {
        let views = ViewSchedule::new(shards.views(), seed)?;
        let sampler = EpochSampler::new(shards.len(), batch_size, seed)?.with_order(order);
        let makers = shards.makes_views().then(|| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(rayon::current_num_threads())
                .thread_name(|index| format!("views-{index}"))
                .build()
                .map_err(|e| shared::Error::invalid(format!("cannot start threads that make views: {e}"), ""))
        });
        Ok(Self {
            shards,
            teachers,
            seed,
            sampler,
            views,
            makers: makers.transpose()?,
            orders: Mutex::default(),
            locals: None,
        })
    }

    /// The same batches with the local views of the set, if it has any: for methods that see them.
    ///
    /// # Errors
    /// As [`LocalSchedule::new`].
    pub fn with_local_views(self, seed: u64) -> Result<Self> {
        let schedule = LocalSchedule::new(self.shards.views(), self.shards.local_views(), seed)?;
        Ok(Self { locals: (schedule.hand_size() > 0).then_some(schedule), ..self })
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
        let (sample_ids, [query_rows, key_rows]) = self.rows(step);
        let teacher = match &self.teachers {
            Some(teachers) => {
                let targets = |rows: &[(usize, usize)]| teachers.batch(rows, self.seed, step);
                Some([targets(&query_rows)?, targets(&key_rows)?])
            }
            None => None,
        };
        let views = |rows: &[(usize, usize)]| normalized_batch(&self.shards, rows, Normalization::Imagenet);
        let all = || Ok::<_, shared::Error>(([views(&query_rows)?, views(&key_rows)?], self.local_views(step)?));
        let (views, locals) = self.makers.as_ref().map_or_else(all, |makers| makers.install(all))?;
        let epoch = step / self.steps_per_epoch();
        Ok(Batch { step, epoch, sample_ids, views, locals, teacher })
    }

    /// `(B, L, h, w, 3)`: the local views of a step.
    fn local_views(&self, step: u64) -> Result<Option<Tensor>> {
        let Some(schedule) = &self.locals else { return Ok(None) };
        let flat = normalized_views(&self.shards, &self.local_rows(step), Normalization::Imagenet)?;
        let (rows, height, width, channels) = flat.dims4()?;
        let count = schedule.hand_size();
        Ok(Some(flat.reshape((rows / count, count, height, width, channels))?))
    }

    /// The local views of a step, those of one sample together.
    fn local_rows(&self, step: u64) -> Vec<(usize, View)> {
        let Some(schedule) = &self.locals else { return Vec::new() };
        let (epoch, position) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = self.order(epoch);
        let samples = self.sampler.batch(&order, position).iter();
        let hand = |index: usize| schedule.hand(self.shards.sample_id(index), epoch);
        samples.flat_map(|&index| hand(index).into_iter().map(move |view| (index, View::Local(view)))).collect()
    }

    /// The samples of a step, and the view of each that is the query and the one that is the key.
    fn rows(&self, step: u64) -> (Vec<u64>, [Vec<(usize, usize)>; 2]) {
        let (epoch, position) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = self.order(epoch);
        let samples = self.sampler.batch(&order, position);
        let sample_ids: Vec<u64> = samples.iter().map(|&index| self.shards.sample_id(index)).collect();
        let pairs: Vec<[usize; 2]> = sample_ids.iter().map(|&id| self.views.pair(id, epoch)).collect();
        let rows = [0, 1].map(|view| samples.iter().zip(&pairs).map(|(&index, pair)| (index, pair[view])).collect());
        (sample_ids, rows)
    }

    /// Asks the disk for what a step is going to read.
    fn will_need(&self, step: u64) -> Result<()> {
        self.rows(step).1.iter().try_for_each(|rows| self.shards.will_need(rows))?;
        self.shards.will_need_views(&self.local_rows(step))
    }

    /// Makes the batches of a range of steps on threads of their own.
    ///
    /// # Errors
    /// [`shared::Error::Invalid`] when the system refuses the threads.
    pub fn prefetch(self: &Arc<Self>, steps: Range<u64>) -> Result<Prefetcher<Batch>> {
        let batches = Arc::clone(self);
        let end = steps.end;
        Prefetcher::new(WORKERS, BATCHES_AHEAD, steps, move |step| {
            // The disk works on what this thread does next while it makes this batch.
            let next = step + WORKERS as u64;
            if next < end {
                batches.will_need(next)?;
            }
            batches.batch(step)
        })
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
