//! Dense 3x3 convolutions of stride 1 by Winograd's minimal filtering: 4x4 outputs of a channel cost 36 products instead of 144.
//!
//! Tiles of 6x6 inputs and the weights are transformed, multiplied at each of the 36 positions as matrices over channels, and the
//! products transformed back. The backward pass runs the same maps the other way: with `V = B' d B`, `U = G g G'` and
//! `Y = A' (U . V) A` forward, `D = A dY A'` gives `dU = V' D` and `dV = D U'`, from which `dg = G' dU G` and `dd = B dV B'`.
//!
//! Interpolation points are 0, ±2/3, ±3/2 and infinity. Against the usual 0, ±1, ±2 they halve the rounding error, to about 1e-6 of
//! the result's norm at 512 channels (a direct sum has about 3e-7).
//!
//! Source: Lavin and Gray, arXiv 1509.09308, section 4; on the choice of points, Barabasz et al., arXiv 1803.10986.
#![expect(unsafe_code, reason = "vector kernels over raw pointers; every safe function checks the sizes")]
#![expect(clippy::multiple_unsafe_ops_per_block, clippy::inline_always, reason = "kernels are one unsafe computation")]

use rayon::prelude::*;

use super::flow::{
    Conv, Finish, Finisher, GateSums, Incoming, Outgoing, Retreat, Source, Wanted, backward_sums, buffer, statistics,
};
use super::gemm::{MAX_ROW_PIECES, Packed, Rows, multiply_factor, multiply_transposed};
use super::norm::Statistics;
use super::simd::{Simd, dispatch};
use super::tiles;

/// Side of an output tile.
const OUT: usize = 4;
/// Side of an input tile.
const IN: usize = 6;
/// Positions in a transformed tile.
const POSITIONS: usize = IN * IN;
/// Numbers of a transformed buffer: what fits a shared third cache besides its partners.
const CHUNK_FLOATS: usize = 2_400_000;
/// Tiles that are multiplied together, about.
const UNIT_TILES: usize = 64;

/// The first interpolation point, and its powers; the second is its inverse.
const A1: f32 = 2.0 / 3.0;
const A2: f32 = A1 * A1;
const A3: f32 = A2 * A1;
const B1: f32 = 3.0 / 2.0;
const B2: f32 = B1 * B1;
const B3: f32 = B2 * B1;
const SUM: f32 = A2 + B2;
/// What the weights at the points are divided by: the products of the distances to the other points.
const F_A: f32 = 1.0 / (2.0 * A2 * (A2 - B2));
const F_B: f32 = 1.0 / (2.0 * B2 * (B2 - A2));

/// Whether a convolution is of this kind: where the tiles are filled well enough that their products are fewer. The batch has no say,
/// so that an image's result does not depend on the others.
pub(super) fn applies(conv: &Conv) -> bool {
    let geometry = conv.geometry;
    let tiles = conv.output_height().div_ceil(OUT) * conv.output_width().div_ceil(OUT);
    let pays = 4 * 9 * conv.output_pixels() > 5 * POSITIONS * tiles;
    !geometry.depthwise && geometry.kernel == 3 && geometry.stride == 1 && geometry.in_channels >= 8 && pays
}

/// How the images are cut into tiles, and those into units that are multiplied together.
#[derive(Debug, Clone, Copy)]
struct Plan {
    inputs: usize,
    outputs: usize,
    height: usize,
    width: usize,
    output_height: usize,
    output_width: usize,
    top: usize,
    left: usize,
    tiles_down: usize,
    tiles_across: usize,
    /// Tiles of a unit: whole rows of tiles of an image, or whole images.
    unit: usize,
    /// Images that are transformed at once.
    images: usize,
}

