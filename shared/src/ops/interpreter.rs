//! What a network's definition is run by: one definition computes, counts its cost, or becomes a graph for other programs.
//!
//! The networks of [`crate::models`] are written once, generic over an [`Interpreter`]. [`Pass`] computes tensors. Others follow the same
//! calls and see the blocks' parameters, but compute nothing.

use candle_core::Tensor;

use super::parameter::{
    Activation, BasicBlock, BatchNorm, Bottleneck, ConvBn, HiddenLayer, Linear, MbConv, Parameter, ProjectionHead,
    SqueezeExcite, Stem,
};
use super::token_parameter::{
    Attention, AttentionBlock, ClassAttentionBlock, LayerNorm, LocalBlock, LocalPatchInteraction, MlpBlock,
    PatchEmbedding,
};
use super::{Pass, blocks, token_blocks};
use crate::Result;

/// Runs the blocks that networks are made of.
///
/// The blocks without an implementation here are primitive. The others are composed of these, for interpreters that gain nothing from
/// seeing them whole.
pub trait Interpreter {
    /// What passes from block to block: for [`Pass`] images or grids of tokens `(B, H, W, C)`, tokens `(B, N, C)` or rows `(B, F)`.
    type Value: Clone;

    /// Convolution, batch norm, the sum with `residual` if there is one, activation: [`crate::ops::conv_bn`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn conv_bn(
        &mut self,
        xs: &Self::Value,
        params: &ConvBn,
        residual: Option<&Self::Value>,
        act: Activation,
    ) -> Result<Self::Value>;

    /// 3x3 max pool of stride 2 with padding 1: [`crate::ops::max_pool`].
    ///
    /// # Errors
    /// As [`crate::ops::max_pool`].
    fn max_pool(&mut self, xs: &Self::Value) -> Result<Self::Value>;

    /// The mean over all pixels: [`crate::ops::global_average_pool`].
    ///
    /// # Errors
    /// As [`crate::ops::global_average_pool`].
    fn global_average_pool(&mut self, xs: &Self::Value) -> Result<Self::Value>;

    /// An affine map of rows, which may be tokens: [`crate::ops::linear`].
    ///
    /// # Errors
    /// As [`crate::ops::linear`].
    fn linear(&mut self, xs: &Self::Value, params: &Linear, act: Activation) -> Result<Self::Value>;

    /// Batch norm of rows, activation: [`crate::ops::batch_norm_rows`].
    ///
    /// # Errors
    /// As [`crate::ops::batch_norm_rows`].
    fn batch_norm_rows(&mut self, xs: &Self::Value, params: &BatchNorm, act: Activation) -> Result<Self::Value>;

    /// Each channel times a factor computed from the means of all: see [`SqueezeExcite`].
    ///
    /// # Errors
    /// `Error::Shape` for an image of other channels.
    fn squeeze_excite(&mut self, xs: &Self::Value, params: &SqueezeExcite) -> Result<Self::Value>;

    /// From an image to tokens with positions, a class token first: [`crate::ops::embed_patches`].
    ///
    /// # Errors
    /// As [`crate::ops::embed_patches`].
    fn embed_patches(&mut self, xs: &Self::Value, params: &PatchEmbedding) -> Result<Self::Value>;

    /// Adds positions to a grid of tokens: [`crate::ops::add_fourier_positions`].
    ///
    /// # Errors
    /// As [`crate::ops::add_fourier_positions`].
    fn add_fourier_positions(&mut self, xs: &Self::Value, params: &Linear) -> Result<Self::Value>;

    /// A norm of each token: [`crate::ops::layer_norm`].
    ///
    /// # Errors
    /// As [`crate::ops::layer_norm`].
    fn layer_norm(&mut self, xs: &Self::Value, params: &LayerNorm) -> Result<Self::Value>;

    /// Attention between tokens: [`crate::ops::attention`].
    ///
    /// # Errors
    /// As [`crate::ops::attention`].
    fn attention(&mut self, qkv: &Self::Value, heads: usize) -> Result<Self::Value>;

    /// Attention between channels: [`crate::ops::cross_covariance_attention`].
    ///
    /// # Errors
    /// As [`crate::ops::cross_covariance_attention`].
    fn cross_covariance_attention(&mut self, qkv: &Self::Value, temperature: &Parameter) -> Result<Self::Value>;

    /// Attention of one row for each image: [`crate::ops::class_attention`].
    ///
    /// # Errors
    /// As [`crate::ops::class_attention`].
    fn class_attention(
        &mut self,
        query: &Self::Value,
        keys: &Self::Value,
        values: &Self::Value,
        heads: usize,
    ) -> Result<Self::Value>;

    /// Convolutions over a grid of tokens: [`crate::ops::local_patch_interaction`].
    ///
    /// # Errors
    /// As [`crate::ops::local_patch_interaction`].
    fn local_patch_interaction(&mut self, xs: &Self::Value, params: &LocalPatchInteraction) -> Result<Self::Value>;

    /// From a grid of tokens to a row of them with another one first: [`crate::ops::prepend_token`].
    ///
    /// # Errors
    /// As [`crate::ops::prepend_token`].
    fn prepend_token(&mut self, xs: &Self::Value, token: &Parameter) -> Result<Self::Value>;

    /// From tokens to rows: [`crate::ops::first_token`].
    ///
    /// # Errors
    /// As [`crate::ops::first_token`].
    fn first_token(&mut self, xs: &Self::Value) -> Result<Self::Value>;

    /// Tokens with a row in the place of the first: [`crate::ops::replace_first_token`].
    ///
    /// # Errors
    /// As [`crate::ops::replace_first_token`].
    fn replace_first_token(&mut self, xs: &Self::Value, token: &Self::Value) -> Result<Self::Value>;

    /// A sum, with factors for the channels of the second summand: [`crate::ops::add_branch`].
    ///
    /// # Errors
    /// As [`crate::ops::add_branch`].
    fn add_branch(&mut self, xs: &Self::Value, branch: &Self::Value, scale: Option<&Parameter>) -> Result<Self::Value>;

    /// Attention around a shortcut: see [`AttentionBlock`].
    ///
    /// # Errors
    /// As [`crate::ops::attention`].
    fn attention_block(&mut self, xs: &Self::Value, params: &AttentionBlock) -> Result<Self::Value> {
        composed::attention_block(self, xs, params)
    }

    /// Two linear layers around a shortcut: see [`MlpBlock`].
    ///
    /// # Errors
    /// As [`crate::ops::layer_norm`].
    fn mlp_block(&mut self, xs: &Self::Value, params: &MlpBlock) -> Result<Self::Value> {
        composed::mlp_block(self, xs, params)
    }

    /// Convolutions over a grid of tokens around a shortcut: see [`LocalBlock`].
    ///
    /// # Errors
    /// As [`crate::ops::local_patch_interaction`].
    fn local_block(&mut self, xs: &Self::Value, params: &LocalBlock) -> Result<Self::Value> {
        composed::local_block(self, xs, params)
    }

    /// Attention of the class token around a shortcut: see [`ClassAttentionBlock`].
    ///
    /// # Errors
    /// As [`crate::ops::class_attention`].
    fn class_attention_block(&mut self, xs: &Self::Value, params: &ClassAttentionBlock) -> Result<Self::Value> {
        composed::class_attention_block(self, xs, params)
    }

    /// The first layers of a residual network: [`crate::ops::stem`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn stem(&mut self, xs: &Self::Value, params: &Stem) -> Result<Self::Value> {
        let xs = self.conv_bn(xs, &params.conv, None, Activation::Relu)?;
        self.max_pool(&xs)
    }

    /// Two 3x3 convolutions around a shortcut: [`crate::ops::basic_block`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn basic_block(&mut self, xs: &Self::Value, params: &BasicBlock) -> Result<Self::Value> {
        composed::basic_block(self, xs, params)
    }

    /// 1x1, 3x3 and 1x1 convolutions around a shortcut: [`crate::ops::bottleneck`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn bottleneck(&mut self, xs: &Self::Value, params: &Bottleneck) -> Result<Self::Value> {
        composed::bottleneck(self, xs, params)
    }

    /// The inverted residual block: [`crate::ops::mb_conv`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn mb_conv(&mut self, xs: &Self::Value, params: &MbConv) -> Result<Self::Value> {
        composed::mb_conv(self, xs, params)
    }

    /// The projection head: [`crate::ops::projection_head`].
    ///
    /// # Errors
    /// As [`crate::ops::projection_head`].
    fn projection_head(&mut self, xs: &Self::Value, params: &ProjectionHead) -> Result<Self::Value> {
        composed::projection_head(self, xs, params)
    }
}

