//! The blocks of transformers, each handed to the engine of the pass.
//!
//! Tokens are `(B, N, C)`; where their places on a grid matter they are `(B, H, W, C)`, and every block that works on single tokens takes
//! either.

use candle_core::Tensor;

use super::interpreter::composed;
use super::parameter::{Linear, Parameter};
use super::token_parameter::{
    AttentionBlock, ClassAttentionBlock, LayerNorm, LocalBlock, LocalPatchInteraction, MlpBlock, PatchEmbedding,
};
use super::{Engine, Pass, cpu, shape_error, token_reference};
use crate::Result;

/// One token for each patch of an image, a class token before them, positions added to all.
///
/// # Shapes
/// - `xs`: `(B, H, W, 3)` f32, `H` and `W` multiples of the patch's side `P`
/// - returns: `(B, 1 + H/P * W/P, C)` f32
///
/// # Errors
/// `Error::Shape` for images of other channels, or with a side that is no multiple of the patch's.
///
/// # Source
/// Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929, equation 1.
pub fn embed_patches(xs: &Tensor, params: &PatchEmbedding, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => token_reference::embed_patches(xs, params, pass),
        Engine::Cpu => {
            let table = token_reference::first_tokens(xs, params, pass)?;
            cpu::grid_layers::embed_patches(xs, params, &table, pass)
        }
    }
}

/// `xs` and what a linear layer makes of the sines and cosines of each token's place.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)` f32; returns the same
///
/// # Errors
/// `Error::Shape` when `xs` has another shape.
///
/// # Source
/// El-Nouby et al., `XCiT`, arXiv 2106.09681, in timm's form.
pub fn add_fourier_positions(xs: &Tensor, params: &Linear, pass: &Pass) -> Result<Tensor> {
    check_grid("add_fourier_positions", xs, params.bias.var().elem_count())?;
    match pass.engine {
        Engine::Reference => token_reference::add_fourier_positions(xs, params, pass),
        Engine::Cpu => {
            let table = token_reference::fourier_positions(xs, params, pass)?;
            cpu::grid_layers::add_positions(xs, &table, pass)
        }
    }
}

/// Rows of mean 0 and variance 1, scaled and shifted.
///
/// # Shapes
/// - `xs`: `(.., C)` f32; returns the same
///
/// # Errors
/// `Error::Shape` when `xs` has another width.
///
/// # Source
/// Ba, Kiros, Hinton, arXiv 1607.06450, equation 4.
pub fn layer_norm(xs: &Tensor, params: &LayerNorm, pass: &Pass) -> Result<Tensor> {
    check_width("layer_norm", xs, params.weight.var().elem_count())?;
    match pass.engine {
        Engine::Reference => token_reference::layer_norm(xs, params, pass),
        Engine::Cpu => cpu::token_layers::layer_norm(xs, params, pass),
    }
}

/// `softmax(Q K' / sqrt(width)) V` of each head, where the softmax runs over the tokens that are asked.
///
/// # Shapes
/// - `qkv`: `(B, N, 3 * heads * width)` f32: queries, keys and values, each head by head
/// - returns: `(B, N, heads * width)` f32, head by head
///
/// # Errors
/// `Error::Shape` when `qkv` is not of rank 3 or its width is no multiple of `3 * heads`.
///
/// # Source
/// Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.2.
pub fn attention(qkv: &Tensor, heads: usize, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => token_reference::attention(qkv, heads),
        Engine::Cpu => cpu::token_layers::attention(qkv, heads),
    }
}

/// `softmax(temperature * Q K') V` of each head, where queries, keys and values are channels: each is a row of as many numbers as there
/// are tokens, and those of queries and keys have unit length.
///
/// # Shapes
/// - `qkv`: `(B, .., 3 * heads * width)` f32: queries, keys and values, each head by head
/// - `temperature`: `[heads, 1, 1]`
/// - returns: `(B, .., heads * width)` f32, head by head
///
/// # Errors
/// `Error::Shape` when the width of `qkv` is no multiple of `3 * heads`.
///
/// # Source
/// El-Nouby et al., `XCiT`, arXiv 2106.09681, section 3.2.
pub fn cross_covariance_attention(qkv: &Tensor, temperature: &Parameter, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => token_reference::cross_covariance_attention(qkv, temperature, pass),
        Engine::Cpu => cpu::token_layers::cross_covariance_attention(qkv, temperature, pass),
    }
}