impl Plan {
    fn new(conv: &Conv) -> Self {
        let (output_height, output_width) = (conv.output_height(), conv.output_width());
        let (tiles_down, tiles_across) = (output_height.div_ceil(OUT), output_width.div_ceil(OUT));
        let per_image = tiles_down * tiles_across;
        let unit = if per_image > UNIT_TILES {
            let fitting = |rows: &usize| tiles_down.is_multiple_of(*rows) && rows * tiles_across <= UNIT_TILES;
            (1..=tiles_down).rev().find(fitting).unwrap_or(1) * tiles_across
        } else {
            UNIT_TILES / per_image * per_image
        };
        let geometry = conv.geometry;
        let floats = POSITIONS * per_image * geometry.in_channels.max(geometry.out_channels);
        let whole_units = unit.div_ceil(per_image);
        let images = (CHUNK_FLOATS / floats / whole_units * whole_units).max(whole_units).max(4);
        Self {
            inputs: geometry.in_channels,
            outputs: geometry.out_channels,
            height: conv.height,
            width: conv.width,
            output_height,
            output_width,
            top: geometry.leading_padding(conv.height),
            left: geometry.leading_padding(conv.width),
            tiles_down,
            tiles_across,
            unit,
            images,
        }
    }

    fn tiles_per_image(&self) -> usize {
        self.tiles_down * self.tiles_across
    }

    /// Pixels of a padded row of tiles.
    fn band_width(&self) -> usize {
        self.tiles_across * OUT + IN - OUT
    }

    /// Rows of tiles in a unit.
    fn unit_rows(&self) -> usize {
        self.unit / self.tiles_across
    }
}

/// Cuts a transformed buffer of `tiles` tiles into its units.
fn units<'a>(
    values: &'a mut [f32],
    plan: &Plan,
    channels: usize,
) -> impl IndexedParallelIterator<Item = &'a mut [f32]> {
    values.par_chunks_mut(POSITIONS * plan.unit * channels)
}

/// The products at all positions of all units: `out = left * right`.
fn multiply_positions(plan: &Plan, left: &[f32], inner: usize, right: &Packed, outer: usize, out: &mut [f32]) {
    let mut jobs: Vec<(usize, &[f32], &mut [f32])> = left
        .chunks(POSITIONS * plan.unit * inner)
        .zip(out.chunks_mut(POSITIONS * plan.unit * outer))
        .flat_map(|(left, out)| {
            let tiles = left.len() / POSITIONS / inner;
            left.chunks(tiles * inner).zip(out.chunks_mut(tiles * outer)).enumerate().map(|(p, (l, o))| (p, l, o))
        })
        .collect();
    // Neighbouring jobs share the right factor.
    jobs.sort_by_key(|(position, ..)| *position);
    jobs.into_par_iter().for_each(|(position, left, out)| {
        multiply_factor(left.len() / inner, left, inner, right, position, out, outer, false);
    });
}

/// `out = conv(source)` finished as `finish` says; returns the groups' statistics when they are gathered.
pub(super) fn forward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    out: &mut [f32],
    finish: Finish<'_>,
) -> Vec<Statistics> {
    let plan = Plan::new(conv);
    let right = pack_weights(weight, plan.inputs, plan.outputs);
    let tiles = plan.images.min(conv.batch) * plan.tiles_per_image();
    let mut transformed = buffer(POSITIONS * tiles * plan.inputs);
    let mut products = buffer(POSITIONS * tiles * plan.outputs);
    let mut gathered = Vec::new();
    for (chunk, out) in out.chunks_mut(plan.images * conv.output_length()).enumerate() {
        let (first, count) = (chunk * plan.images, out.len() / conv.output_length());
        let tiles = count * plan.tiles_per_image();
        let transformed = &mut transformed[..POSITIONS * tiles * plan.inputs];
        let products = &mut products[..POSITIONS * tiles * plan.outputs];
        transform_inputs(&plan, conv, source, first, transformed);
        multiply_positions(&plan, transformed, plan.inputs, &right, plan.outputs, products);
        gathered.par_extend(out.par_chunks_mut(conv.output_length()).enumerate().map(|(index, out)| {
            let image = first + index;
            let mut finisher = Finisher::new(finish, plan.outputs);
            let band = OUT * plan.output_width * plan.outputs;
            for (ty, out) in out.chunks_mut(band).enumerate() {
                let tile = index * plan.tiles_per_image() + ty * plan.tiles_across;
                outputs_of_row(&plan, products, tile, out);
                finisher.tile(image * conv.output_length() + ty * band, out);
            }
            (conv.group_of(image), finisher.into_moments())
        }));
    }
    statistics(gathered, conv.groups, plan.outputs)
}

