//! Every heavy operation and the memory layout: models call blocks and never see axes.
//!
//! Activations are `(B, H, W, C)` f32 and contiguous. A block is a function `block(xs, &Params, &Pass) -> Tensor`: `Params`
//! is a struct of [`Parameter`] handles that owns *all* of the block's weights ([`ConvBn`], [`BasicBlock`], ...), and [`Pass`]
//! says how to run it: the [`Mode`] of batch norm, whether gradients are recorded, and the [`Engine`] that computes.
//!
//! 1. **One block, one graph node.** An engine may run a block as one candle custom op with its own backward, or as many;
//!    the caller cannot tell. [`Engine::Reference`] composes plain candle operations and is the oracle in tests.
//! 2. **Gradients of parameters are deposited, not returned.** A custom op has at most three inputs, a block has many
//!    parameters. An op therefore captures its `Params` and in its backward calls [`Parameter::deposit`], which adds to the
//!    parameter's slot; its graph inputs are the activations and an *anchor*, a scalar variable that makes candle record the
//!    node even where the activations themselves need no gradient (the first layer: no `dX` is computed there). From one
//!    operation of the CPU engine to the next, gradients of activations are handed over likewise (`cpu/graph.rs`).
//! 3. **Collected once.** [`ParameterStore::backward`] empties the slots, runs candle's backward, then joins what was
//!    deposited with what candle itself tracked (reference operations use the variables), into [`Gradients`] by name.
//! 4. **Files keep PyTorch's layout, memory keeps the op's**: convolutions `[kh, kw, in, out]`, linear `[in, out]`;
//!    [`ParameterStore`] converts at its border and nobody else does.
//! 5. **Deterministic.** Work is cut into pieces by shape alone, partial sums are added in piece order: the same bits at any
//!    thread count. Not at any instruction set: vectors of another width add in another order. [`force_isa`] chooses one.
//!
//! A new device or a fused block is a new arm in `blocks.rs`, nothing else.

mod allocator;
mod blocks;
mod cpu;
mod interpreter;
mod isa;
mod parameter;
pub(crate) mod positions;
pub mod reference;
mod shape;
mod store;
mod token_blocks;
mod token_parameter;
pub mod token_reference;
mod update;

pub use allocator::{TensorAllocator, reserve_memory};
pub use blocks::{
    basic_block, batch_norm_rows, bottleneck, conv_bn, global_average_pool, info_nce, l2_normalise, linear, linear_map,
    max_pool, mb_conv, projection_head, soft_cross_entropy, stem,
};
pub use interpreter::Interpreter;
pub use isa::{Isa, force_isa, isa};
pub use parameter::{
    Activation, BasicBlock, BatchNorm, Bottleneck, Conv2d, ConvBn, Gate, Geometry, HiddenLayer, Init, Linear, MbConv,
    Padding, Parameter, ProjectionHead, SqueezeExcite, Stem, WeightLayout,
};
pub use positions::FOURIER_CHANNELS;
pub(crate) use positions::{fourier as fourier_positions, resampled as resampled_positions};
pub use shape::Shape;
pub(crate) use store::TOKEN_STD;
pub use store::{Builder, Gradients, ParameterStore};
pub use token_blocks::{
    add_branch, add_fourier_positions, attention, attention_block, class_attention, class_attention_block,
    cross_covariance_attention, embed_patches, first_token, layer_norm, local_block, local_patch_interaction,
    mlp_block, prepend_token, replace_first_token,
};
pub use token_parameter::{
    Attention, AttentionBlock, BiasedConv, ClassAttentionBlock, LayerNorm, LocalBlock, LocalPatchInteraction, MlpBlock,
    PatchEmbedding, PositionResampling, Positions,
};

pub use update::{
    AdamStep, DescentStep, adamw_in_place, descend_in_place, ema_in_place, is_finite, scale_in_place, sum_of_squares,
    sum_of_squares_decayed,
};

use candle_core::{Device, Tensor};

/// The variance offset of batch norm, PyTorch's default.
pub const BATCH_NORM_EPS: f64 = 1e-5;
/// The weight of new statistics in the running ones, PyTorch's default.
pub const BATCH_NORM_MOMENTUM: f64 = 0.1;

/// The variance offset of layer norm in vision transformers, timm's.
pub const LAYER_NORM_EPS: f64 = 1e-6;

/// How batch norm gets its statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Running statistics; nothing is recorded for a backward pass.
    Eval,
    /// Batch statistics, and the running buffers move.
    Train {
        /// The batch is cut into this many contiguous groups of equal size, each with its own statistics, as if each ran
        /// on a device of its own. The buffers take one step per forward pass, towards the mean over the groups.
        bn_groups: usize,
    },
}

/// Which implementation computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Plain candle operations, any device.
    Reference,
    /// Own kernels over channels-last f32 on the CPU.
    Cpu,
}

/// How a forward pass is run.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// Batch norm statistics.
    pub mode: Mode,
    /// Whether a backward pass will follow.
    pub record: bool,
    /// The implementation.
    pub engine: Engine,
}

impl Engine {
    /// The fastest engine for a device.
    pub fn for_device(device: &Device) -> Self {
        if device.is_cpu() { Self::Cpu } else { Self::Reference }
    }
}

/// An [`crate::Error::Shape`] for a tensor that does not fit an operation.
fn shape_error(op: &'static str, expected: impl Into<String>, got: &Tensor) -> crate::Error {
    crate::Error::Shape { op, expected: expected.into(), got: format!("{:?}", got.dims()) }
}