/// `softmax(q K' / sqrt(width)) V` of each head, for one query in each image.
///
/// # Shapes
/// - `query`: `(B, heads * width)` f32, head by head
/// - `keys`, `values`: `(B, N, heads * width)` f32, head by head
/// - returns: `(B, heads * width)` f32
///
/// # Errors
/// `Error::Shape` when the three do not fit together or `heads` does not divide their width.
///
/// # Source
/// Touvron et al., Going deeper with Image Transformers, arXiv 2103.17239, section 3.2.
pub fn class_attention(query: &Tensor, keys: &Tensor, values: &Tensor, heads: usize) -> Result<Tensor> {
    let fits = matches!(*keys.dims(), [batch, tokens, channels] if tokens > 0
        && heads > 0 && channels.is_multiple_of(heads) && query.dims() == [batch, channels]);
    if !fits {
        let expected = format!("(B, N, C) beside a query {:?} and {heads} heads", query.dims());
        return Err(shape_error("class_attention keys", expected, keys));
    }
    if values.dims() != keys.dims() {
        return Err(shape_error("class_attention values", format!("{:?}", keys.dims()), values));
    }
    token_reference::class_attention(query, keys, values, heads)
}

/// Two depthwise convolutions over the grid of tokens, with GELU and batch norm between them.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)` f32; returns the same
///
/// # Errors
/// `Error::Shape` when `xs` has another shape; `Error::Invalid` when the batch cannot be cut into the groups of `pass`.
///
/// # Source
/// El-Nouby et al., `XCiT`, arXiv 2106.09681, section 3.3.
pub fn local_patch_interaction(xs: &Tensor, params: &LocalPatchInteraction, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => token_reference::local_patch_interaction(xs, params, pass),
        Engine::Cpu => cpu::grid_layers::local_patch_interaction(xs, params, pass),
    }
}

/// A token before the others, the same in each image.
///
/// # Shapes
/// - `xs`: `(B, .., C)` f32, `N` tokens in all
/// - `token`: `[1, 1, C]`
/// - returns: `(B, 1 + N, C)` f32
///
/// # Errors
/// `Error::Shape` when `xs` has another width.
pub fn prepend_token(xs: &Tensor, token: &Parameter, pass: &Pass) -> Result<Tensor> {
    check_width("prepend_token", xs, token.var().elem_count())?;
    token_reference::prepend_token(xs, token, pass)
}

/// The first token of each image.
///
/// # Shapes
/// - `xs`: `(B, N, C)` f32; returns `(B, C)` f32
///
/// # Errors
/// `Error::Shape` when `xs` is not of rank 3.
pub fn first_token(xs: &Tensor) -> Result<Tensor> {
    check_tokens("first_token", xs)?;
    token_reference::first_token(xs)
}

/// The tokens of each image with another one in the place of the first.
///
/// # Shapes
/// - `xs`: `(B, N, C)` f32; returns the same
/// - `token`: `(B, C)` f32
///
/// # Errors
/// `Error::Shape` when the two do not fit together.
pub fn replace_first_token(xs: &Tensor, token: &Tensor) -> Result<Tensor> {
    let [batch, _, channels] = check_tokens("replace_first_token", xs)?;
    if token.dims() != [batch, channels] {
        return Err(shape_error("replace_first_token token", format!("({batch}, {channels})"), token));
    }
    token_reference::replace_first_token(xs, token)
}

/// `xs + branch`, or `xs + scale * branch` with a factor for each channel.
///
/// # Shapes
/// - `xs`, `branch`: `(.., C)` f32 of the same shape, which is also returned
/// - `scale`: `[C]`
///
/// # Errors
/// `Error::Shape` when they do not fit together.
pub fn add_branch(xs: &Tensor, branch: &Tensor, scale: Option<&Parameter>, pass: &Pass) -> Result<Tensor> {
    if let Some(scale) = scale {
        check_width("add_branch", xs, scale.var().elem_count())?;
    }
    if branch.dims() != xs.dims() {
        return Err(shape_error("add_branch", format!("{:?}", xs.dims()), branch));
    }
    match pass.engine {
        Engine::Reference => token_reference::add_branch(xs, branch, scale, pass),
        Engine::Cpu => cpu::token_layers::add_branch(xs, branch, scale, pass),
    }
}

/// The sum of its input and a branch with attention in it.
///
/// # Shapes
/// - `xs`: `(B, N, C)` f32, for attention between channels `(B, .., C)`; returns the same
///
/// # Errors
/// `Error::Shape` when `xs` has another shape.
pub fn attention_block(xs: &Tensor, params: &AttentionBlock, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => composed::attention_block(&mut pass.clone(), xs, params),
        Engine::Cpu => cpu::token_layers::attention_block(xs, params, pass),
    }
}