/// Writes `B' d B` of the tiles of some images.
fn transform_inputs(plan: &Plan, conv: &Conv, source: &Source<'_>, first: usize, transformed: &mut [f32]) {
    let channels = plan.inputs;
    let band_row = plan.band_width() * channels;
    units(transformed, plan, channels).enumerate().for_each_init(
        || vec![0.0; IN * band_row],
        |band, (unit, transformed)| {
            let tiles = transformed.len() / POSITIONS / channels;
            for row in 0..tiles / plan.tiles_across {
                let row_index = unit * plan.unit_rows() + row;
                let (image, ty) = (first + row_index / plan.tiles_down, row_index % plan.tiles_down);
                for (index, target) in band.chunks_exact_mut(band_row).enumerate() {
                    let pixels = &mut target[plan.left * channels..][..plan.width * channels];
                    match (ty * OUT + index).checked_sub(plan.top) {
                        Some(y) if y < plan.height => {
                            let start = image * conv.input_length() + y * plan.width * channels;
                            source.read(conv, image, start, pixels);
                        }
                        _ => pixels.fill(0.0),
                    }
                }
                for tx in 0..plan.tiles_across {
                    let from = &band[tx * OUT * channels..];
                    let tile = row * plan.tiles_across + tx;
                    transform_tile(from, band_row, channels, &mut transformed[tile * channels..], tiles * channels);
                }
            }
        },
    );
}

/// Writes the outputs of a row of tiles; `tile` is the first, counted over the images of the chunk.
fn outputs_of_row(plan: &Plan, products: &[f32], tile: usize, out: &mut [f32]) {
    let channels = plan.outputs;
    let (unit, within) = (tile / plan.unit, tile % plan.unit);
    let products = unit_of(products, plan, unit, channels);
    let step = products.len() / POSITIONS;
    let row_length = plan.output_width * channels;
    let rows = out.len() / row_length;
    for tx in 0..plan.tiles_across {
        let columns = OUT.min(plan.output_width - tx * OUT);
        let from = &products[(within + tx) * channels..];
        finish_tile(from, step, channels, &mut out[tx * OUT * channels..], row_length, [rows, columns]);
    }
}

/// The numbers of one unit of a transformed buffer.
fn unit_of<'a>(values: &'a [f32], plan: &Plan, unit: usize, channels: usize) -> &'a [f32] {
    let length = POSITIONS * plan.unit * channels;
    &values[unit * length..((unit + 1) * length).min(values.len())]
}