/// Blocks out of primitive ones: what the whole blocks mean.
pub(super) mod composed {
    use super::{
        Activation, Attention, AttentionBlock, BasicBlock, Bottleneck, ClassAttentionBlock, ConvBn, HiddenLayer,
        Interpreter, LocalBlock, MbConv, MlpBlock, ProjectionHead, Result,
    };

    pub(in crate::ops) fn basic_block<I>(run: &mut I, xs: &I::Value, params: &BasicBlock) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let shortcut = shortcut(run, xs, params.downsample.as_ref())?;
        let xs = run.conv_bn(xs, &params.conv1, None, Activation::Relu)?;
        run.conv_bn(&xs, &params.conv2, Some(&shortcut), Activation::Relu)
    }

    pub(in crate::ops) fn bottleneck<I>(run: &mut I, xs: &I::Value, params: &Bottleneck) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let shortcut = shortcut(run, xs, params.downsample.as_ref())?;
        let xs = run.conv_bn(xs, &params.conv1, None, Activation::Relu)?;
        let xs = run.conv_bn(&xs, &params.conv2, None, Activation::Relu)?;
        run.conv_bn(&xs, &params.conv3, Some(&shortcut), Activation::Relu)
    }

    pub(in crate::ops) fn mb_conv<I>(run: &mut I, xs: &I::Value, params: &MbConv) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let mut inner = xs.clone();
        if let Some(expand) = &params.expand {
            inner = run.conv_bn(&inner, expand, None, params.act)?;
        }
        inner = run.conv_bn(&inner, &params.depthwise, None, params.act)?;
        if let Some(squeeze_excite) = &params.squeeze_excite {
            inner = run.squeeze_excite(&inner, squeeze_excite)?;
        }
        run.conv_bn(&inner, &params.project, params.residual.then_some(xs), Activation::Identity)
    }

    pub(in crate::ops) fn attention_block<I>(run: &mut I, xs: &I::Value, params: &AttentionBlock) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let branch = run.layer_norm(xs, &params.norm)?;
        let qkv = run.linear(&branch, &params.qkv, Activation::Identity)?;
        let branch = match &params.attention {
            Attention::Tokens { heads } => run.attention(&qkv, *heads)?,
            Attention::CrossCovariance { temperature } => run.cross_covariance_attention(&qkv, temperature)?,
        };
        let branch = run.linear(&branch, &params.projection, Activation::Identity)?;
        run.add_branch(xs, &branch, params.layer_scale.as_ref())
    }

    pub(in crate::ops) fn mlp_block<I>(run: &mut I, xs: &I::Value, params: &MlpBlock) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let branch = run.layer_norm(xs, &params.norm)?;
        let branch = run.linear(&branch, &params.hidden, Activation::Gelu)?;
        let branch = run.linear(&branch, &params.output, Activation::Identity)?;
        run.add_branch(xs, &branch, params.layer_scale.as_ref())
    }

    pub(in crate::ops) fn local_block<I>(run: &mut I, xs: &I::Value, params: &LocalBlock) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let branch = run.layer_norm(xs, &params.norm)?;
        let branch = run.local_patch_interaction(&branch, &params.interaction)?;
        run.add_branch(xs, &branch, Some(&params.layer_scale))
    }

    pub(in crate::ops) fn class_attention_block<I>(
        run: &mut I,
        xs: &I::Value,
        params: &ClassAttentionBlock,
    ) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let normed = run.layer_norm(xs, &params.norm1)?;
        let query = run.first_token(&normed)?;
        let query = run.linear(&query, &params.query, Activation::Identity)?;
        let keys = run.linear(&normed, &params.key, Activation::Identity)?;
        let values = run.linear(&normed, &params.value, Activation::Identity)?;
        let attended = run.class_attention(&query, &keys, &values, params.heads)?;
        let attended = run.linear(&attended, &params.projection, Activation::Identity)?;
        // The other tokens' branch is their normalised value.
        let branch = run.replace_first_token(&normed, &attended)?;
        let xs = run.add_branch(xs, &branch, Some(&params.layer_scale1))?;
        let xs = run.layer_norm(&xs, &params.norm2)?;
        let class = run.first_token(&xs)?;
        let branch = run.linear(&class, &params.hidden, Activation::Gelu)?;
        let branch = run.linear(&branch, &params.output, Activation::Identity)?;
        let class = run.add_branch(&class, &branch, Some(&params.layer_scale2))?;
        // The other tokens are added to themselves.
        let doubled = run.add_branch(&xs, &xs, None)?;
        run.replace_first_token(&doubled, &class)
    }

    pub(in crate::ops) fn projection_head<I>(run: &mut I, xs: &I::Value, params: &ProjectionHead) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let xs = match &params.hidden {
            None => xs.clone(),
            Some(HiddenLayer { linear, norm: None }) => run.linear(xs, linear, Activation::Relu)?,
            Some(HiddenLayer { linear, norm: Some(norm) }) => {
                let xs = run.linear(xs, linear, Activation::Identity)?;
                run.batch_norm_rows(&xs, norm, Activation::Relu)?
            }
        };
        run.linear(&xs, &params.output, Activation::Identity)
    }

    fn shortcut<I>(run: &mut I, xs: &I::Value, downsample: Option<&ConvBn>) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        match downsample {
            Some(params) => run.conv_bn(xs, params, None, Activation::Identity),
            None => Ok(xs.clone()),
        }
    }
}

