//! Every primitive block out of plain candle operations, on any device, in f32 or f64: what the other engines are checked against.
//!
//! Gradients come from candle's own rules, through the parameters' variables. NaN is never lost: neither candle's `relu` nor
//! its `maximum` keeps it, so choices are written as comparisons.

use std::f64::consts::FRAC_1_SQRT_2;

use candle_core::{D, Tensor};

use super::cpu::block::check_groups;
use super::parameter::{Activation, BatchNorm, Conv2d, ConvBn, Gate, Linear, Parameter, SqueezeExcite};
use super::{AdamStep, DescentStep};
use super::{Mode, Pass};
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
    if !matches!(*xs.dims(), [b, h, w, c] if c == geometry.in_channels && geometry.fits(h, w) && b > 0) {
        return Err(super::shape_error("conv_bn", format!("(B, H, W, {})", geometry.in_channels), xs));
    }
    let xs = convolution(xs, &params.conv, pass)?;
    let mut xs = batch_norm(&xs, &params.norm, pass)?;
    if let Some(residual) = residual {
        xs = (xs + residual)?;
    }
    activate(&xs, act)
}

/// A convolution without bias, over channels-last images.
///
/// # Shapes
/// - `xs`: `(B, H, W, in)` f32; returns `(B, H', W', out)`
///
/// # Errors
/// A tensor operation that fails.
pub fn convolution(xs: &Tensor, params: &Conv2d, pass: &Pass) -> Result<Tensor> {
    let geometry = params.geometry;
    let (_, height, width, _) = xs.dims4()?;
    let weight = params.weight.value(pass.record);
    let mut xs = xs.clone();
    for (axis, side) in [(1, height), (2, width)] {
        let before = geometry.leading_padding(side);
        let reach = (geometry.output_side(side) - 1) * geometry.stride + geometry.kernel;
        // Pixels that no kernel reaches are cut off: candle's gradient of `conv2d` takes it that height and width have
        // equally many of them, and fails where a strided 1x1 kernel leaves one in an even side and none in an odd side.
        xs = xs.pad_with_zeros(axis, before, reach.saturating_sub(side + before))?.narrow(axis, 0, reach)?;
    }
    if geometry.depthwise {
        return depthwise(
            &xs.contiguous()?,
            &weight,
            geometry.stride,
            [height, width].map(|side| geometry.output_side(side)),
        );
    }
    let weight = weight.permute((3, 2, 0, 1))?.contiguous()?;
    let xs = xs.permute((0, 3, 1, 2))?.contiguous()?;
    let xs = xs.conv2d(&weight, 0, geometry.stride, 1, 1)?;
    Ok(xs.permute((0, 2, 3, 1))?.contiguous()?)
}

/// Sums `xs` under each tap, times the tap's weights; `xs` is padded already.
fn depthwise(xs: &Tensor, weight: &Tensor, stride: usize, [height, width]: [usize; 2]) -> Result<Tensor> {
    let (kernel, _, _, channels) = weight.dims4()?;
    let weight = weight.reshape((kernel * kernel, channels))?;
    let under = |xs: &Tensor, axis: usize, tap: usize, side: usize| -> Result<Tensor> {
        let indices: Vec<u32> = (0..side).map(|i| (i * stride + tap) as u32).collect();
        Ok(xs.index_select(&Tensor::new(indices, xs.device())?, axis)?)
    };
    let mut sum: Option<Tensor> = None;
    for tap in 0..kernel * kernel {
        let xs = under(&under(xs, 1, tap / kernel, height)?, 2, tap % kernel, width)?;
        let term = xs.broadcast_mul(&weight.get(tap)?)?;
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| super::shape_error("depthwise", "a kernel of at least one pixel", xs))
}

