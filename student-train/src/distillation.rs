//! Distillation: what a step learns from the teacher's cached embeddings.
//!
//! ```text
//! distill_weight * (distance(s_q, t_q) + distance(s_k, t_k))
//! ```
//! `s` are the student's embeddings of the two global views, `t` the teacher's.

use std::ops::Range;

use candle_core::Tensor;
use shared::losses::distillation;
use shared::models::Outputs;
use shared::run::Losses;
use shared::{Error, Result};

use crate::config::DistillationConfig;
use crate::part::Part;
use crate::step::Batch;
use crate::trainable::Trainable;

/// The terms of the loss that a teacher adds, with their state.
#[derive(Debug)]
pub struct Distillation {
    weight: f64,
}

impl Distillation {
    /// The state before the first step.
    pub fn new(config: &DistillationConfig) -> Self {
        Self { weight: config.distill_weight }
    }

    /// Networks of its own that learn.
    pub fn trainables(&self) -> Vec<Trainable> {
        Vec::new()
    }

    /// Whether it has anything to say of a global view, 0 (the query's) or 1 (the key's).
    pub fn wants(&self, view: usize) -> bool {
        view < 2
    }

    /// Its loss on some rows of a global view.
    ///
    /// # Errors
    /// [`Error::Shape`] when the teacher's embeddings are of another shape.
    pub fn part(&self, view: usize, outputs: &Outputs, batch: &Batch, rows: &Range<usize>) -> Result<Part> {
        let teacher = targets(batch, view, rows)?;
        let distance = distillation(&outputs.embeddings, &teacher)?;
        let name = if view == 0 { Losses::DISTILL_Q } else { Losses::DISTILL_K };
        Ok(Part { loss: (&distance * self.weight)?, terms: vec![(name.into(), distance)] })
    }
}

/// The teacher's embeddings of some rows of a view.
fn targets(batch: &Batch, view: usize, rows: &Range<usize>) -> Result<Tensor> {
    let teacher = batch.teacher.as_ref().and_then(|teacher| teacher.get(view));
    let teacher = teacher.ok_or_else(|| Error::invalid("the batch has no embeddings of a teacher", ""))?;
    Ok(teacher.narrow(0, rows.start, rows.len())?)
}
