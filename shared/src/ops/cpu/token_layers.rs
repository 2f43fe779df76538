//! Transformers' operations in candle's graph.

use candle_core::Tensor;

use super::dense::{self, Finish, Gradients, Read, Sizes};
use super::norm::Affine;
use super::token_tiles::Norm;
use super::{attention, branches, cross_covariance, deposit, graph, layer_norm, values, with_values};
use crate::Result;
use crate::ops::token_blocks::AttentionSizes;
use crate::ops::{Activation, Attention, AttentionBlock, LayerNorm, Linear, MlpBlock, Parameter, Pass, shape_error};

const LAYER_NORM: &str = "layer_norm";
const LINEAR: &str = "linear";
const ATTENTION: &str = "attention";
const CROSS_COVARIANCE: &str = "cross_covariance_attention";
const ATTENTION_BLOCK: &str = "attention_block";
const MLP_BLOCK: &str = "mlp_block";
const ADD_BRANCH: &str = "add_branch";

/// A layer norm's numbers.
#[derive(Debug)]
pub(super) struct NormValues {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f64,
}

impl NormValues {
    pub(super) fn of(params: &LayerNorm) -> candle_core::Result<Self> {
        Ok(Self { weight: values(params.weight.var())?, bias: values(params.bias.var())?, eps: params.eps })
    }

    pub(super) fn norm(&self) -> Norm<'_> {
        Norm { weight: &self.weight, bias: &self.bias, eps: self.eps }
    }
}

/// Scale 1 and a linear layer's bias, or both times the factors of a branch.
fn affine(params: &Linear, scale: Option<&Parameter>) -> candle_core::Result<Affine> {
    let mut shift = values(params.bias.var())?;
    let Some(scale) = scale else { return Ok(Affine { scale: vec![1.0; shift.len()], shift }) };
    let scale = values(scale.var())?;
    for (shift, scale) in shift.iter_mut().zip(&scale) {
        *shift *= scale;
    }
    Ok(Affine { scale, shift })
}

fn sizes(params: &Linear, rows: usize) -> candle_core::Result<Sizes> {
    let (inputs, outputs) = params.weight.var().dims2()?;
    Ok(Sizes { rows, inputs, outputs })
}

/// `act((read weight + bias) * scale + residual)`.
fn forward(
    params: &Linear,
    sizes: Sizes,
    read: Read<'_>,
    scale: Option<&Parameter>,
    act: Activation,
    residual: Option<&[f32]>,
) -> candle_core::Result<Vec<f32>> {
    let affine = affine(params, scale)?;
    let finish = Some(Finish { affine: &affine, act, residual });
    with_values(params.weight.var(), |weight| Ok(dense::forward(sizes, read, weight, finish)))
}

/// Deposits the gradients of a linear layer without activation, and of the factors that may follow it; returns all.
fn backward(
    params: &Linear,
    sizes: Sizes,
    read: Read<'_>,
    dout: &[f32],
    scale: Option<&Parameter>,
    plus: Option<&[f32]>,
) -> candle_core::Result<Gradients> {
    let factors = scale.map(|scale| values(scale.var())).transpose()?;
    let mut gradients = with_values(params.weight.var(), |weight| {
        Ok(dense::backward(sizes, read, weight, dout, factors.as_deref(), plus))
    })?;
    let (mut dweight, mut dbias) = (std::mem::take(&mut gradients.weight), std::mem::take(&mut gradients.bias));
    if let (Some(scale), Some(factors)) = (scale, factors) {
        // The gradient of a factor is that of the product, times what is multiplied, over all rows: as the product is linear in the weights,
        // they and their gradients tell it.
        let bias = values(params.bias.var())?;
        let mut along: Vec<f64> = bias.iter().zip(&dbias).map(|(b, d)| f64::from(*b) * f64::from(*d)).collect();
        with_values(params.weight.var(), |weight| {
            for (weight, dweight) in weight.chunks_exact(sizes.outputs).zip(dweight.chunks_exact_mut(sizes.outputs)) {
                for (((along, w), d), factor) in along.iter_mut().zip(weight).zip(dweight).zip(&factors) {
                    *along += f64::from(*w) * f64::from(*d);
                    *d *= factor;
                }
            }
            Ok(())
        })?;
        for (d, factor) in dbias.iter_mut().zip(&factors) {
            *d *= factor;
        }
        deposit(scale, along.into_iter().map(|d| d as f32).collect())?;
    }
    deposit(&params.weight, dweight)?;
    deposit(&params.bias, dbias)?;
    Ok(gradients)
}