/// Computes, each block by the pass's engine.
impl Interpreter for Pass {
    type Value = Tensor;

    fn conv_bn(&mut self, xs: &Tensor, params: &ConvBn, residual: Option<&Tensor>, act: Activation) -> Result<Tensor> {
        blocks::conv_bn(xs, params, residual, act, self)
    }

    fn max_pool(&mut self, xs: &Tensor) -> Result<Tensor> {
        blocks::max_pool(xs, self)
    }

    fn global_average_pool(&mut self, xs: &Tensor) -> Result<Tensor> {
        blocks::global_average_pool(xs, self)
    }

    fn linear(&mut self, xs: &Tensor, params: &Linear, act: Activation) -> Result<Tensor> {
        blocks::linear(xs, params, act, self)
    }

    fn batch_norm_rows(&mut self, xs: &Tensor, params: &BatchNorm, act: Activation) -> Result<Tensor> {
        blocks::batch_norm_rows(xs, params, act, self)
    }

    /// By itself, outside [`Interpreter::mb_conv`], it has no fused form.
    fn squeeze_excite(&mut self, xs: &Tensor, params: &SqueezeExcite) -> Result<Tensor> {
        super::reference::squeeze_excite(xs, params, self)
    }

    fn embed_patches(&mut self, xs: &Tensor, params: &PatchEmbedding) -> Result<Tensor> {
        token_blocks::embed_patches(xs, params, self)
    }

