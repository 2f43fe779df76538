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
}

impl WeightLayout {
    /// The shape in memory of a tensor that has `shape` in the file.
    pub fn memory_shape(self, shape: &[usize]) -> Vec<usize> {
        match (self, shape) {
            (Self::Convolution, &[out, inp, kh, kw]) => vec![kh, kw, inp, out],
            (Self::Linear, &[out, inp]) => vec![inp, out],
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
    var: Var,
    slot: Arc<Mutex<Option<Tensor>>>,
}

impl Parameter {
    pub(super) fn new(var: Var) -> Self {
        Self { var, slot: Arc::default() }
    }

    /// The variable, in memory layout.
    pub fn var(&self) -> &Var {
        &self.var
    }

    /// The value for a plain candle operation: tracked by candle when `record` is set.
    pub fn value(&self, record: bool) -> Tensor {
        if record { self.var.as_tensor().clone() } else { self.var.as_detached_tensor() }
    }

    /// Adds a gradient, in memory layout, to what earlier operations of this backward pass left.
    ///
    /// # Errors
    /// A gradient of another shape than the parameter's.
    pub fn deposit(&self, gradient: Tensor) -> Result<()> {
        if gradient.dims() != self.var.dims() {
            return Err(super::shape_error("gradient", format!("{:?}", self.var.dims()), &gradient));
        }
        let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(match slot.take() {
            Some(sum) => {
                super::blocks::add_in_place(&sum, &gradient)?;
                sum
            }
            None => gradient,
        });
        Ok(())
    }

    pub(super) fn take_deposit(&self) -> Option<Tensor> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
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
    /// Zeros around the input, in pixels.
    pub padding: usize,
}

impl Geometry {
    /// A convolution with `padding = kernel / 2`.
    pub fn same(in_channels: usize, out_channels: usize, kernel: usize, stride: usize) -> Self {
        Self { in_channels, out_channels, kernel, stride, padding: kernel / 2 }
    }

    /// The side of the output for a side of the input.
    pub fn output_side(&self, side: usize) -> usize {
        (side + 2 * self.padding).saturating_sub(self.kernel) / self.stride + 1
    }
}

/// What follows a batch norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `max(0, x)`; its derivative at 0 is 0.
    Relu,
}

/// A convolution without bias.
#[derive(Debug, Clone)]
pub struct Conv2d {
    /// `[k, k, in, out]`.
    pub weight: Parameter,
    /// Its shape.
    pub geometry: Geometry,
}

/// A batch norm over channels, eps 1e-5, momentum 0.1.
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

/// An affine map of rows.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[in, out]`.
    pub weight: Parameter,
    /// `[out]`.
    pub bias: Parameter,
}

/// Linear, `ReLU`, linear.
#[derive(Debug, Clone)]
pub struct ProjectionHead {
    /// To the hidden width.
    pub hidden: Linear,
    /// To the embedding width.
    pub output: Linear,
}
