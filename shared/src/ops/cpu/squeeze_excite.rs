//! Squeeze-excite inside a block: factors from the means of activated channels, and the way back.

use rayon::prelude::*;

use super::activation::NORMAL_DENSITY;
use super::flow::{Before, Conv};
use super::gemm::{Packed, Rows, multiply, multiply_transposed};
use super::tiles;
use super::{deposit, values};
use crate::ops::{Activation, Gate, SqueezeExcite};

/// Rows summed in f32 one after the other.
const SHORT_ROWS: usize = 256;

/// What the backward pass needs.
#[derive(Debug)]
pub(super) struct SavedGate {
    /// Means of the activated channels, `(B, C)`.
    means: Vec<f32>,
    /// Output of the first layer before its activation, `(B, R)`.
    hidden: Vec<f32>,
    /// Output of the second layer, `(B, C)`.
    logits: Vec<f32>,
    /// The factors, `(B, C)`.
    pub(super) factors: Vec<f32>,
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// An activation, and its slope.
fn activate(act: Activation, x: f32) -> (f32, f32) {
    match act {
        Activation::Identity => (x, 1.0),
        Activation::Relu => (if x < 0.0 { 0.0 } else { x }, if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::Relu6 => {
            let value = if x < 0.0 { 0.0 } else { x };
            (if value > 6.0 { 6.0 } else { value }, if x > 0.0 && x < 6.0 { 1.0 } else { 0.0 })
        }
        Activation::Silu => {
            let sigmoid = sigmoid(x);
            (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
        }
        Activation::HardSwish => {
            let slope = if x >= 3.0 { 1.0 } else { x / 3.0 + 0.5 };
            (x * gate(Gate::HardSigmoid, x).0, if x > -3.0 { slope } else { 0.0 })
        }
        Activation::Gelu => {
            let below = 0.5 * libm::erfcf(-x * std::f32::consts::FRAC_1_SQRT_2);
            (x * below, below + x * (-0.5 * x * x).exp() * NORMAL_DENSITY)
        }
    }
}

/// A factor, and its slope.
fn gate(gate: Gate, x: f32) -> (f32, f32) {
    match gate {
        Gate::Sigmoid => {
            let value = sigmoid(x);
            (value, value * (1.0 - value))
        }
        Gate::HardSigmoid => {
            let value = x / 6.0 + 0.5;
            // NaN stays NaN.
            let value = if value < 0.0 { 0.0 } else { value };
            (if value > 1.0 { 1.0 } else { value }, if x > -3.0 && x < 3.0 { 1.0 / 6.0 } else { 0.0 })
        }
    }
}

/// `xs weight + bias`.
fn linear(xs: &[f32], inputs: usize, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let outputs = bias.len();
    let mut out = bias.repeat(xs.len() / inputs);
    let packed = Packed::new(weight, inputs, outputs, outputs, 1);
    multiply(xs.len() / inputs, xs, inputs, &packed, &mut out, outputs, true);
    out
}

/// `dout weight'`.
fn linear_gradient(dout: &[f32], outputs: usize, weight: &[f32]) -> Vec<f32> {
    let (rows, inputs) = (dout.len() / outputs, weight.len() / outputs);
    let mut dxs = vec![0.0; rows * inputs];
    let packed = Packed::new(weight, outputs, inputs, 1, outputs);
    multiply(rows, dout, outputs, &packed, &mut dxs, inputs, false);
    dxs
}

/// `xs' dout`.
fn weight_gradient(xs: &[f32], dout: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut dweight = vec![0.0; inputs * outputs];
    let rows = Rows { left: xs, right: dout, count: xs.len() / inputs };
    multiply_transposed([inputs, outputs], &[rows], inputs, outputs, &mut dweight, outputs);
    dweight
}

fn column_sums(xs: &[f32], columns: usize) -> Vec<f32> {
    let mut sums = vec![0.0; columns];
    xs.chunks_exact(columns).for_each(|row| tiles::add(&mut sums, row));
    sums
}

/// Means of the activated channels of raw images, `(B, C)`; `before` says how they are activated.
pub(super) fn means(conv: &Conv, raw: &[f32], before: &Before<'_>) -> Vec<f32> {
    let channels = conv.geometry.out_channels;
    let pixels = conv.output_pixels();
    let mut means = vec![0.0; conv.batch * channels];
    means.par_chunks_mut(channels).zip(raw.par_chunks(pixels * channels)).enumerate().for_each(
        |(image, (means, raw))| {
            let affine = &before.affines[conv.group_of(image)];
            let mut short = vec![0.0; channels];
            let mut sums = vec![0.0f64; channels];
            for raw in raw.chunks(SHORT_ROWS * channels) {
                short.fill(0.0);
                tiles::pool(raw, affine, before.act, &mut short);
                sums.iter_mut().zip(&short).for_each(|(sum, short)| *sum += f64::from(*short));
            }
            means.iter_mut().zip(&sums).for_each(|(mean, sum)| *mean = (sum / pixels as f64) as f32);
        },
    );
    means
}

/// Means over the pixels of each image, `(B, C)`, from sums over its rows, `(B, H, C)`.
pub(super) fn means_of_rows(conv: &Conv, row_sums: &[f32]) -> Vec<f32> {
    let channels = conv.geometry.out_channels;
    let mut means = Vec::with_capacity(conv.batch * channels);
    for rows in row_sums.chunks_exact(conv.output_height() * channels) {
        let mut sums = vec![0.0f64; channels];
        for row in rows.chunks_exact(channels) {
            sums.iter_mut().zip(row).for_each(|(sum, &row)| *sum += f64::from(row));
        }
        means.extend(sums.into_iter().map(|sum| (sum / conv.output_pixels() as f64) as f32));
    }
    means
}

/// The factors of each channel of each image, and what the backward pass needs.
pub(super) fn forward(params: &SqueezeExcite, means: Vec<f32>, channels: usize) -> candle_core::Result<SavedGate> {
    let (reduce, expand) = (values(params.reduce.weight.var())?, values(params.expand.weight.var())?);
    let (reduce_bias, expand_bias) = (values(params.reduce.bias.var())?, values(params.expand.bias.var())?);
    let hidden = linear(&means, channels, &reduce, &reduce_bias);
    let active: Vec<f32> = hidden.iter().map(|&x| activate(params.act, x).0).collect();
    let logits = linear(&active, reduce_bias.len(), &expand, &expand_bias);
    let factors = logits.par_iter().with_min_len(4096).map(|&x| gate(params.gate, x).0).collect();
    Ok(SavedGate { means, hidden, logits, factors })
}

/// From the gradient of the factors to that which each pixel's activated value gets through its channel's mean, `(B, C)`; deposits
/// the gradients of the parameters.
pub(super) fn backward(
    params: &SqueezeExcite,
    saved: &SavedGate,
    dfactors: &[f32],
    pixels: usize,
) -> candle_core::Result<Vec<f32>> {
    let (reduce, expand) = (values(params.reduce.weight.var())?, values(params.expand.weight.var())?);
    let width = params.reduce.bias.var().elem_count();
    let channels = params.expand.bias.var().elem_count();
    let dlogits: Vec<f32> = dfactors.iter().zip(&saved.logits).map(|(&d, &x)| d * gate(params.gate, x).1).collect();
    let active: Vec<f32> = saved.hidden.iter().map(|&x| activate(params.act, x).0).collect();
    deposit(&params.expand.bias, column_sums(&dlogits, channels))?;
    deposit(&params.expand.weight, weight_gradient(&active, &dlogits, width, channels))?;
    let mut dhidden = linear_gradient(&dlogits, channels, &expand);
    for (d, &x) in dhidden.iter_mut().zip(&saved.hidden) {
        *d *= activate(params.act, x).1;
    }
    deposit(&params.reduce.bias, column_sums(&dhidden, width))?;
    deposit(&params.reduce.weight, weight_gradient(&saved.means, &dhidden, channels, width))?;
    let mut dmeans = linear_gradient(&dhidden, width, &reduce);
    for d in &mut dmeans {
        *d /= pixels as f32;
    }
    Ok(dmeans)
}
