//! `MobileNetV3`-Large: a stem, six stages of inverted residual blocks, a last convolution, the mean over all pixels, a last widening.
//!
//! Source: Howard et al., arXiv 1905.02244, table 1, in timm's form (`mobilenetv3_large_100`): the widening to 1280 features after the mean
//! has a bias and no batch norm, and squeeze-excite narrows to a quarter of the expanded channels, rounded to a multiple of 8.
//! Names, shapes and initial values of all tensors are timm's.

use super::inverted_residual::{BlockConfig, Flavour, Squeeze};
use crate::Result;
use crate::ops::{Activation, Builder, ConvBn, Gate, Geometry, Interpreter, Linear, MbConv};

const STEM_CHANNELS: usize = 16;
const LAST_CHANNELS: usize = 960;
const FEATURES: usize = 1280;

/// A block of the paper's table.
struct Block {
    kernel: usize,
    stride: usize,
    /// Channels of the depthwise convolution; none where there is no expansion.
    expanded: Option<usize>,
    outputs: usize,
    /// Channels inside squeeze-excite, if there is one.
    squeeze: Option<usize>,
    act: Activation,
}

const fn block(
    kernel: usize,
    stride: usize,
    expanded: Option<usize>,
    outputs: usize,
    squeeze: Option<usize>,
    act: Activation,
) -> Block {
    Block { kernel, stride, expanded, outputs, squeeze, act }
}

/// The blocks of each stage.
const STAGES: [&[Block]; 6] = {
    use Activation::{HardSwish, Relu};
    [
        &[block(3, 1, None, 16, None, Relu)],
        &[block(3, 2, Some(64), 24, None, Relu), block(3, 1, Some(72), 24, None, Relu)],
        &[
            block(5, 2, Some(72), 40, Some(24), Relu),
            block(5, 1, Some(120), 40, Some(32), Relu),
            block(5, 1, Some(120), 40, Some(32), Relu),
        ],
        &[
            block(3, 2, Some(240), 80, None, HardSwish),
            block(3, 1, Some(200), 80, None, HardSwish),
            block(3, 1, Some(184), 80, None, HardSwish),
            block(3, 1, Some(184), 80, None, HardSwish),
        ],
        &[block(3, 1, Some(480), 112, Some(120), HardSwish), block(3, 1, Some(672), 112, Some(168), HardSwish)],
        &[
            block(5, 2, Some(672), 160, Some(168), HardSwish),
            block(5, 1, Some(960), 160, Some(240), HardSwish),
            block(5, 1, Some(960), 160, Some(240), HardSwish),
        ],
    ]
};

/// The backbone, without a classifier.
#[derive(Debug, Clone)]
pub(super) struct MobileNetV3 {
    stem: ConvBn,
    blocks: Vec<MbConv>,
    last: ConvBn,
    head: Linear,
}

impl MobileNetV3 {
    /// The large network at its own width.
    pub(super) fn large(builder: &mut Builder) -> Result<Self> {
        let stem = builder.conv_bn("conv_stem", "bn1", Geometry::same(3, STEM_CHANNELS, 3, 2))?;
        let mut blocks = Vec::new();
        let mut inputs = STEM_CHANNELS;
        for (stage, stage_blocks) in STAGES.iter().enumerate() {
            for (index, &Block { kernel, stride, expanded, outputs, squeeze, act }) in stage_blocks.iter().enumerate() {
                let squeeze =
                    squeeze.map(|channels| Squeeze { channels, act: Activation::Relu, gate: Gate::HardSigmoid });
                let config =
                    BlockConfig { inputs, expanded, outputs, kernel, stride, act, squeeze, flavour: Flavour::PyTorch };
                blocks.push(config.build(builder, &format!("blocks.{stage}.{index}"))?);
                inputs = outputs;
            }
        }
        let name = format!("blocks.{}.0", STAGES.len());
        let geometry = Geometry::same(inputs, LAST_CHANNELS, 1, 1);
        let last = builder.conv_bn(&format!("{name}.conv"), &format!("{name}.bn1"), geometry)?;
        let head = builder.pointwise("conv_head", LAST_CHANNELS, FEATURES)?;
        Ok(Self { stem, blocks, last, head })
    }

    /// `(B, H, W, 3)` to `(B, F)`.
    pub(super) fn forward<I: Interpreter>(&self, run: &mut I, xs: &I::Value) -> Result<I::Value> {
        let mut xs = run.conv_bn(xs, &self.stem, None, Activation::HardSwish)?; // (B, H/2, W/2, 16)
        for block in &self.blocks {
            xs = run.mb_conv(&xs, block)?;
        }
        let xs = run.conv_bn(&xs, &self.last, None, Activation::HardSwish)?; // (B, H/32, W/32, 960)
        let pooled = run.global_average_pool(&xs)?;
        run.linear(&pooled, &self.head, Activation::HardSwish)
    }
}
