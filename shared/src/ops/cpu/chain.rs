//! A block: convolutions with batch norm one after the other around a shortcut, with a backward pass of its own.
//!
//! Between layers flow the convolutions' raw outputs only. Statistics are gathered while a tile of output is in cache; normalising,
//! activating and the factors of squeeze-excite are applied when the next layer reads. Kept for the backward pass are the raw outputs,
//! one tensor for each convolution; everything else is computed again there, where the tile is in cache anyway.
//!
//! Backward, a layer turns the gradient before its activation (`dz`) into that of its raw output while it reads it, computes gradients
//! of its weights and its source, and turns the latter into the `dz` of the layer before, with the sums that layer's batch norm needs.

use rayon::prelude::*;

use super::depthwise::{self, Expansion, Pixels};
use super::flow::{
    Before, Conv, Finish, Incoming, IncomingGate, IncomingNorm, Source, Wanted, backward_sums, buffer, pieces, split,
};
use super::gemm::Packed;
use super::norm::{Affine, BackwardSums, ShortSums, Statistics};
use super::squeeze_excite::{self, SavedGate};
use super::tiles::{self, Activated, Extras};
use super::{convolution, deposit, values, with_values};
use crate::ops::{Activation, BatchNorm, ConvBn, Mode, SqueezeExcite};

/// Numbers of a tile of an element-wise pass: what fits a core's first caches beside its partners.
const TILE_FLOATS: usize = 16 * 1024;
/// Numbers of a piece of an element-wise pass.
const PIECE_FLOATS: usize = 256 * 1024;

/// A convolution, its batch norm, what follows.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) params: ConvBn,
    pub(super) act: Activation,
    pub(super) squeeze_excite: Option<SqueezeExcite>,
}

/// What is added before the activation of the last layer.
#[derive(Debug, Clone)]
pub(super) enum Shortcut {
    /// Nothing.
    None,
    /// The input of the block.
    Input,
    /// A tensor of its own.
    Given,
    /// The input after a convolution and a batch norm.
    Projection(ConvBn),
}

/// A block.
#[derive(Debug, Clone)]
pub(super) struct Chain {
    pub(super) layers: Vec<Layer>,
    pub(super) shortcut: Shortcut,
}

/// A layer's raw output with everything that its readers and its backward pass need.
#[derive(Debug)]
struct SavedLayer {
    conv: Conv,
    raw: Vec<f32>,
    statistics: Vec<Statistics>,
    affines: Vec<Affine>,
    means: Vec<Vec<f32>>,
    gate: Option<SavedGate>,
}

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub(super) struct SavedChain {
    layers: Vec<SavedLayer>,
    projection: Option<SavedLayer>,
}

/// Gradients of a block's inputs.
#[derive(Debug)]
pub(super) struct InputGradients {
    /// Of its input, if that was wanted.
    pub(super) input: Option<Vec<f32>>,
    /// Of the tensor that was added, if there was one.
    pub(super) given: Option<Vec<f32>>,
}

impl SavedLayer {
    fn before(&self, act: Activation) -> Before<'_> {
        let gate = self.gate.as_ref().map(|gate| gate.factors.as_slice());
        Before { affines: &self.affines, means: &self.means, act, gate }
    }

    fn source(&self, act: Activation) -> Source<'_> {
        Source { values: &self.raw, before: Some(self.before(act)) }
    }
}

impl Chain {
    /// The convolutions of a batch of images of this size.
    pub(super) fn convolutions(&self, batch: usize, groups: usize, height: usize, width: usize) -> Vec<Conv> {
        let (mut height, mut width) = (height, width);
        self.layers
            .iter()
            .map(|layer| {
                let conv = Conv { geometry: layer.params.conv.geometry, batch, groups, height, width };
                (height, width) = (conv.output_height(), conv.output_width());
                conv
            })
            .collect()
    }

