//! Depthwise convolutions: one kernel sums rows of pixels under their taps, forward and for the gradient of the input, at any stride.
//!
//! Rows pass through a ring of zero-padded rows that stays in cache; what is applied to raw numbers on reading is applied there,
//! once per row. The backward pass walks over an image once: gradient of a row, gradient before the activation, gradient of the
//! weights. Weights are `[k * k][C]`.
#![expect(unsafe_code, reason = "vector kernels over raw pointers; every safe function checks the sizes")]
#![expect(clippy::multiple_unsafe_ops_per_block, clippy::inline_always, reason = "kernels are one unsafe computation")]

use rayon::prelude::*;

use super::flow::{
    Conv, Finish, Finisher, GateSums, Incoming, Outgoing, Retreat, Source, Wanted, backward_sums, buffer, pieces,
    split, statistics, sum_in_order,
};
use super::gemm::{Packed, Run};
use super::norm::{Affine, Statistics};
use super::simd::{Simd, dispatch};
use super::tiles::{self, Extras};
use crate::ops::Activation;

/// Pieces that a forward pass has at least, if the images are high enough.
const LEAST_PIECES: usize = 16;
/// Rows of a piece at least.
const LEAST_ROWS: usize = 4;
/// Numbers of an image that is made as a whole by a convolution before: about half of a core's second cache.
const WHOLE_IMAGE_FLOATS: usize = 128 * 1024;
/// Pixels of a larger image that are made at once, at least.
const EXPANDED_PIXELS: usize = 96;

/// Where a tap reads, for the first output, and its weights.
#[derive(Debug, Clone, Copy)]
struct Tap<'a> {
    pixels: &'a [f32],
    weight: &'a [f32],
}

#[derive(Debug, Clone, Copy)]
struct RawTap {
    pixels: *const f32,
    weight: *const f32,
}

/// Most taps of a kernel.
const MAX_TAPS: usize = 49;

/// `out[j * out_step + c] = sum over taps of pixels[j * step + c] * weight[c]` for `j < count`.
///
/// # Panics
/// When a slice is too short.
fn sum_taps(taps: &[Tap<'_>], step: usize, out: &mut [f32], out_step: usize, count: usize, channels: usize) {
    if count == 0 {
        return;
    }
    assert!(taps.len() <= MAX_TAPS, "too many taps");
    assert!((count - 1) * out_step + channels <= out.len(), "output out of bounds");
    let mut raw = [RawTap { pixels: std::ptr::null(), weight: std::ptr::null() }; MAX_TAPS];
    for (raw, tap) in raw.iter_mut().zip(taps) {
        assert!((count - 1) * step + channels <= tap.pixels.len(), "pixels out of bounds");
        assert!(channels <= tap.weight.len(), "weights out of bounds");
        *raw = RawTap { pixels: tap.pixels.as_ptr(), weight: tap.weight.as_ptr() };
    }
    // SAFETY: by the assertions, the last channel of the last pixel of each tap and of `out` lies inside its slice.
    unsafe { sum_taps_raw(&raw[..taps.len()], step, out.as_mut_ptr(), out_step, count, channels) };
}

#[inline(always)]
unsafe fn taps_block<V: Simd, const COUNT: usize>(
    taps: &[RawTap],
    offset: usize,
    step: usize,
    out: *mut f32,
    out_step: usize,
    channels: usize,
) {
    // SAFETY: the contract of `sum_taps_raw`.
    unsafe {
        let mut channel = 0;
        while channel + V::LANES <= channels {
            let mut sums = [V::splat(0.0); COUNT];
            for tap in taps {
                let weight = V::load(tap.weight.add(channel));
                let pixels = tap.pixels.add(offset + channel);
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(pixels.add(j * step)).mul_add(weight, *sum);
                }
            }
            for (j, sum) in sums.into_iter().enumerate() {
                sum.store(out.add(j * out_step + channel));
            }
            channel += V::LANES;
        }
        if channel < channels {
            let left = channels - channel;
            let mut sums = [V::splat(0.0); COUNT];
            for tap in taps {
                let weight = V::load_first(tap.weight.add(channel), left);
                let pixels = tap.pixels.add(offset + channel);
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load_first(pixels.add(j * step), left).mul_add(weight, *sum);
                }
            }
            for (j, sum) in sums.into_iter().enumerate() {
                sum.store_first(out.add(j * out_step + channel), left);
            }
        }
    }
}

