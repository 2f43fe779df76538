//! Every block of `shared::ops` behind one type, with drawn parameters that keep all values away from kinks.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor};
use shared::Error;
use shared::ops::{
    self, Activation, BasicBlock, Bottleneck, Builder, ConvBn, Engine, Gate, Geometry, HiddenLayer, Linear, MbConv,
    Mode, Parameter, ParameterStore, Pass, ProjectionHead, SqueezeExcite, Stem, reference,
};

use crate::support::{flat, normal};
use crate::token_block::{TokenBlock, TokenSpec};

/// A block to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Spec {
    ConvBn {
        geometry: Geometry,
        act: Activation,
        residual: bool,
    },
    Stem {
        channels: usize,
    },
    BasicBlock {
        inputs: usize,
        outputs: usize,
        stride: usize,
    },
    Bottleneck {
        inputs: usize,
        width: usize,
        outputs: usize,
        stride: usize,
    },
    MbConv {
        depthwise: Geometry,
        expand_from: Option<usize>,
        squeeze: Option<Squeeze>,
        outputs: usize,
        act: Activation,
    },
    MaxPool {
        channels: usize,
    },
    GlobalAveragePool {
        channels: usize,
    },
    Linear {
        inputs: usize,
        outputs: usize,
        act: Activation,
    },
    ProjectionHead {
        inputs: usize,
        hidden: usize,
        outputs: usize,
    },
    L2Normalise {
        width: usize,
    },
    InfoNce {
        width: usize,
        queue: usize,
        temperature: f64,
    },
    Token(TokenSpec),
}

/// A squeeze-excite to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Squeeze {
    pub(crate) channels: usize,
    pub(crate) act: Activation,
    pub(crate) gate: Gate,
}

/// A block with its parameters.
#[derive(Debug)]
pub(crate) enum Block {
    ConvBn(ConvBn, Activation),
    Stem(Stem),
    BasicBlock(BasicBlock),
    Bottleneck(Bottleneck),
    MbConv(MbConv),
    MaxPool,
    GlobalAveragePool,
    Linear(Linear, Activation),
    ProjectionHead(ProjectionHead),
    L2Normalise,
    InfoNce { temperature: f64 },
    Token(TokenBlock),
}

impl Spec {
    /// An inverted residual block from `inputs` to `outputs` channels, `widening` times as wide inside (1 is no expansion).
    pub(crate) fn mb_conv(
        [inputs, widening, outputs]: [usize; 3],
        inside: impl Fn(usize) -> Geometry,
        act: Activation,
        squeeze: Option<Squeeze>,
    ) -> Self {
        let expand_from = (widening > 1).then_some(inputs);
        Self::MbConv { depthwise: inside(inputs * widening), expand_from, squeeze, outputs, act }
    }

    /// The shape of the input; rows have no sides.
    pub(crate) fn input_shape(&self, size: [usize; 3]) -> Vec<usize> {
        let [batch, height, width] = size;
        match *self {
            Self::Token(spec) => spec.input_shape(size),
            Self::Linear { inputs, .. } | Self::ProjectionHead { inputs, .. } => vec![batch, inputs],
            Self::L2Normalise { width } | Self::InfoNce { width, .. } => vec![batch, width],
            _ => vec![batch, height, width, self.channels()],
        }
    }

    fn channels(&self) -> usize {
        match *self {
            Self::ConvBn { geometry, .. } => geometry.in_channels,
            Self::Stem { .. } => 3,
            Self::BasicBlock { inputs, .. } | Self::Bottleneck { inputs, .. } => inputs,
            Self::MbConv { depthwise, expand_from, .. } => expand_from.unwrap_or(depthwise.in_channels),
            Self::MaxPool { channels } | Self::GlobalAveragePool { channels } => channels,
            Self::Linear { .. }
            | Self::ProjectionHead { .. }
            | Self::L2Normalise { .. }
            | Self::InfoNce { .. }
            | Self::Token(_) => 0,
        }
    }

    /// The shapes of the other inputs: a residual, or keys and queue.
    pub(crate) fn extra_shapes(&self, [batch, height, width]: [usize; 3]) -> Vec<Vec<usize>> {
        match *self {
            Self::ConvBn { geometry, residual: true, .. } => {
                let [height, width] = [height, width].map(|side| geometry.output_side(side));
                vec![vec![batch, height, width, geometry.out_channels]]
            }
            Self::InfoNce { width, queue, .. } => vec![vec![batch, width], vec![queue, width]],
            _ => vec![],
        }
    }