    /// Runs the block; `keep` asks for what a backward pass needs.
    pub(super) fn forward(
        &self,
        convs: &[Conv],
        xs: &[f32],
        given: Option<&[f32]>,
        mode: Mode,
        keep: bool,
    ) -> candle_core::Result<(Vec<f32>, Option<SavedChain>)> {
        match mode {
            Mode::Eval => Ok((self.evaluate(convs, xs, given)?, None)),
            Mode::Train { .. } => self.train(convs, xs, given, keep),
        }
    }

    /// Running statistics: each layer's output is normalised and activated while it is in cache.
    fn evaluate(&self, convs: &[Conv], xs: &[f32], given: Option<&[f32]>) -> candle_core::Result<Vec<f32>> {
        let projected = match (&self.shortcut, convs.first()) {
            (Shortcut::Projection(params), Some(first)) => {
                let conv = Conv { geometry: params.conv.geometry, ..*first };
                Some(evaluate_layer(&conv, params, Source::plain(xs), Activation::Identity, None)?)
            }
            _ => None,
        };
        let last = self.layers.len() - 1;
        let mut current: Option<Vec<f32>> = None;
        let mut factors: Option<Vec<f32>> = None;
        let mut index = 0;
        while index <= last {
            let values = current.as_deref().unwrap_or(xs);
            let expand = (factors.is_none() && self.expands(index, convs)).then(|| &self.layers[index]);
            let inputs = convs[index].geometry.in_channels;
            index += usize::from(expand.is_some());
            let (layer, conv) = (&self.layers[index], &convs[index]);
            let residual = match &self.shortcut {
                _ if index < last => None,
                Shortcut::None => None,
                Shortcut::Input => Some(xs),
                Shortcut::Given => given,
                Shortcut::Projection(_) => projected.as_deref(),
            };
            let channels = conv.geometry.out_channels;
            let pooled = if layer.squeeze_excite.is_some() { conv.batch * conv.output_height() * channels } else { 0 };
            let mut row_sums = buffer(pooled);
            let out = if let Some(expand) = expand {
                let source = Expanded { values, inputs, layer: expand };
                evaluate_expanded(conv, layer, source, residual, &mut row_sums)?
            } else {
                let unchanged = [Affine::identity(inputs)];
                let act = Activation::Identity;
                let gated = Before { affines: &unchanged, means: &[], act, gate: factors.as_deref() };
                let source = Source { values, before: factors.is_some().then_some(gated) };
                evaluate_layer(conv, &layer.params, source, layer.act, residual)?
            };
            factors = match &layer.squeeze_excite {
                Some(params) => {
                    let means = if expand.is_some() {
                        squeeze_excite::means_of_rows(conv, &row_sums)
                    } else {
                        let unchanged = [Affine::identity(channels)];
                        let act = Activation::Identity;
                        let as_it_is = Before { affines: &unchanged, means: &[], act, gate: None };
                        squeeze_excite::means(conv, &out, &as_it_is)
                    };
                    Some(squeeze_excite::forward(params, means, channels)?.factors)
                }
                None => None,
            };
            current = Some(out);
            index += 1;
        }
        Ok(current.unwrap_or_default())
    }

    /// Whether a layer only widens the pixels of a depthwise convolution that follows.
    fn expands(&self, index: usize, convs: &[Conv]) -> bool {
        let plain = self.layers[index].squeeze_excite.is_none() && convolution::is_pointwise(&convs[index]);
        plain && convs.get(index + 1).is_some_and(|next| next.geometry.depthwise)
    }

