//! One step: views of a batch in, moved parameters out.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;
use shared::checkpoint::Checkpoint;
use shared::distributed::World;
use shared::models::{Encoder, MlpHead};
use shared::optim::{Optimizer, average_update, clip_gradients, gradient_norm};
use shared::rng::KeyedRng;
use shared::run::{AVERAGE_PREFIX, Losses, QUERY_PREFIX, prefixed};
use shared::{Error, Fault, Result};

use crate::averaging::average;
use crate::config::Config;
use crate::distillation::Distillation;
use crate::method::{Counters, Method, StepInput};
use crate::spread::Observed;
use crate::trainable::{GradientSum, Trainable};

/// The name of the student among what learns.
pub const QUERY_NAME: &str = "query";

/// What a step sees: the whole batch, or a rank's share of it.
#[derive(Debug)]
pub struct Batch {
    /// The step, counted from 0 over the whole run.
    pub step: u64,
    /// Its epoch, counted from 0.
    pub epoch: u64,
    /// Who the samples are, for messages.
    pub sample_ids: Vec<u64>,
    /// Two global views, `(B, H, W, 3)` f32, normalised: the query's and the key's.
    pub views: [Tensor; 2],
    /// Small views, `(B, L, h, w, 3)` f32, normalised: for methods of many crops, from sets that have them.
    pub locals: Option<Tensor>,
    /// The teacher's embeddings of the two views, `(B, D)` f32 each.
    pub teacher: Option<[Tensor; 2]>,
    /// A rank's share of the key's views in the shuffled order of the whole batch; none for a single process, which has them all.
    pub shuffled_keys: Option<Tensor>,
}

/// A student whose parameters are a moving average of the query encoder's.
#[derive(Debug)]
struct Average {
    student: Encoder,
    decay: f64,
}

/// All that changes from step to step.
#[derive(Debug)]
pub struct TrainingState {
    query: Encoder,
    method: Method,
    distillation: Option<Distillation>,
    optimizer: Optimizer,
    clip_norm: Option<f64>,
    average: Option<Average>,
    bn_groups: usize,
    accumulate: usize,
    observed: Observed,
    world: World,
}