/// Gradients of the weights and of the source.
pub(super) fn backward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    incoming: &Incoming<'_>,
    wanted: Wanted<'_>,
) -> Outgoing {
    debug_assert!(!source.is_gated(), "squeeze-excite is read by 1x1 convolutions");
    let plan = Plan::new(conv);
    let Plan { inputs, outputs, .. } = plan;
    let wants_gradient = matches!(wanted, Wanted::Gradient { .. });
    let right = wants_gradient.then(|| pack_weights(&transpose_taps(weight, inputs, outputs), outputs, inputs));
    let tiles = plan.images.min(conv.batch) * plan.tiles_per_image();
    let mut transformed = buffer(POSITIONS * tiles * inputs);
    let mut spread = buffer(POSITIONS * tiles * outputs);
    let mut dweight = vec![0.0; POSITIONS * inputs * outputs];
    let mut gradient = buffer(if wants_gradient { conv.batch * conv.input_length() } else { 0 });
    let mut sums = Vec::new();
    for first in (0..conv.batch).step_by(plan.images) {
        let count = plan.images.min(conv.batch - first);
        let tiles = count * plan.tiles_per_image();
        let transformed = &mut transformed[..POSITIONS * tiles * inputs];
        let spread = &mut spread[..POSITIONS * tiles * outputs];
        transform_inputs(&plan, conv, source, first, transformed);
        spread_gradients(&plan, conv, incoming, first, spread);
        dweight.par_chunks_mut(inputs * outputs).enumerate().for_each(|(position, dweight)| {
            add_position(&plan, transformed, spread, position, dweight);
        });
        let (Some(right), Wanted::Gradient { plus }) = (&right, wanted) else { continue };
        multiply_positions(&plan, spread, outputs, right, inputs, transformed);
        let images = first * conv.input_length()..(first + count) * conv.input_length();
        sums.par_extend(gradient[images].par_chunks_mut(conv.input_length()).enumerate().map_init(
            || buffer((plan.tiles_down * OUT + IN - OUT) * plan.band_width() * inputs),
            |padded, (index, gradient)| {
                padded.fill(0.0);
                let mut retreat = Retreat::new(inputs);
                gather_gradients(&plan, transformed, index, padded);
                let image = first + index;
                let row_length = plan.width * inputs;
                for (y, gradient) in gradient.chunks_exact_mut(row_length).enumerate() {
                    let from = ((y + plan.top) * plan.band_width() + plan.left) * inputs;
                    gradient.copy_from_slice(&padded[from..from + row_length]);
                    let start = image * conv.input_length() + y * row_length;
                    let group = conv.group_of(image);
                    match &source.before {
                        Some(before) => retreat.tile(source, before, group, start, gradient, None),
                        None => {
                            if let Some(plus) = plus {
                                tiles::add(gradient, &plus[start..start + row_length]);
                            }
                        }
                    }
                }
                (conv.group_of(image), retreat.sums)
            },
        ));
    }
    Outgoing {
        gradient,
        sums: backward_sums(sums, conv.groups, inputs),
        gate_sums: GateSums::default(),
        dweight: unpack_weights(&dweight, inputs, outputs),
    }
}

/// Writes `A dY A'` of the tiles of some images.
fn spread_gradients(plan: &Plan, conv: &Conv, incoming: &Incoming<'_>, first: usize, spread: &mut [f32]) {
    let channels = plan.outputs;
    let band_row = plan.tiles_across * OUT * channels;
    let row_length = plan.output_width * channels;
    units(spread, plan, channels).enumerate().for_each_init(
        || vec![0.0; OUT * band_row],
        |band, (unit, spread)| {
            let tiles = spread.len() / POSITIONS / channels;
            for row in 0..tiles / plan.tiles_across {
                let row_index = unit * plan.unit_rows() + row;
                let (image, ty) = (first + row_index / plan.tiles_down, row_index % plan.tiles_down);
                for (index, target) in band.chunks_exact_mut(band_row).enumerate() {
                    let y = ty * OUT + index;
                    if y < plan.output_height {
                        let start = image * conv.output_length() + y * row_length;
                        incoming.read(conv.group_of(image), start, &mut target[..row_length]);
                    } else {
                        target.fill(0.0);
                    }
                }
                for tx in 0..plan.tiles_across {
                    let tile = row * plan.tiles_across + tx;
                    let to = &mut spread[tile * channels..];
                    spread_tile(&band[tx * OUT * channels..], band_row, channels, to, tiles * channels);
                }
            }
        },
    );
}

/// Adds `V' D` of one position to the gradient of its weights.
fn add_position(plan: &Plan, transformed: &[f32], spread: &[f32], position: usize, dweight: &mut [f32]) {
    let (inputs, outputs) = (plan.inputs, plan.outputs);
    let pieces: Vec<Rows<'_>> = transformed
        .chunks(POSITIONS * plan.unit * inputs)
        .zip(spread.chunks(POSITIONS * plan.unit * outputs))
        .map(|(transformed, spread)| {
            let count = transformed.len() / POSITIONS / inputs;
            let (left, right) = (&transformed[position * count * inputs..], &spread[position * count * outputs..]);
            Rows { left, right, count }
        })
        .collect();
    for pieces in pieces.chunks(MAX_ROW_PIECES) {
        multiply_transposed([inputs, outputs], pieces, inputs, outputs, dweight, outputs);
    }
}

