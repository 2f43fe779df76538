//! Parts of a step's loss, and their sum over views and pieces of a batch.

use std::collections::BTreeMap;

use candle_core::Tensor;
use shared::Result;
use shared::run::Losses;

use crate::trainable::GradientSum;

/// A loss to be minimised, and what is reported of it.
#[derive(Debug)]
pub struct Part {
    /// Scalar, weighted.
    pub loss: Tensor,
    /// Scalars by name, unweighted.
    pub terms: Vec<(String, Tensor)>,
}

/// The losses of a step while it goes through pieces of its batch; every piece weighs the same.
#[derive(Debug)]
pub struct LossSum {
    pieces: usize,
    loss: f32,
    terms: BTreeMap<String, f32>,
}

impl LossSum {
    /// Nothing yet; the batch comes in so many pieces.
    pub fn new(pieces: usize) -> Self {
        Self { pieces, loss: 0.0, terms: BTreeMap::new() }
    }

    /// Adds the parts that hang on one graph and their gradients; the graph can be freed then.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn backward(&mut self, parts: Vec<Part>, gradients: &mut GradientSum) -> Result<()> {
        let mut total: Option<Tensor> = None;
        for part in parts {
            for (name, term) in part.terms {
                *self.terms.entry(name).or_insert(0.0) += term.to_scalar::<f32>()?;
            }
            total = Some(match total {
                Some(total) => (total + part.loss)?,
                None => part.loss,
            });
        }
        let Some(total) = total else { return Ok(()) };
        self.loss += total.to_scalar::<f32>()?;
        if self.pieces == 1 {
            return gradients.backward(&total);
        }
        gradients.backward(&(total / self.pieces as f64)?)
    }

    /// The means over the pieces.
    pub fn losses(self) -> Losses {
        let pieces = self.pieces as f32;
        let terms = self.terms.into_iter().map(|(name, sum)| (name, sum / pieces)).collect();
        Losses { loss: self.loss / pieces, terms }
    }
}
