//! Two depthwise convolutions over grids of tokens, with GELU and batch norm after the first. Kept for the backward pass is the raw output of
//! the first; the rest is computed again there.

use rayon::prelude::*;

use super::block::update_running;
use super::chain::running_affine;
use super::flow::{Before, Conv, Finish, Incoming, IncomingNorm, Source, Wanted, buffer, pieces, split, statistics};
use super::layer_norm::{add_up, column_sums, rounded};
use super::norm::{Affine, Moments, ShortSums, Statistics};
use super::tiles::{self, Activated, Extras};
use super::{convolution, deposit, values, with_values};
use crate::ops::{Activation, LocalPatchInteraction, Mode, Parameter};

/// Numbers of a tile of an element-wise pass.
const TILE_FLOATS: usize = 16 * 1024;
/// Numbers of a piece of an element-wise pass.
const PIECE_FLOATS: usize = 128 * 1024;

/// What a backward pass needs.
#[derive(Debug)]
pub(super) struct Saved {
    /// Output of the first convolution, without its bias.
    raw: Vec<f32>,
    statistics: Vec<Statistics>,
}

/// The shift by a convolution's bias.
fn shift(bias: &Parameter) -> candle_core::Result<Affine> {
    let shift = values(bias.var())?;
    Ok(Affine { scale: vec![1.0; shift.len()], shift })
}

fn identity_before(affines: &[Affine]) -> Before<'_> {
    Before { affines, means: &[], act: Activation::Identity, gate: None }
}

/// The output for `xs`, times the factors `scale`, plus `residual`, and what a backward pass needs.
pub(super) fn forward(
    params: &LocalPatchInteraction,
    conv: &Conv,
    xs: &[f32],
    scale: Option<&Parameter>,
    residual: Option<&[f32]>,
    mode: Mode,
) -> candle_core::Result<(Vec<f32>, Option<Saved>)> {
    let first = shift(&params.conv1.bias)?;
    let mut last = shift(&params.conv2.bias)?;
    if let Some(scale) = scale {
        last.scale = values(scale.var())?;
        for (shift, scale) in last.shift.iter_mut().zip(&last.scale) {
            *shift *= scale;
        }
    }
    let convolve = |weight: &Parameter, source: &Source<'_>, affine: &Affine, act, residual| {
        let mut out = buffer(conv.batch * conv.output_length());
        with_values(weight.var(), |weight| {
            convolution::forward(conv, source, weight, &mut out, Finish::Apply { affine, act, residual });
            Ok(out)
        })
    };
    let identity = Activation::Identity;
    let (weight1, weight2) = (&params.conv1.conv.weight, &params.conv2.conv.weight);
    if mode == Mode::Eval {
        let hidden = convolve(weight1, &Source::plain(xs), &first, Activation::Gelu, None)?;
        let affines = [running_affine(&params.norm)?];
        let source = Source { values: &hidden, before: Some(identity_before(&affines)) };
        return Ok((convolve(weight2, &source, &last, identity, residual)?, None));
    }
    let unchanged = Affine::identity(conv.geometry.in_channels);
    let raw = convolve(weight1, &Source::plain(xs), &unchanged, identity, None)?;
    let (hidden, gathered) = activate(conv, &raw, &first);
    let statistics = statistics(gathered, conv.groups, conv.geometry.in_channels);
    update_running(&params.norm, &statistics)?;
    let affines = affines(params, &statistics)?;
    let source = Source { values: &hidden, before: Some(identity_before(&affines)) };
    let out = convolve(weight2, &source, &last, identity, residual)?;
    Ok((out, Some(Saved { raw, statistics })))
}

/// Batch norm of each group.
fn affines(params: &LocalPatchInteraction, statistics: &[Statistics]) -> candle_core::Result<Vec<Affine>> {
    let (weight, bias) = (values(params.norm.weight.var())?, values(params.norm.bias.var())?);
    let eps = params.norm.eps;
    Ok(statistics.iter().map(|s| Affine::new(&s.mean, &s.variance, &weight, &bias, eps)).collect())
}

/// GELU after the first convolution and its bias, and the moments of its results by group.
fn activate(conv: &Conv, raw: &[f32], first: &Affine) -> (Vec<f32>, Vec<(usize, Option<Moments>)>) {
    let channels = conv.geometry.in_channels;
    let mut hidden = buffer(raw.len());
    let rows_per_group = raw.len() / channels / conv.groups;
    let pieces = pieces(conv.groups, rows_per_group, 1, PIECE_FLOATS / channels, usize::MAX);
    let tile = (TILE_FLOATS / channels).max(1) * channels;
    let parts = split(&mut hidden, &pieces, channels);
    let gathered = pieces.par_iter().zip(parts).map(|(piece, hidden)| {
        let mut moments = Moments::new(channels);
        for (index, hidden) in hidden.chunks_mut(tile).enumerate() {
            let raw = &raw[piece.start * channels + index * tile..][..hidden.len()];
            tiles::apply(raw, hidden, first, Activation::Gelu, Extras::default());
            moments.add(hidden);
        }
        (piece.group, Some(moments))
    });
    let gathered = gathered.collect();
    (hidden, gathered)
}

