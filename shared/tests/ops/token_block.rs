//! The blocks of transformers, as `block` has those of convolutional networks. Nothing in them has a kink.

use candle_core::Tensor;
use shared::Error;
use shared::ops::{
    self, Activation, Attention, AttentionBlock, Builder, ClassAttentionBlock, Geometry, Init, LayerNorm, Linear,
    LocalBlock, LocalPatchInteraction, MlpBlock, Padding, Parameter, Pass, PatchEmbedding, PositionResampling,
    Positions, WeightLayout,
};

/// A block to be made; tokens have `channels` numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TokenSpec {
    EmbedPatches { patch: usize, side: usize, resampling: PositionResampling, channels: usize },
    FourierPositions { channels: usize },
    LayerNorm { channels: usize },
    Linear { channels: usize, outputs: usize, act: Activation },
    Attention { heads: usize, width: usize },
    CrossCovariance { heads: usize, width: usize },
    LocalPatchInteraction { channels: usize },
    AttentionBlock { heads: usize, channels: usize, cross_covariance: bool, scaled: bool },
    MlpBlock { channels: usize, hidden: usize, scaled: bool },
    LocalBlock { channels: usize },
    ClassAttentionBlock { heads: usize, channels: usize },
    PrependToken { channels: usize },
}

/// A block with its parameters.
#[derive(Debug)]
pub(crate) enum TokenBlock {
    EmbedPatches(PatchEmbedding),
    FourierPositions(Linear),
    LayerNorm(LayerNorm),
    Linear(Linear, Activation),
    Attention(usize),
    CrossCovariance(Parameter),
    LocalPatchInteraction(LocalPatchInteraction),
    AttentionBlock(AttentionBlock),
    MlpBlock(MlpBlock),
    LocalBlock(LocalBlock),
    ClassAttentionBlock(ClassAttentionBlock),
    PrependToken(Parameter),
}

impl TokenSpec {
    /// The shape of the input: an image, a grid of tokens or a row of as many.
    pub(crate) fn input_shape(&self, [batch, height, width]: [usize; 3]) -> Vec<usize> {
        let row = |channels: usize| vec![batch, height * width, channels];
        let grid = |channels: usize| vec![batch, height, width, channels];
        match *self {
            Self::EmbedPatches { patch, .. } => vec![batch, height * patch, width * patch, 3],
            Self::Attention { heads, width } => row(3 * heads * width),
            Self::CrossCovariance { heads, width } => grid(3 * heads * width),
            Self::AttentionBlock { channels, cross_covariance: true, .. }
            | Self::FourierPositions { channels }
            | Self::LocalPatchInteraction { channels }
            | Self::LocalBlock { channels }
            | Self::PrependToken { channels } => grid(channels),
            Self::LayerNorm { channels }
            | Self::Linear { channels, .. }
            | Self::AttentionBlock { channels, .. }
            | Self::MlpBlock { channels, .. }
            | Self::ClassAttentionBlock { channels, .. } => row(channels),
        }
    }

    pub(crate) fn declare(&self, builder: &mut Builder) -> Result<TokenBlock, Error> {
        let mut plain = |name: &str, shape: &[usize]| {
            builder.add(name.into(), shape, WeightLayout::Plain, Init::Constant(1.0), true)
        };
        Ok(match *self {
            Self::EmbedPatches { patch, side, resampling, channels } => {
                let class_token = plain("class", &[1, 1, channels])?;
                let table = plain("table", &[1, 1 + side * side, channels])?;
                let geometry = Geometry::same(3, channels, patch, patch).with_padding(Padding::Symmetric(0));
                TokenBlock::EmbedPatches(PatchEmbedding {
                    projection: builder.biased_conv("conv", geometry)?,
                    class_token,
                    positions: Positions { table, side, resampling },
                })
            }
            Self::FourierPositions { channels } => {
                TokenBlock::FourierPositions(builder.linear("fc", ops::FOURIER_CHANNELS, channels)?)
            }
            Self::LayerNorm { channels } => TokenBlock::LayerNorm(builder.layer_norm("norm", channels)?),
            Self::Linear { channels, outputs, act } => {
                TokenBlock::Linear(builder.token_linear("fc", channels, outputs)?, act)
            }
            Self::Attention { heads, .. } => TokenBlock::Attention(heads),
            Self::CrossCovariance { heads, .. } => TokenBlock::CrossCovariance(plain("temperature", &[heads, 1, 1])?),
            Self::LocalPatchInteraction { channels } => {
                TokenBlock::LocalPatchInteraction(interaction(builder, channels)?)
            }
            Self::AttentionBlock { heads, channels, cross_covariance, scaled } => {
                let attention = if cross_covariance {
                    Attention::CrossCovariance { temperature: plain("temperature", &[heads, 1, 1])? }
                } else {
                    Attention::Tokens { heads }
                };
                let layer_scale = scaled.then(|| plain("gamma", &[channels])).transpose()?;
                TokenBlock::AttentionBlock(AttentionBlock {
                    norm: builder.layer_norm("norm", channels)?,
                    qkv: builder.token_linear("qkv", channels, 3 * channels)?,
                    attention,
                    projection: builder.token_linear("projection", channels, channels)?,
                    layer_scale,
                })
            }
            Self::MlpBlock { channels, hidden, scaled } => {
                let layer_scale = scaled.then(|| plain("gamma", &[channels])).transpose()?;
                TokenBlock::MlpBlock(MlpBlock {
                    norm: builder.layer_norm("norm", channels)?,
                    hidden: builder.token_linear("hidden", channels, hidden)?,
                    output: builder.token_linear("output", hidden, channels)?,
                    layer_scale,
                })
            }
            Self::LocalBlock { channels } => {
                let layer_scale = plain("gamma", &[channels])?;
                TokenBlock::LocalBlock(LocalBlock {
                    norm: builder.layer_norm("norm", channels)?,
                    interaction: interaction(builder, channels)?,
                    layer_scale,
                })
            }
            Self::ClassAttentionBlock { heads, channels } => {
                let [layer_scale1, layer_scale2] = ["gamma1", "gamma2"].map(|name| plain(name, &[channels]));
                let mut square = |name: &str| builder.token_linear(name, channels, channels);
                let [query, key, value, projection] = ["query", "key", "value", "projection"].map(&mut square);
                TokenBlock::ClassAttentionBlock(ClassAttentionBlock {
                    query: query?,
                    key: key?,
                    value: value?,
                    projection: projection?,
                    norm1: builder.layer_norm("norm1", channels)?,
                    heads,
                    layer_scale1: layer_scale1?,
                    norm2: builder.layer_norm("norm2", channels)?,
                    hidden: builder.token_linear("hidden", channels, 2 * channels)?,
                    output: builder.token_linear("output", 2 * channels, channels)?,
                    layer_scale2: layer_scale2?,
                })
            }
            Self::PrependToken { channels } => TokenBlock::PrependToken(plain("token", &[1, 1, channels])?),
        })
    }
}

