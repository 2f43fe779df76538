//! The smaller operations in candle's graph: pools, linear layers, unit rows, the contrastive loss.

use candle_core::{Device, Tensor};

use super::pool::{self, MaxPool};
use super::rows::{self, InfoNceResult};
use super::{deposit, graph, values, with_values};
use crate::Result;
use crate::ops::{Activation, Linear, Parameter, Pass, shape_error};

const MAX_POOL: &str = "max_pool";
const AVERAGE_POOL: &str = "global_average_pool";
const LINEAR: &str = "linear";
const NORMALISE: &str = "l2_normalise";
const INFO_NCE: &str = "info_nce";
const SOFT_CROSS_ENTROPY: &str = "soft_cross_entropy";

/// See [`crate::ops::max_pool`].
pub(in crate::ops) fn max_pool(xs: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = xs.dims4().map_err(|_wrong| shape_error(MAX_POOL, "(B, H, W, C)", xs))?;
    let pool = MaxPool { batch, height, width, channels };
    let xs = xs.contiguous()?;
    let out = with_values(&xs, |xs| Ok(pool.forward(xs)))?;
    let shape = (batch, pool.output_height(), pool.output_width(), channels);
    if !xs.track_op() {
        return Ok(Tensor::from_vec(out, shape, xs.device())?);
    }
    let input = xs.detach();
    let backward = move |dout: Vec<f32>| Ok(vec![Some(with_values(&input, |input| Ok(pool.backward(input, &dout)))?)]);
    Ok(graph::record(MAX_POOL, out, shape, &[&xs], backward)?)
}

/// See [`crate::ops::global_average_pool`].
pub(in crate::ops) fn global_average_pool(xs: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) =
        xs.dims4().map_err(|_wrong| shape_error(AVERAGE_POOL, "(B, H, W, C)", xs))?;
    let (xs, pixels) = (xs.contiguous()?, height * width);
    let out = with_values(&xs, |xs| Ok(pool::average(xs, pixels, channels)))?;
    if !xs.track_op() {
        return Ok(Tensor::from_vec(out, (batch, channels), xs.device())?);
    }
    let backward = move |dout: Vec<f32>| Ok(vec![Some(pool::average_gradient(&dout, pixels, channels))]);
    Ok(graph::record(AVERAGE_POOL, out, (batch, channels), &[&xs], backward)?)
}

/// See [`crate::ops::linear`].
pub(in crate::ops) fn linear(xs: &Tensor, params: &Linear, act: Activation, pass: &Pass) -> Result<Tensor> {
    affine(xs, &params.weight, Some(&params.bias), act, pass)
}

/// See [`crate::ops::linear_map`].
pub(in crate::ops) fn linear_map(xs: &Tensor, weight: &Parameter, pass: &Pass) -> Result<Tensor> {
    affine(xs, weight, None, Activation::Identity, pass)
}

fn affine(xs: &Tensor, weight: &Parameter, bias: Option<&Parameter>, act: Activation, pass: &Pass) -> Result<Tensor> {
    let (inputs, outputs) = weight.var().dims2()?;
    let rows = match *xs.dims() {
        [rows, width] if width == inputs => rows,
        _ => return Err(shape_error(LINEAR, format!("(.., {inputs})"), xs)),
    };
    let xs = xs.contiguous()?;
    let summands = bias.map_or_else(|| Ok(vec![0.0; outputs]), |bias| values(bias.var()))?;
    let mut out =
        with_values(&xs, |xs| with_values(weight.var(), |weight| Ok(rows::linear(xs, inputs, weight, &summands))))?;
    // A frozen layer hands the gradient on to an input that wants one.
    let (record, wants_input) = (pass.record, xs.track_op());
    let recorded = record || wants_input;
    let before = (recorded && act != Activation::Identity).then(|| out.clone());
    if act != Activation::Identity {
        rows::activate(&mut out, outputs, act);
    }
    if !recorded {
        return Ok(Tensor::from_vec(out, (rows, outputs), xs.device())?);
    }
    let (weight, bias, input) = (weight.clone(), bias.cloned(), xs.detach());
    let backward = move |mut gradient: Vec<f32>| {
        if let Some(before) = before {
            rows::activation_gradient(&before, &mut gradient, outputs, act);
        }
        if let Some(bias) = bias.filter(|_| record) {
            deposit(&bias, rows::column_sums(&gradient, outputs))?;
        }
        if record {
            let dweight = with_values(&input, |xs| Ok(rows::linear_weight_gradient(xs, &gradient, inputs, outputs)))?;
            deposit(&weight, dweight)?;
        }
        if !wants_input {
            return Ok(vec![None]);
        }
        let dxs = |weight: &[f32]| Ok(rows::linear_input_gradient(&gradient, weight, inputs, outputs));
        Ok(vec![Some(with_values(weight.var(), dxs)?)])
    };
    Ok(graph::record(LINEAR, out, (rows, outputs), &[&xs], backward)?)
}

