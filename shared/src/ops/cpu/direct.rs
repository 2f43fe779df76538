//! Dense convolutions of any kernel and stride as matrix products without gathering: with channels last, the pixels under a row of the
//! kernel lie side by side, so a row of outputs is a sum of products over a padded band of input rows. Weights are `[k * k * in][out]`.

use rayon::prelude::*;

use super::flow::{
    Conv, Finish, Finisher, GateSums, Incoming, Outgoing, Piece, Retreat, Source, Wanted, backward_sums, buffer,
    pieces, split, statistics, sum_in_order,
};
use super::gemm::{MAX_ROW_PIECES, MAX_RUNS, Packed, Rows, Run, multiply_transposed};
use super::norm::Statistics;
use super::tiles;

/// Numbers of a band of input rows: what fits half of a core's second cache.
const BAND_FLOATS: usize = 96 * 1024;
/// Pieces of an image are at least this many over the batch, if the images are high enough.
const LEAST_PIECES: usize = 16;

/// Some rows of images, each with zeros around it.
#[derive(Debug)]
struct Band {
    values: Vec<f32>,
    row_length: usize,
    /// Numbers before the first pixel of a row.
    before: usize,
    /// Numbers of the pixels of a row.
    pixels: usize,
}

impl Band {
    fn new(rows: usize, row_length: usize, before: usize, pixels: usize) -> Self {
        Self { values: vec![0.0; rows * row_length], row_length, before, pixels }
    }

    /// Fills the rows `first..` of an image of `height` rows, counted from its first row; those outside become zeros.
    fn fill(&mut self, first: isize, rows: usize, height: usize, mut read: impl FnMut(usize, &mut [f32])) {
        for (index, target) in self.values.chunks_exact_mut(self.row_length).take(rows).enumerate() {
            let pixels = &mut target[self.before..self.before + self.pixels];
            match usize::try_from(first + index as isize) {
                Ok(row) if row < height => read(row, pixels),
                _ => pixels.fill(0.0),
            }
        }
    }

    /// A row, from a pixel offset on.
    fn from(&self, row: usize, offset: usize) -> &[f32] {
        &self.values[row * self.row_length + offset..(row + 1) * self.row_length]
    }
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    kernel: usize,
    stride: usize,
    inputs: usize,
    outputs: usize,
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
            inputs: geometry.in_channels,
            outputs: geometry.out_channels,
            height: conv.height,
            width: conv.width,
            output_height: conv.output_height(),
            output_width: conv.output_width(),
            top: geometry.leading_padding(conv.height),
            left: geometry.leading_padding(conv.width),
        }
    }

    /// Numbers of a padded input row.
    fn row_length(&self) -> usize {
        let reach = (self.output_width - 1) * self.stride + self.kernel;
        reach.max(self.left + self.width) * self.inputs
    }

    /// Rows of input under `rows` rows of output.
    fn input_rows(&self, rows: usize) -> usize {
        (rows - 1) * self.stride + self.kernel
    }

    /// Rows of output whose input is a band of the right size.
    fn band_rows(&self, batch: usize) -> usize {
        let fitting = (BAND_FLOATS / self.row_length()).saturating_sub(self.kernel) / self.stride + 1;
        let bands = LEAST_PIECES.div_ceil(batch).min(self.output_height);
        fitting.min(self.output_height.div_ceil(bands))
    }

    /// A band for the input of `rows` rows of output.
    fn band(&self, rows: usize) -> Band {
        Band::new(self.input_rows(rows), self.row_length(), self.left * self.inputs, self.width * self.inputs)
    }

    /// Fills a band with what lies under `rows` rows of an image's output, from `first` on.
    fn fill(&self, band: &mut Band, conv: &Conv, source: &Source<'_>, image: usize, first: usize, rows: usize) {
        let top = (first * self.stride) as isize - self.top as isize;
        band.fill(top, self.input_rows(rows), self.height, |row, pixels| {
            let start = image * conv.input_length() + row * self.width * self.inputs;
            source.read(conv, image, start, pixels);
        });
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
    let sizes = Sizes::new(conv);
    let Sizes { kernel, stride, inputs, outputs, output_width, output_height, .. } = sizes;
    assert!(kernel <= MAX_RUNS, "kernels have at most {MAX_RUNS} rows");
    let packed = Packed::new(weight, kernel * kernel * inputs, outputs, outputs, 1);
    let rows = sizes.band_rows(conv.batch);
    let pieces = pieces(conv.batch, output_height, 1, rows, usize::MAX);
    let parts = split(out, &pieces, output_width * outputs);
    let gathered = pieces
        .par_iter()
        .zip(parts)
        .map_init(
            || sizes.band(rows),
            |band, (piece, out)| {
                let image = piece.group;
                let first = piece.start - image * output_height;
                sizes.fill(band, conv, source, image, first, piece.rows);
                for panel in packed.panels(0) {
                    for (index, out) in out.chunks_exact_mut(output_width * outputs).enumerate() {
                        let mut runs = [Run { values: &[], length: 0, factor_row: 0 }; MAX_RUNS];
                        for (ky, run) in runs.iter_mut().enumerate().take(kernel) {
                            let values = band.from(index * stride + ky, 0);
                            *run = Run { values, length: kernel * inputs, factor_row: ky * kernel * inputs };
                        }
                        panel.multiply(output_width, &runs[..kernel], stride * inputs, out, outputs, false);
                    }
                }
                let mut finisher = Finisher::new(finish, outputs);
                finisher.tile(piece.start * output_width * outputs, out);
                (conv.group_of(image), finisher.into_moments())
            },
        )
        .collect();
    statistics(gathered, conv.groups, outputs)
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
    let dweight = weight_gradient(conv, source, incoming);
    let (gradient, sums) = match wanted {
        Wanted::Nothing => (Vec::new(), Vec::new()),
        Wanted::Gradient { plus } => input_gradient(conv, source, weight, incoming, plus),
    };
    Outgoing { gradient, sums, gate_sums: GateSums::default(), dweight }
}