/// See [`crate::ops::layer_norm`].
pub(in crate::ops) fn layer_norm(xs: &Tensor, params: &LayerNorm, pass: &Pass) -> Result<Tensor> {
    let xs = xs.contiguous()?;
    let norm = NormValues::of(params)?;
    let out = with_values(&xs, |xs| Ok(layer_norm::forward(xs, &norm.norm())))?;
    if !pass.record {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    }
    let (params, input) = (params.clone(), xs.detach());
    let backward = move |mut gradient: Vec<f32>| {
        let (shift, scale) = with_values(&input, |xs| Ok(layer_norm::backward(xs, &norm.norm(), &mut gradient, None)))?;
        deposit(&params.bias, shift)?;
        deposit(&params.weight, scale)?;
        Ok(vec![Some(gradient)])
    };
    Ok(graph::record(LAYER_NORM, out, xs.shape(), &[&xs], backward)?)
}

/// See [`crate::ops::linear`], for many rows.
pub(in crate::ops) fn linear(xs: &Tensor, params: &Linear, act: Activation, pass: &Pass) -> Result<Tensor> {
    let (inputs, outputs) = params.weight.var().dims2()?;
    if xs.dims().last() != Some(&inputs) {
        return Err(shape_error(LINEAR, format!("(.., {inputs})"), xs));
    }
    let xs = xs.contiguous()?;
    let shape: Vec<usize> = [&xs.dims()[..xs.rank() - 1], &[outputs]].concat();
    let sizes = sizes(params, xs.elem_count() / inputs)?;
    let keeps = pass.record && act != Activation::Identity;
    let run = |act: Activation| with_values(&xs, |xs| forward(params, sizes, Read::Plain(xs), None, act, None));
    if !keeps {
        let out = run(act)?;
        if !pass.record {
            return Ok(Tensor::from_vec(out, shape, xs.device())?);
        }
        let (params, input, wants_input) = (params.clone(), xs.detach(), xs.track_op());
        let back = move |dout: Vec<f32>| {
            let gradients = with_values(&input, |xs| backward(&params, sizes, Read::Plain(xs), &dout, None, None))?;
            Ok(vec![wants_input.then_some(gradients.input)])
        };
        return Ok(graph::record(LINEAR, out, shape, &[&xs], back)?);
    }
    let before = run(Activation::Identity)?;
    let mut out = before.clone();
    super::rows::activate(&mut out, outputs, act);
    let (params, input, wants_input) = (params.clone(), xs.detach(), xs.track_op());
    let back = move |mut dout: Vec<f32>| {
        super::rows::activation_gradient(&before, &mut dout, outputs, act);
        let gradients = with_values(&input, |xs| backward(&params, sizes, Read::Plain(xs), &dout, None, None))?;
        Ok(vec![wants_input.then_some(gradients.input)])
    };
    Ok(graph::record(LINEAR, out, shape, &[&xs], back)?)
}

/// See [`crate::ops::attention`].
pub(in crate::ops) fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let sizes = AttentionSizes::of(ATTENTION, qkv, heads)?;
    mix(ATTENTION, qkv, sizes, &Attention::Tokens { heads }, qkv.track_op())
}

/// See [`crate::ops::cross_covariance_attention`].
pub(in crate::ops) fn cross_covariance_attention(qkv: &Tensor, temperature: &Parameter, pass: &Pass) -> Result<Tensor> {
    let sizes = AttentionSizes::of(CROSS_COVARIANCE, qkv, temperature.var().elem_count())?;
    mix(CROSS_COVARIANCE, qkv, sizes, &Attention::CrossCovariance { temperature: temperature.clone() }, pass.record)
}

