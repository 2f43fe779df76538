//! Kernels over channels-last f32 on the CPU, wrapped as candle custom operations with their own backward passes.
//!
//! From below: `simd` and `activation` (vectors), `gemm` and `tiles` (kernels over tiles in cache), `norm` (batch norm as numbers per
//! channel), `flow` (what passes from layer to layer), `pointwise`, `depthwise`, `direct` and `winograd` (convolutions, chosen by
//! `convolution`), `squeeze_excite`, `chain` (blocks), `pool` and `rows` (the rest); these compute on slices and know nothing of tensors'
//! graphs. `block`, `layers` and `update` wrap them. All work is cut into pieces that depend on shapes alone; partial sums are added
//! in the order of the pieces.

mod activation;
pub(super) mod block;
mod chain;
mod convolution;
mod depthwise;
mod direct;
mod flow;
mod gemm;
pub(super) mod layers;
mod norm;
mod pointwise;
mod pool;
mod rows;
mod simd;
mod squeeze_excite;
mod tiles;
pub(super) mod update;
mod winograd;

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Layout, Storage, Tensor, Var, bail};

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

/// The variable that makes candle record an operation whose activations need no gradient.
fn anchor() -> candle_core::Result<Tensor> {
    Ok(Var::zeros((), candle_core::DType::F32, &candle_core::Device::Cpu)?.into_inner())
}

/// What the forward pass of an operation leaves for its backward pass, which takes it away.
#[derive(Debug)]
struct Saved<T>(Mutex<Option<T>>);

impl<T> Saved<T> {
    fn empty() -> Self {
        Self(Mutex::new(None))
    }

    fn put(&self, value: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    fn take(&self, op: &'static str) -> candle_core::Result<T> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(value) => Ok(value),
            None => bail!("{op}: the backward pass ran twice over one forward pass"),
        }
    }
}

/// Deposits a gradient that lies like its parameter.
fn deposit(parameter: &crate::ops::Parameter, gradient: Vec<f32>) -> candle_core::Result<()> {
    let var = parameter.var();
    let gradient = Tensor::from_vec(gradient, var.shape(), var.device())?;
    parameter.deposit(gradient).map_err(candle_core::Error::wrap)
}
