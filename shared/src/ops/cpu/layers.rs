//! The smaller operations as candle custom operations: pools, linear layers, unit rows, the contrastive loss.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Shape, Tensor};

use super::pool::{self, MaxPool};
use super::rows::{self, InfoNceResult};
use super::{Saved, anchor, deposit, slice, values, with_values};
use crate::Result;
use crate::ops::{Activation, Linear, Pass, shape_error};

const MAX_POOL: &str = "max_pool";
const AVERAGE_POOL: &str = "global_average_pool";
const LINEAR: &str = "linear";
const NORMALISE: &str = "l2_normalise";
const INFO_NCE: &str = "info_nce";

/// See [`crate::ops::max_pool`].
pub(in crate::ops) fn max_pool(xs: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = xs.dims4().map_err(|_wrong| shape_error(MAX_POOL, "(B, H, W, C)", xs))?;
    let pool = MaxPool { batch, height, width, channels };
    Ok(xs.contiguous()?.apply_op1(pool)?)
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        MAX_POOL
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = (self.batch, self.output_height(), self.output_width(), self.channels);
        Ok((CpuStorage::F32(self.forward(slice(xs, layout)?)), shape.into()))
    }

    fn bwd(&self, xs: &Tensor, out: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dout = dout.contiguous()?;
        let dxs = with_values(xs, |xs| {
            with_values(out, |out| with_values(&dout, |dout| Ok(self.backward(xs, out, dout))))
        })?;
        Ok(Some(Tensor::from_vec(dxs, xs.shape(), xs.device())?))
    }
}

/// See [`crate::ops::global_average_pool`].
pub(in crate::ops) fn global_average_pool(xs: &Tensor) -> Result<Tensor> {
    xs.dims4().map_err(|_wrong| shape_error(AVERAGE_POOL, "(B, H, W, C)", xs))?;
    Ok(xs.contiguous()?.apply_op1(AveragePoolOp)?)
}

#[derive(Debug)]
struct AveragePoolOp;

impl CustomOp1 for AveragePoolOp {
    fn name(&self) -> &'static str {
        AVERAGE_POOL
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, height, width, channels) = layout.shape().dims4()?;
        let out = pool::average(slice(xs, layout)?, height * width, channels);
        Ok((CpuStorage::F32(out), (batch, channels).into()))
    }

    fn bwd(&self, xs: &Tensor, _out: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (_, height, width, channels) = xs.dims4()?;
        let gradient = |dout: &[f32]| Ok(pool::average_gradient(dout, height * width, channels));
        Ok(Some(Tensor::from_vec(with_values(&dout.contiguous()?, gradient)?, xs.shape(), xs.device())?))
    }
}

/// See [`crate::ops::linear`].
pub(in crate::ops) fn linear(xs: &Tensor, params: &Linear, act: Activation, pass: &Pass) -> Result<Tensor> {
    let (inputs, outputs) = params.weight.var().dims2()?;
    let rows = match *xs.dims() {
        [rows, width] if width == inputs => rows,
        _ => return Err(shape_error(LINEAR, format!("(B, {inputs})"), xs)),
    };
    let op = LinearOp { params: params.clone(), act, rows, inputs, outputs, normalised: Saved::empty() };
    let xs = xs.contiguous()?;
    if pass.record {
        return Ok(xs.apply_op2(&anchor()?, op)?);
    }
    let out = with_values(&xs, |xs| op.forward(xs, false))?;
    Ok(Tensor::from_vec(out, (rows, outputs), &Device::Cpu)?)
}

#[derive(Debug)]
struct LinearOp {
    params: Linear,
    act: Activation,
    rows: usize,
    inputs: usize,
    outputs: usize,
    /// The result before the activation, kept where there is one.
    normalised: Saved<Vec<f32>>,
}

impl LinearOp {
    fn forward(&self, xs: &[f32], keep: bool) -> candle_core::Result<Vec<f32>> {
        let bias = values(self.params.bias.var())?;
        let mut out = with_values(self.params.weight.var(), |weight| Ok(rows::linear(xs, self.inputs, weight, &bias)))?;
        if self.act != Activation::Identity {
            if keep {
                self.normalised.put(out.clone());
            }
            rows::activate(&mut out, self.outputs, self.act);
        }
        Ok(out)
    }
}

