//! What flows between the layers of a block: raw numbers with what is applied when they are read, gradients likewise; and how work is
//! cut into pieces.

use super::norm::{Affine, BackwardSums, Moments, ShortSums, Slope, Statistics};
use super::tiles::{self, Activated, Extras, GATED_SUMS, Gated};
use crate::ops::{Activation, Geometry};

/// Room for numbers that are all written before any is read; in builds with debug checks it is full of NaN, which a test would see.
#[expect(
    unsafe_code,
    clippy::uninit_vec,
    reason = "filling hundreds of megabytes with zeros first costs more than the kernels"
)]
pub(super) fn buffer(length: usize) -> Vec<f32> {
    if cfg!(debug_assertions) {
        return vec![f32::NAN; length];
    }
    let mut values = Vec::with_capacity(length);
    // SAFETY: the capacity was just reserved, every pattern of bits is an f32, and the callers write all numbers before reading any.
    unsafe { values.set_len(length) };
    values
}

/// A convolution of one batch, which is cut into groups of images with batch-norm statistics of their own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Conv {
    pub(super) geometry: Geometry,
    pub(super) batch: usize,
    pub(super) groups: usize,
    pub(super) height: usize,
    pub(super) width: usize,
}

impl Conv {
    pub(super) fn output_height(&self) -> usize {
        self.geometry.output_side(self.height)
    }

    pub(super) fn output_width(&self) -> usize {
        self.geometry.output_side(self.width)
    }

    /// Input pixels of an image.
    pub(super) fn input_pixels(&self) -> usize {
        self.height * self.width
    }

    /// Output pixels of an image.
    pub(super) fn output_pixels(&self) -> usize {
        self.output_height() * self.output_width()
    }

    /// Numbers of an input image.
    pub(super) fn input_length(&self) -> usize {
        self.input_pixels() * self.geometry.in_channels
    }

    /// Numbers of an output image.
    pub(super) fn output_length(&self) -> usize {
        self.output_pixels() * self.geometry.out_channels
    }

    pub(super) fn images_per_group(&self) -> usize {
        self.batch / self.groups
    }

    pub(super) fn group_of(&self, image: usize) -> usize {
        image / self.images_per_group()
    }
}

/// What a layer reads: numbers as they are, or raw numbers of the layer before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) values: &'a [f32],
    pub(super) before: Option<Before<'a>>,
}

/// What is applied to raw numbers when they are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before<'a> {
    /// Batch norm, one for each group.
    pub(super) affines: &'a [Affine],
    /// Means of the raw numbers, one row for each group; empty when there is no backward pass.
    pub(super) means: &'a [Vec<f32>],
    pub(super) act: Activation,
    /// Factors of squeeze-excite, `(B, C)`.
    pub(super) gate: Option<&'a [f32]>,
}

impl<'a> Source<'a> {
    /// Numbers as they are.
    pub(super) fn plain(values: &'a [f32]) -> Self {
        Self { values, before: None }
    }

    /// Whether factors differ between images.
    pub(super) fn is_gated(&self) -> bool {
        self.before.is_some_and(|before| before.gate.is_some())
    }

    /// Writes the numbers from `start` on, which belong to one image, as the layer sees them.
    pub(super) fn read(&self, conv: &Conv, image: usize, start: usize, out: &mut [f32]) {
        let values = &self.values[start..start + out.len()];
        match &self.before {
            None => out.copy_from_slice(values),
            Some(before) => {
                let channels = conv.geometry.in_channels;
                let gate = before.gate.map(|gate| &gate[image * channels..(image + 1) * channels]);
                let extras = Extras { residual: None, gate };
                tiles::apply(values, out, &before.affines[conv.group_of(image)], before.act, extras);
            }
        }
    }
}

/// What becomes of a layer's raw output, tile by tile.
#[derive(Debug, Clone, Copy)]
pub(super) enum Finish<'a> {
    /// It stays, and its statistics are gathered.
    Gather,
    /// It is normalised with known statistics and activated in place.
    Apply {
        affine: &'a Affine,
        act: Activation,
        /// As long as the output.
        residual: Option<&'a [f32]>,
    },
}

/// The part of a [`Finish`] that belongs to a piece of work.
#[derive(Debug)]
pub(super) struct Finisher<'a> {
    finish: Finish<'a>,
    moments: Option<Moments>,
}

impl<'a> Finisher<'a> {
    pub(super) fn new(finish: Finish<'a>, channels: usize) -> Self {
        let moments = matches!(finish, Finish::Gather).then(|| Moments::new(channels));
        Self { finish, moments }
    }

    /// Takes a tile of whole rows that begins at the number `start` of the output.
    pub(super) fn tile(&mut self, start: usize, tile: &mut [f32]) {
        match (&self.finish, &mut self.moments) {
            (Finish::Gather, Some(moments)) => moments.add(tile),
            (Finish::Apply { affine, act, residual }, _) => {
                let residual = residual.map(|residual| (&residual[start..start + tile.len()], None));
                tiles::apply_in_place(tile, affine, *act, Extras { residual, gate: None });
            }
            (Finish::Gather, None) => {}
        }
    }

