//! Kernels over channels-last f32 on the CPU, wrapped as operations of candle's graph with backward passes of their own.
//!
//! From below: `simd` and `activation` (vectors), `gemm` and `tiles` (kernels over tiles in cache), `norm` (batch norm as numbers per
//! channel), `flow` (what passes from layer to layer), `pointwise`, `depthwise`, `direct` and `winograd` (convolutions, chosen by
//! `convolution`), `squeeze_excite`, `chain` (blocks), `pool` and `rows` (the rest of convolutional networks); for transformers
//! `token_tiles`, `layer_norm`, `dense` (linear layers of many rows), `attention`, `cross_covariance`, `local_patch` and `branches`. These
//! compute on slices and know nothing of tensors' graphs. `block`, `layers`, `token_layers`, `grid_layers` and `update` wrap them, on
//! candle's graph by `graph`. All work is cut into pieces that depend on shapes alone; partial sums are added in the order of the pieces.

mod activation;
mod attention;
pub(super) mod block;
mod branches;
mod chain;
mod convolution;
mod cross_covariance;
mod dense;
mod depthwise;
mod direct;
mod flow;
mod gemm;
mod graph;
pub(super) mod grid_layers;
mod layer_norm;
pub(super) mod layers;
mod local_patch;
mod norm;
mod pointwise;
mod pool;
mod rows;
mod simd;
mod squeeze_excite;
mod tiles;
pub(super) mod token_layers;
mod token_tiles;
pub(super) mod update;
mod winograd;

use candle_core::{CpuStorage, Layout, Storage, Tensor, bail};

/// The values of a contiguous f32 tensor on the CPU.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("the CPU engine computes in f32 only") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("the CPU engine takes contiguous tensors only"),
    }
}

/// Runs `f` on the values of a tensor.
fn with_values<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> candle_core::Result<R>) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("the CPU engine takes tensors on the CPU only") };
    f(slice(storage, layout)?)
}

/// A copy of a small tensor's values.
fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    with_values(tensor, |values| Ok(values.to_vec()))
}

/// Deposits a gradient that lies like its parameter.
fn deposit(parameter: &crate::ops::Parameter, gradient: Vec<f32>) -> candle_core::Result<()> {
    let var = parameter.var();
    let gradient = Tensor::from_vec(gradient, var.shape(), var.device())?;
    parameter.deposit(gradient).map_err(candle_core::Error::wrap)
}
