//! Vision transformers: patches and a class token, blocks of attention and two linear layers, a norm; the features are the class token's.
//!
//! Source: Dosovitskiy et al., arXiv 2010.11929, table 1, with the small and tiny forms of `DeiT`, arXiv 2012.12877, as timm has them
//! (`vision_transformer.py`, version 1.0.31). Names, shapes and initial values of all tensors are timm's; the positions are those of
//! images of 224 x 224 pixels and are resampled for others.
//!
//! Neither dropout nor stochastic depth, as timm by default.

use crate::ops::{
    Attention, AttentionBlock, Builder, Geometry, Init, Interpreter, LayerNorm, MlpBlock, Padding, PatchEmbedding,
    PositionResampling, Positions, TOKEN_STD, WeightLayout,
};
use crate::{Error, Result};

const DEPTH: usize = 12;
/// Channels between the two linear layers of a block over channels outside.
const EXPANSION: usize = 4;
/// Channels of a head, unless the heads are counted otherwise.
const HEAD_CHANNELS: usize = 64;
/// The side of the images that the positions are made for.
const SIDE_PIXELS: usize = 224;
const CLASS_TOKEN_STD: f64 = 1e-6;

/// What the tensors of a vision transformer do not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VitOptions {
    /// Heads of attention; timm's number for the architecture unless given. `MoCo` v3's small network has 12 where timm's has 6.
    pub heads: Option<usize>,
    /// How positions are resampled for images that are not 224 x 224 pixels.
    pub positions: PositionResampling,
}

/// The backbone, without a classifier.
#[derive(Debug, Clone)]
pub(super) struct Vit {
    embedding: PatchEmbedding,
    blocks: Vec<(AttentionBlock, MlpBlock)>,
    norm: LayerNorm,
}

impl Vit {
    /// A network with this many channels and this side of a patch in pixels.
    pub(super) fn new(builder: &mut Builder, channels: usize, patch: usize, options: VitOptions) -> Result<Self> {
        let heads = options.heads.unwrap_or(channels / HEAD_CHANNELS);
        if heads == 0 || !channels.is_multiple_of(heads) {
            let message = format!("{channels} channels cannot be cut into {heads} heads of attention");
            return Err(Error::invalid(message, "choose a number of heads that divides the channels"));
        }
        let side = SIDE_PIXELS / patch;
        let geometry = Geometry::same(3, channels, patch, patch).with_padding(Padding::Symmetric(0));
        let mut token = |name: &str, rows: usize, std: f64| {
            builder.add(name.into(), &[1, rows, channels], WeightLayout::Plain, Init::Normal { std }, true)
        };
        let class_token = token("cls_token", 1, CLASS_TOKEN_STD)?;
        let table = token("pos_embed", 1 + side * side, TOKEN_STD)?;
        let embedding = PatchEmbedding {
            projection: builder.biased_conv("patch_embed.proj", geometry)?,
            class_token,
            positions: Positions { table, side, resampling: options.positions },
        };
        let blocks = (0..DEPTH).map(|index| block(builder, &format!("blocks.{index}"), channels, heads));
        let blocks = blocks.collect::<Result<_>>()?;
        Ok(Self { embedding, blocks, norm: builder.layer_norm("norm", channels)? })
    }

    /// `(B, H, W, 3)` to `(B, F)`.
    pub(super) fn forward<I: Interpreter>(&self, run: &mut I, xs: &I::Value) -> Result<I::Value> {
        let mut xs = run.embed_patches(xs, &self.embedding)?; // (B, 1 + H/P * W/P, F)
        for (attention, mlp) in &self.blocks {
            xs = run.attention_block(&xs, attention)?;
            xs = run.mlp_block(&xs, mlp)?;
        }
        // The norm is each token's own, so that of the first is the first of the norm.
        let xs = run.first_token(&xs)?;
        run.layer_norm(&xs, &self.norm)
    }
}

fn block(builder: &mut Builder, name: &str, channels: usize, heads: usize) -> Result<(AttentionBlock, MlpBlock)> {
    let attention = AttentionBlock {
        norm: builder.layer_norm(&format!("{name}.norm1"), channels)?,
        qkv: builder.token_linear(&format!("{name}.attn.qkv"), channels, 3 * channels)?,
        attention: Attention::Tokens { heads },
        projection: builder.token_linear(&format!("{name}.attn.proj"), channels, channels)?,
        layer_scale: None,
    };
    let hidden = EXPANSION * channels;
    let mlp = MlpBlock {
        norm: builder.layer_norm(&format!("{name}.norm2"), channels)?,
        hidden: builder.token_linear(&format!("{name}.mlp.fc1"), channels, hidden)?,
        output: builder.token_linear(&format!("{name}.mlp.fc2"), hidden, channels)?,
        layer_scale: None,
    };
    Ok((attention, mlp))
}
