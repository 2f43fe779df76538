//! Convolution, batch norm, residual sum and activation as one custom operation that keeps the raw convolution output only.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, bail};

use super::conv::Conv;
use super::norm::{self, Affine, Statistics};
use super::{Saved, anchor, slice, values, with_values};
use crate::ops::{Activation, BATCH_NORM_MOMENTUM, BatchNorm, ConvBn, Mode, Pass, shape_error};
use crate::{Error, Result};

const NAME: &str = "conv_bn";

/// See [`crate::ops::conv_bn`].
pub(in crate::ops) fn conv_bn(
    xs: &Tensor,
    params: &ConvBn,
    residual: Option<&Tensor>,
    act: Activation,
    pass: &Pass,
) -> Result<Tensor> {
    let xs = xs.contiguous()?;
    let op = ConvBnOp::new(&xs, params, act, pass)?;
    let residual = residual.map(Tensor::contiguous).transpose()?;
    if let Some(residual) = &residual
        && residual.dims() != op.output_shape().dims()
    {
        return Err(shape_error(NAME, format!("{:?}", op.output_shape().dims()), residual));
    }
    if pass.record {
        let anchor = anchor()?;
        return Ok(match residual {
            Some(residual) => xs.apply_op3(&residual, &anchor, op)?,
            None => xs.apply_op2(&anchor, op)?,
        });
    }
    let out = with_values(&xs, |xs| match &residual {
        Some(residual) => with_values(residual, |residual| op.forward(xs, Some(residual))),
        None => op.forward(xs, None),
    })?;
    Ok(Tensor::from_vec(out, op.output_shape(), &candle_core::Device::Cpu)?)
}

#[derive(Debug)]
struct ConvBnOp {
    params: ConvBn,
    conv: Conv,
    act: Activation,
    mode: Mode,
    record: bool,
    saved: Saved<(Vec<f32>, Vec<Statistics>)>,
}

impl ConvBnOp {
    fn new(xs: &Tensor, params: &ConvBn, act: Activation, pass: &Pass) -> Result<Self> {
        let geometry = params.conv.geometry;
        let (batch, height, width) = match *xs.dims() {
            [b, h, w, c] if c == geometry.in_channels && geometry.fits(h, w) && b > 0 => (b, h, w),
            _ => return Err(shape_error(NAME, format!("(B, H, W, {})", geometry.in_channels), xs)),
        };
        let conv = Conv { geometry, batch, height, width };
        if let Mode::Train { bn_groups } = pass.mode {
            check_groups(batch, bn_groups, conv.output_pixels())?;
        }
        Ok(Self { params: params.clone(), conv, act, mode: pass.mode, record: pass.record, saved: Saved::empty() })
    }

    fn output_shape(&self) -> Shape {
        let conv = &self.conv;
        (conv.batch, conv.output_height(), conv.output_width(), conv.geometry.out_channels).into()
    }

    fn forward(&self, xs: &[f32], residual: Option<&[f32]>) -> candle_core::Result<Vec<f32>> {
        let channels = self.conv.geometry.out_channels;
        let mut raw = vec![0.0; self.conv.output_pixels() * channels];
        with_values(self.params.conv.weight.var(), |weight| {
            self.conv.forward(xs, weight, &mut raw);
            Ok(())
        })?;
        let norm = &self.params.norm;
        let (weight, bias) = (values(norm.weight.var())?, values(norm.bias.var())?);
        let Mode::Train { bn_groups } = self.mode else {
            let to_f64 = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
            let (mean, variance) = (values(norm.running_mean.var())?, values(norm.running_var.var())?);
            let affine = Affine::new(&to_f64(mean), &to_f64(variance), &weight, &bias);
            norm::apply_in_place(&mut raw, &affine, residual, self.act);
            return Ok(raw);
        };
        let group = raw.len() / bn_groups;
        let stats: Vec<Statistics> = raw.chunks(group).map(|raw| norm::statistics(raw, channels)).collect();
        update_running(norm, &stats)?;
        let mut out = vec![0.0; if self.record { raw.len() } else { 0 }];
        for (index, stats) in stats.iter().enumerate() {
            let affine = Affine::new(&stats.mean, &stats.variance, &weight, &bias);
            let range = index * group..(index + 1) * group;
            let residual = residual.map(|residual| &residual[range.clone()]);
            if self.record {
                norm::apply(&raw[range.clone()], &affine, residual, self.act, &mut out[range]);
            } else {
                norm::apply_in_place(&mut raw[range], &affine, residual, self.act);
            }
        }
        if !self.record {
            return Ok(raw);
        }
        self.saved.put((raw, stats));
        Ok(out)
    }