#[inline(always)]
unsafe fn sum_taps_with<V: Simd>(
    taps: &[RawTap],
    step: usize,
    out: *mut f32,
    out_step: usize,
    count: usize,
    channels: usize,
) {
    let mut j = 0;
    // SAFETY: the contract of `sum_taps_raw`, for the outputs `j..j + constant`.
    unsafe {
        if count.is_multiple_of(7) {
            while j < count {
                taps_block::<V, 7>(taps, j * step, step, out.add(j * out_step), out_step, channels);
                j += 7;
            }
        }
        while j + 8 <= count {
            taps_block::<V, 8>(taps, j * step, step, out.add(j * out_step), out_step, channels);
            j += 8;
        }
        while j + 4 <= count {
            taps_block::<V, 4>(taps, j * step, step, out.add(j * out_step), out_step, channels);
            j += 4;
        }
        while j < count {
            taps_block::<V, 1>(taps, j * step, step, out.add(j * out_step), out_step, channels);
            j += 1;
        }
    }
}

dispatch!(
    /// # Safety
    /// Each tap's pixels hold `(count - 1) * step + channels` numbers, its weights `channels`, `out` `(count - 1) * out_step + channels`.
    sum_taps_raw = sum_taps_with(
        taps: &[RawTap],
        step: usize,
        out: *mut f32,
        out_step: usize,
        count: usize,
        channels: usize,
    )
);

/// Adds to `dweight[kx][c]` the sum over `ox` of `pixels[(ox * stride + kx) * C + c] * gradient[ox * C + c]`, for one row of a kernel.
///
/// # Panics
/// When a slice is too short.
fn add_weight_row(
    pixels: &[f32],
    kernel: usize,
    stride: usize,
    gradient: &[f32],
    channels: usize,
    dweight: &mut [f32],
) {
    let count = gradient.len() / channels;
    if count == 0 {
        return;
    }
    assert!(((count - 1) * stride + kernel) * channels <= pixels.len(), "pixels out of bounds");
    assert!(kernel * channels <= dweight.len(), "weights out of bounds");
    let (pixels, gradient, dweight) = (pixels.as_ptr(), gradient.as_ptr(), dweight.as_mut_ptr());
    // SAFETY: the sizes were checked.
    unsafe { add_weight_row_raw(pixels, kernel, stride, gradient, count, channels, dweight) };
}

#[inline(always)]
unsafe fn weight_vector<V: Simd, const KERNEL: usize, const WHOLE: bool>(
    pixels: *const f32,
    stride: usize,
    gradient: *const f32,
    count: usize,
    channels: usize,
    left: usize,
    dweight: *mut f32,
) {
    // SAFETY: the contract of `add_weight_row_raw`.
    unsafe {
        let load = |from: *const f32| -> V { if WHOLE { V::load(from) } else { V::load_first(from, left) } };
        let (mut even, mut odd) = ([V::splat(0.0); KERNEL], [V::splat(0.0); KERNEL]);
        let mut ox = 0;
        while ox + 2 <= count {
            let (g0, g1) = (load(gradient.add(ox * channels)), load(gradient.add((ox + 1) * channels)));
            let (p0, p1) = (pixels.add(ox * stride * channels), pixels.add((ox + 1) * stride * channels));
            for k in 0..KERNEL {
                even[k] = load(p0.add(k * channels)).mul_add(g0, even[k]);
                odd[k] = load(p1.add(k * channels)).mul_add(g1, odd[k]);
            }
            ox += 2;
        }
        if ox < count {
            let g = load(gradient.add(ox * channels));
            let p = pixels.add(ox * stride * channels);
            for (k, even) in even.iter_mut().enumerate() {
                *even = load(p.add(k * channels)).mul_add(g, *even);
            }
        }
        for k in 0..KERNEL {
            let to = dweight.add(k * channels);
            let sum = even[k].add(odd[k]).add(load(to));
            if WHOLE { sum.store(to) } else { sum.store_first(to, left) }
        }
    }
}

