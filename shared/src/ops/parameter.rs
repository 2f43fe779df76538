//! What a block owns: handles of its parameters, with the slots in which custom operations leave gradients.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Tensor, Var};

use crate::Result;

/// How a tensor of a file lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightLayout {
    /// As in the file.
    Plain,
    /// File `[out, in, kh, kw]`, memory `[kh, kw, in, out]`.
    Convolution,
    /// File `[out, in]`, memory `[in, out]`.
    Linear,
    /// A 1x1 convolution that works on rows: file `[out, in, 1, 1]`, memory `[in, out]`.
    Pointwise,
}

impl WeightLayout {
    /// The shape in memory of a tensor that has `shape` in the file.
    pub fn memory_shape(self, shape: &[usize]) -> Vec<usize> {
        match (self, shape) {
            (Self::Convolution, &[out, inp, kh, kw]) => vec![kh, kw, inp, out],
            (Self::Linear, &[out, inp]) | (Self::Pointwise, &[out, inp, 1, 1]) => vec![inp, out],
            _ => shape.to_vec(),
        }
    }

    /// A tensor of a file, contiguous as memory holds it.
    ///
    /// # Errors
    /// A tensor of another rank than the layout's.
    pub fn to_memory(self, tensor: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Plain => tensor.contiguous()?,
            Self::Convolution => tensor.permute((2, 3, 1, 0))?.contiguous()?,
            Self::Linear => tensor.t()?.contiguous()?,
            Self::Pointwise => tensor.flatten_from(1)?.t()?.contiguous()?,
        })
    }

    /// A tensor of memory, contiguous as files hold it.
    ///
    /// # Errors
    /// A tensor of another rank than the layout's.
    pub fn to_file(self, tensor: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Plain => tensor.contiguous()?,
            Self::Convolution => tensor.permute((3, 2, 0, 1))?.contiguous()?,
            Self::Linear => tensor.t()?.contiguous()?,
            Self::Pointwise => tensor.t()?.contiguous()?.unsqueeze(2)?.unsqueeze(3)?,
        })
    }
}

/// A distribution of initial values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// One value everywhere.
    Constant(f32),
    /// Normal around 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in `[-bound, bound)`.
    Uniform {
        /// Half the width.
        bound: f64,
    },
    /// The integer 0 (`num_batches_tracked`).
    Counter,
}

/// A trainable tensor or a buffer: a shared handle, cheap to clone.
#[derive(Debug, Clone)]
pub struct Parameter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    var: Var,
    slot: Mutex<Option<Tensor>>,
}

impl Parameter {
    pub(super) fn new(name: String, var: Var) -> Self {
        Self { shared: Arc::new(Shared { name, var, slot: Mutex::default() }) }
    }

    /// The name in the model's [`crate::ops::ParameterStore`], `PyTorch`'s.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The variable, in memory layout.
    pub fn var(&self) -> &Var {
        &self.shared.var
    }

    /// The value for a plain candle operation: tracked by candle when `record` is set.
    pub fn value(&self, record: bool) -> Tensor {
        if record { self.var().as_tensor().clone() } else { self.var().as_detached_tensor() }
    }

    /// Adds a gradient, in memory layout, to what earlier operations of this backward pass left.
    ///
    /// # Errors
    /// A gradient of another shape than the parameter's.
    pub fn deposit(&self, gradient: Tensor) -> Result<()> {
        if gradient.dims() != self.var().dims() {
            return Err(super::shape_error("gradient", format!("{:?}", self.var().dims()), &gradient));
        }
        let mut slot = self.shared.slot.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(match slot.take() {
            Some(sum) => {
                super::update::add_in_place(&sum, &gradient)?;
                sum
            }
            None => gradient,
        });
        Ok(())
    }

    pub(super) fn take_deposit(&self) -> Option<Tensor> {
        self.shared.slot.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Zeros around an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// This many pixels on every side.
    Symmetric(usize),
    /// `TensorFlow`'s `SAME`: as many as make the output `ceil(side / stride)`; an odd one comes after the image.
    Same,
}

/// The shape of a square convolution without bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Channels in.
    pub in_channels: usize,
    /// Channels out.
    pub out_channels: usize,
    /// Side of the kernel, in pixels.
    pub kernel: usize,
    /// Step between outputs, in pixels.
    pub stride: usize,
    /// Zeros around the input.
    pub padding: Padding,
    /// Whether each channel is convolved by itself; then `in_channels` and `out_channels` are equal.
    pub depthwise: bool,
}

impl Geometry {
    /// A dense convolution with `kernel / 2` zeros on every side.
    pub fn same(in_channels: usize, out_channels: usize, kernel: usize, stride: usize) -> Self {
        Self { in_channels, out_channels, kernel, stride, padding: Padding::Symmetric(kernel / 2), depthwise: false }
    }

    /// A depthwise convolution with `kernel / 2` zeros on every side.
    pub fn depthwise(channels: usize, kernel: usize, stride: usize) -> Self {
        Self { depthwise: true, ..Self::same(channels, channels, kernel, stride) }
    }

