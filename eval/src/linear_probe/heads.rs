//! The classifiers of a learning-rate grid, stacked into one weight matrix so that all of them train in one pass.
//!
//! `L` heads of `C` classes over `F` features are one `(L × C, F)` matrix: logits, gradients and updates of the whole grid are
//! three matrix operations. Heads never mix: head `l` is what it would be if it were trained alone.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use rayon::prelude::*;
use shared::Result;
use shared::matrix;

use super::softmax;

/// `L` linear classifiers with the state of SGD with momentum.
#[derive(Debug)]
pub struct Heads {
    num_classes: usize,
    lrs: Vec<f64>,
    momentum: f32,
    weight_decay: f32,
    weight: Tensor, // (L × C, F)
    weight_velocity: Vec<f32>,
    bias: Vec<f32>, // (L × C)
    bias_velocity: Vec<f32>,
}

impl Heads {
    /// One head per learning rate, all starting from `weight` `(C, F)` and a bias of zeros.
    ///
    /// # Errors
    /// When `weight` is not `num_classes × width` long.
    pub fn new(
        weight: &[f32],
        num_classes: usize,
        width: usize,
        lrs: &[f64],
        momentum: f64,
        weight_decay: f64,
    ) -> Result<Self> {
        let rows = lrs.len() * num_classes;
        Ok(Self {
            num_classes,
            lrs: lrs.to_vec(),
            momentum: momentum as f32,
            weight_decay: weight_decay as f32,
            weight: matrix::tensor(weight.repeat(lrs.len()), rows, width)?,
            weight_velocity: vec![0.0; rows * width],
            bias: vec![0.0; rows],
            bias_velocity: vec![0.0; rows],
        })
    }

    /// Classes per head, `C`.
    pub fn num_classes(&self) -> usize {
        self.num_classes
    }

    /// Number of heads, `L`.
    pub fn len(&self) -> usize {
        self.lrs.len()
    }

    /// Whether there are no heads.
    pub fn is_empty(&self) -> bool {
        self.lrs.is_empty()
    }

    /// Logits of all heads side by side.
    ///
    /// # Shapes
    /// - `xs`: `(B, F)`
    /// - returns: `(B, L × C)` row-major
    ///
    /// # Errors
    /// When `xs` has another width.
    pub fn logits(&self, xs: &Tensor) -> Result<Vec<f32>> {
        let mut logits = xs.matmul(&self.weight.t()?)?.flatten_all()?.to_vec1::<f32>()?;
        for row in logits.chunks_mut(self.bias.len()) {
            for (x, bias) in row.iter_mut().zip(&self.bias) {
                *x += bias;
            }
        }
        Ok(logits)
    }

    /// One update of every head, each with its learning rate times `lr_factor`; returns the loss of each head, summed over
    /// the batch.
    ///
    /// The gradient is that of the mean cross-entropy over the batch; the update is PyTorch's: `v = momentum v + g + decay w`,
    /// `w = w - lr v`, for weights and biases alike.
    ///
    /// # Shapes
    /// - `xs`: `(B, F)`
    /// - `classes`: `(B)`
    ///
    /// # Errors
    /// When `xs` has another width.
    pub fn step(&mut self, xs: &Tensor, classes: &[u32], lr_factor: f64) -> Result<Vec<f64>> {
        let mut gradient = self.logits(xs)?; // (B, L × C)
        let losses = softmax::cross_entropy_gradient(&mut gradient, classes, self.num_classes);
        let rows = self.bias.len();
        let mut bias_gradient = vec![0.0; rows];
        for sample in gradient.chunks(rows) {
            for (sum, x) in bias_gradient.iter_mut().zip(sample) {
                *sum += x;
            }
        }
        let weight_gradient = matrix::tensor(gradient, classes.len(), rows)?.t()?.matmul(xs)?; // (L × C, F)
        let row_lrs: Vec<f32> = (0..rows).map(|row| (self.lrs[row / self.num_classes] * lr_factor) as f32).collect();
        for (row, (weight, velocity)) in self.bias.iter_mut().zip(&mut self.bias_velocity).enumerate() {
            *velocity = self.momentum * *velocity + (bias_gradient[row] + self.weight_decay * *weight);
            *weight -= row_lrs[row] * *velocity;
        }
        let update = SgdUpdate {
            velocity: Mutex::new(&mut self.weight_velocity),
            row_lrs: &row_lrs,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
        };
        self.weight.inplace_op2(&weight_gradient, &update)?;
        let mut sums = vec![0.0; self.lrs.len()];
        for sample in losses.chunks(self.lrs.len()) {
            for (sum, loss) in sums.iter_mut().zip(sample) {
                *sum += loss;
            }
        }
        Ok(sums)
    }