fn interaction(builder: &mut Builder, channels: usize) -> Result<LocalPatchInteraction, Error> {
    Ok(LocalPatchInteraction {
        conv1: builder.biased_conv("conv1", Geometry::depthwise(channels, 3, 1))?,
        norm: builder.batch_norm("bn", channels)?,
        conv2: builder.biased_conv("conv2", Geometry::depthwise(channels, 3, 1))?,
    })
}

impl TokenBlock {
    pub(crate) fn forward(&self, xs: &Tensor, pass: &Pass) -> Result<Tensor, Error> {
        match self {
            Self::EmbedPatches(params) => ops::embed_patches(xs, params, pass),
            Self::FourierPositions(params) => ops::add_fourier_positions(xs, params, pass),
            Self::LayerNorm(params) => ops::layer_norm(xs, params, pass),
            Self::Linear(params, act) => ops::linear(xs, params, *act, pass),
            Self::Attention(heads) => ops::attention(xs, *heads, pass),
            Self::CrossCovariance(temperature) => ops::cross_covariance_attention(xs, temperature, pass),
            Self::LocalPatchInteraction(params) => ops::local_patch_interaction(xs, params, pass),
            Self::AttentionBlock(params) => ops::attention_block(xs, params, pass),
            Self::MlpBlock(params) => ops::mlp_block(xs, params, pass),
            Self::LocalBlock(params) => ops::local_block(xs, params, pass),
            Self::ClassAttentionBlock(params) => ops::class_attention_block(xs, params, pass),
            Self::PrependToken(token) => ops::prepend_token(xs, token, pass),
        }
    }
}

/// Every block at odd numbers of channels: less than a vector, and more than one with something left.
pub(crate) fn all() -> Vec<TokenSpec> {
    let mut specs = Vec::new();
    for (channels, heads) in [(6, 2), (51, 3), (64, 1)] {
        let width = channels / heads;
        specs.extend([
            TokenSpec::EmbedPatches { patch: 4, side: 3, resampling: PositionResampling::Timm, channels },
            TokenSpec::EmbedPatches { patch: 5, side: 4, resampling: PositionResampling::Dino, channels },
            TokenSpec::FourierPositions { channels },
            TokenSpec::LayerNorm { channels },
            TokenSpec::Linear { channels, outputs: 2 * channels + 1, act: Activation::Gelu },
            TokenSpec::Linear { channels, outputs: 7, act: Activation::Identity },
            TokenSpec::Attention { heads, width },
            TokenSpec::CrossCovariance { heads, width },
            TokenSpec::LocalPatchInteraction { channels },
            TokenSpec::AttentionBlock { heads, channels, cross_covariance: false, scaled: false },
            TokenSpec::AttentionBlock { heads, channels, cross_covariance: true, scaled: true },
            TokenSpec::MlpBlock { channels, hidden: 3 * channels, scaled: false },
            TokenSpec::MlpBlock { channels, hidden: channels + 2, scaled: true },
            TokenSpec::LocalBlock { channels },
            TokenSpec::ClassAttentionBlock { heads, channels },
            TokenSpec::PrependToken { channels },
        ]);
    }
    specs
}