    /// The block and its store, both in floats of `dtype`.
    pub(crate) fn build(&self, dtype: DType) -> Result<(Block, ParameterStore), Error> {
        let mut builder = Builder::new(&Device::Cpu).with_dtype(dtype);
        let block = self.declare(&mut builder)?;
        Ok((block, builder.finish(1)?))
    }

    fn declare(&self, builder: &mut Builder) -> Result<Block, Error> {
        let mut layer = |name: &str, geometry| builder.conv_bn(name, &format!("{name}.bn"), geometry);
        let shortcut = |inputs, outputs, stride| Geometry::same(inputs, outputs, 1, stride);
        Ok(match *self {
            Self::ConvBn { geometry, act, .. } => Block::ConvBn(layer("conv", geometry)?, act),
            Self::Stem { channels } => Block::Stem(Stem { conv: layer("conv", Geometry::same(3, channels, 7, 2))? }),
            Self::BasicBlock { inputs, outputs, stride } => Block::BasicBlock(BasicBlock {
                conv1: layer("conv1", Geometry::same(inputs, outputs, 3, stride))?,
                conv2: layer("conv2", Geometry::same(outputs, outputs, 3, 1))?,
                downsample: (stride > 1 || inputs != outputs)
                    .then(|| layer("downsample", shortcut(inputs, outputs, stride)))
                    .transpose()?,
            }),
            Self::Bottleneck { inputs, width, outputs, stride } => Block::Bottleneck(Bottleneck {
                conv1: layer("conv1", Geometry::same(inputs, width, 1, 1))?,
                conv2: layer("conv2", Geometry::same(width, width, 3, stride))?,
                conv3: layer("conv3", Geometry::same(width, outputs, 1, 1))?,
                downsample: (stride > 1 || inputs != outputs)
                    .then(|| layer("downsample", shortcut(inputs, outputs, stride)))
                    .transpose()?,
            }),
            Self::MbConv { depthwise, expand_from, squeeze, outputs, act } => {
                let inner = depthwise.in_channels;
                let inputs = expand_from.unwrap_or(inner);
                let expand =
                    expand_from.map(|inputs| layer("expand", Geometry::same(inputs, inner, 1, 1))).transpose()?;
                let residual = depthwise.stride == 1 && inputs == outputs;
                let depthwise = layer("depthwise", depthwise)?;
                let project = layer("project", Geometry::same(inner, outputs, 1, 1))?;
                let squeeze_excite = match squeeze {
                    Some(Squeeze { channels, act, gate }) => Some(SqueezeExcite {
                        reduce: builder.pointwise("se.reduce", inner, channels)?,
                        expand: builder.pointwise("se.expand", channels, inner)?,
                        act,
                        gate,
                    }),
                    None => None,
                };
                Block::MbConv(MbConv { expand, depthwise, squeeze_excite, project, act, residual })
            }
            Self::MaxPool { .. } => Block::MaxPool,
            Self::GlobalAveragePool { .. } => Block::GlobalAveragePool,
            Self::Linear { inputs, outputs, act } => Block::Linear(builder.linear("fc", inputs, outputs)?, act),
            Self::ProjectionHead { inputs, hidden, outputs } => Block::ProjectionHead(ProjectionHead {
                hidden: Some(HiddenLayer { linear: builder.linear("fc.0", inputs, hidden)?, norm: None }),
                output: builder.linear("fc.2", hidden, outputs)?,
            }),
            Self::L2Normalise { .. } => Block::L2Normalise,
            Self::InfoNce { temperature, .. } => Block::InfoNce { temperature },
            Self::Token(spec) => Block::Token(spec.declare(builder)?),
        })
    }
}