#[inline(always)]
unsafe fn weight_row<V: Simd, const KERNEL: usize>(
    pixels: *const f32,
    first: usize,
    stride: usize,
    gradient: *const f32,
    count: usize,
    channels: usize,
    dweight: *mut f32,
) {
    // SAFETY: the contract of `add_weight_row_raw`, for `KERNEL` taps from `first` on.
    unsafe {
        let (pixels, dweight) = (pixels.add(first * channels), dweight.add(first * channels));
        let mut channel = 0;
        while channel + V::LANES <= channels {
            let (p, g, d) = (pixels.add(channel), gradient.add(channel), dweight.add(channel));
            weight_vector::<V, KERNEL, true>(p, stride, g, count, channels, V::LANES, d);
            channel += V::LANES;
        }
        if channel < channels {
            let (p, g, d) = (pixels.add(channel), gradient.add(channel), dweight.add(channel));
            weight_vector::<V, KERNEL, false>(p, stride, g, count, channels, channels - channel, d);
        }
    }
}

#[inline(always)]
unsafe fn add_weight_row_with<V: Simd>(
    pixels: *const f32,
    kernel: usize,
    stride: usize,
    gradient: *const f32,
    count: usize,
    channels: usize,
    dweight: *mut f32,
) {
    // SAFETY: the contract of `add_weight_row_raw`.
    unsafe {
        match kernel {
            3 => weight_row::<V, 3>(pixels, 0, stride, gradient, count, channels, dweight),
            5 => weight_row::<V, 5>(pixels, 0, stride, gradient, count, channels, dweight),
            _ => {
                for first in 0..kernel {
                    weight_row::<V, 1>(pixels, first, stride, gradient, count, channels, dweight);
                }
            }
        }
    }
}

dispatch!(
    /// # Safety
    /// `pixels` holds `((count - 1) * stride + kernel) * channels` numbers, `gradient` `count * channels`, `dweight` `kernel * channels`.
    add_weight_row_raw = add_weight_row_with(
        pixels: *const f32,
        kernel: usize,
        stride: usize,
        gradient: *const f32,
        count: usize,
        channels: usize,
        dweight: *mut f32,
    )
);

/// The last rows of an image, each with zeros before and after it.
#[derive(Debug)]
struct Ring {
    values: Vec<f32>,
    slots: usize,
    row_length: usize,
    /// Numbers before the first pixel.
    before: usize,
}

impl Ring {
    fn new(slots: usize, row_length: usize, before: usize) -> Self {
        Self { values: vec![0.0; slots * row_length], slots, row_length, before }
    }

    /// A row with its zeros.
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row % self.slots * self.row_length..][..self.row_length]
    }

    /// The pixels of a row, to be written.
    fn pixels_mut(&mut self, row: usize, length: usize) -> &mut [f32] {
        &mut self.values[row % self.slots * self.row_length + self.before..][..length]
    }
}

/// Sizes of a depthwise convolution.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    kernel: usize,
    stride: usize,
    channels: usize,
    height: usize,
    width: usize,
    output_height: usize,
    output_width: usize,
    top: usize,
    left: usize,
}

impl Sizes {
    fn new(conv: &Conv) -> Self {
        let geometry = conv.geometry;
        Self {
            kernel: geometry.kernel,
            stride: geometry.stride,
            channels: geometry.in_channels,
            height: conv.height,
            width: conv.width,
            output_height: conv.output_height(),
            output_width: conv.output_width(),
            top: geometry.leading_padding(conv.height),
            left: geometry.leading_padding(conv.width),
        }
    }