/// Adds `B dV B'` of an image's tiles into its padded input.
fn gather_gradients(plan: &Plan, transformed: &[f32], image: usize, padded: &mut [f32]) {
    let channels = plan.inputs;
    let row_length = plan.band_width() * channels;
    for ty in 0..plan.tiles_down {
        for tx in 0..plan.tiles_across {
            let tile = image * plan.tiles_per_image() + ty * plan.tiles_across + tx;
            let unit = unit_of(transformed, plan, tile / plan.unit, channels);
            let from = &unit[tile % plan.unit * channels..];
            let to = &mut padded[ty * OUT * row_length + tx * OUT * channels..];
            gather_tile(from, unit.len() / POSITIONS, channels, to, row_length);
        }
    }
}

/// `G g G'` at all positions: factors of `inputs x outputs`.
fn pack_weights(weight: &[f32], inputs: usize, outputs: usize) -> Packed {
    assert!(weight.len() >= 9 * inputs * outputs, "nine taps");
    Packed::from_panels(POSITIONS, inputs, outputs, |first, width, target| {
        let columns = width.min(outputs - first);
        assert!(target.len() >= POSITIONS * inputs * width, "a panel of every position");
        for input in 0..inputs {
            let from = &weight[input * outputs + first..];
            // SAFETY: the last tap of the last input is read up to `8 * inputs * outputs + (inputs - 1) * outputs + first + columns`, within
            // `weight`; the last position is written up to `(35 * inputs + inputs - 1) * width + columns`, within `target`.
            unsafe {
                let to = target.as_mut_ptr().add(input * width);
                weights_raw(from.as_ptr(), inputs * outputs, to, inputs * width, columns);
            }
        }
    })
}

/// `G' dU G`, from `[36][in][out]` to `[9][in][out]`.
fn unpack_weights(transformed: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut dweight = vec![0.0; 9 * inputs * outputs];
    let mut by_input: Vec<Vec<&mut [f32]>> = (0..inputs).map(|_| Vec::with_capacity(9)).collect();
    for tap in dweight.chunks_mut(inputs * outputs) {
        for (rows, row) in by_input.iter_mut().zip(tap.chunks_mut(outputs)) {
            rows.push(row);
        }
    }
    by_input.par_iter_mut().enumerate().for_each_init(
        || buffer(9 * outputs),
        |scratch, (input, rows)| {
            let from = &transformed[input * outputs..];
            assert!(from.len() >= (POSITIONS - 1) * inputs * outputs + outputs, "every position");
            // SAFETY: the last position is read within `from`, the last tap written within the scratch of `9 * outputs` numbers.
            unsafe { weight_gradients_raw(from.as_ptr(), inputs * outputs, scratch.as_mut_ptr(), outputs, outputs) };
            for (row, values) in rows.iter_mut().zip(scratch.chunks_exact(outputs)) {
                row.copy_from_slice(values);
            }
        },
    );
    dweight
}

/// `[9][in][out]` to `[9][out][in]`.
fn transpose_taps(weight: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    const BLOCK: usize = 16;
    let mut transposed = buffer(weight.len());
    transposed.par_chunks_mut(inputs * outputs).zip(weight.par_chunks(inputs * outputs)).for_each(|(to, from)| {
        for first in (0..outputs).step_by(BLOCK) {
            for input in 0..inputs {
                for output in first..(first + BLOCK).min(outputs) {
                    to[output * inputs + input] = from[input * outputs + output];
                }
            }
        }
    });
    transposed
}

/// One tile of `B' d B`: from 6 rows of 6 pixels to 36 positions `step` apart.
fn transform_tile(from: &[f32], row_length: usize, channels: usize, to: &mut [f32], step: usize) {
    assert!((IN - 1) * row_length + IN * channels <= from.len(), "pixels out of bounds");
    assert!((POSITIONS - 1) * step + channels <= to.len(), "positions out of bounds");
    // SAFETY: the sizes were checked.
    unsafe { transform_raw(from.as_ptr(), row_length, channels, to.as_mut_ptr(), step) };
}

