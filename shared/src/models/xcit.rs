//! Cross-covariance image transformers: convolutions down to patches, blocks of attention between channels, convolutions between
//! neighbouring patches and two linear layers; then a class token that asks all patches twice. The features are the class token's.
//!
//! Source: El-Nouby et al., `XCiT`, arXiv 2106.09681, table 1, in timm's form (`xcit.py`, version 1.0.31). Names, shapes and initial values
//! of all tensors are timm's.
//!
//! Neither dropout nor stochastic depth, as timm by default.

use crate::Result;
use crate::ops::{
    Activation, Attention, AttentionBlock, Builder, ClassAttentionBlock, ConvBn, FOURIER_CHANNELS, Geometry, Init,
    Interpreter, LayerNorm, Linear, LocalBlock, LocalPatchInteraction, MlpBlock, Parameter, TOKEN_STD, WeightLayout,
};

const DEPTH: usize = 12;
const CLASS_DEPTH: usize = 2;
/// Channels between the two linear layers of a block over channels outside.
const EXPANSION: usize = 4;
const HEAD_CHANNELS: usize = 48;
/// Convolutions of stride 2 that make patches of 16 x 16 pixels.
const PATCH_CONVOLUTIONS: usize = 4;

/// The backbone, without a classifier.
#[derive(Debug, Clone)]
pub(super) struct Xcit {
    patches: Vec<ConvBn>,
    positions: Linear,
    blocks: Vec<Block>,
    class_token: Parameter,
    class_blocks: Vec<ClassAttentionBlock>,
    norm: LayerNorm,
}

#[derive(Debug, Clone)]
struct Block {
    attention: AttentionBlock,
    local: LocalBlock,
    mlp: MlpBlock,
}

impl Xcit {
    /// A network with this many channels.
    pub(super) fn new(builder: &mut Builder, channels: usize) -> Result<Self> {
        let patches = (0..PATCH_CONVOLUTIONS).map(|index| patch_convolution(builder, index, channels));
        let patches = patches.collect::<Result<_>>()?;
        let positions = positions(builder, channels)?;
        let blocks = (0..DEPTH).map(|index| block(builder, &format!("blocks.{index}"), channels));
        let blocks = blocks.collect::<Result<_>>()?;
        let init = Init::Normal { std: TOKEN_STD };
        let class_token = builder.add("cls_token".into(), &[1, 1, channels], WeightLayout::Plain, init, true)?;
        let class_blocks =
            (0..CLASS_DEPTH).map(|index| class_block(builder, &format!("cls_attn_blocks.{index}"), channels));
        let class_blocks = class_blocks.collect::<Result<_>>()?;
        let norm = builder.layer_norm("norm", channels)?;
        Ok(Self { patches, positions, blocks, class_token, class_blocks, norm })
    }

    /// `(B, H, W, 3)` to `(B, F)`.
    pub(super) fn forward<I: Interpreter>(&self, run: &mut I, xs: &I::Value) -> Result<I::Value> {
        let mut xs = xs.clone();
        for (index, conv) in self.patches.iter().enumerate() {
            let last = index + 1 == self.patches.len();
            xs = run.conv_bn(&xs, conv, None, if last { Activation::Identity } else { Activation::Gelu })?;
        }
        let mut xs = run.add_fourier_positions(&xs, &self.positions)?; // (B, H/16, W/16, F)
        for block in &self.blocks {
            xs = run.attention_block(&xs, &block.attention)?;
            xs = run.local_block(&xs, &block.local)?;
            xs = run.mlp_block(&xs, &block.mlp)?;
        }
        let mut xs = run.prepend_token(&xs, &self.class_token)?; // (B, 1 + H/16 * W/16, F)
        for block in &self.class_blocks {
            xs = run.class_attention_block(&xs, block)?;
        }
        // The norm is each token's own, so that of the first is the first of the norm.
        let xs = run.first_token(&xs)?;
        run.layer_norm(&xs, &self.norm)
    }
}

