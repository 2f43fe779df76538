//! Attention between the channels of a head: similarities are a small matrix, products over all tokens.

use super::attention::by_heads;
use super::gemm::{Packed, Rows, multiply, multiply_transposed};
use super::token_tiles::{softmax, softmax_gradient};
use crate::ops::token_blocks::AttentionSizes;

/// The length below which a channel is divided by this instead, as `PyTorch`'s `normalize`.
const MIN_LENGTH: f32 = 1e-12;

/// One head of one image in a tensor of queries, keys and values.
#[derive(Debug, Clone, Copy)]
struct Head<'a> {
    /// Rows of `3 * heads * width` numbers, from the head's first query on.
    qkv: &'a [f32],
    sizes: AttentionSizes,
    temperature: f32,
}

/// Similarities of a head's channels and what they are made of.
#[derive(Debug)]
struct Similarities {
    /// Cosines of queries (rows) and keys (columns).
    cosines: Vec<f32>,
    /// Lengths of queries and of keys over the tokens.
    lengths: [Vec<f32>; 2],
    /// The shares of queries in values: softmax of the cosines times the temperature.
    shares: Vec<f32>,
}

impl<'a> Head<'a> {
    /// Numbers of a row.
    fn stride(&self) -> usize {
        3 * self.sizes.heads * self.sizes.width
    }

    /// Queries, keys or values: part 0, 1 or 2.
    fn part(&self, part: usize) -> &'a [f32] {
        &self.qkv[part * self.sizes.heads * self.sizes.width..]
    }

    fn length_of_channels(&self, part: usize) -> Vec<f32> {
        let mut squares = vec![0.0f64; self.sizes.width];
        for row in self.part(part).chunks(self.stride()) {
            for (square, &x) in squares.iter_mut().zip(row) {
                *square += f64::from(x) * f64::from(x);
            }
        }
        let length = |square: f64| square.sqrt() as f32;
        // NaN stays NaN.
        squares
            .into_iter()
            .map(|square| if length(square) < MIN_LENGTH { MIN_LENGTH } else { length(square) })
            .collect()
    }

    fn similarities(&self) -> Similarities {
        let AttentionSizes { tokens, width, .. } = self.sizes;
        let lengths = [self.length_of_channels(0), self.length_of_channels(1)];
        let mut cosines = vec![0.0; width * width];
        let shared = [Rows { left: self.part(0), right: self.part(1), count: tokens }];
        multiply_transposed([width, width], &shared, self.stride(), self.stride(), &mut cosines, width);
        for (row, query) in cosines.chunks_exact_mut(width).zip(&lengths[0]) {
            for (cosine, key) in row.iter_mut().zip(&lengths[1]) {
                *cosine /= query * key;
            }
        }
        let mut shares: Vec<f32> = cosines.iter().map(|cosine| cosine * self.temperature).collect();
        softmax(&mut shares, width, 1.0);
        Similarities { cosines, lengths, shares }
    }

    /// `(N, width)`.
    fn forward(&self) -> Vec<f32> {
        let AttentionSizes { tokens, width, .. } = self.sizes;
        let shares = Packed::new(&self.similarities().shares, width, width, 1, width);
        let mut out = vec![0.0; tokens * width];
        multiply(tokens, self.part(2), self.stride(), &shares, &mut out, width, false);
        out
    }

    /// Gradients of queries, keys and values side by side, `(N, 3, width)`, and that of the temperature, from that of the head's output,
    /// rows of `stride` numbers.
    fn backward(&self, dout: &[f32], stride: usize) -> (Vec<f32>, f32) {
        let AttentionSizes { tokens, width, .. } = self.sizes;
        let Similarities { cosines, lengths, shares } = self.similarities();
        let mut gradients = vec![0.0; tokens * 3 * width];
        let right = Packed::new(&shares, width, width, width, 1);
        multiply(tokens, dout, stride, &right, &mut gradients[2 * width..], 3 * width, false);

        let mut dcosines = vec![0.0; width * width];
        let shared = [Rows { left: dout, right: self.part(2), count: tokens }];
        multiply_transposed([width, width], &shared, stride, self.stride(), &mut dcosines, width);
        softmax_gradient(&shares, &mut dcosines, width, 1.0);
        let products = dcosines.iter().zip(&cosines).map(|(d, cosine)| f64::from(*d) * f64::from(*cosine));
        let dtemperature = products.sum::<f64>() as f32;

        // A query's gradient: the keys, of unit length, times those of its cosines, less what lies along the query.
        let mut mixing = vec![0.0; width * width];
        let (mut along_queries, mut along_keys) = (vec![0.0; width], vec![0.0; width]);
        for query in 0..width {
            for key in 0..width {
                let at = query * width + key;
                let dcosine = dcosines[at] * self.temperature;
                mixing[at] = dcosine / (lengths[0][query] * lengths[1][key]);
                along_queries[query] += dcosine * cosines[at];
                along_keys[key] += dcosine * cosines[at];
            }
        }
        for (part, along, packed) in [
            (0, along_queries, Packed::new(&mixing, width, width, 1, width)),
            (1, along_keys, Packed::new(&mixing, width, width, width, 1)),
        ] {
            let into = &mut gradients[part * width..];
            multiply(tokens, self.part(1 - part), self.stride(), &packed, into, 3 * width, false);
            // A channel that was not divided by its length has no length to keep.
            let shrink = along.into_iter().zip(&lengths[part]);
            let shrink: Vec<f32> = shrink
                .map(|(along, &length)| if length > MIN_LENGTH { along / (length * length) } else { 0.0 })
                .collect();
            let rows = self.part(part).chunks(self.stride());
            for (row, gradient) in rows.zip(gradients.chunks_exact_mut(3 * width)) {
                let gradient = &mut gradient[part * width..(part + 1) * width];
                for ((gradient, x), shrink) in gradient.iter_mut().zip(row).zip(&shrink) {
                    *gradient -= x * shrink;
                }
            }
        }
        (gradients, dtemperature)
    }
}

fn head<'a>(qkv: &'a [f32], temperatures: &[f32], sizes: AttentionSizes, image: usize, head: usize) -> Head<'a> {
    let length = sizes.tokens * 3 * sizes.heads * sizes.width;
    let qkv = &qkv[image * length + head * sizes.width..(image + 1) * length];
    Head { qkv, sizes, temperature: temperatures[head] }
}

/// See [`crate::ops::cross_covariance_attention`].
pub(super) fn forward(qkv: &[f32], temperatures: &[f32], sizes: AttentionSizes) -> Vec<f32> {
    by_heads(sizes, 1, |image, index| (head(qkv, temperatures, sizes, image, index).forward(), ())).0
}

/// The gradients of `qkv` and of the temperatures, from that of the output.
pub(super) fn backward(qkv: &[f32], temperatures: &[f32], dout: &[f32], sizes: AttentionSizes) -> (Vec<f32>, Vec<f32>) {
    let stride = sizes.heads * sizes.width;
    let (gradient, of_heads) = by_heads(sizes, 3, |image, index| {
        let dout = &dout[image * sizes.tokens * stride + index * sizes.width..(image + 1) * sizes.tokens * stride];
        head(qkv, temperatures, sizes, image, index).backward(dout, stride)
    });
    let mut dtemperatures = vec![0.0f64; sizes.heads];
    for of_image in of_heads.chunks_exact(sizes.heads) {
        for (sum, d) in dtemperatures.iter_mut().zip(of_image) {
            *sum += f64::from(*d);
        }
    }
    (gradient, dtemperatures.into_iter().map(|d| d as f32).collect())
}