/// One tile of `A' m A`: from 36 positions to as many of 4 rows of 4 pixels as there are.
fn finish_tile(from: &[f32], step: usize, channels: usize, to: &mut [f32], row_length: usize, sides: [usize; 2]) {
    let [rows, columns] = sides;
    assert!((1..=OUT).contains(&rows) && (1..=OUT).contains(&columns), "a tile has 4 x 4 pixels at most");
    assert!((POSITIONS - 1) * step + channels <= from.len(), "positions out of bounds");
    assert!((rows - 1) * row_length + columns * channels <= to.len(), "pixels out of bounds");
    // SAFETY: the sizes were checked.
    unsafe { finish_raw(from.as_ptr(), step, channels, to.as_mut_ptr(), row_length, rows, columns) };
}

/// One tile of `A dY A'`: from 4 rows of 4 pixels to 36 positions.
fn spread_tile(from: &[f32], row_length: usize, channels: usize, to: &mut [f32], step: usize) {
    assert!((OUT - 1) * row_length + OUT * channels <= from.len(), "pixels out of bounds");
    assert!((POSITIONS - 1) * step + channels <= to.len(), "positions out of bounds");
    // SAFETY: the sizes were checked.
    unsafe { spread_raw(from.as_ptr(), row_length, channels, to.as_mut_ptr(), step) };
}

/// One tile of `B dV B'`: from 36 positions, added to 6 rows of 6 pixels.
fn gather_tile(from: &[f32], step: usize, channels: usize, to: &mut [f32], row_length: usize) {
    assert!((POSITIONS - 1) * step + channels <= from.len(), "positions out of bounds");
    assert!((IN - 1) * row_length + IN * channels <= to.len(), "pixels out of bounds");
    // SAFETY: the sizes were checked.
    unsafe { gather_raw(from.as_ptr(), step, channels, to.as_mut_ptr(), row_length) };
}

/// `B' d`.
#[inline(always)]
unsafe fn transform<V: Simd>(d: [V; 6]) -> [V; 6] {
    // SAFETY: the instructions of `V` are available.
    unsafe {
        let s = |x: f32| V::splat(x);
        let even_a = d[2].neg_mul_add(s(B2), d[4]);
        let odd_a = d[1].neg_mul_add(s(B1), d[3].mul(s(A1)));
        let even_b = d[2].neg_mul_add(s(A2), d[4]);
        let odd_b = d[1].neg_mul_add(s(A1), d[3].mul(s(B1)));
        [
            d[2].neg_mul_add(s(SUM), d[0].add(d[4])),
            even_a.add(odd_a),
            even_a.sub(odd_a),
            even_b.add(odd_b),
            even_b.sub(odd_b),
            d[3].neg_mul_add(s(SUM), d[1].add(d[5])),
        ]
    }
}

/// `A' m`.
#[inline(always)]
unsafe fn finish<V: Simd>(m: [V; 6]) -> [V; 4] {
    // SAFETY: the instructions of `V` are available.
    unsafe {
        let s = |x: f32| V::splat(x);
        let (sum_a, difference_a) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum_b, difference_b) = (m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(sum_a).add(sum_b),
            difference_a.mul_add(s(A1), difference_b.mul(s(B1))),
            sum_a.mul_add(s(A2), sum_b.mul(s(B2))),
            difference_a.mul_add(s(A3), difference_b.mul_add(s(B3), m[5])),
        ]
    }
}

/// `A dY`.
#[inline(always)]
unsafe fn spread<V: Simd>(y: [V; 4]) -> [V; 6] {
    // SAFETY: the instructions of `V` are available.
    unsafe {
        let s = |x: f32| V::splat(x);
        let even_a = y[2].mul_add(s(A2), y[0]);
        let odd_a = y[3].mul_add(s(A3), y[1].mul(s(A1)));
        let even_b = y[2].mul_add(s(B2), y[0]);
        let odd_b = y[3].mul_add(s(B3), y[1].mul(s(B1)));
        [y[0], even_a.add(odd_a), even_a.sub(odd_a), even_b.add(odd_b), even_b.sub(odd_b), y[3]]
    }
}

