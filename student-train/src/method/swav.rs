//! `SwAV`: the cluster assignments of one view are predicted from the others.
//!
//! ```text
//! loss = mean over the global views i of 1 / (V - 1) * sum over the crops v other than i of H(q_i, softmax(z_v C / temperature))
//! ```
//! `z_v` are the embeddings of crop `v`, of V, `C` the prototypes, and `q_i` the assignments of global view `i` by [`sinkhorn`], in
//! which embeddings of earlier steps may take part. Local crops predict and are never predicted.
//!
//! Under a teacher the distillation's terms are added on the two global views, whose embeddings a set holds. In the official code of
//! that testbed (`DisCo-pytorch`, `swav-master/main_swav_distill.py`) the term is the mean of the squared differences over all V
//! crops, samples and D elements, halved: each crop's mean squared distance weighs `1 / (2 V D)`, and all together `1 / (2 D)`, 1/256
//! at 128 elements. A `distill_weight` of 1/512 for each of two views sums to the same. Their teacher's embeddings are not scaled to
//! unit length first, those of a set are.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use shared::distributed::World;
use shared::losses::{sinkhorn, soft_cross_entropy};
use shared::models::{Encoder, Outputs};
use shared::ops::{self, Builder, Engine, Init, Mode, Parameter, ParameterStore, Pass, WeightLayout};
use shared::run::{Losses, prefixed};
use shared::tensor_file::TensorFile;
use shared::{Error, Result};

use super::{Counters, Queue, StepInput, narrow};
use crate::config::SwavConfig;
use crate::part::{LossSum, Part};
use crate::step::Batch;
use crate::trainable::{GradientSum, Trainable};

/// The name of the prototypes among what learns, and what the name of their tensor begins with in a checkpoint.
pub const PROTOTYPES_NAME: &str = "prototypes";
/// The names of the queues in a checkpoint, one for each global view.
pub const QUEUE_NAMES: [&str; 2] = ["swav_queue.0", "swav_queue.1"];
/// How many embeddings have entered each queue, in a checkpoint.
const QUEUE_ENTERED: &str = "swav_queue_entered";

/// Prototypes and queues.
#[derive(Debug)]
pub struct Swav {
    config: SwavConfig,
    /// `[D, P]` in memory, `[P, D]` in files.
    prototypes: Parameter,
    store: ParameterStore,
    queues: Option<[Queue; 2]>,
    /// Embeddings that have entered each queue since the beginning.
    entered: u64,
    /// The embeddings of the step in progress, when they are to enter.
    entering: Option<[Tensor; 2]>,
}

