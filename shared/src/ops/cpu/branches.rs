//! Sums of a shortcut and a branch with a factor for each channel, in pieces of rows.

use rayon::prelude::*;

use super::flow::{buffer, pieces, split};
use super::layer_norm::{add_up, rounded};
use super::norm::{Affine, ShortSums};
use super::tiles::{self, Extras};
use crate::ops::Activation;

/// Numbers of a tile.
const TILE_FLOATS: usize = 16 * 1024;
/// Numbers of a piece.
const PIECE_FLOATS: usize = 128 * 1024;

/// `xs + branch * scale`, where the map's shift is 0.
pub(super) fn add(xs: &[f32], branch: &[f32], scale: &Affine) -> Vec<f32> {
    let length = (PIECE_FLOATS / scale.channels()).max(1) * scale.channels();
    let mut out = buffer(xs.len());
    out.par_chunks_mut(length).zip(xs.par_chunks(length)).zip(branch.par_chunks(length)).for_each(
        |((out, xs), branch)| {
            let extras = Extras { residual: Some((xs, None)), gate: None };
            tiles::apply(branch, out, scale, Activation::Identity, extras);
        },
    );
    out
}

/// Gradients of the branch and of the scale, from that of the sum.
pub(super) fn add_gradient(branch: &[f32], dout: &[f32], scale: &Affine) -> (Vec<f32>, Vec<f32>) {
    let channels = scale.channels();
    let pieces = pieces(1, branch.len() / channels, 1, (PIECE_FLOATS / channels).max(1), usize::MAX);
    let tile = (TILE_FLOATS / channels).max(1) * channels;
    let origin = vec![0.0; channels];
    let mut dbranch = buffer(branch.len());
    let parts = split(&mut dbranch, &pieces, channels);
    let done: Vec<Vec<f64>> = pieces
        .par_iter()
        .zip(parts)
        .map(|(piece, dbranch)| {
            let (mut sums, mut short) = (vec![0.0f64; channels], ShortSums::new(channels));
            for (index, dbranch) in dbranch.chunks_mut(tile).enumerate() {
                let start = piece.start * channels + index * tile;
                let range = start..start + dbranch.len();
                short.clear();
                tiles::gradient_sums(&dout[range.clone()], &branch[range.clone()], &origin, &mut short.as_target());
                add_up(&mut sums, &short.products);
                tiles::apply(&dout[range], dbranch, scale, Activation::Identity, Extras::default());
            }
            sums
        })
        .collect();
    let mut sums = vec![0.0f64; channels];
    for part in done {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    (dbranch, rounded(sums))
}