    /// What was gathered.
    pub(super) fn into_moments(self) -> Option<Moments> {
        self.moments
    }
}

/// Statistics of each group from what the pieces gathered, in their order; empty when nothing was.
pub(super) fn statistics(pieces: Vec<(usize, Option<Moments>)>, groups: usize, channels: usize) -> Vec<Statistics> {
    let mut by_group: Vec<Vec<Moments>> = vec![Vec::new(); groups];
    for (group, moments) in pieces {
        by_group[group].extend(moments);
    }
    if by_group.iter().all(Vec::is_empty) {
        return Vec::new();
    }
    by_group.into_iter().map(|parts| Moments::combine(parts, channels)).collect()
}

/// The gradient of a layer's raw output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Incoming<'a> {
    /// `dz`, or where a gate follows the layer, the gradient of its gated output; without batch norm, the gradient of the raw output.
    pub(super) gradient: &'a [f32],
    /// What the gradient comes back through.
    pub(super) norm: Option<IncomingNorm<'a>>,
}

/// Batch norm after a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct IncomingNorm<'a> {
    pub(super) raw: &'a [f32],
    /// One for each group.
    pub(super) slopes: &'a [Slope],
    pub(super) gate: Option<IncomingGate<'a>>,
}

/// Squeeze-excite after a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct IncomingGate<'a> {
    /// Batch norm, one for each group.
    pub(super) affines: &'a [Affine],
    pub(super) act: Activation,
    /// `(B, C)`.
    pub(super) factors: &'a [f32],
    /// The gradient that each activated value gets through its channel's mean, `(B, C)`.
    pub(super) through_mean: &'a [f32],
    /// Numbers of an image of the layer's output.
    pub(super) image_length: usize,
}

impl Incoming<'_> {
    /// Writes the gradients of the raw numbers from `start` on, which belong to one group, and to one image where a gate follows.
    pub(super) fn read(&self, group: usize, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        let gradient = &self.gradient[range.clone()];
        let Some(norm) = &self.norm else { return out.copy_from_slice(gradient) };
        let (raw, slope) = (&norm.raw[range], &norm.slopes[group]);
        match &norm.gate {
            None => tiles::raw_gradient(gradient, raw, slope, out),
            Some(gate) => {
                let channels = slope.mean.len();
                let of_image = start / gate.image_length * channels..(start / gate.image_length + 1) * channels;
                let of = Gated {
                    affine: &gate.affines[group],
                    act: gate.act,
                    factors: &gate.factors[of_image.clone()],
                    through_mean: &gate.through_mean[of_image],
                };
                tiles::gated_raw_gradient(&of, gradient, raw, slope, out);
            }
        }
    }
}

/// Whether a layer computes the gradient of its source, and what else belongs to it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// Nothing learns before this layer.
    Nothing,
    /// The gradient, plus this if it is given: that of a shortcut around the layers.
    Gradient { plus: Option<&'a [f32]> },
}

/// What a layer's backward pass gives.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Of the source: `dz` of the layer before when the source is raw and not gated, otherwise of the numbers as the layer read them
    /// (before the gate, if there is one). Empty when it is not wanted.
    pub(super) gradient: Vec<f32>,
    /// For the batch norm of the layer before, one for each group; only beside `dz`.
    pub(super) sums: Vec<BackwardSums>,
    /// What the layer sums for the gate of its source.
    pub(super) gate_sums: GateSums,
    /// The gradient of the weights.
    pub(super) dweight: Vec<f32>,
}

/// Sums of [`tiles::gated_sums`], image by image; empty without a gate.
#[derive(Debug, Default)]
pub(super) struct GateSums {
    /// `(B, GATED_SUMS, C)`.
    sums: Vec<f64>,
}

impl GateSums {
    pub(super) fn new(images: usize, channels: usize) -> Self {
        Self { sums: vec![0.0; images * GATED_SUMS * channels] }
    }

    /// Adds what some rows of an image gave.
    pub(super) fn add(&mut self, image: usize, short: &[f32]) {
        let sums = &mut self.sums[image * short.len()..(image + 1) * short.len()];
        sums.iter_mut().zip(short).for_each(|(sum, short)| *sum += f64::from(*short));
    }

    /// Appends the images of another part.
    pub(super) fn extend(&mut self, other: Self) {
        self.sums.extend(other.sums);
    }

    /// The gradient of the factors, `(B, C)`.
    pub(super) fn factor_gradients(&self, channels: usize) -> Vec<f32> {
        let images = self.sums.chunks_exact(GATED_SUMS * channels);
        images.flat_map(|sums| sums[..channels].iter().map(|&sum| sum as f32)).collect()
    }