impl Block {
    /// The result; of `info_nce`, loss and percentage as one row.
    pub(crate) fn forward(&self, xs: &Tensor, extras: &[Tensor], pass: &Pass) -> Result<Tensor, Error> {
        match self {
            Self::ConvBn(params, act) => ops::conv_bn(xs, params, extras.first(), *act, pass),
            Self::Stem(params) => ops::stem(xs, params, pass),
            Self::BasicBlock(params) => ops::basic_block(xs, params, pass),
            Self::Bottleneck(params) => ops::bottleneck(xs, params, pass),
            Self::MbConv(params) => ops::mb_conv(xs, params, pass),
            Self::MaxPool => ops::max_pool(xs, pass),
            Self::GlobalAveragePool => ops::global_average_pool(xs, pass),
            Self::Linear(params, act) => ops::linear(xs, params, *act, pass),
            Self::ProjectionHead(params) => ops::projection_head(xs, params, pass),
            Self::L2Normalise => ops::l2_normalise(xs, pass),
            Self::InfoNce { temperature } => {
                let (loss, top1) = ops::info_nce(xs, &extras[0], &extras[1], *temperature, pass.engine)?;
                Ok(Tensor::stack(&[loss, top1], 0)?)
            }
            Self::Token(block) => block.forward(xs, pass),
        }
    }

    /// Moves shifts and biases so that no value comes close to a kink of the function that it goes through.
    ///
    /// Two engines round differently, so a value within rounding of a kink may lie on either side of it, and its
    /// gradient is there or not: a difference that says nothing. Of the values of one channel there is always a pair of
    /// neighbours with a wide gap between them, and the bias that puts the kink into its middle is what is chosen here.
    /// This follows the reference through the block, layer by layer; parameters and inputs are f64.
    pub(crate) fn avoid_kinks(&self, xs: &Tensor, extras: &[Tensor], mode: Mode) -> Result<(), Error> {
        let walk = Walk { pass: Pass { mode, record: false, engine: Engine::Reference } };
        match self {
            Self::ConvBn(params, act) => walk.conv_bn(xs, params, extras.first(), *act).map(drop),
            Self::Stem(params) => walk.conv_bn(xs, &params.conv, None, Activation::Relu).map(drop),
            Self::BasicBlock(BasicBlock { conv1, conv2, downsample }) => {
                let inner = walk.conv_bn(xs, conv1, None, Activation::Relu)?;
                let shortcut = walk.shortcut(xs, downsample.as_ref())?;
                walk.conv_bn(&inner, conv2, Some(&shortcut), Activation::Relu).map(drop)
            }
            Self::Bottleneck(Bottleneck { conv1, conv2, conv3, downsample }) => {
                let inner = walk.conv_bn(xs, conv1, None, Activation::Relu)?;
                let inner = walk.conv_bn(&inner, conv2, None, Activation::Relu)?;
                let shortcut = walk.shortcut(xs, downsample.as_ref())?;
                walk.conv_bn(&inner, conv3, Some(&shortcut), Activation::Relu).map(drop)
            }
            Self::MbConv(MbConv { expand, depthwise, squeeze_excite, act, .. }) => {
                let inner = match expand {
                    Some(expand) => walk.conv_bn(xs, expand, None, *act)?,
                    None => xs.clone(),
                };
                let inner = walk.conv_bn(&inner, depthwise, None, *act)?;
                if let Some(SqueezeExcite { reduce, expand, act, gate }) = squeeze_excite {
                    let few = walk.linear(&reference::global_average_pool(&inner)?, reduce, kinks(*act))?;
                    let few = reference::activate(&few, *act)?;
                    let bounds: &[f64] = if *gate == Gate::HardSigmoid { &[-3.0, 3.0] } else { &[] };
                    walk.linear(&few, expand, bounds)?;
                }
                Ok(())
            }
            Self::Linear(params, act) => walk.linear(xs, params, kinks(*act)).map(drop),
            Self::ProjectionHead(params) => {
                let mut hidden = params.hidden.iter();
                hidden.try_for_each(|hidden| walk.linear(xs, &hidden.linear, kinks(Activation::Relu)).map(drop))
            }
            Self::MaxPool | Self::GlobalAveragePool | Self::L2Normalise | Self::InfoNce { .. } | Self::Token(_) => {
                Ok(())
            }
        }
    }
}

/// Where the derivative of an activation jumps.
fn kinks(act: Activation) -> &'static [f64] {
    match act {
        Activation::Identity | Activation::Silu | Activation::Gelu => &[],
        Activation::Relu => &[0.0],
        Activation::Relu6 => &[0.0, 6.0],
        Activation::HardSwish => &[-3.0, 3.0],
    }
}

