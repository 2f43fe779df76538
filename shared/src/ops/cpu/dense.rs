//! Linear layers over many rows, with what comes before and after them applied while a tile of rows is in cache. Weights are
//! `[in][out]`.

use rayon::prelude::*;

use super::flow::{buffer, pieces, split, sum_in_order};
use super::gemm::{Packed, Rows, multiply, multiply_transposed};
use super::layer_norm::{add_up, rounded};
use super::norm::{Affine, ShortSums};
use super::tiles::{self, Activated, Extras};
use super::token_tiles::{Norm, normalise, normalise_gradient};
use crate::ops::Activation;

/// Numbers of a tile of input and output together: about half of a core's second cache.
const TILE_FLOATS: usize = 110_000;

/// What a layer reads.
#[derive(Debug, Clone, Copy)]
pub(super) enum Read<'a> {
    /// Numbers as they are.
    Plain(&'a [f32]),
    /// Numbers after a layer norm.
    Normed(&'a [f32], Norm<'a>),
    /// `act(raw + shift)`; the affine map's scale is 1.
    Activated(&'a [f32], &'a Affine, Activation),
}

impl<'a> Read<'a> {
    fn values(&self) -> &'a [f32] {
        match *self {
            Self::Plain(values) | Self::Normed(values, _) | Self::Activated(values, ..) => values,
        }
    }

    /// The numbers from `start` on as the layer sees them; `scratch` may hold them.
    fn tile<'s>(&self, start: usize, scratch: &'s mut [f32]) -> &'s [f32]
    where
        'a: 's,
    {
        let values = &self.values()[start..start + scratch.len()];
        match self {
            Self::Plain(_) => return values,
            Self::Normed(_, norm) => normalise(values, norm, scratch),
            Self::Activated(_, affine, act) => tiles::apply(values, scratch, affine, *act, Extras::default()),
        }
        scratch
    }

    fn needs_scratch(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

/// The sizes of a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

impl Sizes {
    /// Rows of a tile.
    fn tile_rows(&self) -> usize {
        (TILE_FLOATS / (self.inputs.min(512) + self.outputs) / 24 * 24).clamp(48, 480)
    }

    /// Pieces of a backward pass: each sums the gradient of the weights on its own.
    fn backward_pieces(&self) -> usize {
        match self.inputs * self.outputs {
            0..=65_536 => 16,
            65_537..=524_288 => 8,
            _ => 4,
        }
    }
}

/// What becomes of the products with the weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finish<'a> {
    /// Scale and shift.
    pub(super) affine: &'a Affine,
    pub(super) act: Activation,
    /// Added before the activation; as long as the output.
    pub(super) residual: Option<&'a [f32]>,
}

/// `act(read weight * scale + shift + residual)`, or `read weight` where nothing is to become of it.
pub(super) fn forward(sizes: Sizes, read: Read<'_>, weight: &[f32], finish: Option<Finish<'_>>) -> Vec<f32> {
    let Sizes { rows, inputs, outputs } = sizes;
    let mut out = buffer(rows * outputs);
    let packed = Packed::new(weight, inputs, outputs, outputs, 1);
    let tile_rows = sizes.tile_rows();
    let pieces = pieces(1, rows, 1, tile_rows, usize::MAX);
    let parts = split(&mut out, &pieces, outputs);
    pieces.par_iter().zip(parts).for_each_init(
        || buffer(if read.needs_scratch() { tile_rows * inputs } else { 0 }),
        |scratch, (piece, out)| {
            let left = match read {
                Read::Plain(values) => &values[piece.start * inputs..][..piece.rows * inputs],
                _ => read.tile(piece.start * inputs, &mut scratch[..piece.rows * inputs]),
            };
            multiply(piece.rows, left, inputs, &packed, out, outputs, false);
            if let Some(Finish { affine, act, residual }) = finish {
                let residual = residual.map(|residual| (&residual[piece.start * outputs..][..out.len()], None));
                tiles::apply_in_place(out, affine, act, Extras { residual, gate: None });
            }
        },
    );
    out
}

/// What comes back through a layer.
#[derive(Debug)]
pub(super) struct Gradients {
    /// Of what is read, before norm or activation; empty when it is not wanted.
    pub(super) input: Vec<f32>,
    /// Of the weights.
    pub(super) weight: Vec<f32>,
    /// Of the shift after them.
    pub(super) bias: Vec<f32>,
    /// Of the shift before: a layer norm's, or that before an activation.
    pub(super) shift: Vec<f32>,
    /// Of the scale of a layer norm.
    pub(super) scale: Vec<f32>,
}

