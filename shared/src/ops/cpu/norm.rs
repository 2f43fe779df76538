//! Batch norm over `rows x channels` with what follows it (residual sum, `ReLU`): two passes forward, two backward.
//!
//! Nothing is kept but the raw input and the statistics; normalised values are computed again in the backward pass.

use rayon::prelude::*;

use crate::ops::{Activation, BATCH_NORM_EPS};

/// Values of a piece: about half a megabyte, so that sums in f32 stay short.
const PIECE_FLOATS: usize = 128 * 1024;
/// Rows summed in f32 before the sum moves to f64.
const SHORT_ROWS: usize = 64;

/// Mean and standard deviation of one group, per channel.
#[derive(Debug, Clone)]
pub(super) struct Statistics {
    pub(super) mean: Vec<f64>,
    /// Biased variance.
    pub(super) variance: Vec<f64>,
    pub(super) rows: usize,
}

/// `normalised = x * scale + shift`.
#[derive(Debug, Clone)]
pub(super) struct Affine {
    pub(super) scale: Vec<f32>,
    pub(super) shift: Vec<f32>,
}

impl Affine {
    pub(super) fn new(mean: &[f64], variance: &[f64], weight: &[f32], bias: &[f32]) -> Self {
        let scale: Vec<f64> =
            weight.iter().zip(variance).map(|(&w, v)| f64::from(w) / (v + BATCH_NORM_EPS).sqrt()).collect();
        let shift = bias.iter().zip(mean).zip(&scale).map(|((&b, m), s)| (f64::from(b) - m * s) as f32).collect();
        Self { scale: scale.into_iter().map(|s| s as f32).collect(), shift }
    }
}

fn piece_rows(channels: usize) -> usize {
    (PIECE_FLOATS / channels).max(1)
}

/// Sums over pieces in the order of the pieces.
fn ordered_sum(parts: Vec<Vec<f64>>, length: usize) -> Vec<f64> {
    let mut sum = vec![0.0; length];
    for part in parts {
        for (sum, value) in sum.iter_mut().zip(part) {
            *sum += value;
        }
    }
    sum
}

/// Statistics of `xs`, rows of `channels` values.
pub(super) fn statistics(xs: &[f32], channels: usize) -> Statistics {
    let rows = xs.len() / channels;
    // Sums of squares around the first row: exact enough even where the mean is far from zero.
    let origin = &xs[..channels];
    let parts = xs
        .par_chunks(piece_rows(channels) * channels)
        .map(|piece| {
            let mut part = vec![0.0f64; 2 * channels];
            let (mut sums, mut squares) = (vec![0.0f32; channels], vec![0.0f32; channels]);
            for short in piece.chunks(SHORT_ROWS * channels) {
                sums.fill(0.0);
                squares.fill(0.0);
                for row in short.chunks_exact(channels) {
                    for (((sum, square), x), o) in sums.iter_mut().zip(&mut squares).zip(row).zip(origin) {
                        let d = x - o;
                        *sum += d;
                        *square += d * d;
                    }
                }
                for (part, &value) in part.iter_mut().zip(sums.iter().chain(&squares)) {
                    *part += f64::from(value);
                }
            }
            part
        })
        .collect();
    let sums = ordered_sum(parts, 2 * channels);
    let count = rows as f64;
    let centred: Vec<f64> = sums[..channels].iter().map(|sum| sum / count).collect();
    let variance =
        sums[channels..].iter().zip(&centred).map(|(square, mean)| (square / count - mean * mean).max(0.0)).collect();
    let mean = centred.iter().zip(origin).map(|(mean, &o)| mean + f64::from(o)).collect();
    Statistics { mean, variance, rows }
}

/// `out = act(xs * scale + shift [+ residual])`.
pub(super) fn apply(xs: &[f32], affine: &Affine, residual: Option<&[f32]>, act: Activation, out: &mut [f32]) {
    let channels = affine.scale.len();
    let length = piece_rows(channels) * channels;
    let floor = if act == Activation::Relu { 0.0 } else { f32::NEG_INFINITY };
    out.par_chunks_mut(length).enumerate().for_each(|(piece, out)| {
        let start = piece * length;
        let xs = &xs[start..start + out.len()];
        let Some(residual) = residual else {
            for (out, xs) in out.chunks_exact_mut(channels).zip(xs.chunks_exact(channels)) {
                for (((out, x), scale), shift) in out.iter_mut().zip(xs).zip(&affine.scale).zip(&affine.shift) {
                    *out = at_least(x * scale + shift, floor);
                }
            }
            return;
        };
        let residual = &residual[start..start + out.len()];
        let rows = out.chunks_exact_mut(channels).zip(xs.chunks_exact(channels)).zip(residual.chunks_exact(channels));
        for ((out, xs), residual) in rows {
            let affine = affine.scale.iter().zip(&affine.shift);
            for (((out, x), r), (scale, shift)) in out.iter_mut().zip(xs).zip(residual).zip(affine) {
                *out = at_least(x * scale + shift + r, floor);
            }
        }
    });
}