/// `B dV`.
#[inline(always)]
unsafe fn gather<V: Simd>(r: [V; 6]) -> [V; 6] {
    // SAFETY: the instructions of `V` are available.
    unsafe {
        let s = |x: f32| V::splat(x);
        let (sum_a, difference_a) = (r[1].add(r[2]), r[1].sub(r[2]));
        let (sum_b, difference_b) = (r[3].add(r[4]), r[3].sub(r[4]));
        [
            r[0],
            difference_b.neg_mul_add(s(A1), difference_a.neg_mul_add(s(B1), r[5])),
            V::splat(0.0).sub(sum_b.mul_add(s(A2), sum_a.mul_add(s(B2), r[0].mul(s(SUM))))),
            r[5].neg_mul_add(s(SUM), difference_b.mul_add(s(B1), difference_a.mul(s(A1)))),
            r[0].add(sum_a).add(sum_b),
            r[5],
        ]
    }
}

/// `G g`.
#[inline(always)]
unsafe fn weights<V: Simd>(g: [V; 3]) -> [V; 6] {
    // SAFETY: the instructions of `V` are available.
    unsafe {
        let s = |x: f32| V::splat(x);
        let (even_a, odd_a) = (g[2].mul_add(s(A2), g[0]).mul(s(F_A)), g[1].mul(s(A1 * F_A)));
        let (even_b, odd_b) = (g[2].mul_add(s(B2), g[0]).mul(s(F_B)), g[1].mul(s(B1 * F_B)));
        [g[0], even_a.add(odd_a), even_a.sub(odd_a), even_b.add(odd_b), even_b.sub(odd_b), g[2]]
    }
}

/// `G' dU`.
#[inline(always)]
unsafe fn weight_gradients<V: Simd>(u: [V; 6]) -> [V; 3] {
    // SAFETY: the instructions of `V` are available.
    unsafe {
        let s = |x: f32| V::splat(x);
        let (sum_a, difference_a) = (u[1].add(u[2]).mul(s(F_A)), u[1].sub(u[2]).mul(s(F_A)));
        let (sum_b, difference_b) = (u[3].add(u[4]).mul(s(F_B)), u[3].sub(u[4]).mul(s(F_B)));
        [
            u[0].add(sum_a).add(sum_b),
            difference_a.mul_add(s(A1), difference_b.mul(s(B1))),
            sum_a.mul_add(s(A2), sum_b.mul_add(s(B2), u[5])),
        ]
    }
}

/// Runs a two-dimensional map for every vector of channels: `$rows x $rows` numbers are loaded by `$load`, `$map` is applied to columns
/// and then to rows, and `$store` takes the results of size `$outs x $outs`.
macro_rules! for_vectors {
    ($v:ident, $channels:expr, $ins:literal -> $outs:literal, $map:ident, |$channel:ident, $left:ident| $load:expr, $store:expr) => {
        let mut $channel = 0;
        while $channel < $channels {
            let $left = $channels - $channel;
            let (load, store) = ($load, $store);
            let mut half = [[$v::splat(0.0); $ins]; $outs];
            for column in 0..$ins {
                let mut values = [$v::splat(0.0); $ins];
                for (row, value) in values.iter_mut().enumerate() {
                    *value = load(row, column);
                }
                let mapped = $map::<$v>(values);
                for (half, value) in half.iter_mut().zip(mapped) {
                    half[column] = value;
                }
            }
            for (row, half) in half.into_iter().enumerate() {
                for (column, value) in $map::<$v>(half).into_iter().enumerate() {
                    store(row, column, value);
                }
            }
            $channel += $v::LANES;
        }
    };
}

#[inline(always)]
unsafe fn transform_with<V: Simd>(from: *const f32, row_length: usize, channels: usize, to: *mut f32, step: usize) {
    // SAFETY: the contract of `transform_raw`.
    unsafe {
        for_vectors!(
            V, channels, 6 -> 6, transform,
            |channel, left| |row: usize, column: usize| {
                V::load_first(from.add(row * row_length + column * channels + channel), left)
            },
            |row: usize, column: usize, value: V| value.store_first(to.add((row * IN + column) * step + channel), left)
        );
    }
}

dispatch!(
    /// # Safety
    /// Six rows of six pixels of `channels` numbers, and 36 positions of `channels` numbers.
    transform_raw = transform_with(from: *const f32, row_length: usize, channels: usize, to: *mut f32, step: usize)
);

