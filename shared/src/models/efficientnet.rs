//! `EfficientNet` and `EfficientNet`-Lite: a stem, seven stages of inverted residual blocks, a last widening, the mean over all pixels.
//!
//! Source: Tan and Le, arXiv 1905.11946, table 1, in timm's forms. `efficientnet_b0` and `b1` (not `tf_efficientnet_b0`) have squeeze-excite,
//! `SiLU`, zeros on all sides of an image alike and `PyTorch`'s batch norm. `tf_efficientnet_lite0` to `4` have `ReLU6` instead of `SiLU`, no
//! squeeze-excite, and `TensorFlow`'s padding and batch norm; scaling leaves their stem and last widening as they are, and the depth
//! of their first and last stage. Names, shapes and initial values of all tensors are timm's.
//!
//! Neither dropout nor stochastic depth, as timm by default.

use super::inverted_residual::{BlockConfig, Flavour, Squeeze};
use crate::Result;
use crate::ops::{Activation, Builder, ConvBn, Gate, Geometry, Interpreter, MbConv};

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

/// Which member of the family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scaling {
    /// Channels of the stages over B0's.
    width: f64,
    /// Blocks of the stages over B0's.
    depth: f64,
    lite: bool,
}

impl Scaling {
    /// B0 is depth 1.0, B1 is 1.1; both have width 1.0.
    pub(super) fn b(depth: f64) -> Self {
        Self { width: 1.0, depth, lite: false }
    }

    /// Lite0 is 1.0, 1.0; Lite4 is 1.4, 1.8.
    pub(super) fn lite(width: f64, depth: f64) -> Self {
        Self { width, depth, lite: true }
    }

    /// Scaled channels, a multiple of 8, never less than nine tenths of what is asked for (timm's `round_channels`).
    fn channels(self, channels: usize) -> usize {
        let wanted = channels as f64 * self.width;
        let rounded = ((wanted + 4.0) / 8.0).floor().max(1.0) * 8.0;
        (if rounded < 0.9 * wanted { rounded + 8.0 } else { rounded }) as usize
    }

    fn blocks(self, stage: usize) -> usize {
        let fixed = self.lite && (stage == 0 || stage + 1 == STAGES.len());
        let depth = if fixed { 1.0 } else { self.depth };
        (STAGES[stage].blocks as f64 * depth).ceil() as usize
    }
}

/// The backbone, without a classifier.
#[derive(Debug, Clone)]
pub(super) struct EfficientNet {
    stem: ConvBn,
    blocks: Vec<MbConv>,
    head: ConvBn,
    act: Activation,
}

impl EfficientNet {
    /// A network of the family.
    pub(super) fn new(builder: &mut Builder, scaling: &Scaling) -> Result<Self> {
        let (act, flavour) =
            if scaling.lite { (Activation::Relu6, Flavour::TensorFlow) } else { (Activation::Silu, Flavour::PyTorch) };
        let stem = flavour.conv_bn(builder, "conv_stem", "bn1", Geometry::same(3, STEM_CHANNELS, 3, 2))?;
        let mut blocks = Vec::new();
        let mut inputs = STEM_CHANNELS;
        for (index, stage) in STAGES.iter().enumerate() {
            let outputs = scaling.channels(stage.outputs);
            for block in 0..scaling.blocks(index) {
                let squeeze = Squeeze { channels: inputs / SQUEEZE, act, gate: Gate::Sigmoid };
                let config = BlockConfig {
                    inputs,
                    expanded: (stage.expansion > 1).then_some(inputs * stage.expansion),
                    outputs,
                    kernel: stage.kernel,
                    stride: if block == 0 { stage.stride } else { 1 },
                    act,
                    squeeze: (!scaling.lite).then_some(squeeze),
                    flavour,
                };
                blocks.push(config.build(builder, &format!("blocks.{index}.{block}"))?);
                inputs = outputs;
            }
        }
        let head = flavour.conv_bn(builder, "conv_head", "bn2", Geometry::same(inputs, FEATURES, 1, 1))?;
        Ok(Self { stem, blocks, head, act })
    }

    /// `(B, H, W, 3)` to `(B, F)`.
    pub(super) fn forward<I: Interpreter>(&self, run: &mut I, xs: &I::Value) -> Result<I::Value> {
        let mut xs = run.conv_bn(xs, &self.stem, None, self.act)?; // (B, H/2, W/2, 32)
        for block in &self.blocks {
            xs = run.mb_conv(&xs, block)?;
        }
        let xs = run.conv_bn(&xs, &self.head, None, self.act)?; // (B, H/32, W/32, F)
        run.global_average_pool(&xs)
    }
}
