//! One step: two views of a batch in, moved parameters and a fuller queue out.

use std::collections::BTreeMap;

use candle_core::Tensor;
use shared::checkpoint::Checkpoint;
use shared::ops::Gradients;
use shared::optim::{Sgd, SgdConfig};
use shared::rng::KeyedRng;
use shared::run::{Losses, prefixed};
use shared::{Error, Fault, Result};

use crate::config::Config;
use crate::objective::{Target, key_part, query_part};
use crate::queue::Queue;
use crate::student::Student;

/// What the names of the optimiser's momenta begin with in a checkpoint.
pub const SGD_PREFIX: &str = "sgd.";
/// The name of the queue in a checkpoint.
pub const QUEUE_NAME: &str = "queue";

/// What a step sees.
#[derive(Debug)]
pub struct Batch {
    /// The step, counted from 0 over the whole run.
    pub step: u64,
    /// Who the samples are, for messages.
    pub sample_ids: Vec<u64>,
    /// `(B, H, W, 3)` f32, normalised: the query's view.
    pub query_view: Tensor,
    /// `(B, H, W, 3)` f32, normalised: the key's view.
    pub key_view: Tensor,
    /// The teacher's embeddings of the two views, `(B, D)` f32 each.
    pub teacher: Option<[Tensor; 2]>,
}

/// All that changes from step to step.
#[derive(Debug)]
pub struct TrainingState {
    student: Student,
    sgd: Sgd,
    queue: Queue,
    temperature: f64,
    key_momentum: f64,
    distill_weight: f64,
}

