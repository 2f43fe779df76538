//! Layer norm over all rows of a tensor, in pieces of rows.

use rayon::prelude::*;

use super::flow::{buffer, pieces, split};
use super::norm::ShortSums;
use super::token_tiles::{self, Norm};

/// Numbers of a tile.
const TILE_FLOATS: usize = 16 * 1024;
/// Numbers of a piece.
const PIECE_FLOATS: usize = 128 * 1024;

/// Rows after the norm.
pub(super) fn forward(xs: &[f32], norm: &Norm<'_>) -> Vec<f32> {
    let length = (PIECE_FLOATS / norm.weight.len()).max(1) * norm.weight.len();
    let mut out = buffer(xs.len());
    out.par_chunks_mut(length).zip(xs.par_chunks(length)).for_each(|(out, xs)| token_tiles::normalise(xs, norm, out));
    out
}

/// From `gradient`, that of the output, to that of the input, in place, plus `plus` if it is given. Returns the gradients of shift and scale.
pub(super) fn backward(
    xs: &[f32],
    norm: &Norm<'_>,
    gradient: &mut [f32],
    plus: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let channels = norm.weight.len();
    let pieces = pieces(1, xs.len() / channels, 1, (PIECE_FLOATS / channels).max(1), usize::MAX);
    let tile = (TILE_FLOATS / channels).max(1) * channels;
    let parts = split(gradient, &pieces, channels);
    let done: Vec<(Vec<f64>, Vec<f64>)> = pieces
        .par_iter()
        .zip(parts)
        .map_init(
            || buffer(tile),
            |value, (piece, gradient)| {
                let (mut shift, mut scale) = (vec![0.0f64; channels], vec![0.0f64; channels]);
                let mut short = ShortSums::new(channels);
                for (index, gradient) in gradient.chunks_mut(tile).enumerate() {
                    let start = piece.start * channels + index * tile;
                    let range = start..start + gradient.len();
                    short.clear();
                    let value = &mut value[..gradient.len()];
                    token_tiles::normalise_gradient(&xs[range.clone()], norm, gradient, value, &mut short);
                    add_up(&mut shift, &short.sums);
                    add_up(&mut scale, &short.products);
                    if let Some(plus) = plus {
                        super::tiles::add(gradient, &plus[range]);
                    }
                }
                (shift, scale)
            },
        )
        .collect();
    let (mut shift, mut scale) = (vec![0.0f64; channels], vec![0.0f64; channels]);
    for (of_shift, of_scale) in done {
        shift.iter_mut().zip(of_shift).for_each(|(sum, part)| *sum += part);
        scale.iter_mut().zip(of_scale).for_each(|(sum, part)| *sum += part);
    }
    (rounded(shift), rounded(scale))
}

/// Adds sums that were made in f32.
pub(super) fn add_up(sums: &mut [f64], short: &[f32]) {
    for (sum, short) in sums.iter_mut().zip(short) {
        *sum += f64::from(*short);
    }
}

/// Sums as gradients.
pub(super) fn rounded(sums: Vec<f64>) -> Vec<f32> {
    sums.into_iter().map(|sum| sum as f32).collect()
}

/// Sums of columns over all rows.
pub(super) fn column_sums(xs: &[f32], columns: usize) -> Vec<f32> {
    let tile = (TILE_FLOATS / columns).max(1) * columns;
    let length = (PIECE_FLOATS / tile).max(1) * tile;
    let done: Vec<Vec<f64>> = xs
        .par_chunks(length)
        .map(|piece| {
            let (mut sums, mut short) = (vec![0.0f64; columns], vec![0.0f32; columns]);
            for tile in piece.chunks(tile) {
                short.fill(0.0);
                for row in tile.chunks_exact(columns) {
                    super::tiles::add(&mut short, row);
                }
                add_up(&mut sums, &short);
            }
            sums
        })
        .collect();
    let mut sums = vec![0.0f64; columns];
    for part in done {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    rounded(sums)
}
