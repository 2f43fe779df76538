//! `EfficientNet`: a stem, seven stages of inverted residual blocks with squeeze-excite, a last widening, the mean over all pixels.
//!
//! Source: Tan and Le, arXiv 1905.11946, table 1, in timm's form (`efficientnet_b0`, not `tf_efficientnet_b0`): zeros on all sides of an
//! image alike, and `PyTorch`'s batch norm. Names, shapes and initial values of all tensors are timm's.
//!
//! Neither dropout nor stochastic depth, as timm by default.

use candle_core::Tensor;

use super::inverted_residual::{BlockConfig, Squeeze};
use crate::Result;
use crate::ops::{self, Activation, Builder, ConvBn, Gate, Geometry, MbConv, Pass};

const ACT: Activation = Activation::Silu;
const STEM_CHANNELS: usize = 32;
const FEATURES: usize = 1280;
/// Channels into a block over channels inside its squeeze-excite.
const SQUEEZE: usize = 4;

/// A stage: its first block takes the stride.
struct Stage {
    blocks: usize,
    kernel: usize,
    stride: usize,
    expansion: usize,
    outputs: usize,
}

const fn stage(blocks: usize, kernel: usize, stride: usize, expansion: usize, outputs: usize) -> Stage {
    Stage { blocks, kernel, stride, expansion, outputs }
}

const STAGES: [Stage; 7] = [
    stage(1, 3, 1, 1, 16),
    stage(2, 3, 2, 6, 24),
    stage(2, 5, 2, 6, 40),
    stage(3, 3, 2, 6, 80),
    stage(3, 5, 1, 6, 112),
    stage(4, 5, 2, 6, 192),
    stage(1, 3, 1, 6, 320),
];

/// The backbone, without a classifier.
#[derive(Debug, Clone)]
pub(super) struct EfficientNet {
    stem: ConvBn,
    blocks: Vec<MbConv>,
    head: ConvBn,
}

impl EfficientNet {
    /// The network whose stages have `depth` times as many blocks as B0's, rounded up: 1.0 is B0, 1.1 is B1.
    pub(super) fn new(builder: &mut Builder, depth: f64) -> Result<Self> {
        let stem = builder.conv_bn("conv_stem", "bn1", Geometry::same(3, STEM_CHANNELS, 3, 2))?;
        let mut blocks = Vec::new();
        let mut inputs = STEM_CHANNELS;
        for (index, stage) in STAGES.iter().enumerate() {
            for block in 0..(stage.blocks as f64 * depth).ceil() as usize {
                let config = BlockConfig {
                    inputs,
                    expanded: (stage.expansion > 1).then_some(inputs * stage.expansion),
                    outputs: stage.outputs,
                    kernel: stage.kernel,
                    stride: if block == 0 { stage.stride } else { 1 },
                    act: ACT,
                    squeeze: Some(Squeeze { channels: inputs / SQUEEZE, act: ACT, gate: Gate::Sigmoid }),
                };
                blocks.push(config.build(builder, &format!("blocks.{index}.{block}"))?);
                inputs = stage.outputs;
            }
        }
        let head = builder.conv_bn("conv_head", "bn2", Geometry::same(inputs, FEATURES, 1, 1))?;
        Ok(Self { stem, blocks, head })
    }

    /// `(B, H, W, 3)` to `(B, F)`.
    pub(super) fn forward(&self, xs: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut xs = ops::conv_bn(xs, &self.stem, None, ACT, pass)?; // (B, H/2, W/2, 32)
        for block in &self.blocks {
            xs = ops::mb_conv(&xs, block, pass)?;
        }
        let xs = ops::conv_bn(&xs, &self.head, None, ACT, pass)?; // (B, H/32, W/32, F)
        ops::global_average_pool(&xs, pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters without running statistics: `sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())`.
    #[test]
    fn depth_tells_b0_from_b1() {
        for (depth, expected) in [(1.0, 4_007_548), (1.1, 6_513_184)] {
            let mut builder = Builder::describing();
            EfficientNet::new(&mut builder, depth).unwrap();
            let named = builder.finish(0).unwrap().names_and_shapes();
            let trainable = named.iter().filter(|(name, _)| !name.contains("running") && !name.contains("tracked"));
            assert_eq!(trainable.map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>(), expected);
        }
    }
}