    /// Batch statistics.
    fn train(
        &self,
        convs: &[Conv],
        xs: &[f32],
        given: Option<&[f32]>,
        keep: bool,
    ) -> candle_core::Result<(Vec<f32>, Option<SavedChain>)> {
        let projection = match (&self.shortcut, convs.first()) {
            (Shortcut::Projection(params), Some(first)) => {
                let conv = Conv { geometry: params.conv.geometry, ..*first };
                Some(train_layer(&conv, params, Source::plain(xs))?)
            }
            _ => None,
        };
        let mut saved: Vec<SavedLayer> = Vec::with_capacity(self.layers.len());
        for (index, (layer, conv)) in self.layers.iter().zip(convs).enumerate() {
            let source = match saved.last() {
                Some(previous) => previous.source(self.layers[index - 1].act),
                None => Source::plain(xs),
            };
            let mut current = train_layer(conv, &layer.params, source)?;
            if let Some(params) = &layer.squeeze_excite {
                let means = squeeze_excite::means(conv, &current.raw, &current.before(layer.act));
                current.gate = Some(squeeze_excite::forward(params, means, conv.geometry.out_channels)?);
            }
            if !keep && let Some(previous) = saved.last_mut() {
                previous.raw = Vec::new();
            }
            saved.push(current);
        }
        let (Some(last), Some(act)) = (saved.last_mut(), self.layers.last().map(|layer| layer.act)) else {
            candle_core::bail!("a block has at least one layer")
        };
        let shortcut = self.shortcut_of(xs, given, projection.as_ref());
        if keep {
            let mut out = buffer(last.raw.len());
            finish_block(last, act, shortcut, Some(&mut out));
            return Ok((out, Some(SavedChain { layers: saved, projection })));
        }
        finish_block(last, act, shortcut, None);
        Ok((std::mem::take(&mut last.raw), None))
    }

    /// What is added before the last activation: numbers, and how they are normalised.
    fn shortcut_of<'a>(
        &self,
        xs: &'a [f32],
        given: Option<&'a [f32]>,
        projection: Option<&'a SavedLayer>,
    ) -> Option<(&'a [f32], Option<&'a [Affine]>)> {
        match &self.shortcut {
            Shortcut::None => None,
            Shortcut::Input => Some((xs, None)),
            Shortcut::Given => given.map(|given| (given, None)),
            Shortcut::Projection(_) => projection.map(|saved| (saved.raw.as_slice(), Some(saved.affines.as_slice()))),
        }
    }

    /// Deposits the parameters' gradients; returns those of the input, if it is wanted, and of the tensor that was added.
    pub(super) fn backward(
        &self,
        saved: SavedChain,
        xs: &[f32],
        given: Option<&[f32]>,
        dout: &[f32],
        wants_input: bool,
    ) -> candle_core::Result<InputGradients> {
        let SavedChain { mut layers, projection } = saved;
        let (Some(last), Some(act)) = (layers.last(), self.layers.last().map(|layer| layer.act)) else {
            candle_core::bail!("a block has at least one layer")
        };
        let shortcut = self.shortcut_of(xs, given, projection.as_ref());
        let (dz_last, mut sums) = start_backward(last, act, shortcut, dout);
        let dz_last_or_dout = dz_last.as_deref().unwrap_or(dout);

        let through_projection = match (&self.shortcut, &projection) {
            (Shortcut::Projection(params), Some(saved)) => {
                let sums = sums_of(saved, dz_last_or_dout);
                let wanted = if wants_input { Wanted::Gradient { plus: None } } else { Wanted::Nothing };
                let incoming = Gradient { values: dz_last_or_dout, sums: &sums, gate: None };
                let outgoing = backward_layer(saved, params, Source::plain(xs), incoming, wanted)?;
                Some(outgoing.gradient)
            }
            _ => None,
        };
        drop(projection);

        let (mut dz, mut through_mean): (Option<Vec<f32>>, Option<Vec<f32>>) = (None, None);
        let mut input = None;
        for index in (0..self.layers.len()).rev() {
            let Some(current) = layers.pop() else { break };
            let previous = layers.last();
            let (source, wanted) = match previous {
                Some(previous) => (previous.source(self.layers[index - 1].act), Wanted::Gradient { plus: None }),
                None if wants_input => {
                    let plus = match &self.shortcut {
                        Shortcut::Input => Some(dz_last_or_dout),
                        _ => through_projection.as_deref(),
                    };
                    (Source::plain(xs), Wanted::Gradient { plus })
                }
                None => (Source::plain(xs), Wanted::Nothing),
            };
            let of_layer = dz.as_deref().unwrap_or(dz_last_or_dout);
            let layer = &self.layers[index];
            let gate = current.gate.as_ref().zip(through_mean.as_deref()).map(|(gate, through_mean)| IncomingGate {
                affines: &current.affines,
                act: layer.act,
                factors: &gate.factors,
                through_mean,
                image_length: current.conv.output_length(),
            });
            let incoming = Gradient { values: of_layer, sums: &sums, gate };
            let outgoing = backward_layer(&current, &layer.params, source, incoming, wanted)?;
            drop(current);
            let Some(previous) = previous else {
                input = wants_input.then_some(outgoing.gradient);
                break;
            };
            (sums, through_mean) = match (&previous.gate, &self.layers[index - 1].squeeze_excite) {
                (Some(gate), Some(params)) => {
                    let conv = &previous.conv;
                    let dfactors = outgoing.gate_sums.factor_gradients(conv.geometry.out_channels);
                    let through_mean = squeeze_excite::backward(params, gate, &dfactors, conv.output_pixels())?;
                    (outgoing.gate_sums.backward_sums(conv, &gate.factors, &through_mean), Some(through_mean))
                }
                _ => (outgoing.sums, None),
            };
            dz = Some(outgoing.gradient);
        }
        let given = matches!(self.shortcut, Shortcut::Given).then(|| dz_last.unwrap_or_else(|| dout.to_vec()));
        Ok(InputGradients { input, given })
    }
}