    /// A ring for rows of the input.
    fn input_ring(&self, slots: usize) -> Ring {
        let reach = (self.output_width - 1) * self.stride + self.kernel;
        Ring::new(slots, reach.max(self.left + self.width) * self.channels, self.left * self.channels)
    }

    /// Zeros before the rows of the output's gradient, in pixels.
    fn gradient_left(&self) -> usize {
        (self.kernel - 1).saturating_sub(self.left).div_ceil(self.stride)
    }

    /// A ring for rows of the output's gradient.
    fn gradient_ring(&self) -> Ring {
        let reach = ((self.width - 1 + self.left) / self.stride + 1).max(self.output_width);
        let left = self.gradient_left();
        Ring::new(self.kernel, (left + reach) * self.channels, left * self.channels)
    }

    /// Rows of the input under the kernel for a row of the output, with the kernel's row.
    fn rows_under(self, output_row: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.kernel).filter_map(move |ky| {
            let row = (output_row * self.stride + ky).checked_sub(self.top)?;
            (row < self.height).then_some((ky, row))
        })
    }

    /// Rows of the output that see a row of the input, with the kernel's row.
    fn rows_over(self, input_row: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.kernel).filter_map(move |ky| {
            let reach = (input_row + self.top).checked_sub(ky)?;
            let row = reach / self.stride;
            (reach.is_multiple_of(self.stride) && row < self.output_height).then_some((ky, row))
        })
    }
}

/// Where a convolution gets its rows of pixels from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pixels<'a> {
    /// They are there.
    Read(Source<'a>),
    /// A 1x1 convolution makes them when they are needed, so that the wide tensor between the two never exists.
    Expand(Expansion<'a>),
}

/// A 1x1 convolution with batch norm and activation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expansion<'a> {
    pub(super) values: &'a [f32],
    pub(super) inputs: usize,
    pub(super) weight: &'a Packed,
    pub(super) affine: &'a Affine,
    pub(super) act: Activation,
}

impl Pixels<'_> {
    /// Rows made at once: enough to repay reading the weights.
    fn rows_at_once(&self, sizes: &Sizes) -> usize {
        match self {
            Self::Read(_) => 1,
            Self::Expand(_) if sizes.height * sizes.width * sizes.channels <= WHOLE_IMAGE_FLOATS => sizes.height,
            Self::Expand(_) => EXPANDED_PIXELS.div_ceil(sizes.width),
        }
    }

    /// Writes rows of an image.
    fn fill(&self, conv: &Conv, image: usize, rows: std::ops::Range<usize>, ring: &mut Ring) {
        let row_length = conv.width * conv.geometry.in_channels;
        match self {
            Self::Read(source) => {
                for row in rows {
                    let start = image * conv.input_length() + row * row_length;
                    source.read(conv, image, start, ring.pixels_mut(row, row_length));
                }
            }
            Self::Expand(expansion) => {
                let Expansion { values, inputs, weight, affine, act } = *expansion;
                for panel in weight.panels(0) {
                    for row in rows.clone() {
                        let start = (image * conv.height + row) * conv.width * inputs;
                        let run =
                            Run { values: &values[start..start + conv.width * inputs], length: inputs, factor_row: 0 };
                        let out = ring.pixels_mut(row, row_length);
                        panel.multiply(conv.width, &[run], inputs, out, conv.geometry.in_channels, false);
                    }
                }
                for row in rows {
                    tiles::apply_in_place(ring.pixels_mut(row, row_length), affine, act, Extras::default());
                }
            }
        }
    }
}

/// `out = conv(source)` finished as `finish` says; returns the groups' statistics when they are gathered.
pub(super) fn forward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    out: &mut [f32],
    finish: Finish<'_>,
) -> Vec<Statistics> {
    forward_from(conv, &Pixels::Read(*source), weight, out, finish, None)
}

