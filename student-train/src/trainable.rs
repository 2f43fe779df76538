//! The networks that a step moves, each a store of parameters with a name of its own, and the sum of their gradients.

use candle_core::Tensor;
use shared::Result;
use shared::ops::{Gradients, ParameterStore};

/// A store whose parameters learn. Checkpoints and optimisers know it by its name.
#[derive(Debug, Clone)]
pub struct Trainable {
    /// `query` for the student; other networks are named by what owns them.
    pub name: &'static str,
    /// Its parameters; a clone shares them.
    pub store: ParameterStore,
}

/// The gradients of a step, summed over its backward passes: views, and pieces of a batch.
#[derive(Debug)]
pub struct GradientSum {
    trainables: Vec<Trainable>,
    sums: Vec<Gradients>,
}

impl GradientSum {
    /// No gradients yet.
    pub fn new(trainables: Vec<Trainable>) -> Self {
        let sums = trainables.iter().map(|_| Gradients::default()).collect();
        Self { trainables, sums }
    }

    /// Runs the backward pass of a scalar loss and adds its gradients.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn backward(&mut self, loss: &Tensor) -> Result<()> {
        for trainable in &self.trainables {
            trainable.store.clear_deposits();
        }
        let tracked = loss.backward()?;
        for (trainable, sum) in self.trainables.iter().zip(&mut self.sums) {
            sum.add(trainable.store.take_gradients(&tracked)?)?;
        }
        Ok(())
    }

    /// Drops the gradients of a network, which then stays as it is, momentum and weight decay included.
    pub fn drop_gradients(&mut self, name: &str) {
        for (trainable, sum) in self.trainables.iter().zip(&mut self.sums) {
            if trainable.name == name {
                *sum = Gradients::default();
            }
        }
    }

    /// Every network with its gradients.
    pub fn iter(&self) -> impl Iterator<Item = (&Trainable, &Gradients)> {
        self.trainables.iter().zip(&self.sums)
    }

    /// As [`GradientSum::iter`], to change the gradients: an all-reduce, or clipping.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&Trainable, &mut Gradients)> {
        self.trainables.iter().zip(&mut self.sums)
    }
}