/// See [`crate::ops::l2_normalise`].
pub(in crate::ops) fn l2_normalise(xs: &Tensor) -> Result<Tensor> {
    let (_, width) = xs.dims2().map_err(|_wrong| shape_error(NORMALISE, "(B, D)", xs))?;
    let xs = xs.contiguous()?;
    let out = with_values(&xs, |xs| Ok(rows::normalise(xs, width)))?;
    if !xs.track_op() {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    }
    let (input, result) = (xs.detach(), out.clone());
    let backward = move |dout: Vec<f32>| {
        let dxs = with_values(&input, |input| Ok(rows::normalise_gradient(input, &result, &dout, width)))?;
        Ok(vec![Some(dxs)])
    };
    Ok(graph::record(NORMALISE, out, xs.shape(), &[&xs], backward)?)
}

/// See [`crate::ops::info_nce`]: the loss and the percentage of rows whose positive wins.
pub(in crate::ops) fn info_nce(q: &Tensor, k: &Tensor, queue: &Tensor, temperature: f64) -> Result<(Tensor, Tensor)> {
    let (batch, width) = q.dims2()?;
    let (q, k, queue) = (q.contiguous()?, k.contiguous()?, queue.contiguous()?);
    let result = with_values(&q, |q| {
        with_values(&k, |k| with_values(&queue, |queue| Ok(rows::info_nce(q, k, queue, width, temperature, true))))
    })?;
    let InfoNceResult { loss, correct, mut dqueries } = result;
    let top1 = Tensor::new((100.0 * correct as f64 / batch as f64) as f32, &Device::Cpu)?;
    if !q.track_op() {
        return Ok((Tensor::new(loss as f32, &Device::Cpu)?, top1));
    }
    // Loss and gradient are computed together.
    let backward = move |dloss: Vec<f32>| {
        for d in &mut dqueries {
            *d *= dloss.first().copied().unwrap_or_default();
        }
        Ok(vec![Some(dqueries)])
    };
    Ok((graph::record(INFO_NCE, vec![loss as f32], (), &[&q], backward)?, top1))
}

/// See [`crate::ops::soft_cross_entropy`].
pub(in crate::ops) fn soft_cross_entropy(logits: &Tensor, targets: &Tensor, temperature: f64) -> Result<Tensor> {
    let (_, classes) = logits.dims2()?;
    let (logits, targets) = (logits.contiguous()?, targets.contiguous()?);
    let wanted = logits.track_op();
    let (loss, mut gradient) = with_values(&logits, |logits| {
        with_values(&targets, |targets| Ok(rows::soft_cross_entropy(logits, targets, classes, temperature, wanted)))
    })?;
    if !wanted {
        return Ok(Tensor::new(loss as f32, &Device::Cpu)?);
    }
    // Loss and gradient are computed together.
    let backward = move |dloss: Vec<f32>| {
        let factor = dloss.first().copied().unwrap_or_default();
        for d in &mut gradient {
            *d *= factor;
        }
        Ok(vec![Some(gradient)])
    };
    Ok(graph::record(SOFT_CROSS_ENTROPY, vec![loss as f32], (), &[&logits], backward)?)
}
