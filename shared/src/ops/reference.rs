//! Every block out of plain candle operations, on any device: what the other engines are checked against.
//!
//! Gradients come from candle's own rules, through the parameters' variables. Two limits: candle cannot write into a tensor
//! that is not on the CPU from here, so updates replace the variable; and where several inputs of a max pool are
//! equally large, each gets a part of the gradient instead of the first getting all of it.

use candle_core::{D, Tensor};

use super::cpu::block::check_groups;
use super::parameter::{Activation, BatchNorm, ConvBn, Linear, Parameter};
use super::{BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, Mode, Pass};
use crate::Result;

/// See [`crate::ops::conv_bn`].
///
/// # Errors
/// A tensor operation that fails.
pub fn conv_bn(
    xs: &Tensor,
    params: &ConvBn,
    residual: Option<&Tensor>,
    act: Activation,
    pass: &Pass,
) -> Result<Tensor> {
    let geometry = params.conv.geometry;
    if !matches!(xs.dims(), [_, _, _, c] if *c == geometry.in_channels) {
        return Err(super::shape_error("conv_bn", format!("(B, H, W, {})", geometry.in_channels), xs));
    }
    let weight = params.conv.weight.value(pass.record).permute((3, 2, 0, 1))?.contiguous()?;
    let xs = xs.permute((0, 3, 1, 2))?.contiguous()?;
    let xs = xs.conv2d(&weight, geometry.padding, geometry.stride, 1, 1)?;
    let xs = xs.permute((0, 2, 3, 1))?.contiguous()?;
    let mut xs = batch_norm(&xs, &params.norm, pass)?;
    if let Some(residual) = residual {
        xs = (xs + residual)?;
    }
    Ok(if act == Activation::Relu { xs.relu()? } else { xs })
}

/// Batch norm over the last axis.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)` f32; returns the same
///
/// # Errors
/// `Error::Invalid` when the batch cannot be cut into the groups of `pass`.
pub fn batch_norm(xs: &Tensor, params: &BatchNorm, pass: &Pass) -> Result<Tensor> {
    let (batch, height, width, channels) = xs.dims4()?;
    let (weight, bias) = (params.weight.value(pass.record), params.bias.value(pass.record));
    let normalise = |xs: &Tensor, mean: &Tensor, variance: &Tensor| -> Result<Tensor> {
        let scale = (&weight / (variance + BATCH_NORM_EPS)?.sqrt()?)?;
        Ok(xs.broadcast_sub(mean)?.broadcast_mul(&scale)?.broadcast_add(&bias)?)
    };
    let Mode::Train { bn_groups } = pass.mode else {
        return normalise(xs, &params.running_mean.value(false), &params.running_var.value(false));
    };
    check_groups(batch, bn_groups, batch * height * width)?;
    let rows = batch / bn_groups * height * width;
    let (mut outs, mut means, mut variances) = (Vec::new(), Vec::new(), Vec::new());
    for group in xs.reshape((bn_groups, rows, channels))?.chunk(bn_groups, 0)? {
        let group = group.reshape((rows, channels))?;
        let mean = group.mean(0)?;
        let variance = group.broadcast_sub(&mean)?.sqr()?.mean(0)?;
        outs.push(normalise(&group, &mean, &variance)?);
        means.push(mean.detach());
        variances.push(variance.detach());
    }
    let unbiased = rows as f64 / (rows as f64 - 1.0);
    update_running(&params.running_mean, &means, 1.0)?;
    update_running(&params.running_var, &variances, unbiased)?;
    let counter = params.num_batches_tracked.var();
    counter.set(&(counter.as_detached_tensor() + 1.0)?)?;
    Ok(Tensor::cat(&outs, 0)?.reshape((batch, height, width, channels))?)
}

fn update_running(running: &Parameter, groups: &[Tensor], factor: f64) -> Result<()> {
    let mean = (Tensor::stack(groups, 0)?.mean(0)? * factor)?;
    let kept = (running.value(false) * (1.0 - BATCH_NORM_MOMENTUM))?;
    Ok(running.var().set(&(kept + (mean * BATCH_NORM_MOMENTUM)?)?)?)
}