/// Attention of either kind as an operation of its own.
fn mix(name: &'static str, qkv: &Tensor, sizes: AttentionSizes, kind: &Attention, record: bool) -> Result<Tensor> {
    let qkv = qkv.contiguous()?;
    let shape: Vec<usize> = [&qkv.dims()[..qkv.rank() - 1], &[sizes.heads * sizes.width]].concat();
    let out = with_values(&qkv, |qkv| mixed(kind, qkv, sizes))?;
    if !record {
        return Ok(Tensor::from_vec(out, shape, qkv.device())?);
    }
    let (kind, input) = (kind.clone(), qkv.detach());
    let back = move |dout: Vec<f32>| Ok(vec![Some(with_values(&input, |qkv| unmixed(&kind, qkv, &dout, sizes))?)]);
    Ok(graph::record(name, out, shape, &[&qkv], back)?)
}

fn mixed(kind: &Attention, qkv: &[f32], sizes: AttentionSizes) -> candle_core::Result<Vec<f32>> {
    Ok(match kind {
        Attention::Tokens { .. } => attention::forward(qkv, sizes),
        Attention::CrossCovariance { temperature } => {
            cross_covariance::forward(qkv, &values(temperature.var())?, sizes)
        }
    })
}

/// The gradient of `qkv`; deposits that of temperatures.
fn unmixed(kind: &Attention, qkv: &[f32], dout: &[f32], sizes: AttentionSizes) -> candle_core::Result<Vec<f32>> {
    match kind {
        Attention::Tokens { .. } => Ok(attention::backward(qkv, dout, sizes)),
        Attention::CrossCovariance { temperature } => {
            let (gradient, of_temperature) = cross_covariance::backward(qkv, &values(temperature.var())?, dout, sizes);
            deposit(temperature, of_temperature)?;
            Ok(gradient)
        }
    }
}

/// See [`AttentionBlock`].
pub(in crate::ops) fn attention_block(xs: &Tensor, params: &AttentionBlock, pass: &Pass) -> Result<Tensor> {
    let channels = params.norm.weight.var().elem_count();
    let (heads, rank) = match &params.attention {
        Attention::Tokens { heads } => (*heads, 3..=3),
        Attention::CrossCovariance { temperature } => (temperature.var().elem_count(), 3..=4),
    };
    let fits = rank.contains(&xs.rank()) && xs.dims().last() == Some(&channels) && xs.elem_count() > 0;
    if !fits || heads == 0 || !channels.is_multiple_of(heads) {
        return Err(shape_error(ATTENTION_BLOCK, format!("(B, N, {channels}) for {heads} heads"), xs));
    }
    let xs = xs.contiguous()?;
    let (batch, rows) = (xs.dim(0)?, xs.elem_count() / channels);
    let mixing = AttentionSizes { batch, tokens: rows / batch, heads, width: channels / heads };
    let norm = NormValues::of(&params.norm)?;
    let (first, last) = (sizes(&params.qkv, rows)?, sizes(&params.projection, rows)?);
    let scale = params.layer_scale.as_ref();
    let (qkv, between, out) = with_values(&xs, |xs| {
        let read = Read::Normed(xs, norm.norm());
        let qkv = forward(&params.qkv, first, read, None, Activation::Identity, None)?;
        let between = mixed(&params.attention, &qkv, mixing)?;
        let read = Read::Plain(&between);
        let out = forward(&params.projection, last, read, scale, Activation::Identity, Some(xs))?;
        Ok((qkv, between, out))
    })?;
    if !pass.record {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    }
    let (params, input) = (params.clone(), xs.detach());
    let back = move |dout: Vec<f32>| {
        let scale = params.layer_scale.as_ref();
        let of_between = backward(&params.projection, last, Read::Plain(&between), &dout, scale, None)?.input;
        drop(between);
        let dqkv = unmixed(&params.attention, &qkv, &of_between, mixing)?;
        drop(qkv);
        drop(of_between);
        let gradients = with_values(&input, |xs| {
            backward(&params.qkv, first, Read::Normed(xs, norm.norm()), &dqkv, None, Some(&dout))
        })?;
        deposit(&params.norm.bias, gradients.shift)?;
        deposit(&params.norm.weight, gradients.scale)?;
        Ok(vec![Some(gradients.input)])
    };
    Ok(graph::record(ATTENTION_BLOCK, out, xs.shape(), &[&xs], back)?)
}