/// Output of a layer with running statistics, normalised and activated.
fn evaluate_layer(
    conv: &Conv,
    params: &ConvBn,
    source: Source<'_>,
    act: Activation,
    residual: Option<&[f32]>,
) -> candle_core::Result<Vec<f32>> {
    let affine = running_affine(&params.norm)?;
    let mut out = buffer(conv.batch * conv.output_length());
    with_values(params.conv.weight.var(), |weight| {
        let finish = Finish::Apply { affine: &affine, act, residual };
        convolution::forward(conv, &source, weight, &mut out, finish);
        Ok(())
    })?;
    Ok(out)
}

/// A layer that widens the pixels of a depthwise convolution.
#[derive(Debug, Clone, Copy)]
struct Expanded<'a> {
    values: &'a [f32],
    inputs: usize,
    layer: &'a Layer,
}

/// Output of a depthwise layer over pixels that another layer makes on the way, both with running statistics; and the sums of its rows,
/// `(B, H', C)`, unless the room for them is empty.
fn evaluate_expanded(
    conv: &Conv,
    layer: &Layer,
    source: Expanded<'_>,
    residual: Option<&[f32]>,
    row_sums: &mut [f32],
) -> candle_core::Result<Vec<f32>> {
    let Expanded { values, inputs, layer: expand } = source;
    let channels = conv.geometry.in_channels;
    let packed =
        with_values(expand.params.conv.weight.var(), |weight| Ok(Packed::new(weight, inputs, channels, channels, 1)))?;
    let (expand_affine, affine) = (running_affine(&expand.params.norm)?, running_affine(&layer.params.norm)?);
    let expansion = Expansion { values, inputs, weight: &packed, affine: &expand_affine, act: expand.act };
    let finish = Finish::Apply { affine: &affine, act: layer.act, residual };
    let mut out = buffer(conv.batch * conv.output_length());
    let row_sums = Some(row_sums).filter(|sums| !sums.is_empty());
    with_values(layer.params.conv.weight.var(), |weight| {
        depthwise::forward_from(conv, &Pixels::Expand(expansion), weight, &mut out, finish, row_sums);
        Ok(())
    })?;
    Ok(out)
}

/// What batch norm does with its running statistics.
pub(super) fn running_affine(norm: &BatchNorm) -> candle_core::Result<Affine> {
    let to_f64 = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
    let (mean, variance) = (to_f64(values(norm.running_mean.var())?), to_f64(values(norm.running_var.var())?));
    Ok(Affine::new(&mean, &variance, &values(norm.weight.var())?, &values(norm.bias.var())?, norm.eps))
}

