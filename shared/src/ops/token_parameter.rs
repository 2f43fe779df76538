//! What the blocks of transformers own: see [`crate::ops::Parameter`].

use super::parameter::{BatchNorm, Conv2d, Linear, Parameter};

/// A norm over the last axis: each row of `C` numbers gets mean 0 and variance 1, then scale and shift.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// `[C]` scale.
    pub weight: Parameter,
    /// `[C]` shift.
    pub bias: Parameter,
    /// Added to the biased variance.
    pub eps: f64,
}

/// A convolution with bias.
#[derive(Debug, Clone)]
pub struct BiasedConv {
    /// Without its bias.
    pub conv: Conv2d,
    /// `[out]`.
    pub bias: Parameter,
}

/// How a table of learned positions is resampled for images of another size than it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PositionResampling {
    /// timm's: bicubic with antialiasing, between the two grids' borders.
    #[default]
    Timm,
    /// DINO's: bicubic without antialiasing, scaled by a tenth of a patch more than the ratio of the grids' sides.
    Dino,
}

/// The learned positions of a vision transformer.
#[derive(Debug, Clone)]
pub struct Positions {
    /// `[1, 1 + side * side, C]`: of the class token, then of a square grid of patches, row by row.
    pub table: Parameter,
    /// Patches along a side of the table's grid.
    pub side: usize,
    /// For other grids.
    pub resampling: PositionResampling,
}

/// From an image to the tokens of a vision transformer: one of each patch, a class token before them, positions added.
#[derive(Debug, Clone)]
pub struct PatchEmbedding {
    /// The kernel is a patch, the stride too.
    pub projection: BiasedConv,
    /// `[1, 1, C]`.
    pub class_token: Parameter,
    /// Added to all tokens.
    pub positions: Positions,
}

/// What mixes tokens in a [`AttentionBlock`].
#[derive(Debug, Clone)]
pub enum Attention {
    /// Between tokens, by this many heads of equally many channels.
    Tokens {
        /// It divides the channels.
        heads: usize,
    },
    /// Between the channels of each head.
    CrossCovariance {
        /// `[heads, 1, 1]`: multiplies the similarities of channels.
        temperature: Parameter,
    },
}

/// The sum of its input and a branch: layer norm, attention between queries, keys and values, a linear layer, a factor for each channel.
#[derive(Debug, Clone)]
pub struct AttentionBlock {
    /// First.
    pub norm: LayerNorm,
    /// From `C` to `3 C`: queries, keys, values, each head by head.
    pub qkv: Linear,
    /// Then.
    pub attention: Attention,
    /// From `C` to `C`.
    pub projection: Linear,
    /// `[C]` factors of the branch, if there are any.
    pub layer_scale: Option<Parameter>,
}

/// The sum of its input and a branch: layer norm, linear, GELU, linear, a factor for each channel.
#[derive(Debug, Clone)]
pub struct MlpBlock {
    /// First.
    pub norm: LayerNorm,
    /// Widening.
    pub hidden: Linear,
    /// Narrowing.
    pub output: Linear,
    /// `[C]` factors of the branch, if there are any.
    pub layer_scale: Option<Parameter>,
}

/// Two depthwise convolutions over a grid of tokens, with GELU and batch norm after the first.
#[derive(Debug, Clone)]
pub struct LocalPatchInteraction {
    /// First.
    pub conv1: BiasedConv,
    /// After the GELU that follows it.
    pub norm: BatchNorm,
    /// Last.
    pub conv2: BiasedConv,
}

/// The sum of its input and a branch: layer norm, convolutions over the grid, a factor for each channel.
#[derive(Debug, Clone)]
pub struct LocalBlock {
    /// First.
    pub norm: LayerNorm,
    /// Then.
    pub interaction: LocalPatchInteraction,
    /// `[C]` factors of the branch.
    pub layer_scale: Parameter,
}

/// A block in which the class token alone asks the others, and all tokens are normalised on the way.
#[derive(Debug, Clone)]
pub struct ClassAttentionBlock {
    /// Before attention.
    pub norm1: LayerNorm,
    /// Of the class token.
    pub query: Linear,
    /// Of all tokens.
    pub key: Linear,
    /// Of all tokens.
    pub value: Linear,
    /// After attention.
    pub projection: Linear,
    /// It divides the channels.
    pub heads: usize,
    /// `[C]` factors of the first branch.
    pub layer_scale1: Parameter,
    /// After the first sum; what comes out is also what the second branch is added to.
    pub norm2: LayerNorm,
    /// Widening the class token.
    pub hidden: Linear,
    /// Narrowing it.
    pub output: Linear,
    /// `[C]` factors of the second branch.
    pub layer_scale2: Parameter,
}
