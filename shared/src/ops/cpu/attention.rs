//! Attention between rows: similarities of queries and keys exist for one tile of queries of one head at a time, in cache, and are
//! computed again in the backward pass.

use rayon::prelude::*;

use super::flow::buffer;
use super::gemm::{Packed, Rows, multiply, multiply_transposed};
use super::token_tiles::{softmax, softmax_gradient};
use crate::ops::token_blocks::AttentionSizes;

/// Queries of a tile.
const TILE_ROWS: usize = 48;

/// One head of one image in a tensor of queries, keys and values.
#[derive(Debug, Clone, Copy)]
struct Head<'a> {
    /// Rows of `3 * heads * width` numbers, from the head's first query on.
    qkv: &'a [f32],
    sizes: AttentionSizes,
}

impl<'a> Head<'a> {
    /// Numbers of a row.
    fn stride(&self) -> usize {
        3 * self.sizes.heads * self.sizes.width
    }

    fn queries(&self, first: usize) -> &'a [f32] {
        &self.qkv[first * self.stride()..]
    }

    fn keys(&self) -> &'a [f32] {
        &self.qkv[self.sizes.heads * self.sizes.width..]
    }

    fn values(&self) -> &'a [f32] {
        &self.qkv[2 * self.sizes.heads * self.sizes.width..]
    }

    /// What similarities are multiplied by.
    fn factor(&self) -> f32 {
        1.0 / (self.sizes.width as f32).sqrt()
    }

    /// Rows of keys or values as the columns of a right factor.
    fn as_columns(&self, rows: &[f32]) -> Packed {
        Packed::new(rows, self.sizes.width, self.sizes.tokens, 1, self.stride())
    }

    /// Rows of keys or values as the rows of a right factor.
    fn as_rows(&self, rows: &[f32]) -> Packed {
        Packed::new(rows, self.sizes.tokens, self.sizes.width, self.stride(), 1)
    }

    /// First queries and numbers of queries of the tiles.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize)> {
        let tokens = self.sizes.tokens;
        let rows = tokens.div_ceil(tokens.div_ceil(TILE_ROWS));
        (0..tokens).step_by(rows).map(move |first| (first, rows.min(tokens - first)))
    }

    /// The shares of a tile of queries in all values.
    fn shares(&self, first: usize, count: usize, keys: &Packed, shares: &mut [f32]) {
        let tokens = self.sizes.tokens;
        multiply(count, self.queries(first), self.stride(), keys, shares, tokens, false);
        softmax(shares, tokens, self.factor());
    }

    /// `(N, width)`.
    fn forward(&self) -> Vec<f32> {
        let AttentionSizes { tokens, width, .. } = self.sizes;
        let (keys, values) = (self.as_columns(self.keys()), self.as_rows(self.values()));
        let (mut out, mut shares) = (buffer(tokens * width), buffer(TILE_ROWS * tokens));
        for (first, count) in self.tiles() {
            let shares = &mut shares[..count * tokens];
            self.shares(first, count, &keys, shares);
            multiply(count, shares, tokens, &values, &mut out[first * width..], width, false);
        }
        out
    }

    /// Gradients of queries, keys and values side by side, `(N, 3, width)`, from that of the head's output, rows of `stride` numbers.
    fn backward(&self, dout: &[f32], stride: usize) -> Vec<f32> {
        let AttentionSizes { tokens, width, .. } = self.sizes;
        let (keys, values) = (self.as_columns(self.keys()), self.as_columns(self.values()));
        let key_rows = self.as_rows(self.keys());
        let mut gradients = vec![0.0; tokens * 3 * width];
        let (mut shares, mut dshares) = (buffer(TILE_ROWS * tokens), buffer(TILE_ROWS * tokens));
        for (first, count) in self.tiles() {
            let (shares, dshares) = (&mut shares[..count * tokens], &mut dshares[..count * tokens]);
            let dout = &dout[first * stride..];
            self.shares(first, count, &keys, shares);
            multiply(count, dout, stride, &values, dshares, tokens, false);
            let of_values = [Rows { left: shares, right: dout, count }];
            let into = &mut gradients[2 * width..];
            multiply_transposed([tokens, width], &of_values, tokens, stride, into, 3 * width);
            softmax_gradient(shares, dshares, tokens, self.factor());
            let into = &mut gradients[first * 3 * width..];
            multiply(count, dshares, tokens, &key_rows, into, 3 * width, false);
            let of_keys = [Rows { left: dshares, right: self.queries(first), count }];
            let into = &mut gradients[width..];
            multiply_transposed([tokens, width], &of_keys, tokens, self.stride(), into, 3 * width);
        }
        gradients
    }
}

/// Copies a head's columns, parts of `width` numbers, to their places in rows of `parts * heads * width` numbers.
fn place(from: &[f32], head: usize, [parts, heads, width]: [usize; 3], to: &mut [f32]) {
    for (from, to) in from.chunks_exact(parts * width).zip(to.chunks_exact_mut(parts * heads * width)) {
        for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(heads * width)) {
            to[head * width..(head + 1) * width].copy_from_slice(from);
        }
    }
}

/// Runs `work` for each head of each image, given the index of the image and of the head, and puts the rows that it returns, `(N, parts, width)`,
/// into their place in `(B, N, parts, heads, width)`. What else it returns comes in the order of images, then heads.
pub(super) fn by_heads<T: Send>(
    sizes: AttentionSizes,
    parts: usize,
    work: impl Fn(usize, usize) -> (Vec<f32>, T) + Sync,
) -> (Vec<f32>, Vec<T>) {
    let AttentionSizes { batch, tokens, heads, width } = sizes;
    let length = tokens * parts * heads * width;
    let mut out = buffer(batch * length);
    let others = out.par_chunks_mut(length).enumerate().flat_map(|(image, out)| {
        let done: Vec<(Vec<f32>, T)> = (0..heads).into_par_iter().map(|head| work(image, head)).collect();
        let placed = done.into_iter().enumerate().map(|(head, (rows, other))| {
            place(&rows, head, [parts, heads, width], out);
            other
        });
        placed.collect::<Vec<T>>()
    });
    let others = others.collect();
    (out, others)
}

fn head(qkv: &[f32], sizes: AttentionSizes, image: usize, head: usize) -> Head<'_> {
    let length = sizes.tokens * 3 * sizes.heads * sizes.width;
    Head { qkv: &qkv[image * length + head * sizes.width..(image + 1) * length], sizes }
}

/// See [`crate::ops::attention`].
pub(super) fn forward(qkv: &[f32], sizes: AttentionSizes) -> Vec<f32> {
    by_heads(sizes, 1, |image, index| (head(qkv, sizes, image, index).forward(), ())).0
}

/// The gradient of `qkv` from that of the output.
pub(super) fn backward(qkv: &[f32], dout: &[f32], sizes: AttentionSizes) -> Vec<f32> {
    let stride = sizes.heads * sizes.width;
    let gradients = by_heads(sizes, 3, |image, index| {
        let dout = &dout[image * sizes.tokens * stride + index * sizes.width..];
        (head(qkv, sizes, image, index).backward(dout, stride), ())
    });
    gradients.0
}