/// A way through a block by the reference.
struct Walk {
    pass: Pass,
}

impl Walk {
    fn conv_bn(
        &self,
        xs: &Tensor,
        params: &ConvBn,
        residual: Option<&Tensor>,
        act: Activation,
    ) -> Result<Tensor, Error> {
        let before = reference::conv_bn(xs, params, residual, Activation::Identity, &self.pass)?;
        shift_off(&params.norm.bias, &before, kinks(act))?;
        reference::conv_bn(xs, params, residual, act, &self.pass)
    }

    fn shortcut(&self, xs: &Tensor, downsample: Option<&ConvBn>) -> Result<Tensor, Error> {
        downsample.map_or_else(|| Ok(xs.clone()), |params| self.conv_bn(xs, params, None, Activation::Identity))
    }

    /// The values before the activation.
    fn linear(&self, xs: &Tensor, params: &Linear, kinks: &[f64]) -> Result<Tensor, Error> {
        let values = || reference::linear(xs, params, Activation::Identity, &self.pass);
        shift_off(&params.bias, &values()?, kinks)?;
        values()
    }
}

/// Adds to each channel's bias what takes its `values` off the kinks.
fn shift_off(bias: &Parameter, values: &Tensor, kinks: &[f64]) -> Result<(), Error> {
    if kinks.is_empty() {
        return Ok(());
    }
    let channels = values.dim(D::Minus1)?;
    let values = flat(values);
    let mut biases = flat(bias.var());
    for (channel, bias) in biases.iter_mut().enumerate() {
        let mut sorted: Vec<f64> = values.iter().skip(channel).step_by(channels).copied().collect();
        sorted.sort_by(f64::total_cmp);
        *bias += best_shift(&sorted, kinks);
    }
    Ok(bias.var().set(&Tensor::from_vec(biases, bias.var().shape(), &Device::Cpu)?)?)
}

/// Of the shifts that put a kink between two neighbours, or leave all as it is, the one that keeps farthest from kinks.
fn best_shift(sorted: &[f64], kinks: &[f64]) -> f64 {
    const FARTHEST: f64 = 0.3;
    let clearance = |shift: f64| {
        let near = |kink: f64| {
            let next = sorted.partition_point(|value| value + shift < kink);
            let around = &sorted[next.saturating_sub(1)..(next + 1).min(sorted.len())];
            around.iter().map(|value| (value + shift - kink).abs()).fold(f64::INFINITY, f64::min)
        };
        kinks.iter().map(|&kink| near(kink)).fold(f64::INFINITY, f64::min).min(0.1)
    };
    let middles = sorted.windows(2).map(|pair| f64::midpoint(pair[0], pair[1]));
    let shifts = middles.flat_map(|middle| kinks.iter().map(move |kink| kink - middle)).filter(|s| s.abs() < FARTHEST);
    let outside = [-FARTHEST, 0.0, FARTHEST];
    let better = |best: (f64, f64), shift: f64| {
        let clear = clearance(shift);
        if clear > best.1 { (shift, clear) } else { best }
    };
    shifts.chain(outside).fold((0.0, clearance(0.0)), better).0
}

/// Parameters and buffers of a block by file name, all of them off the values that hide mistakes (0 and 1): weights that give
/// results of about unit variance, scales and shifts that differ per channel.
pub(crate) fn drawn(store: &ParameterStore, seed: u64) -> Result<BTreeMap<String, Tensor>, Error> {
    let mut tensors = BTreeMap::new();
    for (index, (name, shape)) in store.names_and_shapes().into_iter().enumerate() {
        let draw = normal(&shape, seed.wrapping_mul(1000) + 17 + index as u64);
        let field = name.rsplit('.').next().unwrap_or_default();
        let tensor = match field {
            "num_batches_tracked" => Tensor::new(0i64, &Device::Cpu)?,
            "running_var" => (draw?.abs()? + 0.3)?,
            "weight" if shape.len() == 1 => ((draw? * 0.3)? + 1.0)?,
            "weight" => (draw? / (shape[1..].iter().product::<usize>() as f64).sqrt())?,
            _ => (draw? * 0.3)?,
        };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}