    /// What the batch norm before the gate needs, when the rest of the gradient is known: factors and `through_mean` are `(B, C)`.
    pub(super) fn backward_sums(&self, conv: &Conv, factors: &[f32], through_mean: &[f32]) -> Vec<BackwardSums> {
        let channels = conv.geometry.out_channels;
        let mut all = vec![BackwardSums::new(channels); conv.groups];
        let images = self.sums.chunks_exact(GATED_SUMS * channels);
        let of_images = factors.chunks_exact(channels).zip(through_mean.chunks_exact(channels));
        for (image, (sums, (factors, through_mean))) in images.zip(of_images).enumerate() {
            let into = &mut all[conv.group_of(image)];
            for c in 0..channels {
                let (factor, through_mean) = (f64::from(factors[c]), f64::from(through_mean[c]));
                into.sums[c] += factor * sums[channels + c] + through_mean * sums[2 * channels + c];
                into.products[c] += factor * sums[3 * channels + c] + through_mean * sums[4 * channels + c];
            }
        }
        all
    }
}

/// Turns gradients of what a layer read into those of its source, tile by tile.
#[derive(Debug)]
pub(super) struct Retreat {
    short: ShortSums,
    pub(super) sums: BackwardSums,
}

impl Retreat {
    pub(super) fn new(channels: usize) -> Self {
        Self { short: ShortSums::new(channels), sums: BackwardSums::new(channels) }
    }

    /// From `gradient`, that of the activated numbers, to `dz`, that of the normalised ones, in place; `start` is where the tile begins in
    /// the source. Writes the activated numbers to `value`.
    pub(super) fn tile(
        &mut self,
        source: &Source<'_>,
        before: &Before<'_>,
        group: usize,
        start: usize,
        gradient: &mut [f32],
        value: Option<&mut [f32]>,
    ) {
        let raw = &source.values[start..start + gradient.len()];
        let of = Activated {
            raw,
            affine: &before.affines[group],
            mean: &before.means[group],
            act: before.act,
            residual: None,
        };
        self.short.clear();
        tiles::activation_gradient(&of, gradient, value, &mut self.short.as_target());
        self.sums.add(&self.short);
    }
}

/// Adds up what pieces summed, by group and in their order.
pub(super) fn backward_sums(
    pieces: impl IntoIterator<Item = (usize, BackwardSums)>,
    groups: usize,
    channels: usize,
) -> Vec<BackwardSums> {
    let mut sums = vec![BackwardSums::new(channels); groups];
    for (group, part) in pieces {
        sums[group].merge(&part);
    }
    sums
}

/// The sum of equally long parts, in their order.
pub(super) fn sum_in_order(parts: Vec<Vec<f32>>) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut sum = parts.next().unwrap_or_default();
    for part in parts {
        tiles::add(&mut sum, &part);
    }
    sum
}

/// A piece of the rows of a batch, within one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) group: usize,
    pub(super) start: usize,
    pub(super) rows: usize,
}

/// Cuts `groups` times `rows_per_group` rows into pieces that are multiples of `unit` rows, about `target` rows each and about
/// `most` in all. A function of the shape alone.
pub(super) fn pieces(groups: usize, rows_per_group: usize, unit: usize, target: usize, most: usize) -> Vec<Piece> {
    let units = rows_per_group.div_ceil(unit);
    let count = rows_per_group.div_ceil(target.max(1)).min(most.div_ceil(groups)).clamp(1, units.max(1));
    let rows = units.div_ceil(count) * unit;
    (0..groups)
        .flat_map(|group| {
            (0..rows_per_group).step_by(rows.max(1)).map(move |start| Piece {
                group,
                start: group * rows_per_group + start,
                rows: rows.min(rows_per_group - start),
            })
        })
        .collect()
}

/// Cuts `values`, rows of `width` numbers, as the pieces say.
pub(super) fn split<'a>(mut values: &'a mut [f32], pieces: &[Piece], width: usize) -> Vec<&'a mut [f32]> {
    pieces
        .iter()
        .map(|piece| {
            let (part, rest) = std::mem::take(&mut values).split_at_mut(piece.rows * width);
            values = rest;
            part
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_all_rows_once_and_stay_in_their_group() {
        for (groups, rows, unit, target, most) in
            [(1, 100, 1, 30, 8), (4, 49, 7, 10, 16), (2, 1, 1, 5, 4), (3, 50, 25, 10, 2), (1, 7, 1, 100, 64)]
        {
            let pieces = pieces(groups, rows, unit, target, most);
            let mut next = 0;
            for piece in &pieces {
                assert_eq!(piece.start, next);
                assert_eq!(piece.group, piece.start / rows);
                assert!(
                    piece.rows > 0
                        && (piece.rows.is_multiple_of(unit) || piece.start + piece.rows == (piece.group + 1) * rows)
                );
                next += piece.rows;
            }
            assert_eq!(next, groups * rows);
        }
    }
}