/// The sum of its input and a branch of two linear layers.
///
/// # Shapes
/// - `xs`: `(.., C)` f32; returns the same
///
/// # Errors
/// `Error::Shape` when `xs` has another width.
pub fn mlp_block(xs: &Tensor, params: &MlpBlock, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => composed::mlp_block(&mut pass.clone(), xs, params),
        Engine::Cpu => cpu::token_layers::mlp_block(xs, params, pass),
    }
}

/// The sum of its input and a branch of convolutions over the grid of tokens.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)` f32; returns the same
///
/// # Errors
/// As [`local_patch_interaction`].
pub fn local_block(xs: &Tensor, params: &LocalBlock, pass: &Pass) -> Result<Tensor> {
    match pass.engine {
        Engine::Reference => composed::local_block(&mut pass.clone(), xs, params),
        Engine::Cpu => cpu::grid_layers::local_block(xs, params, pass),
    }
}

/// A block in which the class token alone asks the others.
///
/// # Shapes
/// - `xs`: `(B, N, C)` f32, the class token first; returns the same
///
/// # Errors
/// `Error::Shape` when `xs` has another shape.
pub fn class_attention_block(xs: &Tensor, params: &ClassAttentionBlock, pass: &Pass) -> Result<Tensor> {
    composed::class_attention_block(&mut pass.clone(), xs, params)
}

/// The sizes of a patch embedding.
pub(super) struct Embedding {
    pub(super) batch: usize,
    /// Patches along height and width.
    pub(super) grid: [usize; 2],
    pub(super) channels: usize,
}

impl Embedding {
    /// Checks the images.
    pub(super) fn of(xs: &Tensor, params: &PatchEmbedding) -> Result<Self> {
        let geometry = params.projection.conv.geometry;
        let (patch, inputs) = (geometry.kernel, geometry.in_channels);
        match *xs.dims() {
            [batch, height, width, found]
                if found == inputs
                    && batch > 0
                    && height.min(width) > 0
                    && height.is_multiple_of(patch)
                    && width.is_multiple_of(patch) =>
            {
                Ok(Self { batch, grid: [height / patch, width / patch], channels: geometry.out_channels })
            }
            _ => {
                let expected = format!("(B, H, W, {inputs}) with H and W multiples of {patch} pixels");
                Err(shape_error("embed_patches", expected, xs))
            }
        }
    }
}

/// The sizes of queries, keys and values in one tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionSizes {
    pub(super) batch: usize,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    /// Channels of a head.
    pub(super) width: usize,
}

impl AttentionSizes {
    /// Checks the tensor; tokens may lie on a grid.
    pub(super) fn of(op: &'static str, qkv: &Tensor, heads: usize) -> Result<Self> {
        let expected = || format!("(B, N, C) with C a multiple of {}", 3 * heads);
        let (Some(&batch), Some(&channels)) = (qkv.dims().first(), qkv.dims().last()) else {
            return Err(shape_error(op, expected(), qkv));
        };
        if heads == 0 || channels == 0 || !channels.is_multiple_of(3 * heads) || qkv.rank() < 3 || qkv.elem_count() == 0
        {
            return Err(shape_error(op, expected(), qkv));
        }
        Ok(Self { batch, tokens: qkv.elem_count() / batch / channels, heads, width: channels / (3 * heads) })
    }
}

/// The sides of a grid of tokens of this width.
pub(super) fn check_grid(op: &'static str, xs: &Tensor, channels: usize) -> Result<[usize; 4]> {
    match *xs.dims() {
        [batch, height, width, found] if found == channels && xs.elem_count() > 0 => Ok([batch, height, width, found]),
        _ => Err(shape_error(op, format!("(B, H, W, {channels})"), xs)),
    }
}

fn check_width(op: &'static str, xs: &Tensor, channels: usize) -> Result<()> {
    if xs.dims().last() == Some(&channels) && xs.elem_count() > 0 {
        return Ok(());
    }
    Err(shape_error(op, format!("(.., {channels})"), xs))
}

fn check_tokens(op: &'static str, xs: &Tensor) -> Result<[usize; 3]> {
    match *xs.dims() {
        [batch, tokens, channels] if xs.elem_count() > 0 => Ok([batch, tokens, channels]),
        _ => Err(shape_error(op, "(B, N, C)", xs)),
    }
}
