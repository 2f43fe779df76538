//! 1x1 convolutions of stride 1: matrix products over all pixels, tile by tile, with what comes before and after each tile applied
//! while it is in cache. Weights are `[in][out]`.

use rayon::prelude::*;

use super::flow::{
    Conv, Finish, Finisher, GateSums, Incoming, Outgoing, Piece, Retreat, Source, Wanted, backward_sums, buffer,
    pieces, split, statistics, sum_in_order,
};
use super::gemm::{Packed, Rows, multiply, multiply_transposed};
use super::norm::Statistics;
use super::tiles::{self, Activated, GATED_SUMS};

/// Numbers of a tile of input and output together: about half of a core's second cache.
const TILE_FLOATS: usize = 110_000;
/// Most pieces of a forward pass.
const MOST_PIECES: usize = 64;

/// Rows of a tile.
fn tile_rows(inputs: usize, outputs: usize) -> usize {
    (TILE_FLOATS / (inputs.min(512) + outputs) / 24 * 24).clamp(48, 480)
}

/// The tiles of a piece, as first rows and numbers of rows; none reaches over the end of an image when `images` says how many rows
/// those have.
fn tiles_of(piece: Piece, rows: usize, images: Option<usize>) -> impl Iterator<Item = (usize, usize)> {
    let end = piece.start + piece.rows;
    let mut next = piece.start;
    std::iter::from_fn(move || {
        let start = next;
        next = (start + rows).min(end);
        if let Some(pixels) = images {
            next = next.min((start / pixels + 1) * pixels);
        }
        (start < end).then_some((start, next - start))
    })
}

/// `out = conv(source)` finished as `finish` says; returns the groups' statistics when they are gathered.
pub(super) fn forward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    out: &mut [f32],
    finish: Finish<'_>,
) -> Vec<Statistics> {
    let (inputs, outputs) = (conv.geometry.in_channels, conv.geometry.out_channels);
    let pixels = conv.input_pixels();
    let rows = tile_rows(inputs, outputs);
    let pieces = pieces(conv.groups, conv.images_per_group() * pixels, 1, rows, MOST_PIECES);
    let packed = Packed::new(weight, inputs, outputs, outputs, 1);
    let images = source.before.is_some().then_some(pixels).filter(|_| source.is_gated());
    let parts = split(out, &pieces, outputs);
    let gathered = pieces
        .par_iter()
        .zip(parts)
        .map_init(
            || buffer(if source.before.is_some() { rows * inputs } else { 0 }),
            |scratch, (&piece, out)| {
                let mut finisher = Finisher::new(finish, outputs);
                for (start, count) in tiles_of(piece, rows, images) {
                    let tile = &mut out[(start - piece.start) * outputs..][..count * outputs];
                    let left = if source.before.is_some() {
                        let read = &mut scratch[..count * inputs];
                        source.read(conv, start / pixels, start * inputs, read);
                        &*read
                    } else {
                        &source.values[start * inputs..][..count * inputs]
                    };
                    multiply(count, left, inputs, &packed, tile, outputs, false);
                    finisher.tile(start * outputs, tile);
                }
                (piece.group, finisher.into_moments())
            },
        )
        .collect();
    statistics(gathered, conv.groups, outputs)
}

/// Pieces of a backward pass: each sums the gradient of the weights on its own.
fn backward_pieces(inputs: usize, outputs: usize) -> usize {
    match inputs * outputs {
        0..=65_536 => 16,
        65_537..=524_288 => 8,
        _ => 4,
    }
}

/// Gradients of the weights and of the source.
pub(super) fn backward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    incoming: &Incoming<'_>,
    wanted: Wanted<'_>,
) -> Outgoing {
    let (inputs, outputs) = (conv.geometry.in_channels, conv.geometry.out_channels);
    let pixels = conv.input_pixels();
    let rows = tile_rows(inputs, outputs);
    let gate = source.before.and_then(|before| before.gate);
    let unit = if gate.is_some() { pixels } else { 1 };
    let pieces = pieces(conv.groups, conv.images_per_group() * pixels, unit, rows, backward_pieces(inputs, outputs));
    let wants_gradient = matches!(wanted, Wanted::Gradient { .. });
    let packed = Packed::new(weight, outputs, if wants_gradient { inputs } else { 0 }, 1, outputs);
    let mut gradient = buffer(if wants_gradient { conv.batch * conv.input_length() } else { 0 });
    let width = if wants_gradient { inputs } else { 0 };
    let parts = split(&mut gradient, &pieces, width);
    let done: Vec<(usize, Retreat, Vec<f32>, GateSums)> = pieces
        .par_iter()
        .zip(parts)
        .map_init(
            || (buffer(rows * outputs), buffer(if source.before.is_some() { rows * inputs } else { 0 })),
            |(draw, read), (&piece, gradient)| {
                let mut dweight = vec![0.0; inputs * outputs];
                let mut gate_sums = GateSums::new(if gate.is_some() { piece.rows / pixels } else { 0 }, inputs);
                let mut short = vec![0.0; if gate.is_some() { GATED_SUMS * inputs } else { 0 }];
                let mut retreat = Retreat::new(inputs);
                for (start, count) in tiles_of(piece, rows, gate.map(|_| pixels)) {
                    let draw = &mut draw[..count * outputs];
                    incoming.read(piece.group, start * outputs, draw);
                    let tile = if wants_gradient {
                        &mut gradient[(start - piece.start) * inputs..][..count * inputs]
                    } else {
                        &mut []
                    };
                    if wants_gradient {
                        multiply(count, draw, outputs, &packed, tile, inputs, false);
                    }
                    let values = match (&source.before, gate) {
                        (None, _) => {
                            if let Wanted::Gradient { plus: Some(plus) } = wanted {
                                tiles::add(tile, &plus[start * inputs..][..count * inputs]);
                            }
                            &source.values[start * inputs..][..count * inputs]
                        }
                        (Some(before), None) => {
                            let read = &mut read[..count * inputs];
                            retreat.tile(source, before, piece.group, start * inputs, tile, Some(read));
                            &*read
                        }
                        (Some(before), Some(gate)) => {
                            let read = &mut read[..count * inputs];
                            let image = start / pixels;
                            let of = Activated {
                                raw: &source.values[start * inputs..][..count * inputs],
                                affine: &before.affines[piece.group],
                                mean: &before.means[piece.group],
                                act: before.act,
                                residual: None,
                            };
                            short.fill(0.0);
                            tiles::gated_sums(&of, tile, &gate[image * inputs..][..inputs], read, &mut short);
                            gate_sums.add(image - piece.start / pixels, &short);
                            &*read
                        }
                    };
                    let shared = [Rows { left: values, right: draw, count }];
                    multiply_transposed([inputs, outputs], &shared, inputs, outputs, &mut dweight, outputs);
                }
                (piece.group, retreat, dweight, gate_sums)
            },
        )
        .collect();
    let (mut sums, mut dweights, mut gate_sums) = (Vec::new(), Vec::new(), GateSums::default());
    for (group, retreat, dweight, part) in done {
        sums.push((group, retreat.sums));
        dweights.push(dweight);
        gate_sums.extend(part);
    }
    Outgoing { gradient, sums: backward_sums(sums, conv.groups, inputs), gate_sums, dweight: sum_in_order(dweights) }
}