/// Sums of columns over a piece.
#[derive(Debug)]
struct Sums {
    bias: Vec<f64>,
    shift: Vec<f64>,
    scale: Vec<f64>,
}

impl Sums {
    fn new(sizes: Sizes) -> Self {
        Self { bias: vec![0.0; sizes.outputs], shift: vec![0.0; sizes.inputs], scale: vec![0.0; sizes.inputs] }
    }
}

/// Gradients of everything, from `dout`, that of `read weight`. Where `factors` are given, one for each output, what comes back to the input
/// is that of `factors * dout`, all else is not. `plus` is added to the gradient of the input; without a wish for that, norms and activations
/// get none either.
pub(super) fn backward(
    sizes: Sizes,
    read: Read<'_>,
    weight: &[f32],
    dout: &[f32],
    factors: Option<&[f32]>,
    plus: Option<&[f32]>,
) -> Gradients {
    let Sizes { rows, inputs, outputs } = sizes;
    let packed = Packed::from_rows(outputs, inputs, |row, first, target| {
        let factor = factors.map_or(1.0, |factors| factors[row]);
        for (offset, slot) in target.iter_mut().enumerate() {
            *slot = weight[(first + offset) * outputs + row] * factor;
        }
    });
    let tile_rows = sizes.tile_rows();
    let pieces = pieces(1, rows, 1, tile_rows, sizes.backward_pieces());
    let mut input = buffer(rows * inputs);
    let parts = split(&mut input, &pieces, inputs);
    let done: Vec<(Vec<f32>, Sums)> = pieces
        .par_iter()
        .zip(parts)
        .map_init(
            || buffer(if read.needs_scratch() { tile_rows * inputs } else { 0 }),
            |scratch, (piece, input)| {
                let (mut dweight, mut sums) = (vec![0.0; inputs * outputs], Sums::new(sizes));
                let (mut short, mut short_bias) = (ShortSums::new(inputs), vec![0.0; outputs]);
                for (index, gradient) in input.chunks_mut(tile_rows * inputs).enumerate() {
                    let first = piece.start + index * tile_rows;
                    let (start, count) = (first * inputs, gradient.len() / inputs);
                    let dout = &dout[first * outputs..][..count * outputs];
                    short_bias.fill(0.0);
                    for row in dout.chunks_exact(outputs) {
                        tiles::add(&mut short_bias, row);
                    }
                    add_up(&mut sums.bias, &short_bias);
                    multiply(count, dout, outputs, &packed, gradient, inputs, false);
                    short.clear();
                    let values = &read.values()[start..start + gradient.len()];
                    let left = match read {
                        Read::Plain(_) => values,
                        Read::Normed(_, norm) => {
                            let value = &mut scratch[..gradient.len()];
                            normalise_gradient(values, &norm, gradient, value, &mut short);
                            &*value
                        }
                        Read::Activated(_, affine, act) => {
                            let value = &mut scratch[..gradient.len()];
                            let mean = &vec![0.0; inputs];
                            let of = Activated { raw: values, affine, mean, act, residual: None };
                            tiles::activation_gradient(&of, gradient, Some(value), &mut short.as_target());
                            &*value
                        }
                    };
                    add_up(&mut sums.shift, &short.sums);
                    add_up(&mut sums.scale, &short.products);
                    if let Some(plus) = plus {
                        tiles::add(gradient, &plus[start..start + gradient.len()]);
                    }
                    let shared = [Rows { left, right: dout, count }];
                    multiply_transposed([inputs, outputs], &shared, inputs, outputs, &mut dweight, outputs);
                }
                (dweight, sums)
            },
        )
        .collect();
    let (mut dweights, mut total) = (Vec::with_capacity(done.len()), Sums::new(sizes));
    for (dweight, sums) in done {
        dweights.push(dweight);
        for (total, part) in
            [(&mut total.bias, sums.bias), (&mut total.shift, sums.shift), (&mut total.scale, sums.scale)]
        {
            total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
        }
    }
    let Sums { bias, shift, scale } = total;
    let weight = sum_in_order(dweights);
    Gradients { input, weight, bias: rounded(bias), shift: rounded(shift), scale: rounded(scale) }
}