    /// The weights `(C, F)` and bias `(C)` of one head.
    ///
    /// # Errors
    /// When there is no such head.
    pub fn parameters(&self, head: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let rows = head * self.num_classes..(head + 1) * self.num_classes;
        let weight = self.weight.narrow(0, rows.start, self.num_classes)?.flatten_all()?.to_vec1()?;
        Ok((weight, self.bias[rows].to_vec()))
    }
}

/// The update of the weight matrix, in place.
struct SgdUpdate<'a> {
    velocity: Mutex<&'a mut Vec<f32>>,
    row_lrs: &'a [f32],
    momentum: f32,
    weight_decay: f32,
}

impl InplaceOp2 for SgdUpdate<'_> {
    fn name(&self) -> &'static str {
        "linear-probe-update"
    }

    fn cpu_fwd(
        &self,
        weight: &mut CpuStorage,
        _: &Layout,
        gradient: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<()> {
        let (CpuStorage::F32(weight), CpuStorage::F32(gradient)) = (weight, gradient) else {
            candle_core::bail!("the linear probe holds f32 weights");
        };
        let mut velocity = self.velocity.lock().unwrap_or_else(PoisonError::into_inner);
        let width = weight.len() / self.row_lrs.len().max(1);
        weight
            .par_chunks_mut(width)
            .zip(gradient.par_chunks(width))
            .zip(velocity.par_chunks_mut(width))
            .zip(self.row_lrs)
            .with_min_len(8)
            .for_each(|(((weight, gradient), velocity), &lr)| {
                for ((w, g), v) in weight.iter_mut().zip(gradient).zip(velocity) {
                    *v = self.momentum * *v + (g + self.weight_decay * *w);
                    *w -= lr * *v;
                }
            });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_steps_of_hand_values() {
        // One feature of value 2, two classes, weights 0: softmax 1/2, so dw = (-1, 1), db = (-1/2, 1/2).
        let mut heads = Heads::new(&[0.0, 0.0], 2, 1, &[0.1], 0.5, 0.0).unwrap();
        let xs = matrix::tensor(vec![2.0], 1, 1).unwrap();
        let loss = heads.step(&xs, &[0], 1.0).unwrap();
        assert!((loss[0] - 2.0_f64.ln()).abs() < 1e-6);
        let (weight, bias) = heads.parameters(0).unwrap();
        assert!((weight[0] - 0.1).abs() < 1e-7 && (weight[1] + 0.1).abs() < 1e-7, "{weight:?}");
        assert!((bias[0] - 0.05).abs() < 1e-7 && (bias[1] + 0.05).abs() < 1e-7, "{bias:?}");
        // Logits ±0.25: p0 = 1/(1+exp(-0.5)); velocity = 0.5 × (-1) + 2 (p0 - 1).
        heads.step(&xs, &[0], 1.0).unwrap();
        let p0 = 1.0 / (1.0 + (-0.5_f32).exp());
        let want = 0.1 - 0.1 * (-0.5 + 2.0 * (p0 - 1.0));
        assert!((heads.parameters(0).unwrap().0[0] - want).abs() < 1e-6);
    }

    #[test]
    fn a_head_of_a_grid_equals_the_head_trained_alone() {
        let value = |i: usize| ((i * 7919) % 499) as f32 / 499.0 - 0.5;
        let weight: Vec<f32> = (0..3 * 20).map(value).collect();
        let classes: Vec<u32> = (0..32).map(|i| (i * i) % 3).collect();
        let train = |lrs: &[f64]| {
            let mut heads = Heads::new(&weight, 3, 20, lrs, 0.9, 1e-3).unwrap();
            for step in 0..5 {
                let xs = matrix::tensor((0..32 * 20).map(|i| value(i + step * 640)).collect(), 32, 20).unwrap();
                heads.step(&xs, &classes, 1.0).unwrap();
            }
            heads
        };
        let (grid, alone) = (train(&[3.0, 0.1, 1.0]), train(&[0.1]));
        let (a, b) = (grid.parameters(1).unwrap(), alone.parameters(0).unwrap());
        for (x, y) in a.0.iter().chain(&a.1).zip(b.0.iter().chain(&b.1)) {
            assert!((x - y).abs() <= 1e-6 * y.abs().max(1.0), "{x} {y}");
        }
    }
}