/// See [`MlpBlock`].
pub(in crate::ops) fn mlp_block(xs: &Tensor, params: &MlpBlock, pass: &Pass) -> Result<Tensor> {
    let channels = params.norm.weight.var().elem_count();
    if xs.dims().last() != Some(&channels) || xs.elem_count() == 0 {
        return Err(shape_error(MLP_BLOCK, format!("(.., {channels})"), xs));
    }
    let xs = xs.contiguous()?;
    let rows = xs.elem_count() / channels;
    let norm = NormValues::of(&params.norm)?;
    let (first, last) = (sizes(&params.hidden, rows)?, sizes(&params.output, rows)?);
    let scale = params.layer_scale.as_ref();
    let bias = affine(&params.hidden, None)?;
    let (hidden, out) = with_values(&xs, |xs| {
        let read = Read::Normed(xs, norm.norm());
        if !pass.record {
            let hidden = forward(&params.hidden, first, read, None, Activation::Gelu, None)?;
            let out = forward(&params.output, last, Read::Plain(&hidden), scale, Activation::Identity, Some(xs))?;
            return Ok((hidden, out));
        }
        let hidden = with_values(params.hidden.weight.var(), |weight| Ok(dense::forward(first, read, weight, None)))?;
        let read = Read::Activated(&hidden, &bias, Activation::Gelu);
        let out = forward(&params.output, last, read, scale, Activation::Identity, Some(xs))?;
        Ok((hidden, out))
    })?;
    if !pass.record {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    }
    let (params, input) = (params.clone(), xs.detach());
    let back = move |dout: Vec<f32>| {
        let read = Read::Activated(&hidden, &bias, Activation::Gelu);
        let of_hidden = backward(&params.output, last, read, &dout, params.layer_scale.as_ref(), None)?;
        drop(hidden);
        let gradients = with_values(&input, |xs| {
            backward(&params.hidden, first, Read::Normed(xs, norm.norm()), &of_hidden.input, None, Some(&dout))
        })?;
        deposit(&params.norm.bias, gradients.shift)?;
        deposit(&params.norm.weight, gradients.scale)?;
        Ok(vec![Some(gradients.input)])
    };
    Ok(graph::record(MLP_BLOCK, out, xs.shape(), &[&xs], back)?)
}

/// See [`crate::ops::add_branch`].
pub(in crate::ops) fn add_branch(
    xs: &Tensor,
    branch: &Tensor,
    scale: Option<&Parameter>,
    pass: &Pass,
) -> Result<Tensor> {
    let (xs, branch) = (xs.contiguous()?, branch.contiguous()?);
    let Some(&channels) = xs.dims().last() else { return Err(shape_error(ADD_BRANCH, "(.., C)", &xs)) };
    let affine = match scale {
        Some(scale) => Affine { scale: values(scale.var())?, shift: vec![0.0; channels] },
        None => Affine::identity(channels),
    };
    let out = with_values(&xs, |xs| with_values(&branch, |branch| Ok(branches::add(xs, branch, &affine))))?;
    if !pass.record {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    }
    let (scale, input) = (scale.cloned(), branch.detach());
    let back = move |dout: Vec<f32>| {
        let Some(scale) = scale else { return Ok(vec![Some(dout.clone()), Some(dout)]) };
        let (dbranch, dscale) = with_values(&input, |branch| Ok(branches::add_gradient(branch, &dout, &affine)))?;
        deposit(&scale, dscale)?;
        Ok(vec![Some(dout), Some(dbranch)])
    };
    Ok(graph::record(ADD_BRANCH, out, xs.shape(), &[&xs, &branch], back)?)
}