/// An activation, with its derivative at kinks as [`Activation`] says; NaN stays NaN.
///
/// Made of choices: candle's own `relu` turns NaN into 0 and has the derivative 1 at 0, and its `clamp` halves the
/// gradient at the bounds.
///
/// # Errors
/// A tensor operation that fails.
pub fn activate(xs: &Tensor, act: Activation) -> Result<Tensor> {
    Ok(match act {
        Activation::Identity => xs.clone(),
        Activation::Relu => xs.le(0.0)?.where_cond(&xs.zeros_like()?, xs)?,
        Activation::Relu6 => {
            let capped = xs.ge(6.0)?.where_cond(&(xs.zeros_like()? + 6.0)?, xs)?;
            xs.le(0.0)?.where_cond(&xs.zeros_like()?, &capped)?
        }
        Activation::Silu => (xs * gate(xs, Gate::Sigmoid)?)?,
        Activation::HardSwish => {
            let between = (xs * ((xs + 3.0)? / 6.0)?)?;
            let below_three = xs.ge(3.0)?.where_cond(xs, &between)?;
            xs.le(-3.0)?.where_cond(&xs.zeros_like()?, &below_three)?
        }
        // By `erf`: the derivative of candle's own `gelu_erf` has six digits only.
        Activation::Gelu => (xs * (((xs * FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?)?,
    })
}

/// A function from numbers to factors between 0 and 1.
///
/// # Errors
/// A tensor operation that fails.
pub fn gate(xs: &Tensor, gate: Gate) -> Result<Tensor> {
    Ok(match gate {
        // By the hyperbolic tangent, which never overflows.
        Gate::Sigmoid => (((xs * 0.5)?.tanh()? + 1.0)? * 0.5)?,
        // The bounds are those of `xs`: the sum with 3 is rounded and reaches 6 too early.
        Gate::HardSigmoid => {
            let between = ((xs + 3.0)? / 6.0)?;
            let below_three = xs.ge(3.0)?.where_cond(&xs.ones_like()?, &between)?;
            xs.le(-3.0)?.where_cond(&xs.zeros_like()?, &below_three)?
        }
    })
}

/// Multiplies each channel of each image by a factor made from the means of all its channels.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)` f32; returns the same
///
/// # Errors
/// A tensor operation that fails.
pub fn squeeze_excite(xs: &Tensor, params: &SqueezeExcite, pass: &Pass) -> Result<Tensor> {
    let means = global_average_pool(xs)?;
    let few = linear(&means, &params.reduce, params.act, pass)?;
    let factors = gate(&linear(&few, &params.expand, Activation::Identity, pass)?, params.gate)?;
    Ok(xs.broadcast_mul(&factors.unsqueeze(1)?.unsqueeze(1)?)?)
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
        let scale = (&weight / (variance + params.eps)?.sqrt()?)?;
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
    update_running(&params.running_mean, &means, 1.0, params.momentum)?;
    update_running(&params.running_var, &variances, unbiased, params.momentum)?;
    let counter = params.num_batches_tracked.var();
    counter.set(&(counter.as_detached_tensor() + 1.0)?)?;
    Ok(Tensor::cat(&outs, 0)?.reshape((batch, height, width, channels))?)
}

fn update_running(running: &Parameter, groups: &[Tensor], factor: f64, momentum: f64) -> Result<()> {
    let mean = (Tensor::stack(groups, 0)?.mean(0)? * factor)?;
    let kept = (running.value(false) * (1.0 - momentum))?;
    Ok(running.var().set(&(kept + (mean * momentum)?)?)?)
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
        let edge = Tensor::full(f32::NEG_INFINITY, shape, xs.device())?.to_dtype(xs.dtype())?;
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
            Some(largest) => {
                // The first of equals wins, and NaN, which is unequal to itself, wins over all.
                let later_wins = (largest.lt(&shifted)? + shifted.ne(&shifted)?)?;
                later_wins.where_cond(&shifted, &largest)?
            }
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
    let (inputs, outputs) = params.weight.var().dims2()?;
    let shape: Vec<usize> = [&xs.dims()[..xs.rank() - 1], &[outputs]].concat();
    let xs = xs.reshape(((), inputs))?.matmul(&params.weight.value(pass.record))?;
    activate(&xs.broadcast_add(&params.bias.value(pass.record))?.reshape(shape)?, act)
}

/// See [`crate::ops::l2_normalise`].
///
/// # Errors
/// A tensor operation that fails.
pub fn l2_normalise(xs: &Tensor) -> Result<Tensor> {
    // Below the root, so that a row of zeros has a finite gradient.
    let squares = xs.sqr()?.sum_keepdim(D::Minus1)?;
    Ok(xs.broadcast_div(&squares.maximum(1e-24)?.sqrt()?)?)
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
    let correct = first.detach().gt(&rivals)?.to_dtype(q.dtype())?;
    Ok((loss, (correct.mean_all()? * 100.0)?))
}

/// See [`crate::ops::soft_cross_entropy`].
///
/// # Errors
/// A tensor operation that fails.
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor, temperature: f64) -> Result<Tensor> {
    let targets = targets.detach();
    let logits = (logits / temperature)?;
    let top = logits.detach().max_keepdim(1)?;
    let shifted = logits.broadcast_sub(&top)?;
    let log_softmax = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?;
    Ok((targets * log_softmax)?.sum(1)?.mean(0)?.neg()?)
}

/// See [`crate::ops::descend_in_place`].
///
/// # Errors
/// A tensor operation that fails.
pub fn descend(parameter: &Tensor, gradient: &Tensor, buffer: &Tensor, step: &DescentStep) -> Result<()> {
    let &DescentStep { momentum, nesterov, weight_decay, scale, lr } = step;
    let decayed = ((gradient + (parameter.detach() * weight_decay)?)? * scale)?;
    assign(buffer, &((buffer.detach() * momentum)? + &decayed)?)?;
    let direction = if nesterov { (decayed + (buffer.detach() * momentum)?)? } else { buffer.detach() };
    assign(parameter, &(parameter.detach() - (direction * lr)?)?)
}

/// See [`crate::ops::adamw_in_place`].
///
/// # Errors
/// A tensor operation that fails.
pub fn adamw(parameter: &Tensor, gradient: &Tensor, [mean, square]: [&Tensor; 2], step: &AdamStep) -> Result<()> {
    let &AdamStep { beta1, beta2, epsilon, .. } = step;
    assign(mean, &((mean.detach() * beta1)? + (gradient * (1.0 - beta1))?)?)?;
    assign(square, &((square.detach() * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?)?;
    let divisor = ((square.detach().sqrt()? / step.square_correction())? + epsilon)?;
    let moved = (mean.detach().div(&divisor)? * step.step_size())?;
    assign(parameter, &((parameter.detach() * step.keep())? - moved)?)
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
pub(super) fn assign(target: &Tensor, source: &Tensor) -> Result<()> {
    Ok(target.slice_set(&source.contiguous()?, 0, 0)?)
}