impl Swav {
    /// The state before the first step.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(config: &SwavConfig, query: &Encoder, seed: u64) -> Result<Self> {
        let width = query.head().map_or(0, |head| head.embedding_dim);
        let mut builder = Builder::new(query.device());
        // A linear layer without bias, drawn as PyTorch draws it.
        let init = Init::Uniform { bound: 1.0 / (width as f64).sqrt() };
        let shape = [config.prototypes, width];
        let prototypes = builder.add("weight".into(), &shape, WeightLayout::Linear, init, true)?;
        let store = builder.finish(seed)?;
        let queue = || {
            let rows = Tensor::zeros((config.swav_queue_size, width), DType::F32, &Device::Cpu)?;
            Queue::from_keys(rows, 0)
        };
        let queues = if config.swav_queue_size > 0 { Some([queue()?, queue()?]) } else { None };
        Ok(Self { config: config.clone(), prototypes, store, queues, entered: 0, entering: None })
    }

    /// The prototypes; a clone shares them.
    pub fn trainable(&self) -> Trainable {
        Trainable { name: PROTOTYPES_NAME, store: self.store.clone() }
    }

    /// # Source
    /// Caron et al., `SwAV`, arXiv 2006.09882, section 3 and algorithm 1; official `main_swav.py` @ 04b8f43, `train`.
    ///
    /// # Deviation
    /// With `accumulate` above 1 every crop goes forward twice: the assignments need the whole batch before the first piece can go
    /// backwards.
    pub(super) fn gradients(&mut self, input: &StepInput<'_>, gradients: &mut GradientSum) -> Result<Losses> {
        self.normalise_prototypes()?;
        let mut sum = LossSum::new(input.accumulate);
        let globals = if input.accumulate == 1 {
            let rows = 0..input.batch.sample_ids.len();
            let crops = crops(input.query, input, &rows)?;
            let globals = gathered(global_embeddings(&crops)?, input.world)?;
            let assignments = self.assignments(&globals, input)?;
            sum.backward(self.parts(input, &rows, &crops, &assignments)?, gradients)?;
            globals
        } else {
            let globals = gathered(embed_ahead(input)?, input.world)?;
            let assignments = self.assignments(&globals, input)?;
            for rows in input.pieces() {
                let crops = crops(input.query, input, &rows)?;
                let assignments = [narrow(&assignments[0], &rows)?, narrow(&assignments[1], &rows)?];
                sum.backward(self.parts(input, &rows, &crops, &assignments)?, gradients)?;
            }
            globals
        };
        for embeddings in &globals {
            input.observed.embeddings(embeddings);
        }
        if input.batch.step < self.config.freeze_prototypes_steps {
            gradients.drop_gradients(PROTOTYPES_NAME);
        }
        self.entering = (input.batch.epoch >= self.config.queue_from_epoch).then_some(globals);
        Ok(sum.losses())
    }

    /// Makes every prototype unit length again, which the last step left a little longer or shorter.
    fn normalise_prototypes(&self) -> Result<()> {
        let mut tensors = self.store.to_tensors()?;
        let pass = Pass { mode: Mode::Eval, record: false, engine: Engine::for_device(self.prototypes.var().device()) };
        for rows in tensors.values_mut() {
            *rows = ops::l2_normalise(rows, &pass)?;
        }
        self.store.load(&tensors)
    }

    /// The assignments of the two global views, `(B / R, P)` each: found for the batch of all ranks, given for the rows of this one.
    fn assignments(&self, globals: &[Tensor; 2], input: &StepInput<'_>) -> Result<[Tensor; 2]> {
        let pass = Pass { mode: Mode::Eval, record: false, engine: input.query.engine() };
        let SwavConfig { epsilon, sinkhorn_iterations, swav_queue_size, .. } = self.config;
        let full = self.queues.as_ref().filter(|_| self.entered >= swav_queue_size as u64);
        let assign = |view: usize| {
            let mut scores = ops::linear_map(&globals[view], &self.prototypes, &pass)?;
            if let Some(queues) = full {
                let earlier = ops::linear_map(queues[view].keys(), &self.prototypes, &pass)?;
                scores = Tensor::cat(&[&earlier, &scores], 0)?;
            }
            let rows = globals[view].dim(0)?;
            narrow(&sinkhorn(&scores, epsilon, sinkhorn_iterations, rows)?, &input.world.share(rows))
        };
        Ok([assign(0)?, assign(1)?])
    }

    /// The losses of some rows of a batch.
    fn parts(
        &self,
        input: &StepInput<'_>,
        rows: &Range<usize>,
        crops: &[Outputs],
        assignments: &[Tensor; 2],
    ) -> Result<Vec<Part>> {
        let [first, second] = assignments;
        let both = (first + second)?;
        let pass = Pass { mode: Mode::Eval, record: true, engine: input.query.engine() };
        let mut total: Option<Tensor> = None;
        for (crop, outputs) in crops.iter().enumerate() {
            let scores = ops::linear_map(&outputs.embeddings, &self.prototypes, &pass)?;
            let target = match crop {
                0 => second,
                1 => first,
                _ => &both,
            };
            let loss = soft_cross_entropy(&scores, target, self.config.temperature)?;
            total = Some(match total {
                Some(total) => (total + loss)?,
                None => loss,
            });
        }
        let total = total.ok_or_else(|| Error::invalid("the batch has no views", ""))?;
        let loss = (total / (2 * (crops.len() - 1)) as f64)?;
        let mut parts = vec![Part { loss: loss.clone(), terms: vec![(Losses::SWAPPED_PREDICTION.into(), loss)] }];
        for (view, outputs) in crops.iter().take(2).enumerate() {
            if let Some(distillation) = input.distillation.filter(|distillation| distillation.wants(view)) {
                parts.push(distillation.part(view, outputs, input.batch, rows)?);
            }
        }
        Ok(parts)
    }

    pub(super) fn after_step(&mut self) -> Result<()> {
        let (Some(queues), Some(entering)) = (&mut self.queues, self.entering.take()) else { return Ok(()) };
        for (queue, rows) in queues.iter_mut().zip(&entering) {
            queue.enqueue(rows)?;
        }
        self.entered += entering[0].dim(0)? as u64;
        Ok(())
    }

    pub(super) fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let prototypes = self.store.to_tensors()?.into_iter();
        let mut tensors: BTreeMap<String, Tensor> =
            prototypes.map(|(name, tensor)| (format!("{PROTOTYPES_NAME}.{name}"), tensor)).collect();
        for (name, queue) in QUEUE_NAMES.iter().zip(self.queues.iter().flatten()) {
            tensors.insert((*name).into(), queue.keys().clone());
        }
        Ok(tensors)
    }

    pub(super) fn counters(&self) -> Counters {
        Counters::from([(QUEUE_ENTERED.into(), self.entered)])
    }

    pub(super) fn load(&mut self, file: &TensorFile, counters: &Counters) -> Result<()> {
        let entered = counters.get(QUEUE_ENTERED);
        let entered = *entered.ok_or_else(|| Error::invalid(format!("the checkpoint has no `{QUEUE_ENTERED}`"), ""))?;
        self.store.load(&prefixed(file, &format!("{PROTOTYPES_NAME}."))?)?;
        for (name, queue) in QUEUE_NAMES.iter().zip(self.queues.iter_mut().flatten()) {
            let (size, width) = queue.keys().dims2()?;
            file.view_shaped::<f32>(name, &[size, width], "[K, D]")?;
            *queue = Queue::from_keys(file.tensor(name)?, (entered % size as u64) as usize)?;
        }
        self.entered = entered;
        Ok(())
    }
}