/// See [`crate::ops::max_pool`].
///
/// # Errors
/// A tensor operation that fails.
pub fn max_pool(xs: &Tensor) -> Result<Tensor> {
    let (_, height, width, _) = xs.dims4()?;
    let pad = |xs: &Tensor, axis: usize| -> Result<Tensor> {
        let mut shape = xs.dims().to_vec();
        shape[axis] = 1;
        let edge = Tensor::full(f32::MIN, shape, xs.device())?;
        Ok(Tensor::cat(&[&edge, xs, &edge], axis)?)
    };
    let padded = pad(&pad(xs, 1)?, 2)?;
    let every_second = |xs: &Tensor, axis: usize, tap: usize, side: usize| -> Result<Tensor> {
        let indices: Vec<u32> = (0..side.div_ceil(2)).map(|i| (2 * i + tap) as u32).collect();
        Ok(xs.index_select(&Tensor::new(indices, xs.device())?, axis)?)
    };
    let mut largest: Option<Tensor> = None;
    for tap in 0..9 {
        let shifted = every_second(&every_second(&padded, 1, tap / 3, height)?, 2, tap % 3, width)?;
        largest = Some(match largest {
            Some(largest) => largest.maximum(&shifted)?,
            None => shifted,
        });
    }
    largest.ok_or_else(|| super::shape_error("max_pool", "(B, H, W, C)", xs))
}

/// See [`crate::ops::global_average_pool`].
///
/// # Errors
/// A tensor operation that fails.
pub fn global_average_pool(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.flatten(1, 2)?.mean(1)?)
}

/// See [`crate::ops::linear`].
///
/// # Errors
/// A tensor operation that fails.
pub fn linear(xs: &Tensor, params: &Linear, act: Activation, pass: &Pass) -> Result<Tensor> {
    let xs = xs.matmul(&params.weight.value(pass.record))?.broadcast_add(&params.bias.value(pass.record))?;
    Ok(if act == Activation::Relu { xs.relu()? } else { xs })
}

/// See [`crate::ops::l2_normalise`].
///
/// # Errors
/// A tensor operation that fails.
pub fn l2_normalise(xs: &Tensor) -> Result<Tensor> {
    let norm = xs.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(xs.broadcast_div(&norm.clamp(1e-12f32, f32::MAX)?)?)
}

/// See [`crate::ops::info_nce`].
///
/// # Errors
/// A tensor operation that fails.
pub fn info_nce(q: &Tensor, k: &Tensor, queue: &Tensor, temperature: f64) -> Result<(Tensor, Tensor)> {
    let (k, queue) = (k.detach(), queue.detach());
    let positive = (q * k)?.sum_keepdim(1)?;
    let logits = (Tensor::cat(&[&positive, &q.matmul(&queue.t()?)?], 1)? / temperature)?;
    let top = logits.detach().max_keepdim(1)?;
    let sum = logits.broadcast_sub(&top)?.exp()?.sum_keepdim(1)?.log()?;
    let first = logits.narrow(1, 0, 1)?;
    let loss = (sum + top)?.sub(&first)?.mean_all()?;
    let rivals = logits.detach().narrow(1, 1, queue.dim(0)?)?.max_keepdim(1)?;
    let correct = first.detach().gt(&rivals)?.to_dtype(candle_core::DType::F32)?;
    Ok((loss, (correct.mean_all()? * 100.0)?))
}

/// See [`crate::ops::sgd_in_place`].
///
/// # Errors
/// A tensor operation that fails.
pub fn sgd(
    parameter: &Tensor,
    gradient: &Tensor,
    momentum: &Tensor,
    factor: f64,
    weight_decay: f64,
    lr: f64,
) -> Result<()> {
    let decayed = (gradient + (parameter.detach() * weight_decay)?)?;
    assign(momentum, &((momentum.detach() * factor)? + decayed)?)?;
    assign(parameter, &(parameter.detach() - (momentum.detach() * lr)?)?)
}

/// See [`crate::ops::ema_in_place`].
///
/// # Errors
/// A tensor operation that fails.
pub fn ema(key: &Tensor, query: &Tensor, momentum: f64) -> Result<()> {
    assign(key, &((key.detach() * momentum)? + (query.detach() * (1.0 - momentum))?)?)
}

/// `sum += value`.
///
/// # Errors
/// A tensor operation that fails.
pub fn add(sum: &Tensor, value: &Tensor) -> Result<()> {
    assign(sum, &(sum.detach() + value.detach())?)
}

/// Writes the values of `source` into the storage of `target`.
fn assign(target: &Tensor, source: &Tensor) -> Result<()> {
    Ok(target.slice_set(&source.contiguous()?, 0, 0)?)
}