    /// The same convolution with other padding.
    #[must_use]
    pub fn with_padding(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// The side of the output for a side of the input.
    pub fn output_side(&self, side: usize) -> usize {
        match self.padding {
            Padding::Symmetric(padding) => (side + 2 * padding).saturating_sub(self.kernel) / self.stride + 1,
            Padding::Same => side.div_ceil(self.stride),
        }
    }

    /// Zeros before the first pixel of a side.
    pub fn leading_padding(&self, side: usize) -> usize {
        match self.padding {
            Padding::Symmetric(padding) => padding,
            Padding::Same => {
                let reach = (self.output_side(side).max(1) - 1) * self.stride + self.kernel;
                reach.saturating_sub(side) / 2
            }
        }
    }

    /// Whether an image of this size has at least one output pixel.
    pub fn fits(&self, height: usize, width: usize) -> bool {
        height.min(width) > 0
            && match self.padding {
                Padding::Symmetric(padding) => height.min(width) + 2 * padding >= self.kernel,
                Padding::Same => true,
            }
    }

    /// Input channels that each output channel sees.
    pub fn channels_per_group(&self) -> usize {
        if self.depthwise { 1 } else { self.in_channels }
    }
}

/// What follows a batch norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `max(0, x)`; its derivative at 0 is 0.
    Relu,
    /// `min(max(0, x), 6)`; its derivative at 0 and at 6 is 0.
    Relu6,
    /// `x sigmoid(x)`, also called swish.
    Silu,
    /// `x min(max(0, x + 3), 6) / 6`; its derivative at -3 and at 3 is 0 and 1, as `PyTorch`'s.
    HardSwish,
    /// `x Phi(x)`, where `Phi` is the distribution function of the normal distribution: the exact form, not that by a hyperbolic tangent.
    Gelu,
}

/// What turns the output of squeeze-excite into factors between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `min(max(0, x + 3), 6) / 6`; its derivative at -3 and at 3 is 0.
    HardSigmoid,
}

/// A convolution without bias.
#[derive(Debug, Clone)]
pub struct Conv2d {
    /// `[k, k, in, out]`; `[k, k, 1, C]` when depthwise.
    pub weight: Parameter,
    /// Its shape.
    pub geometry: Geometry,
}

/// A batch norm over channels.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    /// `[C]` scale.
    pub weight: Parameter,
    /// `[C]` shift.
    pub bias: Parameter,
    /// `[C]` running mean.
    pub running_mean: Parameter,
    /// `[C]` running unbiased variance.
    pub running_var: Parameter,
    /// Scalar i64: forward passes in training mode.
    pub num_batches_tracked: Parameter,
    /// Added to the variance.
    pub eps: f64,
    /// The weight of new statistics in the running ones.
    pub momentum: f64,
}

/// A convolution with its batch norm.
#[derive(Debug, Clone)]
pub struct ConvBn {
    /// First.
    pub conv: Conv2d,
    /// Then.
    pub norm: BatchNorm,
}

/// The first layers of a residual network: convolution, batch norm, `ReLU`, 3x3 max pool of stride 2.
#[derive(Debug, Clone)]
pub struct Stem {
    /// The 7x7 convolution.
    pub conv: ConvBn,
}

/// Two 3x3 convolutions and a shortcut (`ResNet`-18/34).
#[derive(Debug, Clone)]
pub struct BasicBlock {
    /// 3x3, perhaps strided.
    pub conv1: ConvBn,
    /// 3x3.
    pub conv2: ConvBn,
    /// 1x1 on the shortcut where the shape changes.
    pub downsample: Option<ConvBn>,
}

/// 1x1, 3x3, 1x1 and a shortcut (`ResNet`-50 and deeper; the stride is on the 3x3, as in torchvision).
#[derive(Debug, Clone)]
pub struct Bottleneck {
    /// 1x1, narrowing.
    pub conv1: ConvBn,
    /// 3x3, perhaps strided.
    pub conv2: ConvBn,
    /// 1x1, widening.
    pub conv3: ConvBn,
    /// 1x1 on the shortcut where the shape changes.
    pub downsample: Option<ConvBn>,
}

/// Squeeze-excite: each channel of an image is multiplied by a factor that is computed from the means of all channels,
/// `gate(expand(act(reduce(mean))))`.
#[derive(Debug, Clone)]
pub struct SqueezeExcite {
    /// From `C` channels to few.
    pub reduce: Linear,
    /// Back to `C`.
    pub expand: Linear,
    /// Between the two.
    pub act: Activation,
    /// After both.
    pub gate: Gate,
}

/// The inverted residual block of `MobileNet` and `EfficientNet`: 1x1 convolution (widening), depthwise convolution,
/// squeeze-excite, 1x1 convolution (narrowing, without activation), and perhaps the sum with the input.
#[derive(Debug, Clone)]
pub struct MbConv {
    /// 1x1, widening; absent in the first blocks, whose expansion is 1.
    pub expand: Option<ConvBn>,
    /// 3x3 or 5x5, perhaps strided.
    pub depthwise: ConvBn,
    /// Between the depthwise convolution's activation and `project`.
    pub squeeze_excite: Option<SqueezeExcite>,
    /// 1x1, narrowing.
    pub project: ConvBn,
    /// After `expand` and after `depthwise`.
    pub act: Activation,
    /// Whether the input is added to the output, which then has the same shape.
    pub residual: bool,
}

/// An affine map of rows.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[in, out]`.
    pub weight: Parameter,
    /// `[out]`.
    pub bias: Parameter,
}

/// A linear layer, perhaps behind a hidden one.
#[derive(Debug, Clone)]
pub struct ProjectionHead {
    /// To the hidden width.
    pub hidden: Option<HiddenLayer>,
    /// To the embedding width.
    pub output: Linear,
}

/// Linear, perhaps batch norm, `ReLU`.
#[derive(Debug, Clone)]
pub struct HiddenLayer {
    /// First.
    pub linear: Linear,
    /// Over the rows of the batch.
    pub norm: Option<BatchNorm>,
}