/// Deposits the parameters' gradients; returns that of the input.
pub(super) fn backward(
    params: &LocalPatchInteraction,
    conv: &Conv,
    saved: Saved,
    xs: &[f32],
    dout: &[f32],
    scale: Option<&Parameter>,
) -> candle_core::Result<Vec<f32>> {
    let Saved { raw, statistics } = saved;
    let channels = conv.geometry.in_channels;
    let first = shift(&params.conv1.bias)?;
    let (hidden, _) = activate(conv, &raw, &first);
    let affines = affines(params, &statistics)?;
    let means: Vec<Vec<f32>> = statistics.iter().map(Statistics::mean_f32).collect();
    let before = Before { affines: &affines, means: &means, act: Activation::Identity, gate: None };
    let source = Source { values: &hidden, before: Some(before) };

    let factors = scale.map(|scale| values(scale.var())).transpose()?;
    let mut weight = values(params.conv2.conv.weight.var())?;
    let bias = values(params.conv2.bias.var())?;
    if let Some(factors) = &factors {
        weight.chunks_exact_mut(channels).for_each(|weight| multiply(weight, factors));
    }
    let incoming = Incoming { gradient: dout, norm: None };
    let mut of_second = convolution::backward(conv, &source, &weight, &incoming, Wanted::Gradient { plus: None });
    let (mut dweight, mut dbias) = (std::mem::take(&mut of_second.dweight), column_sums(dout, channels));
    if let (Some(scale), Some(factors)) = (scale, &factors) {
        // As the branch is linear in the weights, they and their gradients tell those of its factors.
        let mut along: Vec<f64> = bias.iter().zip(&dbias).map(|(b, d)| f64::from(*b) * f64::from(*d)).collect();
        let unscaled = values(params.conv2.conv.weight.var())?;
        for (weight, dweight) in unscaled.chunks_exact(channels).zip(dweight.chunks_exact_mut(channels)) {
            for ((along, w), d) in along.iter_mut().zip(weight).zip(dweight.iter()) {
                *along += f64::from(*w) * f64::from(*d);
            }
            multiply(dweight, factors);
        }
        multiply(&mut dbias, factors);
        deposit(scale, rounded(along))?;
    }
    deposit(&params.conv2.conv.weight, dweight)?;
    deposit(&params.conv2.bias, dbias)?;

    let scales = values(params.norm.weight.var())?;
    let (mut dscale, mut dshift) = (vec![0.0f64; channels], vec![0.0f64; channels]);
    let slopes: Vec<_> = statistics
        .iter()
        .zip(&of_second.sums)
        .map(|(statistics, sums)| statistics.slope(&params.norm, &scales, sums, &mut dscale, &mut dshift))
        .collect();
    deposit(&params.norm.weight, rounded(dscale))?;
    deposit(&params.norm.bias, rounded(dshift))?;

    let norm = Some(IncomingNorm { raw: &hidden, slopes: &slopes, gate: None });
    let through_norm = Incoming { gradient: &of_second.gradient, norm };
    let (draw, dbias) = deactivate(conv, &raw, &first, &through_norm);
    deposit(&params.conv1.bias, dbias)?;
    let incoming = Incoming { gradient: &draw, norm: None };
    let of_first = with_values(params.conv1.conv.weight.var(), |weight| {
        Ok(convolution::backward(conv, &Source::plain(xs), weight, &incoming, Wanted::Gradient { plus: None }))
    })?;
    deposit(&params.conv1.conv.weight, of_first.dweight)?;
    Ok(of_first.gradient)
}

/// The gradient of the first convolution's output, and of its bias, from what comes back to the batch norm.
fn deactivate(conv: &Conv, raw: &[f32], first: &Affine, incoming: &Incoming<'_>) -> (Vec<f32>, Vec<f32>) {
    let channels = conv.geometry.in_channels;
    let mut draw = buffer(raw.len());
    let rows_per_group = raw.len() / channels / conv.groups;
    let pieces = pieces(conv.groups, rows_per_group, 1, PIECE_FLOATS / channels, usize::MAX);
    let tile = (TILE_FLOATS / channels).max(1) * channels;
    let mean = vec![0.0; channels];
    let parts = split(&mut draw, &pieces, channels);
    let done: Vec<Vec<f64>> = pieces
        .par_iter()
        .zip(parts)
        .map(|(piece, draw)| {
            let (mut sums, mut short) = (vec![0.0f64; channels], ShortSums::new(channels));
            for (index, draw) in draw.chunks_mut(tile).enumerate() {
                let start = piece.start * channels + index * tile;
                incoming.read(piece.group, start, draw);
                let raw = &raw[start..start + draw.len()];
                let of = Activated { raw, affine: first, mean: &mean, act: Activation::Gelu, residual: None };
                short.clear();
                tiles::activation_gradient(&of, draw, None, &mut short.as_target());
                add_up(&mut sums, &short.sums);
            }
            sums
        })
        .collect();
    let mut sums = vec![0.0f64; channels];
    for part in done {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    (draw, rounded(sums))
}

fn multiply(xs: &mut [f32], factors: &[f32]) {
    for (x, factor) in xs.iter_mut().zip(factors) {
        *x *= factor;
    }
}
