//! Parameter updates in place, and sums over a tensor's elements, cut into pieces that threads share.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Tensor, bail};
use rayon::prelude::*;

use super::{slice, with_values};
use crate::Result;
use crate::ops::{AdamStep, DescentStep};

const PIECE_FLOATS: usize = 64 * 1024;
/// Sums that run beside each other in a piece, for vectors.
const LANES: usize = 8;

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

/// `values = values * factor`.
#[derive(Debug)]
struct Scale {
    factor: f32,
}

impl InplaceOp1 for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let values = slice_mut(storage, layout)?;
        values.par_chunks_mut(PIECE_FLOATS).for_each(|values| {
            for value in values {
                *value *= self.factor;
            }
        });
        Ok(())
    }
}

/// `first = update(first, second, third)` for every element.
struct Elementwise<F> {
    name: &'static str,
    update: F,
}

impl<F: Fn(f32, f32, f32) -> f32 + Sync> InplaceOp3 for Elementwise<F> {
    fn name(&self) -> &'static str {
        self.name
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
        let (firsts, seconds, thirds) = (slice_mut(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        firsts
            .par_chunks_mut(PIECE_FLOATS)
            .zip(seconds.par_chunks(PIECE_FLOATS))
            .zip(thirds.par_chunks(PIECE_FLOATS))
            .for_each(|((firsts, seconds), thirds)| {
                for ((first, &second), &third) in firsts.iter_mut().zip(seconds).zip(thirds) {
                    *first = (self.update)(*first, second, third);
                }
            });
        Ok(())
    }
}

/// `mean_square = keep * mean_square + add * gradient^2`.
#[derive(Debug)]
struct BlendSquare {
    keep: f32,
    add: f32,
}

impl InplaceOp2 for BlendSquare {
    fn name(&self) -> &'static str {
        "blend_square"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let (squares, gradients) = (slice_mut(s1, l1)?, slice(s2, l2)?);
        squares.par_chunks_mut(PIECE_FLOATS).zip(gradients.par_chunks(PIECE_FLOATS)).for_each(
            |(squares, gradients)| {
                for (square, gradient) in squares.iter_mut().zip(gradients) {
                    *square = *square * self.keep + gradient * gradient * self.add;
                }
            },
        );
        Ok(())
    }
}

/// See [`crate::ops::descend_in_place`].
pub(in crate::ops) fn descend(
    parameter: &Tensor,
    gradient: &Tensor,
    buffer: &Tensor,
    step: &DescentStep,
) -> Result<()> {
    let &DescentStep { nesterov, .. } = step;
    let [momentum, weight_decay, scale, lr] =
        [step.momentum, step.weight_decay, step.scale, step.lr].map(|constant| constant as f32);
    let accumulate =
        move |buffer, gradient, parameter| buffer * momentum + (gradient + parameter * weight_decay) * scale;
    buffer.inplace_op3(gradient, parameter, &Elementwise { name: "momentum", update: accumulate })?;
    if nesterov {
        let update = move |parameter, gradient, buffer| {
            let direction = (gradient + parameter * weight_decay) * scale + buffer * momentum;
            parameter - direction * lr
        };
        return Ok(parameter.inplace_op3(gradient, buffer, &Elementwise { name: "nesterov", update })?);
    }
    Ok(parameter.inplace_op2(buffer, &Blend { keep: 1.0, add: -lr })?)
}

/// See [`crate::ops::adamw_in_place`].
pub(in crate::ops) fn adamw(
    parameter: &Tensor,
    gradient: &Tensor,
    [mean, square]: [&Tensor; 2],
    step: &AdamStep,
) -> Result<()> {
    let blend = |keep: f64| (keep as f32, (1.0 - keep) as f32);
    let (keep, add) = blend(step.beta1);
    mean.inplace_op2(gradient, &Blend { keep, add })?;
    let (keep, add) = blend(step.beta2);
    square.inplace_op2(gradient, &BlendSquare { keep, add })?;
    let [keep, size, correction, epsilon] =
        [step.keep(), step.step_size(), step.square_correction(), step.epsilon].map(|constant| constant as f32);
    let update = move |parameter: f32, mean: f32, square: f32| {
        parameter * keep - size * (mean / (square.sqrt() / correction + epsilon))
    };
    Ok(parameter.inplace_op3(mean, square, &Elementwise { name: "adamw", update })?)
}

/// See [`crate::ops::ema_in_place`].
pub(in crate::ops) fn ema(key: &Tensor, query: &Tensor, momentum: f64) -> Result<()> {
    Ok(key.inplace_op2(query, &Blend { keep: momentum as f32, add: (1.0 - momentum) as f32 })?)
}

/// `sum += value`.
pub(in crate::ops) fn add(sum: &Tensor, value: &Tensor) -> Result<()> {
    Ok(sum.inplace_op2(value, &Blend { keep: 1.0, add: 1.0 })?)
}

/// See [`crate::ops::scale_in_place`].
pub(in crate::ops) fn scale(values: &Tensor, factor: f64) -> Result<()> {
    Ok(values.inplace_op1(&Scale { factor: factor as f32 })?)
}

/// See [`crate::ops::sum_of_squares`].
pub(in crate::ops) fn sum_of_squares(values: &Tensor) -> Result<f64> {
    let sums = with_values(values, |values| {
        Ok(values.par_chunks(PIECE_FLOATS).map(|piece| sum_of_squares_of(piece, |value, _| value)).collect::<Vec<_>>())
    })?;
    Ok(sums.into_iter().sum())
}

/// See [`crate::ops::sum_of_squares_decayed`].
pub(in crate::ops) fn sum_of_squares_decayed(gradient: &Tensor, parameter: &Tensor, weight_decay: f64) -> Result<f64> {
    let weight_decay = weight_decay as f32;
    let sums = with_values(gradient, |gradients| {
        with_values(parameter, |parameters| {
            let pieces = gradients.par_chunks(PIECE_FLOATS).zip(parameters.par_chunks(PIECE_FLOATS));
            let sum = |(gradients, parameters): (&[f32], &[f32])| {
                sum_of_squares_of(gradients, |gradient, index| {
                    gradient + parameters.get(index).copied().unwrap_or_default() * weight_decay
                })
            };
            Ok(pieces.map(sum).collect::<Vec<_>>())
        })
    })?;
    Ok(sums.into_iter().sum())
}

/// The sum over one piece, of what `value` makes of each element and its index.
fn sum_of_squares_of(piece: &[f32], value: impl Fn(f32, usize) -> f32) -> f64 {
    let mut sums = [0f64; LANES];
    for (row, elements) in piece.chunks(LANES).enumerate() {
        for ((sum, &element), index) in sums.iter_mut().zip(elements).zip(row * LANES..) {
            let value = f64::from(value(element, index));
            *sum += value * value;
        }
    }
    sums.into_iter().sum()
}

/// See [`crate::ops::is_finite`].
pub(in crate::ops) fn is_finite(values: &Tensor) -> Result<bool> {
    // The exponent of infinities and of what is no number has all its bits set.
    const EXPONENT: u32 = 0x7f80_0000;
    Ok(with_values(values, |values| {
        let bad = |piece: &[f32]| piece.iter().fold(false, |bad, value| bad | (value.to_bits() & EXPONENT == EXPONENT));
        Ok(!values.par_chunks(PIECE_FLOATS).any(bad))
    })?)
}
