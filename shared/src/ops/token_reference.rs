//! Every primitive block of transformers out of plain candle operations, as [`super::reference`] does for those of convolutional networks.

use candle_core::{D, Tensor};

use super::cpu::block::check_groups;
use super::parameter::{Activation, Linear, Parameter};
use super::reference::{activate, batch_norm, convolution, linear};
use super::token_blocks::{AttentionSizes, Embedding, check_grid};
use super::token_parameter::{BiasedConv, LayerNorm, LocalPatchInteraction, PatchEmbedding};
use super::{Mode, Pass, positions};
use crate::Result;

/// The smallest square that a row's squares sum up to, so that its root can be divided by.
const MIN_SQUARES: f64 = 1e-24;

/// See [`crate::ops::embed_patches`].
///
/// # Errors
/// A tensor operation that fails.
pub fn embed_patches(xs: &Tensor, params: &PatchEmbedding, pass: &Pass) -> Result<Tensor> {
    let Embedding { batch, grid: [height, width], channels } = Embedding::of(xs, params)?;
    let patches = biased(xs, &params.projection, pass)?.reshape((batch, height * width, channels))?;
    let class_token = params.class_token.value(pass.record).broadcast_as((batch, 1, channels))?;
    let positions = positions::resampled(&params.positions, [height, width], pass.record)?;
    Ok(Tensor::cat(&[&class_token, &patches], 1)?.broadcast_add(&positions)?)
}

/// What is added to nothing and to the patches: the class token with its position, and the positions of the patches.
///
/// # Shapes
/// - `xs`: `(B, H, W, 3)`; returns `(1 + N, C)`
///
/// # Errors
/// `Error::Shape` for images that cannot be cut into patches.
pub(super) fn first_tokens(xs: &Tensor, params: &PatchEmbedding, pass: &Pass) -> Result<Tensor> {
    let Embedding { grid: [height, width], channels, .. } = Embedding::of(xs, params)?;
    let positions = positions::resampled(&params.positions, [height, width], pass.record)?;
    let class_token = params.class_token.value(pass.record).reshape((1, channels))?;
    let first = (positions.narrow(0, 0, 1)? + class_token)?;
    Ok(Tensor::cat(&[&first, &positions.narrow(0, 1, height * width)?], 0)?)
}

/// See [`crate::ops::add_fourier_positions`].
///
/// # Errors
/// A tensor operation that fails.
pub fn add_fourier_positions(xs: &Tensor, params: &Linear, pass: &Pass) -> Result<Tensor> {
    Ok(xs.broadcast_add(&fourier_positions(xs, params, pass)?)?)
}

/// What [`add_fourier_positions`] adds.
///
/// # Shapes
/// - `xs`: `(B, H, W, C)`; returns `(H, W, C)`
///
/// # Errors
/// A tensor operation that fails.
pub(super) fn fourier_positions(xs: &Tensor, params: &Linear, pass: &Pass) -> Result<Tensor> {
    let (_, height, width, channels) = xs.dims4()?;
    let waves = positions::fourier([height, width], xs.dtype(), xs.device())?;
    Ok(linear(&waves, params, Activation::Identity, pass)?.reshape((height, width, channels))?)
}

/// See [`crate::ops::layer_norm`].
///
/// # Errors
/// A tensor operation that fails.
pub fn layer_norm(xs: &Tensor, params: &LayerNorm, pass: &Pass) -> Result<Tensor> {
    let centred = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + params.eps)?.sqrt()?;
    let normalised = centred.broadcast_div(&deviation)?;
    let (weight, bias) = (params.weight.value(pass.record), params.bias.value(pass.record));
    Ok(normalised.broadcast_mul(&weight)?.broadcast_add(&bias)?)
}

/// Rows of positive numbers that add up to 1.
fn softmax(xs: &Tensor) -> Result<Tensor> {
    let weights = xs.broadcast_sub(&xs.detach().max_keepdim(D::Minus1)?)?.exp()?;
    Ok(weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?)
}

/// See [`crate::ops::attention`].
///
/// # Errors
/// A tensor operation that fails.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let AttentionSizes { batch, tokens, width, .. } = AttentionSizes::of("attention", qkv, heads)?;
    // (3, B, heads, N, width)
    let parts = qkv.reshape((batch, tokens, 3, heads, width))?.permute((2, 0, 3, 1, 4))?;
    let [queries, keys, values] = [0, 1, 2].map(|part| parts.get(part).and_then(|part| part.contiguous()));
    let similarities = (queries?.matmul(&keys?.t()?.contiguous()?)? * (1.0 / (width as f64).sqrt()))?;
    let mixed = softmax(&similarities)?.matmul(&values?)?; // (B, heads, N, width)
    Ok(mixed.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, heads * width))?)
}