/// As [`forward`], for pixels from anywhere; also sums the finished pixels of each row into `row_sums`, `(B, H', C)`, if that is given.
pub(super) fn forward_from(
    conv: &Conv,
    pixels: &Pixels<'_>,
    weight: &[f32],
    out: &mut [f32],
    finish: Finish<'_>,
    row_sums: Option<&mut [f32]>,
) -> Vec<Statistics> {
    let sizes = Sizes::new(conv);
    let Sizes { channels, stride, kernel, output_height, output_width, .. } = sizes;
    let output_row = output_width * channels;
    let bands = LEAST_PIECES.div_ceil(conv.batch).min(output_height.div_ceil(LEAST_ROWS));
    let pieces = pieces(conv.batch, output_height, 1, output_height.div_ceil(bands), conv.batch * bands);
    let parts = split(out, &pieces, output_row);
    let (row_sums, sums_width) = row_sums.map_or((Default::default(), 0), |sums| (sums, channels));
    let sums = split(row_sums, &pieces, sums_width);
    let at_once = pixels.rows_at_once(&sizes);
    let unchanged = Affine::identity(channels);
    let gathered = pieces
        .par_iter()
        .zip(parts)
        .zip(sums)
        .map_init(
            || sizes.input_ring((kernel + at_once - 1).min(sizes.height)),
            |ring, ((piece, out), sums)| {
                let image = piece.group;
                let first = piece.start - image * output_height;
                let end = (first..first + piece.rows).rev().find_map(|row| sizes.rows_under(row).last());
                let end = end.map_or(0, |(_, row)| row + 1);
                let mut finisher = Finisher::new(finish, channels);
                let mut filled = 0;
                for (index, out) in out.chunks_exact_mut(output_row).enumerate() {
                    let row = first + index;
                    for (_, under) in sizes.rows_under(row) {
                        if filled <= under {
                            filled = (under + at_once).min(end);
                            pixels.fill(conv, image, under..filled, ring);
                        }
                    }
                    let mut taps = [Tap { pixels: &[], weight: &[] }; MAX_TAPS];
                    let mut count = 0;
                    for (ky, under) in sizes.rows_under(row) {
                        for kx in 0..kernel {
                            let weight = &weight[(ky * kernel + kx) * channels..][..channels];
                            taps[count] = Tap { pixels: &ring.row(under)[kx * channels..], weight };
                            count += 1;
                        }
                    }
                    sum_taps(&taps[..count], stride * channels, out, channels, output_width, channels);
                    finisher.tile((piece.start + index) * output_row, out);
                    if sums_width > 0 {
                        let sums = &mut sums[index * channels..(index + 1) * channels];
                        sums.fill(0.0);
                        tiles::pool(out, &unchanged, Activation::Identity, sums);
                    }
                }
                (conv.group_of(image), finisher.into_moments())
            },
        )
        .collect();
    statistics(gathered, conv.groups, channels)
}

/// What is used again from image to image.
#[derive(Debug)]
struct Scratch {
    gradients: Ring,
    inputs: Ring,
}

/// Gradients of the weights and of the source.
pub(super) fn backward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    incoming: &Incoming<'_>,
    wanted: Wanted<'_>,
) -> Outgoing {
    debug_assert!(!source.is_gated(), "squeeze-excite follows a depthwise convolution");
    let sizes = Sizes::new(conv);
    let Sizes { channels, kernel, .. } = sizes;
    let wants_gradient = matches!(wanted, Wanted::Gradient { .. });
    let image_length = if wants_gradient { conv.input_length() } else { 0 };
    let mut gradient = buffer(conv.batch * image_length);
    let pieces = pieces(conv.batch, 1, 1, 1, conv.batch);
    let parts = split(&mut gradient, &pieces, image_length);
    let done: Vec<(usize, Retreat, Vec<f32>)> = parts
        .into_par_iter()
        .enumerate()
        .map_init(
            || Scratch { gradients: sizes.gradient_ring(), inputs: sizes.input_ring(1) },
            |scratch, (image, gradient)| {
                let mut dweight = vec![0.0; kernel * kernel * channels];
                let mut retreat = Retreat::new(channels);
                let work = Image { conv, sizes, source, weight, incoming, wanted, index: image };
                work.backward(scratch, gradient, &mut dweight, &mut retreat);
                (conv.group_of(image), retreat, dweight)
            },
        )
        .collect();
    let (mut sums, mut dweights) = (Vec::new(), Vec::new());
    for (group, retreat, dweight) in done {
        sums.push((group, retreat.sums));
        dweights.push(dweight);
    }
    Outgoing {
        gradient,
        sums: backward_sums(sums, conv.groups, channels),
        gate_sums: GateSums::default(),
        dweight: sum_in_order(dweights),
    }
}