impl CustomOp2 for LinearOp {
    fn name(&self) -> &'static str {
        LINEAR
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        layout: &Layout,
        _anchor: &CpuStorage,
        _anchor_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.forward(slice(xs, layout)?, true)?), (self.rows, self.outputs).into()))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        _anchor: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradient = values(&dout.contiguous()?)?;
        if self.act != Activation::Identity {
            rows::activation_gradient(&self.normalised.take(LINEAR)?, &mut gradient, self.outputs, self.act);
        }
        deposit(&self.params.bias, rows::column_sums(&gradient, self.outputs))?;
        let dweight = with_values(xs, |xs| Ok(rows::linear_weight_gradient(xs, &gradient, self.inputs, self.outputs)))?;
        deposit(&self.params.weight, dweight)?;
        if !xs.track_op() {
            return Ok((None, None));
        }
        let dxs = with_values(self.params.weight.var(), |weight| {
            Ok(rows::linear_input_gradient(&gradient, weight, self.inputs, self.outputs))
        })?;
        Ok((Some(Tensor::from_vec(dxs, xs.shape(), xs.device())?), None))
    }
}

/// See [`crate::ops::l2_normalise`].
pub(in crate::ops) fn l2_normalise(xs: &Tensor) -> Result<Tensor> {
    xs.dims2().map_err(|_wrong| shape_error(NORMALISE, "(B, D)", xs))?;
    Ok(xs.contiguous()?.apply_op1(NormaliseOp)?)
}

#[derive(Debug)]
struct NormaliseOp;

impl CustomOp1 for NormaliseOp {
    fn name(&self) -> &'static str {
        NORMALISE
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        Ok((CpuStorage::F32(rows::normalise(slice(xs, layout)?, width)), layout.shape().clone()))
    }

    fn bwd(&self, xs: &Tensor, out: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let width = xs.dim(1)?;
        let dout = values(&dout.contiguous()?)?;
        let dxs = with_values(xs, |xs| with_values(out, |out| Ok(rows::normalise_gradient(xs, out, &dout, width))))?;
        Ok(Some(Tensor::from_vec(dxs, xs.shape(), xs.device())?))
    }
}

/// See [`crate::ops::info_nce`]: the loss and the percentage of rows whose positive wins.
pub(in crate::ops) fn info_nce(q: &Tensor, k: &Tensor, queue: &Tensor, temperature: f64) -> Result<(Tensor, Tensor)> {
    let (batch, width) = q.dims2()?;
    let (k, queue) = (k.contiguous()?, queue.contiguous()?);
    let result = with_values(&q.contiguous()?, |q| {
        with_values(&k, |k| with_values(&queue, |queue| Ok(rows::info_nce(q, k, queue, width, temperature, true))))
    })?;
    let InfoNceResult { loss, correct, dqueries } = result;
    let dqueries = Tensor::from_vec(dqueries, (batch, width), &Device::Cpu)?;
    let loss = q.apply_op1(InfoNceOp { loss: loss as f32, dqueries })?;
    let top1 = Tensor::new((100.0 * correct as f64 / batch as f64) as f32, &Device::Cpu)?;
    debug_assert_eq!(loss.dtype(), DType::F32);
    Ok((loss, top1))
}

/// Hands over what was computed together: the loss forward, its gradient backward.
#[derive(Debug)]
struct InfoNceOp {
    loss: f32,
    dqueries: Tensor,
}

impl CustomOp1 for InfoNceOp {
    fn name(&self) -> &'static str {
        INFO_NCE
    }

    fn cpu_fwd(&self, _q: &CpuStorage, _layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.loss]), ().into()))
    }

    fn bwd(&self, _q: &Tensor, _out: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let factor = f64::from(dout.to_scalar::<f32>()?);
        Ok(Some(self.dqueries.affine(factor, 0.0)?))
    }
}
