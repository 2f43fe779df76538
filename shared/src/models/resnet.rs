//! Residual networks for images: a stem, four stages of blocks, the mean over all pixels.
//!
//! Source: He et al., arXiv 1512.03385, table 1, in torchvision's form (`torchvision/models/resnet.py`): the stride of a bottleneck is
//! on its 3x3 convolution. Names and shapes of all tensors are torchvision's and timm's.
//!
//! Initial values are torchvision's. timm differs in one thing: it starts the last batch norm of each block at scale 0.

use crate::Result;
use crate::ops::{BasicBlock, Bottleneck, Builder, ConvBn, Geometry, Interpreter, Stem};

const STEM_CHANNELS: usize = 64;
const STAGE_CHANNELS: [usize; 4] = [64, 128, 256, 512];
/// Channels out of a bottleneck over channels inside.
const EXPANSION: usize = 4;

#[derive(Debug, Clone)]
enum Block {
    Basic(BasicBlock),
    Bottleneck(Bottleneck),
}

/// The backbone, without a classifier.
#[derive(Debug, Clone)]
pub(super) struct ResNet {
    stem: Stem,
    blocks: Vec<Block>,
}

impl ResNet {
    /// `ResNet`-18 and 34, by the number of blocks in each stage.
    pub(super) fn basic(builder: &mut Builder, blocks_per_stage: [usize; 4]) -> Result<Self> {
        Self::new(builder, blocks_per_stage, false, 1)
    }

    /// `ResNet`-50 and deeper, by the number of blocks in each stage; `widen` multiplies all channels, the stem's too, as `SwAV`'s
    /// `resnet50w2` (`src/resnet50.py`; torchvision's `wide_resnet50_2` widens the inside of bottlenecks only).
    pub(super) fn bottleneck(builder: &mut Builder, blocks_per_stage: [usize; 4], widen: usize) -> Result<Self> {
        Self::new(builder, blocks_per_stage, true, widen)
    }

    fn new(builder: &mut Builder, blocks_per_stage: [usize; 4], bottleneck: bool, widen: usize) -> Result<Self> {
        let mut channels = STEM_CHANNELS * widen;
        let stem = Stem { conv: builder.conv_bn("conv1", "bn1", Geometry::same(3, channels, 7, 2))? };
        let mut blocks = Vec::new();
        for (stage, (width, count)) in STAGE_CHANNELS.iter().zip(blocks_per_stage).enumerate() {
            let width = width * widen;
            for index in 0..count {
                let stride = if stage > 0 && index == 0 { 2 } else { 1 };
                let name = format!("layer{}.{index}", stage + 1);
                let block = if bottleneck {
                    Block::Bottleneck(self::bottleneck(builder, &name, channels, width, stride)?)
                } else {
                    Block::Basic(basic_block(builder, &name, channels, width, stride)?)
                };
                channels = if bottleneck { width * EXPANSION } else { width };
                blocks.push(block);
            }
        }
        Ok(Self { stem, blocks })
    }

    /// `(B, H, W, 3)` to `(B, F)`.
    pub(super) fn forward<I: Interpreter>(&self, run: &mut I, xs: &I::Value) -> Result<I::Value> {
        let mut xs = run.stem(xs, &self.stem)?; // (B, H/4, W/4, 64)
        for block in &self.blocks {
            xs = match block {
                Block::Basic(params) => run.basic_block(&xs, params)?,
                Block::Bottleneck(params) => run.bottleneck(&xs, params)?,
            };
        }
        run.global_average_pool(&xs) // (B, H/32, W/32, F) -> (B, F)
    }
}

fn basic_block(builder: &mut Builder, name: &str, inputs: usize, width: usize, stride: usize) -> Result<BasicBlock> {
    Ok(BasicBlock {
        conv1: layer(builder, name, 1, Geometry::same(inputs, width, 3, stride))?,
        conv2: layer(builder, name, 2, Geometry::same(width, width, 3, 1))?,
        downsample: downsample(builder, name, inputs, width, stride)?,
    })
}

fn bottleneck(builder: &mut Builder, name: &str, inputs: usize, width: usize, stride: usize) -> Result<Bottleneck> {
    let outputs = width * EXPANSION;
    Ok(Bottleneck {
        conv1: layer(builder, name, 1, Geometry::same(inputs, width, 1, 1))?,
        conv2: layer(builder, name, 2, Geometry::same(width, width, 3, stride))?,
        conv3: layer(builder, name, 3, Geometry::same(width, outputs, 1, 1))?,
        downsample: downsample(builder, name, inputs, outputs, stride)?,
    })
}

fn layer(builder: &mut Builder, block: &str, index: usize, geometry: Geometry) -> Result<ConvBn> {
    builder.conv_bn(&format!("{block}.conv{index}"), &format!("{block}.bn{index}"), geometry)
}

fn downsample(
    builder: &mut Builder,
    block: &str,
    inputs: usize,
    outputs: usize,
    stride: usize,
) -> Result<Option<ConvBn>> {
    if stride == 1 && inputs == outputs {
        return Ok(None);
    }
    let geometry = Geometry::same(inputs, outputs, 1, stride);
    Ok(Some(builder.conv_bn(&format!("{block}.downsample.0"), &format!("{block}.downsample.1"), geometry)?))
}