/// One of the convolutions that make patches; each doubles the channels, the last has all of them.
fn patch_convolution(builder: &mut Builder, index: usize, channels: usize) -> Result<ConvBn> {
    let outputs = channels >> (PATCH_CONVOLUTIONS - 1 - index);
    let inputs = if index == 0 { 3 } else { outputs / 2 };
    // Activations count in the names.
    let name = format!("patch_embed.proj.{}", 2 * index);
    Ok(ConvBn {
        conv: builder.uniform_conv(&format!("{name}.0"), Geometry::same(inputs, outputs, 3, 2))?,
        norm: builder.batch_norm(&format!("{name}.1"), outputs)?,
    })
}

/// A 1x1 convolution in timm, over the grid of positions.
fn positions(builder: &mut Builder, channels: usize) -> Result<Linear> {
    let init = Init::Uniform { bound: 1.0 / (FOURIER_CHANNELS as f64).sqrt() };
    let name = "pos_embed.token_projection";
    let shape = [channels, FOURIER_CHANNELS, 1, 1];
    Ok(Linear {
        weight: builder.add(format!("{name}.weight"), &shape, WeightLayout::Pointwise, init, true)?,
        bias: builder.add(format!("{name}.bias"), &[channels], WeightLayout::Plain, init, true)?,
    })
}

/// Factors that start at 1.
fn ones(builder: &mut Builder, name: String, shape: &[usize]) -> Result<Parameter> {
    builder.add(name, shape, WeightLayout::Plain, Init::Constant(1.0), true)
}

fn block(builder: &mut Builder, name: &str, channels: usize) -> Result<Block> {
    let temperature = ones(builder, format!("{name}.attn.temperature"), &[channels / HEAD_CHANNELS, 1, 1])?;
    let attention = AttentionBlock {
        norm: builder.layer_norm(&format!("{name}.norm1"), channels)?,
        qkv: builder.token_linear(&format!("{name}.attn.qkv"), channels, 3 * channels)?,
        attention: Attention::CrossCovariance { temperature },
        projection: builder.token_linear(&format!("{name}.attn.proj"), channels, channels)?,
        layer_scale: Some(ones(builder, format!("{name}.gamma1"), &[channels])?),
    };
    // It comes second and is named as if it came third, as in the official code.
    let local = LocalBlock {
        norm: builder.layer_norm(&format!("{name}.norm3"), channels)?,
        interaction: LocalPatchInteraction {
            conv1: builder.biased_conv(&format!("{name}.local_mp.conv1"), Geometry::depthwise(channels, 3, 1))?,
            norm: builder.batch_norm(&format!("{name}.local_mp.bn"), channels)?,
            conv2: builder.biased_conv(&format!("{name}.local_mp.conv2"), Geometry::depthwise(channels, 3, 1))?,
        },
        layer_scale: ones(builder, format!("{name}.gamma3"), &[channels])?,
    };
    let hidden = EXPANSION * channels;
    let mlp = MlpBlock {
        norm: builder.layer_norm(&format!("{name}.norm2"), channels)?,
        hidden: builder.token_linear(&format!("{name}.mlp.fc1"), channels, hidden)?,
        output: builder.token_linear(&format!("{name}.mlp.fc2"), hidden, channels)?,
        layer_scale: Some(ones(builder, format!("{name}.gamma2"), &[channels])?),
    };
    Ok(Block { attention, local, mlp })
}

fn class_block(builder: &mut Builder, name: &str, channels: usize) -> Result<ClassAttentionBlock> {
    let mut square = |field: &str| builder.token_linear(&format!("{name}.attn.{field}"), channels, channels);
    let (query, key, value, projection) = (square("q")?, square("k")?, square("v")?, square("proj")?);
    let hidden = EXPANSION * channels;
    Ok(ClassAttentionBlock {
        norm1: builder.layer_norm(&format!("{name}.norm1"), channels)?,
        query,
        key,
        value,
        projection,
        heads: channels / HEAD_CHANNELS,
        layer_scale1: ones(builder, format!("{name}.gamma1"), &[channels])?,
        norm2: builder.layer_norm(&format!("{name}.norm2"), channels)?,
        hidden: builder.token_linear(&format!("{name}.mlp.fc1"), channels, hidden)?,
        output: builder.token_linear(&format!("{name}.mlp.fc2"), hidden, channels)?,
        layer_scale2: ones(builder, format!("{name}.gamma2"), &[channels])?,
    })
}
