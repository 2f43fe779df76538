//! Self-supervised methods: what a step learns from the images alone, besides what a teacher says of them.

mod moco;
mod queue;
mod swav;

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;
use shared::Result;
use shared::distributed::World;
use shared::models::{Encoder, Outputs};
use shared::ops::{Mode, ParameterStore};
use shared::run::Losses;
use shared::tensor_file::TensorFile;

pub use self::moco::{KEY_PREFIX, Moco, QUEUE_NAME};
pub use self::queue::Queue;
pub use self::swav::{PROTOTYPES_NAME, QUEUE_NAMES, Swav};
use crate::config::{Config, MethodConfig};
use crate::distillation::Distillation;
use crate::part::LossSum;
use crate::spread::Observed;
use crate::step::Batch;
use crate::trainable::{GradientSum, Trainable};

/// Numbers that a checkpoint holds besides tensors, by name.
pub type Counters = BTreeMap<String, u64>;

/// A self-supervised method with its state.
#[derive(Debug)]
pub enum Method {
    /// Contrast against a queue of keys.
    Moco(Box<Moco>),
    /// Cluster assignments predicted between crops.
    Swav(Box<Swav>),
    /// None: the teacher alone.
    Alone,
}

/// What a method needs to make the gradients of a step.
#[derive(Debug)]
pub struct StepInput<'a> {
    /// The encoder that learns.
    pub query: &'a Encoder,
    /// What the teacher wants, if there is one.
    pub distillation: Option<&'a Distillation>,
    /// The samples of this rank.
    pub batch: &'a Batch,
    /// A permutation of the batch of all ranks, see [`crate::step::batch_shuffle`].
    pub shuffle: &'a [u32],
    /// Batch-norm groups of this rank.
    pub bn_groups: usize,
    /// Pieces that are computed one after the other.
    pub accumulate: usize,
    /// Takes note of the embeddings.
    pub observed: &'a Observed,
    /// The other ranks.
    pub world: &'a World,
}

impl StepInput<'_> {
    /// The rows of every piece.
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let rows = self.batch.sample_ids.len() / self.accumulate;
        (0..self.accumulate).map(move |piece| piece * rows..(piece + 1) * rows)
    }

    /// A piece of a view through the encoder that learns.
    fn outputs(&self, view: &Tensor, rows: &Range<usize>) -> Result<Outputs> {
        let mode = Mode::Train { bn_groups: self.bn_groups / self.accumulate };
        let outputs = self.query.outputs(&narrow(view, rows)?, mode)?;
        self.observed.embeddings(&outputs.embeddings);
        Ok(outputs)
    }
}

impl Method {
    /// The state before the first step; what follows the query encoder starts as its copy.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(config: &Config, query: &Encoder) -> Result<Self> {
        Ok(match &config.method {
            MethodConfig::MocoV2(moco) | MethodConfig::MocoV1(moco) => {
                Self::Moco(Box::new(Moco::new(moco, query, config.seed)?))
            }
            MethodConfig::Swav(swav) => Self::Swav(Box::new(Swav::new(swav, query, config.seed)?)),
            MethodConfig::Alone => Self::Alone,
        })
    }

    /// Networks of its own that learn.
    pub fn trainables(&self) -> Vec<Trainable> {
        match self {
            Self::Swav(swav) => vec![swav.trainable()],
            Self::Moco(_) | Self::Alone => Vec::new(),
        }
    }

    /// Networks of its own that run in training mode and do not learn.
    pub fn followers(&self) -> Vec<ParameterStore> {
        match self {
            Self::Moco(moco) => vec![moco.key().store().clone()],
            Self::Swav(_) | Self::Alone => Vec::new(),
        }
    }

    /// Makes what follows the query encoder its copy again.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn restart(&self, query: &Encoder) -> Result<()> {
        match self {
            Self::Moco(moco) => moco.restart(query),
            Self::Swav(_) | Self::Alone => Ok(()),
        }
    }

    /// Computes the losses of a step and adds their gradients, distillation included.
    ///
    /// # Errors
    /// [`shared::Error::Shape`] when the batch does not fit.
    pub fn gradients(&mut self, input: &StepInput<'_>, gradients: &mut GradientSum) -> Result<Losses> {
        match self {
            Self::Moco(moco) => moco.gradients(input, gradients),
            Self::Swav(swav) => swav.gradients(input, gradients),
            Self::Alone => two_views(input, None, gradients),
        }
    }

    /// What is left to do once the parameters have moved: what the step embedded enters the queue.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn after_step(&mut self) -> Result<()> {
        match self {
            Self::Moco(moco) => moco.after_step(),
            Self::Swav(swav) => swav.after_step(),
            Self::Alone => Ok(()),
        }
    }

    /// Its tensors for a checkpoint, trainable networks included.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        match self {
            Self::Moco(moco) => moco.to_tensors(),
            Self::Swav(swav) => swav.to_tensors(),
            Self::Alone => Ok(BTreeMap::new()),
        }
    }

    /// Its numbers for a checkpoint.
    pub fn counters(&self) -> Counters {
        match self {
            Self::Moco(moco) => moco.counters(),
            Self::Swav(swav) => swav.counters(),
            Self::Alone => Counters::new(),
        }
    }

    /// Takes its tensors and numbers from a checkpoint.
    ///
    /// # Errors
    /// [`shared::Error::Damaged`] or [`shared::Error::Invalid`] when something is missing or of another shape.
    pub fn load(&mut self, file: &TensorFile, counters: &Counters) -> Result<()> {
        match self {
            Self::Moco(moco) => moco.load(file, counters),
            Self::Swav(swav) => swav.load(file, counters),
            Self::Alone => Ok(()),
        }
    }
}

/// The keys of a step, and what compares queries with them.
#[derive(Debug, Clone, Copy)]
struct Contrast<'a> {
    moco: &'a Moco,
    /// `(B, D)` f32, unit rows, of this rank's samples.
    keys: &'a Tensor,
}

/// The losses of both global views: contrast on the query's, distillation on those that it is asked for.
///
/// The graph of one view of one piece is freed before the next is built.
fn two_views(input: &StepInput<'_>, contrast: Option<Contrast<'_>>, gradients: &mut GradientSum) -> Result<Losses> {
    let mut sum = LossSum::new(input.accumulate);
    for rows in input.pieces() {
        for (view, pixels) in input.batch.views.iter().enumerate() {
            let contrast = contrast.filter(|_| view == 0);
            let distillation = input.distillation.filter(|distillation| distillation.wants(view));
            if contrast.is_none() && distillation.is_none() {
                continue;
            }
            let outputs = input.outputs(pixels, &rows)?;
            let mut parts = Vec::new();
            if let Some(Contrast { moco, keys }) = contrast {
                parts.push(moco.part(&outputs.embeddings, &narrow(keys, &rows)?)?);
            }
            if let Some(distillation) = distillation {
                parts.push(distillation.part(view, &outputs, input.batch, &rows)?);
            }
            sum.backward(parts, gradients)?;
        }
    }
    Ok(sum.losses())
}

/// Some rows of a tensor.
fn narrow(tensor: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.narrow(0, rows.start, rows.len())?)
}