/// The backward pass of one image.
#[derive(Debug, Clone, Copy)]
struct Image<'a> {
    conv: &'a Conv,
    sizes: Sizes,
    source: &'a Source<'a>,
    weight: &'a [f32],
    incoming: &'a Incoming<'a>,
    wanted: Wanted<'a>,
    index: usize,
}

impl Image<'_> {
    fn backward(&self, scratch: &mut Scratch, gradient: &mut [f32], dweight: &mut [f32], retreat: &mut Retreat) {
        let Sizes { kernel, stride, channels, width, output_width, .. } = self.sizes;
        let Scratch { gradients, inputs } = scratch;
        let (input_row, output_row) = (width * channels, output_width * channels);
        let group = self.conv.group_of(self.index);
        let before = gradients.before;
        let mut filled = None;
        for y in 0..self.sizes.height {
            for (_, over) in self.sizes.rows_over(y) {
                let first = filled.map_or(0, |filled| filled + 1);
                for over in first..=over {
                    let start = self.index * self.conv.output_length() + over * output_row;
                    self.incoming.read(group, start, gradients.pixels_mut(over, output_row));
                }
                filled = filled.max(Some(over));
            }
            let start = self.index * self.conv.input_length() + y * input_row;
            let pixels = inputs.pixels_mut(0, input_row);
            match (self.wanted, &self.source.before) {
                (Wanted::Nothing, _) => self.source.read(self.conv, self.index, start, pixels),
                (Wanted::Gradient { plus }, before) => {
                    let target = &mut gradient[y * input_row..][..input_row];
                    self.gradient_row(y, gradients, target);
                    if let Some(before) = before {
                        retreat.tile(self.source, before, group, start, target, Some(pixels));
                    } else {
                        self.source.read(self.conv, self.index, start, pixels);
                        if let Some(plus) = plus {
                            tiles::add(target, &plus[start..start + input_row]);
                        }
                    }
                }
            }
            let inputs = inputs.row(0);
            for (ky, over) in self.sizes.rows_over(y) {
                let dys = &gradients.row(over)[before..before + output_row];
                let taps = &mut dweight[ky * kernel * channels..][..kernel * channels];
                add_weight_row(inputs, kernel, stride, dys, channels, taps);
            }
        }
    }

    /// The gradient of a row of the input, as the layer read it.
    fn gradient_row(&self, y: usize, gradients: &Ring, out: &mut [f32]) {
        let Sizes { kernel, stride, channels, width, left, .. } = self.sizes;
        let zeros = self.sizes.gradient_left();
        for parity in 0..stride.min(width) {
            let mut taps = [Tap { pixels: &[], weight: &[] }; MAX_TAPS];
            let mut count = 0;
            for (ky, over) in self.sizes.rows_over(y) {
                for kx in 0..kernel {
                    let reach = (parity + left) as isize - kx as isize;
                    if reach.rem_euclid(stride as isize) != 0 {
                        continue;
                    }
                    let first = (reach.div_euclid(stride as isize) + zeros as isize) as usize;
                    let weight = &self.weight[(ky * kernel + kx) * channels..][..channels];
                    taps[count] = Tap { pixels: &gradients.row(over)[first * channels..], weight };
                    count += 1;
                }
            }
            let out = &mut out[parity * channels..];
            sum_taps(&taps[..count], channels, out, stride * channels, (width - parity).div_ceil(stride), channels);
        }
    }
}
