//! The blocks that models are written in, each handed to the engine of the pass.

use candle_core::Tensor;

use super::interpreter::composed;
use super::parameter::{
    Activation, BasicBlock, BatchNorm, Bottleneck, ConvBn, Linear, MbConv, Parameter, ProjectionHead, Stem,
};
use super::update::same_shape;
use super::{Engine, Pass, cpu, reference, shape_error};
use crate::Result;

/// Convolution, batch norm, the sum with `residual` if there is one, activation.
///
/// # Shapes
/// - `xs`: `(B, H, W, in)` f32
/// - `residual`: `(B, H', W', out)` f32, the shape of the result
/// - returns: `(B, H', W', out)` f32
///
/// # Errors
/// `Error::Shape` for inputs of another shape; `Error::Invalid` when the batch cannot be cut into the groups of `pass`.
pub fn conv_bn(
    xs: &Tensor,
    params: &ConvBn,
    residual: Option<&Tensor>,
    act: Activation,
    pass: &Pass,
) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => reference::conv_bn(xs, params, residual, act, pass),
        Engine::Cpu => cpu::block::conv_bn(xs, params, residual, act, pass),
    }
}

/// The first layers of a residual network.
///
/// # Shapes
/// - `xs`: `(B, H, W, 3)` f32, normalised images
/// - returns: `(B, H/4, W/4, C)` f32, sides rounded up twice
///
/// # Errors
/// As [`conv_bn`].
pub fn stem(xs: &Tensor, params: &Stem, pass: &Pass) -> Result<Tensor> {
    let xs = conv_bn(xs, &params.conv, None, Activation::Relu, pass)?;
    max_pool(&xs, pass)
}

/// Two 3x3 convolutions around a shortcut.
///
/// # Shapes
/// - `xs`: `(B, H, W, in)` f32
/// - returns: `(B, H', W', out)` f32
///
/// # Errors
/// As [`conv_bn`].
pub fn basic_block(xs: &Tensor, params: &BasicBlock, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => composed::basic_block(&mut pass.clone(), xs, params),
        Engine::Cpu => cpu::block::basic_block(xs, params, pass),
    }
}

/// 1x1, 3x3 and 1x1 convolutions around a shortcut.
///
/// # Shapes
/// - `xs`: `(B, H, W, in)` f32
/// - returns: `(B, H', W', out)` f32
///
/// # Errors
/// As [`conv_bn`].
pub fn bottleneck(xs: &Tensor, params: &Bottleneck, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => composed::bottleneck(&mut pass.clone(), xs, params),
        Engine::Cpu => cpu::block::bottleneck(xs, params, pass),
    }
}

/// The inverted residual block of `MobileNet` and `EfficientNet`.
///
/// # Shapes
/// - `xs`: `(B, H, W, in)` f32
/// - returns: `(B, H', W', out)` f32
///
/// # Errors
/// As [`conv_bn`].
///
/// # Source
/// Sandler et al., `MobileNetV2`, arXiv 1801.04381, section 3.3; with squeeze-excite as in `MobileNetV3`, arXiv 1905.02244, section 5.3.
pub fn mb_conv(xs: &Tensor, params: &MbConv, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => composed::mb_conv(&mut pass.clone(), xs, params),
        Engine::Cpu => cpu::block::mb_conv(xs, params, pass),
    }
}

/// 3x3 max pool of stride 2 with padding 1.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)` f32
/// - returns: `(B, (H + 1) / 2, (W + 1) / 2, C)` f32
///
/// # Errors
/// `Error::Shape` when `xs` is not of rank 4.
pub fn max_pool(xs: &Tensor, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => reference::max_pool(xs),
        Engine::Cpu => cpu::layers::max_pool(xs),
    }
}

/// The mean over all pixels.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)` f32
/// - returns: `(B, C)` f32
///
/// # Errors
/// `Error::Shape` when `xs` is not of rank 4.
pub fn global_average_pool(xs: &Tensor, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => reference::global_average_pool(xs),
        Engine::Cpu => cpu::layers::global_average_pool(xs),
    }
}

/// `act(xs weight + bias)`, row by row.
///
/// # Shapes
/// - `xs`: `(.., in)` f32: rows `(B, in)`, or tokens
/// - returns: `(.., out)` f32
///
/// # Errors
/// `Error::Shape` when `xs` has another width.
pub fn linear(xs: &Tensor, params: &Linear, act: Activation, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => reference::linear(xs, params, act, pass),
        Engine::Cpu if xs.rank() > 2 => cpu::token_layers::linear(xs, params, act, pass),
        Engine::Cpu => cpu::layers::linear(xs, params, act, pass),
    }
}