/// Raw output of a layer and the statistics of its groups, which also move the running ones.
fn train_layer(conv: &Conv, params: &ConvBn, source: Source<'_>) -> candle_core::Result<SavedLayer> {
    let mut raw = buffer(conv.batch * conv.output_length());
    let statistics = with_values(params.conv.weight.var(), |weight| {
        Ok(convolution::forward(conv, &source, weight, &mut raw, Finish::Gather))
    })?;
    let norm = &params.norm;
    super::block::update_running(norm, &statistics)?;
    let (weight, bias) = (values(norm.weight.var())?, values(norm.bias.var())?);
    let affines = statistics.iter().map(|s| Affine::new(&s.mean, &s.variance, &weight, &bias, norm.eps)).collect();
    let means = statistics.iter().map(Statistics::mean_f32).collect();
    Ok(SavedLayer { conv: *conv, raw, statistics, affines, means, gate: None })
}

/// Normalises, adds the shortcut and activates: into `out`, or over the raw numbers.
fn finish_block(
    last: &mut SavedLayer,
    act: Activation,
    shortcut: Option<(&[f32], Option<&[Affine]>)>,
    out: Option<&mut [f32]>,
) {
    let channels = last.conv.geometry.out_channels;
    let rows_per_group = last.raw.len() / channels / last.conv.groups;
    let pieces = pieces(last.conv.groups, rows_per_group, 1, PIECE_FLOATS / channels, usize::MAX);
    let affines = &last.affines;
    let extras = |group: usize, start: usize, length: usize| {
        let residual =
            shortcut.map(|(values, affines)| (&values[start..start + length], affines.map(|affines| &affines[group])));
        Extras { residual, gate: None }
    };
    if let Some(out) = out {
        let raw = &last.raw;
        pieces.par_iter().zip(split(out, &pieces, channels)).for_each(|(piece, out)| {
            let start = piece.start * channels;
            let raw = &raw[start..start + out.len()];
            tiles::apply(raw, out, &affines[piece.group], act, extras(piece.group, start, out.len()));
        });
    } else {
        pieces.par_iter().zip(split(&mut last.raw, &pieces, channels)).for_each(|(piece, raw)| {
            let extras = extras(piece.group, piece.start * channels, raw.len());
            tiles::apply_in_place(raw, &affines[piece.group], act, extras);
        });
    }
}

/// From the gradient of the block's output to `dz` of its last layer, and the sums of that. Without an activation `dz` is the
/// gradient itself.
fn start_backward(
    last: &SavedLayer,
    act: Activation,
    shortcut: Option<(&[f32], Option<&[Affine]>)>,
    dout: &[f32],
) -> (Option<Vec<f32>>, Vec<BackwardSums>) {
    if act == Activation::Identity {
        return (None, sums_of(last, dout));
    }
    let channels = last.conv.geometry.out_channels;
    let mut dz = buffer(dout.len());
    let sums = by_tiles(&last.conv, channels, &mut dz, |group, start, dz, short| {
        let range = start..start + dz.len();
        let residual =
            shortcut.map(|(values, affines)| (&values[range.clone()], affines.map(|affines| &affines[group])));
        let of = Activated {
            raw: &last.raw[range.clone()],
            affine: &last.affines[group],
            mean: &last.means[group],
            act,
            residual,
        };
        tiles::activation_gradient_to(&of, &dout[range], dz, None, &mut short.as_target());
    });
    (Some(dz), sums)
}

/// The sums that a layer's batch norm needs of its `dz`.
fn sums_of(layer: &SavedLayer, dz: &[f32]) -> Vec<BackwardSums> {
    let channels = layer.conv.geometry.out_channels;
    let length = layer.raw.len();
    by_tiles_of(&layer.conv, channels, length, |group, range, short| {
        let raw = &layer.raw[range.clone()];
        tiles::gradient_sums(&dz[range], raw, &layer.means[group], &mut short.as_target());
    })
}