/// Pieces that each sum the gradient of the weights on their own.
fn weight_pieces(floats: usize) -> usize {
    match floats {
        0..=65_536 => 16,
        65_537..=524_288 => 8,
        _ => 4,
    }
}

fn weight_gradient(conv: &Conv, source: &Source<'_>, incoming: &Incoming<'_>) -> Vec<f32> {
    let sizes = Sizes::new(conv);
    let Sizes { kernel, stride, inputs, outputs, output_width, output_height, .. } = sizes;
    let floats = kernel * kernel * inputs * outputs;
    let rows = sizes.band_rows(LEAST_PIECES).min(MAX_ROW_PIECES);
    let row_length = output_width * outputs;
    // Images whose rows are summed in one go, so that large weights are not read and written for every image.
    let together = (MAX_ROW_PIECES / rows.max(1)).min(if rows < output_height { 1 } else { 4 }).max(1);
    let pieces = pieces(1, conv.batch, together, 1, weight_pieces(floats));
    let partials = pieces
        .par_iter()
        .map_init(
            || {
                let bands: Vec<Band> = (0..together).map(|_| sizes.band(rows)).collect();
                (bands, buffer(together * rows * row_length))
            },
            |(bands, draw), piece| {
                let mut dweight = vec![0.0; floats];
                let images = piece.start..piece.start + piece.rows;
                for chunk in images.step_by(together) {
                    let count = together.min(piece.start + piece.rows - chunk);
                    for first in (0..output_height).step_by(rows) {
                        let band_rows = rows.min(output_height - first);
                        let mut jobs = Vec::with_capacity(count * band_rows);
                        for (index, (band, draw)) in
                            bands.iter_mut().zip(draw.chunks_exact_mut(rows * row_length)).enumerate().take(count)
                        {
                            let image = chunk + index;
                            sizes.fill(band, conv, source, image, first, band_rows);
                            let start = image * conv.output_length() + first * row_length;
                            incoming.read(conv.group_of(image), start, &mut draw[..band_rows * row_length]);
                        }
                        for ky in 0..kernel {
                            jobs.clear();
                            for (band, draw) in bands.iter().zip(draw.chunks_exact(rows * row_length)).take(count) {
                                for (row, draw) in draw.chunks_exact(row_length).enumerate().take(band_rows) {
                                    let left = band.from(row * stride + ky, 0);
                                    jobs.push(Rows { left, right: draw, count: output_width });
                                }
                            }
                            let taps = kernel * inputs;
                            let target = &mut dweight[ky * taps * outputs..][..taps * outputs];
                            multiply_transposed([taps, outputs], &jobs, stride * inputs, outputs, target, outputs);
                        }
                    }
                }
                dweight
            },
        )
        .collect();
    sum_in_order(partials)
}

/// The rows of the output's gradient that pixels of one parity see, and how.
#[derive(Debug)]
struct Parity {
    /// First row and column of these pixels.
    y: usize,
    x: usize,
    /// Offset of the first row of the output's gradient under a row of these pixels, in rows; then in pixels.
    above: isize,
    left: isize,
    rows: usize,
    packed: Packed,
    /// Numbers under one row of taps.
    length: usize,
}