/// See [`crate::ops::cross_covariance_attention`].
///
/// # Errors
/// A tensor operation that fails.
pub fn cross_covariance_attention(qkv: &Tensor, temperature: &Parameter, pass: &Pass) -> Result<Tensor> {
    let heads = temperature.var().elem_count();
    let AttentionSizes { batch, tokens, width, .. } = AttentionSizes::of("cross_covariance_attention", qkv, heads)?;
    // (3, B, heads, width, N)
    let parts = qkv.reshape((batch, tokens, 3, heads, width))?.permute((2, 0, 3, 4, 1))?;
    let [queries, keys, values] = [0, 1, 2].map(|part| parts.get(part).and_then(|part| part.contiguous()));
    let similarities = unit(&queries?)?.matmul(&unit(&keys?)?.t()?.contiguous()?)?; // (B, heads, width, width)
    let similarities = similarities.broadcast_mul(&temperature.value(pass.record))?;
    let mixed = softmax(&similarities)?.matmul(&values?)?; // (B, heads, width, N)
    let shape: Vec<usize> = [&qkv.dims()[..qkv.rank() - 1], &[heads * width]].concat();
    Ok(mixed.permute((0, 3, 1, 2))?.contiguous()?.reshape(shape)?)
}

/// Rows of unit length; NaN stays NaN.
fn unit(xs: &Tensor) -> Result<Tensor> {
    let squares = xs.sqr()?.sum_keepdim(D::Minus1)?;
    let least = (squares.zeros_like()? + MIN_SQUARES)?;
    let squares = squares.le(MIN_SQUARES)?.where_cond(&least, &squares)?;
    Ok(xs.broadcast_div(&squares.sqrt()?)?)
}

/// See [`crate::ops::class_attention`].
///
/// # Errors
/// A tensor operation that fails.
pub fn class_attention(query: &Tensor, keys: &Tensor, values: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, channels) = keys.dims3()?;
    let width = channels / heads;
    let by_head = |xs: &Tensor, tokens: usize| xs.reshape((batch, tokens, heads, width))?.transpose(1, 2)?.contiguous();
    let (query, keys, values) = (by_head(query, 1)?, by_head(keys, tokens)?, by_head(values, tokens)?);
    let similarities = (query.matmul(&keys.t()?.contiguous()?)? * (1.0 / (width as f64).sqrt()))?; // (B, heads, 1, N)
    let mixed = softmax(&similarities)?.matmul(&values)?; // (B, heads, 1, width)
    Ok(mixed.reshape((batch, channels))?)
}

fn biased(xs: &Tensor, params: &BiasedConv, pass: &Pass) -> Result<Tensor> {
    Ok(convolution(xs, &params.conv, pass)?.broadcast_add(&params.bias.value(pass.record))?)
}

/// See [`crate::ops::local_patch_interaction`].
///
/// # Errors
/// A tensor operation that fails.
pub fn local_patch_interaction(xs: &Tensor, params: &LocalPatchInteraction, pass: &Pass) -> Result<Tensor> {
    let [batch, height, width, _] = check_grid("local_patch_interaction", xs, params.norm.weight.var().elem_count())?;
    if let Mode::Train { bn_groups } = pass.mode {
        check_groups(batch, bn_groups, batch * height * width)?;
    }
    let xs = activate(&biased(xs, &params.conv1, pass)?, Activation::Gelu)?;
    biased(&batch_norm(&xs, &params.norm, pass)?, &params.conv2, pass)
}

/// See [`crate::ops::prepend_token`].
///
/// # Errors
/// A tensor operation that fails.
pub fn prepend_token(xs: &Tensor, token: &Parameter, pass: &Pass) -> Result<Tensor> {
    let (batch, channels) = (xs.dim(0)?, xs.dim(D::Minus1)?);
    let tokens = xs.reshape((batch, (), channels))?;
    let token = token.value(pass.record).broadcast_as((batch, 1, channels))?;
    Ok(Tensor::cat(&[&token, &tokens], 1)?)
}

/// See [`crate::ops::first_token`].
///
/// # Errors
/// A tensor operation that fails.
pub fn first_token(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.narrow(1, 0, 1)?.squeeze(1)?)
}

/// See [`crate::ops::replace_first_token`].
///
/// # Errors
/// A tensor operation that fails.
pub fn replace_first_token(xs: &Tensor, token: &Tensor) -> Result<Tensor> {
    Ok(Tensor::cat(&[&token.unsqueeze(1)?, &xs.narrow(1, 1, xs.dim(1)? - 1)?], 1)?)
}

/// See [`crate::ops::add_branch`].
///
/// # Errors
/// A tensor operation that fails.
pub fn add_branch(xs: &Tensor, branch: &Tensor, scale: Option<&Parameter>, pass: &Pass) -> Result<Tensor> {
    match scale {
        Some(scale) => Ok((xs + branch.broadcast_mul(&scale.value(pass.record))?)?),
        None => Ok((xs + branch)?),
    }
}