/// As [`apply`], over `xs` itself.
pub(super) fn apply_in_place(xs: &mut [f32], affine: &Affine, residual: Option<&[f32]>, act: Activation) {
    let channels = affine.scale.len();
    let length = piece_rows(channels) * channels;
    let floor = if act == Activation::Relu { 0.0 } else { f32::NEG_INFINITY };
    xs.par_chunks_mut(length).enumerate().for_each(|(piece, xs)| {
        let start = piece * length;
        let residual = residual.map(|residual| &residual[start..start + xs.len()]);
        for (row, xs) in xs.chunks_exact_mut(channels).enumerate() {
            let affine = affine.scale.iter().zip(&affine.shift);
            if let Some(residual) = residual {
                let residual = &residual[row * channels..][..channels];
                for ((x, r), (scale, shift)) in xs.iter_mut().zip(residual).zip(affine) {
                    *x = at_least(*x * scale + shift + r, floor);
                }
            } else {
                for (x, (scale, shift)) in xs.iter_mut().zip(affine) {
                    *x = at_least(*x * scale + shift, floor);
                }
            }
        }
    });
}

/// `max(x, floor)` that lets NaN through, as `PyTorch`'s `ReLU` does.
#[inline]
fn at_least(x: f32, floor: f32) -> f32 {
    if x < floor { floor } else { x }
}

/// Gradients of one group: turns `xs` (the raw input) into the gradient of the input, in place, and returns those of the
/// scale and of the shift. `dout` becomes the gradient before the activation, which is also that of the residual.
pub(super) fn backward(xs: &mut [f32], stats: &Statistics, weight: &[f32], dout: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let channels = weight.len();
    let length = piece_rows(channels) * channels;
    let mean: Vec<f32> = stats.mean.iter().map(|&mean| mean as f32).collect();
    let parts = xs
        .par_chunks(length)
        .zip(dout.par_chunks(length))
        .map(|(xs, dout)| {
            let mut part = vec![0.0f64; 2 * channels];
            let (mut sums, mut products) = (vec![0.0f32; channels], vec![0.0f32; channels]);
            for (xs, dout) in xs.chunks(SHORT_ROWS * channels).zip(dout.chunks(SHORT_ROWS * channels)) {
                sums.fill(0.0);
                products.fill(0.0);
                for (xs, dout) in xs.chunks_exact(channels).zip(dout.chunks_exact(channels)) {
                    let sums = sums.iter_mut().zip(&mut products);
                    for ((((sum, product), x), d), m) in sums.zip(xs).zip(dout).zip(&mean) {
                        *sum += d;
                        *product += d * (x - m);
                    }
                }
                for (part, &value) in part.iter_mut().zip(sums.iter().chain(&products)) {
                    *part += f64::from(value);
                }
            }
            part
        })
        .collect();
    let sums = ordered_sum(parts, 2 * channels);
    let inverse: Vec<f64> = stats.variance.iter().map(|v| 1.0 / (v + BATCH_NORM_EPS).sqrt()).collect();
    let dweight: Vec<f64> = sums[channels..].iter().zip(&inverse).map(|(product, inverse)| product * inverse).collect();
    let dbias = sums[..channels].to_vec();
    // dx = scale * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n), as dz * a + x * b + c per channel.
    let count = stats.rows as f64;
    let mut coefficients = vec![(0.0f32, 0.0f32, 0.0f32); channels];
    for (c, slot) in coefficients.iter_mut().enumerate() {
        let scale = f64::from(weight[c]) * inverse[c];
        let slope = -scale * inverse[c] * dweight[c] / count;
        *slot = (scale as f32, slope as f32, (-scale * dbias[c] / count) as f32);
    }
    xs.par_chunks_mut(length).zip(dout.par_chunks(length)).for_each(|(xs, dout)| {
        for (xs, dout) in xs.chunks_exact_mut(channels).zip(dout.chunks_exact(channels)) {
            for (((x, d), m), (scale, slope, offset)) in xs.iter_mut().zip(dout).zip(&mean).zip(&coefficients) {
                *x = d * scale + (*x - m) * slope + offset;
            }
        }
    });
    (dweight, dbias)
}

/// The gradient before the activation: `dout`, with zeros where a `ReLU` gave 0.
pub(super) fn mask(dout: &[f32], out: &[f32], act: Activation) -> Vec<f32> {
    if act == Activation::Identity {
        return dout.to_vec();
    }
    let mut masked = vec![0.0; dout.len()];
    let pieces =
        masked.par_chunks_mut(PIECE_FLOATS).zip(out.par_chunks(PIECE_FLOATS)).zip(dout.par_chunks(PIECE_FLOATS));
    pieces.for_each(|((masked, out), dout)| {
        for ((masked, y), d) in masked.iter_mut().zip(out).zip(dout) {
            *masked = if *y <= 0.0 { 0.0 } else { *d };
        }
    });
    masked
}
