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
use shared::distributed::World;
use shared::shard::ShardSet;
use shared::transforms::View;
use shared::transforms::normalize::Normalization;

use crate::step::{Batch, batch_shuffle};
use crate::teachers::Teachers;

/// Threads that make batches; one normalises several thousand plain views of 224 x 224 a second.
const WORKERS: usize = 2;
/// Batches that wait, besides one in the hands of each worker: memory is bounded by their sum.
const BATCHES_AHEAD: usize = 2;
/// Batches that exist at once: those, one in the hands of each worker, and that of the step.
pub const BATCHES_IN_MEMORY: usize = WORKERS + BATCHES_AHEAD + 1;

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
    /// Whose share is made.
    world: World,
    /// Whether the shares of several ranks have the key's views of the shuffled batch as well.
    shuffle_keys: bool,
}

/// Which views a step, or a rank's share of it, sees: pairs of a sample's index and a view.
struct Rows {
    sample_ids: Vec<u64>,
    /// The query's and the key's.
    views: [Vec<(usize, usize)>; 2],
    shuffled_keys: Option<Vec<(usize, usize)>>,
}

impl Rows {
    fn all(&self) -> impl Iterator<Item = &Vec<(usize, usize)>> {
        self.views.iter().chain(&self.shuffled_keys)
    }
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
            world: World::alone(),
            shuffle_keys: false,
            locals: None,
        })
    }

    /// Makes this rank's share of every batch, the rows `[r * B / R, (r + 1) * B / R)` of the same global batch. With `shuffle_keys` it
    /// has the key's views of that share of the shuffled batch, too: their images are read here, not sent.
    #[must_use]
    pub fn shared_out(self, world: &World, shuffle_keys: bool) -> Self {
        Self { world: world.clone(), shuffle_keys, ..self }
    }

    /// The same batches with the local views of the set, if it has any: for methods that see them.
    ///
    /// # Errors
    /// As [`LocalSchedule::new`].
    pub fn with_local_views(self) -> Result<Self> {
        let schedule = LocalSchedule::new(self.shards.views(), self.shards.local_views(), self.seed)?;
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

    /// The batch of a step, counted from 0 over the whole run, or this rank's share of it.
    ///
    /// # Errors
    /// [`shared::Error::Tensor`] when memory cannot become a tensor.
    pub fn batch(&self, step: u64) -> Result<Batch> {
        let Rows { sample_ids, views: [query_rows, key_rows], shuffled_keys } = self.rows(step);
        let teacher = match &self.teachers {
            Some(teachers) => {
                let targets = |rows: &[(usize, usize)]| teachers.batch(rows, self.seed, step);
                Some([targets(&query_rows)?, targets(&key_rows)?])
            }
            None => None,
        };
        let views = |rows: &[(usize, usize)]| normalized_batch(&self.shards, rows, Normalization::Imagenet);
        let all = || {
            let shuffled_keys = shuffled_keys.as_deref().map(views).transpose()?;
            Ok::<_, shared::Error>(([views(&query_rows)?, views(&key_rows)?], shuffled_keys, self.local_views(step)?))
        };
        let (views, shuffled_keys, locals) = self.makers.as_ref().map_or_else(all, |makers| makers.install(all))?;
        let epoch = step / self.steps_per_epoch();
        Ok(Batch { step, epoch, sample_ids, views, locals, teacher, shuffled_keys })
    }

    /// `(B, L, h, w, 3)`: the local views of a step.
    fn local_views(&self, step: u64) -> Result<Option<Tensor>> {
        let Some(schedule) = &self.locals else { return Ok(None) };
        let flat = normalized_views(&self.shards, &self.local_rows(step), Normalization::Imagenet)?;
        let (rows, height, width, channels) = flat.dims4()?;
        let count = schedule.hand_size();
        Ok(Some(flat.reshape((rows / count, count, height, width, channels))?))
    }

    /// The local views of this rank's share of a step, those of one sample together.
    fn local_rows(&self, step: u64) -> Vec<(usize, View)> {
        let Some(schedule) = &self.locals else { return Vec::new() };
        let (epoch, position) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = self.order(epoch);
        let samples = self.sampler.batch(&order, position);
        let hand = |index: usize| schedule.hand(self.shards.sample_id(index), epoch);
        let views = |&index: &usize| hand(index).into_iter().map(move |view| (index, View::Local(view)));
        samples[self.world.share(samples.len())].iter().flat_map(views).collect()
    }

    /// The samples of a step, and the view of each that is the query and the one that is the key.
    fn rows(&self, step: u64) -> Rows {
        let (epoch, position) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = self.order(epoch);
        let samples = self.sampler.batch(&order, position);
        let views = |index: usize| {
            let id = self.shards.sample_id(index);
            (id, self.views.pair(id, epoch).map(|view| (index, view)))
        };
        let share = self.world.share(samples.len());
        let (sample_ids, pairs): (Vec<u64>, Vec<_>) = samples[share.clone()].iter().map(|&index| views(index)).unzip();
        let shuffled_keys = (self.shuffle_keys && !self.world.is_alone()).then(|| {
            let shuffle = batch_shuffle(samples.len(), self.seed, step);
            shuffle[share].iter().map(|&row| views(samples[row as usize]).1[1]).collect()
        });
        Rows { sample_ids, views: [0, 1].map(|view| pairs.iter().map(|pair| pair[view]).collect()), shuffled_keys }
    }

    /// Asks the disk for what a step is going to read.
    fn will_need(&self, step: u64) -> Result<()> {
        self.rows(step).all().try_for_each(|rows| self.shards.will_need(rows))?;
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
