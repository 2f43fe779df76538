//! Parameter updates in place, one pass over each tensor.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor, bail};
use rayon::prelude::*;

use super::slice;
use crate::Result;

const PIECE_FLOATS: usize = 64 * 1024;

fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("parameters are f32") };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut values[start..end]),
        None => bail!("parameters are contiguous"),
    }
}

/// `value = value * keep + other * add`.
#[derive(Debug)]
struct Blend {
    keep: f32,
    add: f32,
}

impl InplaceOp2 for Blend {
    fn name(&self) -> &'static str {
        "blend"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let (values, others) = (slice_mut(s1, l1)?, slice(s2, l2)?);
        values.par_chunks_mut(PIECE_FLOATS).zip(others.par_chunks(PIECE_FLOATS)).for_each(|(values, others)| {
            for (value, other) in values.iter_mut().zip(others) {
                *value = *value * self.keep + other * self.add;
            }
        });
        Ok(())
    }
}

/// `momentum = momentum * factor + (gradient + weight_decay * parameter)`.
#[derive(Debug)]
struct Accumulate {
    factor: f32,
    weight_decay: f32,
}

impl InplaceOp3 for Accumulate {
    fn name(&self) -> &'static str {
        "sgd_momentum"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<()> {
        let (momenta, gradients, parameters) = (slice_mut(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        momenta
            .par_chunks_mut(PIECE_FLOATS)
            .zip(gradients.par_chunks(PIECE_FLOATS))
            .zip(parameters.par_chunks(PIECE_FLOATS))
            .for_each(|((momenta, gradients), parameters)| {
                for ((momentum, gradient), parameter) in momenta.iter_mut().zip(gradients).zip(parameters) {
                    *momentum = *momentum * self.factor + (gradient + parameter * self.weight_decay);
                }
            });
        Ok(())
    }
}

/// See [`crate::ops::sgd_in_place`].
pub(in crate::ops) fn sgd(
    parameter: &Tensor,
    gradient: &Tensor,
    momentum: &Tensor,
    factor: f64,
    weight_decay: f64,
    lr: f64,
) -> Result<()> {
    let accumulate = Accumulate { factor: factor as f32, weight_decay: weight_decay as f32 };
    momentum.inplace_op3(gradient, parameter, &accumulate)?;
    Ok(parameter.inplace_op2(momentum, &Blend { keep: 1.0, add: -lr as f32 })?)
}

/// See [`crate::ops::ema_in_place`].
pub(in crate::ops) fn ema(key: &Tensor, query: &Tensor, momentum: f64) -> Result<()> {
    Ok(key.inplace_op2(query, &Blend { keep: momentum as f32, add: (1.0 - momentum) as f32 })?)
}

/// `sum += value`.
pub(in crate::ops) fn add(sum: &Tensor, value: &Tensor) -> Result<()> {
    Ok(sum.inplace_op2(value, &Blend { keep: 1.0, add: 1.0 })?)
}
