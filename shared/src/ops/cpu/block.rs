//! A [`Chain`] as one operation in candle's graph.

use candle_core::{Shape, Tensor, bail};

use super::chain::{Chain, InputGradients, Layer, SavedChain, Shortcut};
use super::flow::Conv;
use super::norm::Statistics;
use super::{graph, values, with_values};
use crate::ops::{Activation, BasicBlock, BatchNorm, Bottleneck, ConvBn, MbConv, Mode, Parameter, Pass, shape_error};
use crate::{Error, Result};

fn layer(params: &ConvBn, act: Activation) -> Layer {
    Layer { params: params.clone(), act, squeeze_excite: None }
}

/// See [`crate::ops::conv_bn`].
pub(in crate::ops) fn conv_bn(
    xs: &Tensor,
    params: &ConvBn,
    residual: Option<&Tensor>,
    act: Activation,
    pass: &Pass,
) -> Result<Tensor> {
    let shortcut = if residual.is_some() { Shortcut::Given } else { Shortcut::None };
    run("conv_bn", xs, residual, Chain { layers: vec![layer(params, act)], shortcut }, pass)
}

/// See [`crate::ops::basic_block`].
pub(in crate::ops) fn basic_block(xs: &Tensor, params: &BasicBlock, pass: &Pass) -> Result<Tensor> {
    let layers = vec![layer(&params.conv1, Activation::Relu), layer(&params.conv2, Activation::Relu)];
    run("basic_block", xs, None, Chain { layers, shortcut: projection(params.downsample.as_ref()) }, pass)
}

/// See [`crate::ops::bottleneck`].
pub(in crate::ops) fn bottleneck(xs: &Tensor, params: &Bottleneck, pass: &Pass) -> Result<Tensor> {
    let layers = [&params.conv1, &params.conv2, &params.conv3].map(|params| layer(params, Activation::Relu)).to_vec();
    run("bottleneck", xs, None, Chain { layers, shortcut: projection(params.downsample.as_ref()) }, pass)
}

/// See [`crate::ops::mb_conv`].
pub(in crate::ops) fn mb_conv(xs: &Tensor, params: &MbConv, pass: &Pass) -> Result<Tensor> {
    let mut layers: Vec<Layer> = params.expand.iter().map(|expand| layer(expand, params.act)).collect();
    layers.push(Layer { squeeze_excite: params.squeeze_excite.clone(), ..layer(&params.depthwise, params.act) });
    layers.push(layer(&params.project, Activation::Identity));
    let shortcut = if params.residual { Shortcut::Input } else { Shortcut::None };
    run("mb_conv", xs, None, Chain { layers, shortcut }, pass)
}

fn projection(downsample: Option<&ConvBn>) -> Shortcut {
    downsample.map_or(Shortcut::Input, |params| Shortcut::Projection(params.clone()))
}

/// Checks the shapes of a block's inputs, and runs it.
fn run(name: &'static str, xs: &Tensor, given: Option<&Tensor>, chain: Chain, pass: &Pass) -> Result<Tensor> {
    let channels = chain.layers.first().map_or(0, |layer| layer.params.conv.geometry.in_channels);
    let (batch, height, width) = match *xs.dims() {
        [b, h, w, c] if c == channels && b > 0 => (b, h, w),
        _ => return Err(shape_error(name, format!("(B, H, W, {channels})"), xs)),
    };
    let groups = match pass.mode {
        Mode::Train { bn_groups } => bn_groups,
        Mode::Eval => 1,
    };
    if pass.mode != Mode::Eval {
        check_groups(batch, groups, usize::MAX)?;
    }
    let convs = chain.convolutions(batch, groups, height, width);
    for conv in &convs {
        if !conv.geometry.fits(conv.height, conv.width) {
            let side = conv.geometry.kernel;
            return Err(shape_error(name, format!("images of at least {side} x {side} pixels with their padding"), xs));
        }
        if pass.mode != Mode::Eval {
            check_groups(batch, groups, batch * conv.output_pixels())?;
        }
    }
    let Some(last) = convs.last() else { return Err(shape_error(name, "a layer", xs)) };
    let shape = Shape::from((batch, last.output_height(), last.output_width(), last.geometry.out_channels));
    if let Some(given) = given
        && given.dims() != shape.dims()
    {
        return Err(shape_error(name, format!("{:?}", shape.dims()), given));
    }
    if matches!(chain.shortcut, Shortcut::Input) && xs.dims() != shape.dims() {
        return Err(shape_error(name, format!("{:?}, the shape of the output", shape.dims()), xs));
    }
    let xs = xs.contiguous()?;
    let given = given.map(Tensor::contiguous).transpose()?;
    let op = Block { chain, convs };
    let out =
        |given: Option<&[f32]>| with_values(&xs, |xs| op.chain.forward(&op.convs, xs, given, pass.mode, pass.record));
    let (out, saved) = match &given {
        Some(given) => with_values(given, |given| out(Some(given)))?,
        None => out(None)?,
    };
    let Some(saved) = saved else { return Ok(Tensor::from_vec(out, shape, xs.device())?) };
    let (input, wants_input) = (xs.detach(), xs.track_op());
    let kept = given.as_ref().map(Tensor::detach);
    let backward = move |dout: Vec<f32>| op.backward(saved, &input, kept.as_ref(), &dout, wants_input);
    let inputs: Vec<&Tensor> = std::iter::once(&xs).chain(&given).collect();
    Ok(graph::record(name, out, shape, &inputs, backward)?)
}

#[derive(Debug)]
struct Block {
    chain: Chain,
    convs: Vec<Conv>,
}

impl Block {
    /// Gradients of the input and of the tensor that was added.
    fn backward(
        &self,
        saved: SavedChain,
        xs: &Tensor,
        given: Option<&Tensor>,
        dout: &[f32],
        wants_input: bool,
    ) -> candle_core::Result<Vec<Option<Vec<f32>>>> {
        let InputGradients { input, given } = with_values(xs, |xs| match given {
            Some(given) => with_values(given, |given| self.chain.backward(saved, xs, Some(given), dout, wants_input)),
            None => self.chain.backward(saved, xs, None, dout, wants_input),
        })?;
        Ok(vec![input, given])
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
pub(super) fn update_running(norm: &BatchNorm, groups: &[Statistics]) -> candle_core::Result<()> {
    let Some(first) = groups.first() else { bail!("no batch norm groups") };
    let unbiased = first.rows as f64 / (first.rows as f64 - 1.0);
    let count = groups.len() as f64;
    let step = |parameter: &Parameter, of: &dyn Fn(&Statistics) -> &[f64], factor: f64| {
        let mut running = values(parameter.var())?;
        for (c, value) in running.iter_mut().enumerate() {
            let mean = groups.iter().map(|stats| of(stats)[c]).sum::<f64>() / count * factor;
            *value = ((1.0 - norm.momentum) * f64::from(*value) + norm.momentum * mean) as f32;
        }
        parameter.var().set(&Tensor::from_vec(running, parameter.var().shape(), parameter.var().device())?)
    };
    step(&norm.running_mean, &|stats| &stats.mean, 1.0)?;
    step(&norm.running_var, &|stats| &stats.variance, unbiased)?;
    let counter = norm.num_batches_tracked.var();
    counter.set(&(counter.as_detached_tensor() + 1.0)?)
}