    fn add_fourier_positions(&mut self, xs: &Tensor, params: &Linear) -> Result<Tensor> {
        token_blocks::add_fourier_positions(xs, params, self)
    }

    fn layer_norm(&mut self, xs: &Tensor, params: &LayerNorm) -> Result<Tensor> {
        token_blocks::layer_norm(xs, params, self)
    }

    fn attention(&mut self, qkv: &Tensor, heads: usize) -> Result<Tensor> {
        token_blocks::attention(qkv, heads, self)
    }

    fn cross_covariance_attention(&mut self, qkv: &Tensor, temperature: &Parameter) -> Result<Tensor> {
        token_blocks::cross_covariance_attention(qkv, temperature, self)
    }

    fn class_attention(&mut self, query: &Tensor, keys: &Tensor, values: &Tensor, heads: usize) -> Result<Tensor> {
        token_blocks::class_attention(query, keys, values, heads)
    }

    fn local_patch_interaction(&mut self, xs: &Tensor, params: &LocalPatchInteraction) -> Result<Tensor> {
        token_blocks::local_patch_interaction(xs, params, self)
    }

    fn prepend_token(&mut self, xs: &Tensor, token: &Parameter) -> Result<Tensor> {
        token_blocks::prepend_token(xs, token, self)
    }

    fn first_token(&mut self, xs: &Tensor) -> Result<Tensor> {
        token_blocks::first_token(xs)
    }

    fn replace_first_token(&mut self, xs: &Tensor, token: &Tensor) -> Result<Tensor> {
        token_blocks::replace_first_token(xs, token)
    }

    fn add_branch(&mut self, xs: &Tensor, branch: &Tensor, scale: Option<&Parameter>) -> Result<Tensor> {
        token_blocks::add_branch(xs, branch, scale, self)
    }

    fn attention_block(&mut self, xs: &Tensor, params: &AttentionBlock) -> Result<Tensor> {
        token_blocks::attention_block(xs, params, self)
    }

    fn mlp_block(&mut self, xs: &Tensor, params: &MlpBlock) -> Result<Tensor> {
        token_blocks::mlp_block(xs, params, self)
    }

    fn local_block(&mut self, xs: &Tensor, params: &LocalBlock) -> Result<Tensor> {
        token_blocks::local_block(xs, params, self)
    }

    fn basic_block(&mut self, xs: &Tensor, params: &BasicBlock) -> Result<Tensor> {
        blocks::basic_block(xs, params, self)
    }

    fn bottleneck(&mut self, xs: &Tensor, params: &Bottleneck) -> Result<Tensor> {
        blocks::bottleneck(xs, params, self)
    }

    fn mb_conv(&mut self, xs: &Tensor, params: &MbConv) -> Result<Tensor> {
        blocks::mb_conv(xs, params, self)
    }
}