/// `xs weight`, row by row: a linear layer without bias.
///
/// # Shapes
/// - `xs`: `(B, in)` f32
/// - `weight`: `[in, out]`
/// - returns: `(B, out)` f32
///
/// # Errors
/// `Error::Shape` when `xs` has another width.
pub fn linear_map(xs: &Tensor, weight: &Parameter, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => Ok(xs.matmul(&weight.value(pass.record))?),
        Engine::Cpu => cpu::layers::linear_map(xs, weight, pass),
    }
}

/// Batch norm over rows, activation.
///
/// Heads have few rows beside a backbone's pixels: every engine composes it of plain operations.
///
/// # Shapes
/// - `xs`: `(B, C)` f32
/// - returns: `(B, C)` f32
///
/// # Errors
/// `Error::Shape` when `xs` has another width; `Error::Invalid` when the batch cannot be cut into the groups of `pass`.
pub fn batch_norm_rows(xs: &Tensor, params: &BatchNorm, act: Activation, pass: &Pass) -> Result<Tensor> {
    let channels = params.weight.var().elem_count();
    let batch = match *xs.dims() {
        [batch, width] if width == channels => batch,
        _ => return Err(shape_error("batch_norm_rows", format!("(B, {channels})"), xs)),
    };
    let normed = reference::batch_norm(&xs.reshape((batch, 1, 1, channels))?, params, pass)?;
    reference::activate(&normed.reshape((batch, channels))?, act)
}

/// The projection head. Its rows are not of unit length yet.
///
/// # Shapes
/// - `xs`: `(B, F)` f32
/// - returns: `(B, D)` f32
///
/// # Errors
/// `Error::Shape` when `xs` has another width.
pub fn projection_head(xs: &Tensor, params: &ProjectionHead, pass: &Pass) -> Result<Tensor> {
    composed::projection_head(&mut pass.clone(), xs, params)
}

/// Rows divided by their L2 norm, or by 1e-12 where the norm is smaller.
///
/// # Shapes
/// - `xs`: `(B, D)` f32
/// - returns: `(B, D)` f32, rows of unit length
///
/// # Errors
/// `Error::Shape` when `xs` is not of rank 2.
pub fn l2_normalise(xs: &Tensor, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => reference::l2_normalise(xs),
        Engine::Cpu => cpu::layers::l2_normalise(xs),
    }
}

/// Cross entropy of `[q . k, q . queue] / temperature` against the first, mean over the batch, and the percentage of rows
/// whose first logit is the largest. Only `q` gets a gradient. [`crate::losses::info_nce`] is the documented loss.
///
/// # Shapes
/// - `q`, `k`: `(B, D)` f32
/// - `queue`: `(K, D)` f32, `K > 0`
/// - returns: two f32 scalars
///
/// # Errors
/// `Error::Shape` when the three do not fit together.
pub fn info_nce(q: &Tensor, k: &Tensor, queue: &Tensor, temperature: f64, engine: Engine) -> Result<(Tensor, Tensor)> {
    let (batch, width) = match *q.dims() {
        [batch, width] if batch > 0 => (batch, width),
        _ => return Err(shape_error("info_nce query", "(B, D)", q)),
    };
    if k.dims() != [batch, width] {
        return Err(shape_error("info_nce key", format!("({batch}, {width})"), k));
    }
    if !matches!(*queue.dims(), [length, found] if found == width && length > 0) {
        return Err(shape_error("info_nce queue", format!("(K, {width})"), queue));
    }
    match engine {
        Engine::Reference => reference::info_nce(q, k, queue, temperature),
        Engine::Cpu => cpu::layers::info_nce(q, k, queue, temperature),
    }
}

/// Cross entropy of `softmax(logits / temperature)` against weights of the classes, mean over the rows. Only `logits` gets a
/// gradient. [`crate::losses::soft_cross_entropy`] is the documented loss.
///
/// # Shapes
/// - `logits`, `targets`: `(B, P)` f32
/// - returns: an f32 scalar
///
/// # Errors
/// `Error::Shape` when the two do not fit together or are empty.
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor, temperature: f64, engine: Engine) -> Result<Tensor> {
    if logits.rank() != 2 || logits.elem_count() == 0 {
        return Err(shape_error("soft_cross_entropy logits", "(B, P)", logits));
    }
    same_shape("soft_cross_entropy targets", logits, targets)?;
    match engine {
        Engine::Reference => reference::soft_cross_entropy(logits, targets, temperature),
        Engine::Cpu => cpu::layers::soft_cross_entropy(logits, targets, temperature),
    }
}