/// The gradient of the source: pixels whose rows and columns leave the same remainders by the stride meet the same taps, so each such
/// class is a dense convolution of the output's gradient by transposed weights.
fn input_gradient(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    incoming: &Incoming<'_>,
    plus: Option<&[f32]>,
) -> (Vec<f32>, Vec<super::norm::BackwardSums>) {
    let sizes = Sizes::new(conv);
    let Sizes { stride, inputs, outputs, width, height, output_width, output_height, .. } = sizes;
    let classes: Vec<Parity> = (0..stride.min(height))
        .flat_map(|y| (0..stride.min(width)).map(move |x| (y, x)))
        .map(|(y, x)| parity(&sizes, weight, y, x))
        .collect();
    let above = classes.iter().map(|class| -class.above).max().unwrap_or(0).max(0) as usize;
    let left = classes.iter().map(|class| -class.left).max().unwrap_or(0).max(0) as usize;
    let reach =
        |side: usize, before: isize, taps: usize| (side.div_ceil(stride) as isize + before + taps as isize) as usize;
    let below =
        classes.iter().map(|class| reach(height, class.above, class.rows)).max().unwrap_or(0).max(output_height);
    let right = classes
        .iter()
        .map(|class| reach(width, class.left, class.length / outputs))
        .max()
        .unwrap_or(0)
        .max(output_width);
    let mut gradient = buffer(conv.batch * conv.input_length());
    let image_pieces = pieces(conv.batch, 1, 1, 1, conv.batch);
    let parts = split(&mut gradient, &image_pieces, conv.input_length());
    let row_length = output_width * outputs;
    let done: Vec<(usize, Retreat)> = image_pieces
        .par_iter()
        .zip(parts)
        .map_init(
            || Band::new(above + below, (left + right) * outputs, left * outputs, row_length),
            |band, (piece, gradient): (&Piece, &mut [f32])| {
                let image = piece.group;
                let group = conv.group_of(image);
                band.fill(-(above as isize), above + below, output_height, |row, pixels| {
                    incoming.read(group, image * conv.output_length() + row * row_length, pixels);
                });
                for class in &classes {
                    let across = (width - class.x).div_ceil(stride);
                    for panel in class.packed.panels(0) {
                        for (index, y) in (class.y..height).step_by(stride).enumerate() {
                            let mut runs = [Run { values: &[], length: 0, factor_row: 0 }; MAX_RUNS];
                            for (row, run) in runs.iter_mut().enumerate().take(class.rows) {
                                let band_row = (index as isize + class.above + (above + row) as isize) as usize;
                                let offset = (left as isize + class.left) as usize * outputs;
                                let values = band.from(band_row, offset);
                                *run = Run { values, length: class.length, factor_row: row * class.length };
                            }
                            let out = &mut gradient[(y * width + class.x) * inputs..];
                            panel.multiply(across, &runs[..class.rows], outputs, out, stride * inputs, false);
                        }
                    }
                }
                let mut retreat = Retreat::new(inputs);
                let start = image * conv.input_length();
                match &source.before {
                    Some(before) => {
                        for (row, gradient) in gradient.chunks_exact_mut(width * inputs).enumerate() {
                            retreat.tile(source, before, group, start + row * width * inputs, gradient, None);
                        }
                    }
                    None => {
                        if let Some(plus) = plus {
                            tiles::add(gradient, &plus[start..start + gradient.len()]);
                        }
                    }
                }
                (group, retreat)
            },
        )
        .collect();
    let sums = done.into_iter().map(|(group, retreat)| (group, retreat.sums));
    (gradient, backward_sums(sums, conv.groups, inputs))
}

fn parity(sizes: &Sizes, weight: &[f32], y: usize, x: usize) -> Parity {
    let Sizes { kernel, stride, inputs, outputs, top, left, .. } = *sizes;
    // Taps in the order of the rows or columns of the output's gradient that they see.
    let taps = |parity: usize, padding: usize| -> (Vec<usize>, isize) {
        let reach = |tap: usize| (parity + padding) as isize - tap as isize;
        let taps: Vec<usize> = (0..kernel).rev().filter(|&tap| reach(tap).rem_euclid(stride as isize) == 0).collect();
        let first = taps.first().map_or(0, |&tap| reach(tap).div_euclid(stride as isize));
        (taps, first)
    };
    let ((rows, above), (columns, before)) = (taps(y, top), taps(x, left));
    let length = columns.len() * outputs;
    let packed = Packed::from_rows(rows.len() * length, inputs, |row, first, target| {
        let (ky, kx) = (rows[row / length], columns[row % length / outputs]);
        let of_tap = &weight[(ky * kernel + kx) * inputs * outputs..][..inputs * outputs];
        for (offset, slot) in target.iter_mut().enumerate() {
            *slot = of_tap[(first + offset) * outputs + row % outputs];
        }
    });
    Parity { y, x, above, left: before, rows: rows.len(), packed, length }
}