impl TrainingState {
    /// The state before the first step, a function of the configuration.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(config: &Config) -> Result<Self> {
        let student = Student::new(config.student, config.head(), config.bn_groups, config.seed)?;
        let queue = Queue::random(config.queue_size, config.embedding_dim, config.seed)?;
        Ok(Self::from_parts(student, queue, config))
    }

    /// A state made of a given student and queue.
    pub fn from_parts(student: Student, queue: Queue, config: &Config) -> Self {
        let sgd = Sgd::new(SgdConfig { momentum: config.momentum, weight_decay: config.weight_decay });
        Self {
            student,
            sgd,
            queue,
            temperature: config.temperature,
            key_momentum: config.key_momentum,
            distill_weight: config.distill_weight.unwrap_or(0.0),
        }
    }

    /// The student.
    pub fn student(&self) -> &Student {
        &self.student
    }

    /// The negatives.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Makes one step and returns the losses that it minimised.
    ///
    /// In this order: the key encoder follows and embeds the key's view in shuffled order; the query encoder embeds the query's
    /// view, then, when there is a teacher, the key's; gradients; descent; the keys enter the queue.
    ///
    /// # Shapes
    /// - `shuffle`: a permutation of `0..B`, see [`batch_shuffle`]
    ///
    /// # Errors
    /// [`Error::Invalid`] when the loss is not finite, before the parameters move; [`Error::Shape`] when the batch does not fit.
    ///
    /// # Source
    /// `DisCo`, arXiv 2104.09124, section 3; `MoCo`, arXiv 1911.05722, algorithm 1; official `DisCo` code @ 1d732c8,
    /// `moco/builder_kq_mse_largeembedding_2048.py`, `forward`.
    pub fn step(&mut self, batch: &Batch, shuffle: &[u32], lr: f64) -> Result<Losses> {
        let keys = self.student.embed_keys(&batch.key_view, shuffle, self.key_momentum)?; // (B, D)
        let [query_target, key_target] = self.targets(batch);

        let queries = self.student.embed_queries(&batch.query_view)?; // (B, D)
        let part = query_part(&queries, &keys, self.queue.keys(), self.temperature, query_target)?;
        let mut losses = Losses {
            loss: scalar(&part.loss)?,
            info_nce: scalar(&part.contrast.loss)?,
            distill_q: part.distance.as_ref().map(scalar).transpose()?,
            distill_k: None,
            top1: scalar(&part.contrast.top1)?,
        };
        let store = self.student.query().store();
        let mut gradients = store.backward(&part.loss)?;
        // The graph of this view holds most of the memory; the other view's comes next.
        drop((part, queries));

        if let Some(target) = key_target {
            let embeddings = self.student.embed_queries(&batch.key_view)?; // (B, D)
            let (weighted, distance) = key_part(&embeddings, target)?;
            losses.loss += scalar(&weighted)?;
            losses.distill_k = Some(scalar(&distance)?);
            gradients = sum(gradients, &store.backward(&weighted)?)?;
        }
        if !losses.loss.is_finite() {
            return Err(not_finite(&losses, batch));
        }
        self.sgd.step(store, &gradients, lr)?;
        self.queue.enqueue(&keys)?;
        Ok(losses)
    }

    fn targets<'a>(&self, batch: &'a Batch) -> [Option<Target<'a>>; 2] {
        let weight = self.distill_weight;
        match &batch.teacher {
            Some(teacher) => teacher.each_ref().map(|teacher| Some(Target { teacher, weight })),
            None => [None, None],
        }
    }

    /// Everything for a checkpoint but the queue's pointer.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = self.student.to_tensors()?;
        let momenta = self.sgd.to_tensors(self.student.query().store())?;
        tensors.extend(momenta.into_iter().map(|(name, tensor)| (format!("{SGD_PREFIX}{name}"), tensor)));
        tensors.insert(QUEUE_NAME.into(), self.queue.keys().clone());
        Ok(tensors)
    }

    /// Takes everything from a checkpoint.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::Invalid`] when tensors are missing, unexpected or of another shape.
    pub fn load<S>(&mut self, checkpoint: &Checkpoint<S>, queue_pointer: usize) -> Result<()> {
        let file = &checkpoint.tensors;
        for name in file.names() {
            let known = [shared::run::QUERY_PREFIX, crate::student::KEY_PREFIX, SGD_PREFIX];
            if name != QUEUE_NAME && !known.iter().any(|prefix| name.starts_with(prefix)) {
                return Err(file.fault(Fault::Value(format!("tensor `{name}` is no part of a training"))));
            }
        }
        let (size, width) = self.queue.keys().dims2()?;
        file.view_shaped::<f32>(QUEUE_NAME, &[size, width], "[K, D]")?;
        self.student.load(file)?;
        self.sgd.load(self.student.query().store(), &prefixed(file, SGD_PREFIX)?)?;
        self.queue = Queue::from_keys(file.tensor(QUEUE_NAME)?, queue_pointer)?;
        Ok(())
    }
}

/// The order in which the key encoder sees the samples of a step, counted from 0 over the whole run.
pub fn batch_shuffle(batch_size: usize, seed: u64, step: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..batch_size as u32).collect();
    KeyedRng::new("batch shuffle", seed, &[step]).shuffle(&mut order);
    order
}

fn scalar(tensor: &Tensor) -> Result<f32> {
    Ok(tensor.to_scalar()?)
}

fn sum(mut gradients: Gradients, more: &Gradients) -> Result<Gradients> {
    for (name, gradient) in gradients.iter_mut() {
        if let Some(more) = more.get(name) {
            *gradient = (&*gradient + more)?;
        }
    }
    Ok(gradients)
}

fn not_finite(losses: &Losses, batch: &Batch) -> Error {
    const LISTED: usize = 4;
    let ids: Vec<String> = batch.sample_ids.iter().take(LISTED).map(|id| format!("{id:016x}")).collect();
    let more = batch.sample_ids.len().saturating_sub(LISTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let Losses { loss, info_nce, .. } = losses;
    Error::invalid(
        format!(
            "the loss became {loss} (info_nce {info_nce}) in step {} on the samples {}{more}",
            batch.step + 1,
            ids.join(", ")
        ),
        "start again with `--overwrite` and a lower `--lr`",
    )
}