#[inline(always)]
unsafe fn finish_with<V: Simd>(
    from: *const f32,
    step: usize,
    channels: usize,
    to: *mut f32,
    row_length: usize,
    rows: usize,
    columns: usize,
) {
    // SAFETY: the contract of `finish_raw`.
    unsafe {
        for_vectors!(
            V, channels, 6 -> 4, finish,
            |channel, left| |row: usize, column: usize| V::load_first(from.add((row * IN + column) * step + channel), left),
            |row: usize, column: usize, value: V| {
                if row < rows && column < columns {
                    value.store_first(to.add(row * row_length + column * channels + channel), left);
                }
            }
        );
    }
}

dispatch!(
    /// # Safety
    /// 36 positions of `channels` numbers, and `rows` rows of `columns` pixels.
    finish_raw = finish_with(
        from: *const f32,
        step: usize,
        channels: usize,
        to: *mut f32,
        row_length: usize,
        rows: usize,
        columns: usize,
    )
);

#[inline(always)]
unsafe fn spread_with<V: Simd>(from: *const f32, row_length: usize, channels: usize, to: *mut f32, step: usize) {
    // SAFETY: the contract of `spread_raw`.
    unsafe {
        for_vectors!(
            V, channels, 4 -> 6, spread,
            |channel, left| |row: usize, column: usize| {
                V::load_first(from.add(row * row_length + column * channels + channel), left)
            },
            |row: usize, column: usize, value: V| value.store_first(to.add((row * IN + column) * step + channel), left)
        );
    }
}

dispatch!(
    /// # Safety
    /// Four rows of four pixels of `channels` numbers, and 36 positions of `channels` numbers.
    spread_raw = spread_with(from: *const f32, row_length: usize, channels: usize, to: *mut f32, step: usize)
);

#[inline(always)]
unsafe fn gather_with<V: Simd>(from: *const f32, step: usize, channels: usize, to: *mut f32, row_length: usize) {
    // SAFETY: the contract of `gather_raw`.
    unsafe {
        for_vectors!(
            V, channels, 6 -> 6, gather,
            |channel, left| |row: usize, column: usize| V::load_first(from.add((row * IN + column) * step + channel), left),
            |row: usize, column: usize, value: V| {
                let to = to.add(row * row_length + column * channels + channel);
                value.add(V::load_first(to, left)).store_first(to, left);
            }
        );
    }
}

dispatch!(
    /// # Safety
    /// 36 positions of `channels` numbers, and six rows of six pixels.
    gather_raw = gather_with(from: *const f32, step: usize, channels: usize, to: *mut f32, row_length: usize)
);

#[inline(always)]
unsafe fn weights_with<V: Simd>(from: *const f32, tap_step: usize, to: *mut f32, step: usize, channels: usize) {
    // SAFETY: the contract of `weights_raw`.
    unsafe {
        for_vectors!(
            V, channels, 3 -> 6, weights,
            |channel, left| |row: usize, column: usize| V::load_first(from.add((row * 3 + column) * tap_step + channel), left),
            |row: usize, column: usize, value: V| value.store_first(to.add((row * IN + column) * step + channel), left)
        );
    }
}

dispatch!(
    /// # Safety
    /// Nine taps of `channels` numbers, `tap_step` apart, and 36 positions.
    weights_raw = weights_with(from: *const f32, tap_step: usize, to: *mut f32, step: usize, channels: usize)
);

#[inline(always)]
unsafe fn weight_gradients_with<V: Simd>(
    from: *const f32,
    step: usize,
    to: *mut f32,
    tap_step: usize,
    channels: usize,
) {
    // SAFETY: the contract of `weight_gradients_raw`.
    unsafe {
        for_vectors!(
            V, channels, 6 -> 3, weight_gradients,
            |channel, left| |row: usize, column: usize| V::load_first(from.add((row * IN + column) * step + channel), left),
            |row: usize, column: usize, value: V| value.store_first(to.add((row * 3 + column) * tap_step + channel), left)
        );
    }
}

dispatch!(
    /// # Safety
    /// 36 positions of `channels` numbers, `step` apart, and nine taps.
    weight_gradients_raw = weight_gradients_with(from: *const f32, step: usize, to: *mut f32, tap_step: usize, channels: usize)
);