impl TrainingState {
    /// The state before the first step, a function of the configuration.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(config: &Config) -> Result<Self> {
        Self::with_teacher_head(config, None)
    }

    /// As [`TrainingState::new`], with the teacher's own head behind the student's adapter.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the configuration is not for this head.
    pub fn with_teacher_head(config: &Config, head: Option<Arc<MlpHead>>) -> Result<Self> {
        let mut query = Encoder::new(config.student, Some(config.head()), config.seed)?;
        if let Some(head) = head {
            query = query.with_reused_head(head)?;
        }
        let method = Method::new(config, &query)?;
        Self::from_parts(query, method, config)
    }

    /// A state made of a given student and method.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn from_parts(query: Encoder, method: Method, config: &Config) -> Result<Self> {
        let optimisation = &config.optimisation;
        let average =
            optimisation.ema_decay.map(|decay| Ok::<_, Error>(Average { student: query.momentum_copy()?, decay }));
        Ok(Self {
            average: average.transpose()?,
            query,
            method,
            distillation: Distillation::new(config)?,
            optimizer: Optimizer::new(optimisation.optimizer()),
            clip_norm: optimisation.clip_norm,
            bn_groups: config.bn_groups,
            accumulate: config.accumulate,
            observed: Observed::default(),
            world: World::alone(),
        })
    }

    /// The same state, one of the equal states of ranks that train together: each step takes a share of a batch.
    #[must_use]
    pub fn in_world(self, world: World) -> Self {
        Self { world, ..self }
    }

    /// The encoder that learns.
    pub fn query(&self) -> &Encoder {
        &self.query
    }

    /// What is seen of the embeddings of the next step, or was of the last.
    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// The encoder that the run exports and that is evaluated: the moving average where there is one.
    pub fn student(&self) -> &Encoder {
        self.average.as_ref().map_or(&self.query, |average| &average.student)
    }

    /// What the teacher adds to the loss, if there is one.
    pub fn distillation(&self) -> Option<&Distillation> {
        self.distillation.as_ref()
    }

    /// The self-supervised method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Replaces some of the query encoder's tensors, names and layouts of `PyTorch`, before the first step; what follows it
    /// is its copy again.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a tensor that the encoder does not have, or of another shape; nothing is changed then.
    pub fn start_from(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut all = self.query.store().to_tensors()?;
        all.extend(tensors.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        self.query.store().load(&all)?;
        if let Some(average) = &self.average {
            average.student.store().copy_from(self.query.store())?;
        }
        self.method.restart(&self.query)
    }

    /// Everything that learns, the student first.
    fn trainables(&self) -> Vec<Trainable> {
        let mut trainables = vec![Trainable { name: QUERY_NAME, store: self.query.store().clone() }];
        trainables.extend(self.method.trainables());
        trainables.extend(self.distillation.iter().flat_map(Distillation::trainables));
        trainables
    }

    /// Makes one step and returns the losses that it minimised.
    ///
    /// In this order: the method's forward and backward passes with the teacher's terms, means over the ranks, clipping, descent,
    /// the average of the student, what method and distillation do after a step.
    ///
    /// # Shapes
    /// - `shuffle`: a permutation of `0..B`, all ranks' rows, see [`batch_shuffle`]
    ///
    /// # Errors
    /// [`Error::Invalid`] when the loss, a clipped gradient or a parameter is not finite, for a loss with the samples of the first
    /// rank where it happened: the state must not be saved then; [`Error::Shape`] when the batch does not fit.
    pub fn step(&mut self, batch: &Batch, shuffle: &[u32], lr: f64) -> Result<Losses> {
        let mut gradients = GradientSum::new(self.trainables());
        let input = StepInput {
            query: &self.query,
            distillation: self.distillation.as_ref(),
            batch,
            shuffle,
            bn_groups: self.bn_groups / self.world.size(),
            accumulate: self.accumulate,
            observed: &self.observed,
            world: &self.world,
        };
        let own = self.method.gradients(&input, &mut gradients)?;
        let mut losses = own.clone();
        average(&self.world, &mut losses, &mut gradients, &self.method)?;
        if !losses.loss.is_finite() {
            let stop = |losses: &Losses| not_finite(&format!("the loss became {}", losses.loss), losses, batch);
            self.world.agree(if own.loss.is_finite() { Ok(()) } else { Err(stop(&own)) })?;
            return self.world.agree(Err(stop(&losses)));
        }
        if let Some(limit) = self.clip_norm {
            let norm = gradient_norm(gradients.iter().map(|(_, gradients)| gradients))?;
            losses.terms.insert(Losses::GRADIENT_NORM.into(), norm as f32);
            if !norm.is_finite() {
                // The same on all ranks, as are the parameters.
                return self.world.agree(Err(not_finite("a gradient is not finite", &losses, batch)));
            }
            clip_gradients(gradients.iter().map(|(_, gradients)| gradients), norm, limit)?;
        }
        for (trainable, gradients) in gradients.iter() {
            self.optimizer.step(trainable.name, &trainable.store, gradients, lr)?;
        }
        for (Trainable { name: network, store }, _) in gradients.iter() {
            if let Some(name) = store.first_not_finite()? {
                let what = format!("the parameter `{network}.{name}` is not finite any more");
                return self.world.agree(Err(not_finite(&what, &losses, batch)));
            }
        }
        if let Some(Average { student, decay }) = &self.average {
            average_update(student.store(), self.query.store(), *decay)?;
        }
        self.method.after_step()?;
        if let Some(distillation) = &mut self.distillation {
            distillation.after_step(batch, &self.world)?;
        }
        Ok(losses)
    }

    /// All tensors of a checkpoint, in file names and layouts behind a prefix.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let query = self.query.store().to_tensors()?;
        let mut tensors: BTreeMap<String, Tensor> =
            query.into_iter().map(|(name, tensor)| (format!("{QUERY_PREFIX}{name}"), tensor)).collect();
        tensors.extend(self.method.to_tensors()?);
        if let Some(average) = &self.average {
            let average = average.student.store().to_tensors()?;
            tensors.extend(average.into_iter().map(|(name, tensor)| (format!("{AVERAGE_PREFIX}{name}"), tensor)));
        }
        if let Some(distillation) = &self.distillation {
            tensors.extend(distillation.to_tensors()?);
        }
        for Trainable { name: network, store } in self.trainables() {
            let prefix = self.optimizer.prefix(network);
            let state = self.optimizer.to_tensors(network, &store)?;
            tensors.extend(state.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
        }
        Ok(tensors)
    }

    /// Trainable values of all networks, the student's head and the method's own included.
    pub fn num_parameters(&self) -> usize {
        self.trainables().iter().map(|trainable| trainable.store.num_parameters()).sum()
    }

    /// Bytes of the tensors of a checkpoint after the first step, and of the state in memory.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn checkpoint_bytes(&self) -> Result<u64> {
        let bytes = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        let tensors = self.to_tensors()?.values().map(bytes).sum::<u64>();
        let learnt = (self.num_parameters() * size_of::<f32>()) as u64;
        Ok(tensors + learnt * self.optimizer.config().rule.buffers())
    }

    /// All numbers of a checkpoint.
    pub fn counters(&self) -> Counters {
        let mut counters = self.method.counters();
        counters.extend(self.distillation.iter().flat_map(Distillation::counters));
        counters
    }

    /// Takes everything from a checkpoint.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::Invalid`] when tensors are missing, unexpected or of another shape.
    pub fn load<S>(&mut self, checkpoint: &Checkpoint<S>, counters: &Counters) -> Result<()> {
        let file = &checkpoint.tensors;
        self.query.store().load(&prefixed(file, QUERY_PREFIX)?)?;
        self.method.load(file, counters)?;
        if let Some(average) = &self.average {
            average.student.store().load(&prefixed(file, AVERAGE_PREFIX)?)?;
        }
        if let Some(distillation) = &mut self.distillation {
            distillation.load(file, counters)?;
        }
        for Trainable { name: network, store } in self.trainables() {
            let tensors = prefixed(file, &self.optimizer.prefix(network))?;
            self.optimizer.load(network, &store, &tensors)?;
        }
        let known = self.to_tensors()?;
        match file.names().into_iter().find(|name| !known.contains_key(name)) {
            Some(name) => Err(file.fault(Fault::Value(format!("tensor `{name}` is no part of this training")))),
            None => Ok(()),
        }
    }
}

/// The order in which the key encoder sees the samples of a step, counted from 0 over the whole run.
pub fn batch_shuffle(batch_size: usize, seed: u64, step: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..batch_size as u32).collect();
    KeyedRng::new("batch shuffle", seed, &[step]).shuffle(&mut order);
    order
}

/// What stopped, in one sentence; the samples are named so that they can be looked at.
fn not_finite(what: &str, losses: &Losses, batch: &Batch) -> Error {
    const LISTED: usize = 256;
    let ids: Vec<String> = batch.sample_ids.iter().take(LISTED).map(|id| format!("{id:016x}")).collect();
    let more = batch.sample_ids.len().saturating_sub(LISTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let terms: Vec<String> = losses.terms.iter().map(|(name, value)| format!("{name} {value}")).collect();
    Error::invalid(
        format!("{what} ({}) in step {} on the samples {}{more}", terms.join(", "), batch.step + 1, ids.join(", ")),
        "lower `--lr`, warm it up by `--warmup-epochs` or clip gradients by `--clip-norm`, and start again with `--overwrite`",
    )
}