    /// Deposits the parameters' gradients; returns those of the input, if wanted, and of the residual.
    fn backward(&self, xs: &Tensor, out: &Tensor, dout: &Tensor) -> candle_core::Result<(Option<Tensor>, Tensor)> {
        let (mut raw, stats) = self.saved.take(NAME)?;
        let dout = dout.contiguous()?;
        let before_act = with_values(&dout, |dout| with_values(out, |out| Ok(norm::mask(dout, out, self.act))))?;
        let norm = &self.params.norm;
        let scale = values(norm.weight.var())?;
        let channels = scale.len();
        let (mut dscale, mut dshift) = (vec![0.0f64; channels], vec![0.0f64; channels]);
        let group = raw.len() / stats.len();
        for ((raw, dout), stats) in raw.chunks_mut(group).zip(before_act.chunks(group)).zip(&stats) {
            let (scale_part, shift_part) = norm::backward(raw, stats, &scale, dout);
            for (sum, part) in dscale.iter_mut().zip(scale_part).chain(dshift.iter_mut().zip(shift_part)) {
                *sum += part;
            }
        }
        let draw = raw;
        deposit_f64(&norm.weight, &dscale)?;
        deposit_f64(&norm.bias, &dshift)?;
        let weight = &self.params.conv.weight;
        let dweight = with_values(xs, |xs| Ok(self.conv.weight_gradient(xs, &draw)))?;
        deposit(weight, dweight)?;
        let dxs = if xs.track_op() {
            let mut dxs = vec![0.0; xs.elem_count()];
            with_values(weight.var(), |weight| {
                self.conv.input_gradient(&draw, weight, &mut dxs);
                Ok(())
            })?;
            Some(Tensor::from_vec(dxs, xs.shape(), xs.device())?)
        } else {
            None
        };
        let dresidual = Tensor::from_vec(before_act, out.shape(), out.device())?;
        Ok((dxs, dresidual))
    }
}

impl CustomOp2 for ConvBnOp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        _anchor: &CpuStorage,
        _anchor_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.forward(slice(xs, xs_layout)?, None)?), self.output_shape()))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        _anchor: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dxs, _) = self.backward(xs, out, dout)?;
        Ok((dxs, None))
    }
}

impl CustomOp3 for ConvBnOp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
        _anchor: &CpuStorage,
        _anchor_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = self.forward(slice(xs, xs_layout)?, Some(slice(residual, residual_layout)?))?;
        Ok((CpuStorage::F32(out), self.output_shape()))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        residual: &Tensor,
        _anchor: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dxs, dresidual) = self.backward(xs, out, dout)?;
        Ok((dxs, residual.track_op().then_some(dresidual), None))
    }
}

/// That a batch can be cut into `groups`, with at least two values per channel in each.
pub(in crate::ops) fn check_groups(batch: usize, groups: usize, pixels: usize) -> Result<()> {
    if groups == 0 || !batch.is_multiple_of(groups) {
        let message = format!("a batch of {batch} cannot be cut into {groups} batch norm groups of equal size");
        return Err(Error::invalid(message, "choose `--bn-groups` so that it divides the batch size"));
    }
    if pixels / groups < 2 {
        let message = "batch norm needs more than one value per channel to train";
        return Err(Error::invalid(message, "choose a larger batch, larger images or fewer `--bn-groups`"));
    }
    Ok(())
}

/// Moves the running statistics one step towards the mean of the groups' statistics.
fn update_running(norm: &BatchNorm, groups: &[Statistics]) -> candle_core::Result<()> {
    let Some(first) = groups.first() else { bail!("no batch norm groups") };
    let unbiased = first.rows as f64 / (first.rows as f64 - 1.0);
    let count = groups.len() as f64;
    let step = |parameter: &crate::ops::Parameter, of: &dyn Fn(&Statistics) -> &[f64], factor: f64| {
        let mut running = values(parameter.var())?;
        for (c, value) in running.iter_mut().enumerate() {
            let mean = groups.iter().map(|stats| of(stats)[c]).sum::<f64>() / count * factor;
            *value = ((1.0 - BATCH_NORM_MOMENTUM) * f64::from(*value) + BATCH_NORM_MOMENTUM * mean) as f32;
        }
        parameter.var().set(&Tensor::from_vec(running, parameter.var().shape(), parameter.var().device())?)
    };
    step(&norm.running_mean, &|stats| &stats.mean, 1.0)?;
    step(&norm.running_var, &|stats| &stats.variance, unbiased)?;
    let counter = norm.num_batches_tracked.var();
    counter.set(&(counter.as_detached_tensor() + 1.0)?)
}

/// Deposits a gradient that lies like its parameter.
pub(super) fn deposit(parameter: &crate::ops::Parameter, gradient: Vec<f32>) -> candle_core::Result<()> {
    let var = parameter.var();
    let gradient = Tensor::from_vec(gradient, var.shape(), var.device())?;
    parameter.deposit(gradient).map_err(candle_core::Error::wrap)
}

fn deposit_f64(parameter: &crate::ops::Parameter, gradient: &[f64]) -> candle_core::Result<()> {
    deposit(parameter, gradient.iter().map(|&value| value as f32).collect())
}
