//! The terms of objectives: contrast against a queue, agreement with the teacher of several kinds, prediction of cluster
//! assignments.
//!
//! The total of DisCo, as this project computes it, is
//! `info_nce(q, k, queue) + distill_weight * (distillation(s_q, t_q) + distillation(s_k, t_k))` with `distill_weight` 32 by
//! default. Both terms are means over the batch, so gradients do not depend on its size. The official code *sums* the squared
//! distance over the 32 samples of a GPU and then averages gradients over GPUs, which for any number of GPUs of 32 samples each
//! is 32 times the mean over all samples: the same gradient.

mod distillation;
mod info_nce;
mod relational;
mod seed;
mod sinkhorn;
mod soft_cross_entropy;

pub use distillation::distillation;
pub use info_nce::{InfoNce, info_nce};
pub use relational::{rkd_angle, rkd_distance};
pub use seed::seed;
pub use sinkhorn::sinkhorn;
pub use soft_cross_entropy::soft_cross_entropy;

/// Rows of unit length, for the tests of several losses.
#[cfg(test)]
fn unit_rows(count: usize, width: usize, phase: f32) -> candle_core::Tensor {
    let values: Vec<f32> = (0..count * width).map(|i| (i as f32 * 1.7 + phase).sin()).collect();
    let xs = candle_core::Tensor::from_vec(values, (count, width), &candle_core::Device::Cpu).unwrap();
    xs.broadcast_div(&xs.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap()).unwrap()
}