/// The embeddings of the two global views, `(B, D)` each, without gradient.
fn global_embeddings(crops: &[Outputs]) -> Result<[Tensor; 2]> {
    match crops {
        [first, second, ..] => Ok([first.embeddings.detach(), second.embeddings.detach()]),
        _ => Err(Error::invalid("the batch has no two global views", "")),
    }
}

/// The embeddings of all ranks, in their order.
fn gathered([first, second]: [Tensor; 2], world: &World) -> Result<[Tensor; 2]> {
    Ok([world.all_gather(&first)?, world.all_gather(&second)?])
}

/// The embeddings of the global views of a whole batch, piece by piece as they will be computed again, by a copy of the encoder, so
/// that running statistics move once.
fn embed_ahead(input: &StepInput<'_>) -> Result<[Tensor; 2]> {
    let copy = input.query.momentum_copy()?;
    let mut pieces = [Vec::new(), Vec::new()];
    for rows in input.pieces() {
        let embeddings = global_embeddings(&crops(&copy, input, &rows)?)?;
        for (pieces, rows) in pieces.iter_mut().zip(embeddings) {
            pieces.push(rows);
        }
    }
    Ok([Tensor::cat(&pieces[0], 0)?, Tensor::cat(&pieces[1], 0)?])
}

/// What the encoder makes of every crop of some rows of a batch, the global views first.
///
/// Crops of one size go through the backbone together, then all through the head, so that a batch norm takes its statistics over
/// all of them, as in the official code. With several groups each takes those of its own samples: a group is what one device
/// would see.
fn crops(encoder: &Encoder, input: &StepInput<'_>, rows: &Range<usize>) -> Result<Vec<Outputs>> {
    let groups = input.bn_groups / input.accumulate;
    let mode = Mode::Train { bn_groups: groups };
    let samples = rows.len() / groups;
    let mut features = Vec::new();
    let mut count = 0;
    for views in views_by_size(input.batch)? {
        let mut pieces = Vec::new();
        for group in 0..groups {
            for view in &views {
                pieces.push(view.narrow(0, rows.start + group * samples, samples)?);
            }
        }
        count += views.len();
        let of_size = encoder.features(&Tensor::cat(&pieces, 0)?, mode)?; // (groups * views * samples, F)
        features.push(of_size.reshape((groups, views.len() * samples, of_size.dim(1)?))?);
    }
    let features = match &features[..] {
        [alone] => alone.flatten(0, 1)?,
        several => Tensor::cat(several, 1)?.flatten(0, 1)?,
    };
    let all = encoder.outputs_of(features, mode)?;
    let of_crop = |rows: &Tensor, crop: usize| -> Result<Tensor> {
        let width = rows.dim(1)?;
        let rows = rows.reshape((groups, count, samples, width))?.narrow(1, crop, 1)?;
        Ok(rows.contiguous()?.reshape((groups * samples, width))?)
    };
    (0..count)
        .map(|crop| {
            Ok(Outputs {
                features: of_crop(&all.features, crop)?,
                projections: of_crop(&all.projections, crop)?,
                embeddings: of_crop(&all.embeddings, crop)?,
            })
        })
        .collect()
}

/// The crops of a batch, `(B, H, W, 3)` each: those of one size together, the global views first.
fn views_by_size(batch: &Batch) -> Result<Vec<Vec<Tensor>>> {
    let mut globals = batch.views.to_vec();
    let Some(locals) = &batch.locals else { return Ok(vec![globals]) };
    let (_, count, height, width, _) = locals.dims5()?;
    let locals = (0..count).map(|view| Ok(locals.narrow(1, view, 1)?.squeeze(1)?.contiguous()?));
    let locals: Vec<Tensor> = locals.collect::<Result<_>>()?;
    let (_, global_height, global_width, _) = globals[0].dims4()?;
    if (global_height, global_width) == (height, width) {
        globals.extend(locals);
        return Ok(vec![globals]);
    }
    Ok(vec![globals, locals])
}