/// Runs `work` on tiles of the output of a convolution: `(group, start, tile of out, sums)`.
fn by_tiles(
    conv: &Conv,
    channels: usize,
    out: &mut [f32],
    work: impl Fn(usize, usize, &mut [f32], &mut ShortSums) + Sync,
) -> Vec<BackwardSums> {
    let rows_per_group = out.len() / channels / conv.groups;
    let pieces = pieces(conv.groups, rows_per_group, 1, PIECE_FLOATS / channels, usize::MAX);
    let tile = (TILE_FLOATS / channels).max(1) * channels;
    let parts = pieces
        .par_iter()
        .zip(split(out, &pieces, channels))
        .map(|(piece, out)| {
            let (mut sums, mut short) = (BackwardSums::new(channels), ShortSums::new(channels));
            for (index, out) in out.chunks_mut(tile).enumerate() {
                short.clear();
                work(piece.group, piece.start * channels + index * tile, out, &mut short);
                sums.add(&short);
            }
            (piece.group, sums)
        })
        .collect::<Vec<_>>();
    backward_sums(parts, conv.groups, channels)
}

/// Runs `work` on ranges of the output of a convolution: `(group, range, sums)`.
fn by_tiles_of(
    conv: &Conv,
    channels: usize,
    length: usize,
    work: impl Fn(usize, std::ops::Range<usize>, &mut ShortSums) + Sync,
) -> Vec<BackwardSums> {
    let rows_per_group = length / channels / conv.groups;
    let pieces = pieces(conv.groups, rows_per_group, 1, PIECE_FLOATS / channels, usize::MAX);
    let tile = (TILE_FLOATS / channels).max(1) * channels;
    let parts = pieces
        .par_iter()
        .map(|piece| {
            let (mut sums, mut short) = (BackwardSums::new(channels), ShortSums::new(channels));
            let end = (piece.start + piece.rows) * channels;
            for start in (piece.start * channels..end).step_by(tile) {
                short.clear();
                work(piece.group, start..(start + tile).min(end), &mut short);
                sums.add(&short);
            }
            (piece.group, sums)
        })
        .collect::<Vec<_>>();
    backward_sums(parts, conv.groups, channels)
}

/// What comes back to a layer.
#[derive(Debug, Clone, Copy)]
struct Gradient<'a> {
    /// `dz`, or the gradient of the gated output.
    values: &'a [f32],
    /// Of `dz`, one for each group.
    sums: &'a [BackwardSums],
    gate: Option<IncomingGate<'a>>,
}

/// The backward pass of one layer; deposits the parameters' gradients.
fn backward_layer(
    layer: &SavedLayer,
    params: &ConvBn,
    source: Source<'_>,
    gradient: Gradient<'_>,
    wanted: Wanted<'_>,
) -> candle_core::Result<super::flow::Outgoing> {
    let norm: &BatchNorm = &params.norm;
    let scale = values(norm.weight.var())?;
    let channels = scale.len();
    let (mut dscale, mut dshift) = (vec![0.0f64; channels], vec![0.0f64; channels]);
    let slopes: Vec<_> = layer
        .statistics
        .iter()
        .zip(gradient.sums)
        .map(|(statistics, sums)| statistics.slope(norm, &scale, sums, &mut dscale, &mut dshift))
        .collect();
    let to_f32 = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<_>>();
    deposit(&norm.weight, to_f32(dscale))?;
    deposit(&norm.bias, to_f32(dshift))?;
    let Gradient { values, gate, .. } = gradient;
    let norm = Some(IncomingNorm { raw: &layer.raw, slopes: &slopes, gate });
    let incoming = Incoming { gradient: values, norm };
    let mut outgoing = with_values(params.conv.weight.var(), |weight| {
        Ok(convolution::backward(&layer.conv, &source, weight, &incoming, wanted))
    })?;
    deposit(&params.conv.weight, std::mem::take(&mut outgoing.dweight))?;
    Ok(outgoing)
}
