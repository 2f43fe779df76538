//! Dense k x k convolutions as tiled matrix products: a tile of output pixels gathers its input pixels into a small panel,
//! which is multiplied while it is in cache. Weights are `[k * k * in][out]`.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{View, multiply};
use crate::ops::Geometry;

/// Output pixels whose panel is multiplied at once.
const TILE_ROWS: usize = 384;
/// Floats of a panel that still fit a core's cache.
const PANEL_FLOATS: usize = 512 * 1024;
/// Weight gradients up to this size are summed over pieces of the batch; larger ones are cut by kernel taps instead.
const SMALL_WEIGHT: usize = 200_000;

/// A convolution of one batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Conv {
    pub(super) geometry: Geometry,
    pub(super) batch: usize,
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

    /// Output pixels of the whole batch.
    pub(super) fn output_pixels(&self) -> usize {
        self.batch * self.output_height() * self.output_width()
    }

    fn input_pixels(&self) -> usize {
        self.batch * self.height * self.width
    }

    /// Whether the input itself is the matrix to multiply.
    fn is_product(&self) -> bool {
        self.geometry.kernel == 1 && self.geometry.stride == 1
    }

    fn gather<'a>(&self, xs: &'a [f32]) -> Gather<'a> {
        let Geometry { in_channels, kernel, stride, .. } = self.geometry;
        let padding = self.geometry.leading_padding(self.height);
        let offset = |tap: usize| tap as isize - padding as isize;
        Gather {
            source: xs,
            height: self.height,
            width: self.width,
            channels: in_channels,
            target_height: self.output_height(),
            target_width: self.output_width(),
            stride: stride as isize,
            taps: (0..kernel * kernel).map(|tap| (offset(tap / kernel), offset(tap % kernel))).collect(),
        }
    }

    /// `ys = conv(xs, weight)`.
    pub(super) fn forward(&self, xs: &[f32], weight: &[f32], ys: &mut [f32]) {
        let out = self.geometry.out_channels;
        if self.is_product() {
            let inner = self.geometry.in_channels;
            let rows = super::rows_per_piece(self.output_pixels(), TILE_ROWS, 256);
            ys.par_chunks_mut(rows * out).zip(xs.par_chunks(rows * inner)).for_each(|(ys, xs)| {
                multiply([ys.len() / out, out, inner], View::rows(xs, inner), View::rows(weight, out), ys, out, false);
            });
            return;
        }
        self.gather(xs).product(weight, out, ys);
    }

    /// `dxs`, the gradient of the input, from `dys`, that of the output.
    pub(super) fn input_gradient(&self, dys: &[f32], weight: &[f32], dxs: &mut [f32]) {
        let Geometry { in_channels, out_channels, kernel, stride, .. } = self.geometry;
        let padding = self.geometry.leading_padding(self.height);
        if self.is_product() {
            let rows = super::rows_per_piece(self.input_pixels(), TILE_ROWS, 256);
            dxs.par_chunks_mut(rows * in_channels).zip(dys.par_chunks(rows * out_channels)).for_each(|(dxs, dys)| {
                let sizes = [dxs.len() / in_channels, in_channels, out_channels];
                let transposed = View::rows(weight, out_channels).t();
                multiply(sizes, View::rows(dys, out_channels), transposed, dxs, in_channels, false);
            });
            return;
        }
        // Input pixels of one parity class (one class when the stride is 1) meet the same taps, so each class is a dense
        // convolution of `dys` by the transposed weights of these taps.
        for parity in 0..stride * stride {
            let (py, px) = (parity / stride, parity % stride);
            if py >= self.height || px >= self.width {
                continue;
            }
            let mut taps = Vec::new();
            let mut transposed = Vec::new();
            for tap in (0..kernel * kernel).rev() {
                let from = |parity: usize, tap: usize| (parity + padding) as isize - tap as isize;
                let (dy, dx) = (from(py, tap / kernel), from(px, tap % kernel));
                let step = stride as isize;
                if dy.rem_euclid(step) == 0 && dx.rem_euclid(step) == 0 {
                    taps.push((dy.div_euclid(step), dx.div_euclid(step)));
                    let of_tap = &weight[tap * in_channels * out_channels..][..in_channels * out_channels];
                    append_transposed(&mut transposed, of_tap, in_channels, out_channels);
                }
            }
            let gather = Gather {
                source: dys,
                height: self.output_height(),
                width: self.output_width(),
                channels: out_channels,
                target_height: (self.height - py).div_ceil(stride),
                target_width: (self.width - px).div_ceil(stride),
                stride: 1,
                taps,
            };
            if stride == 1 {
                gather.product(&transposed, in_channels, dxs);
                continue;
            }
            let mut class = vec![0.0; self.batch * gather.target_height * gather.target_width * in_channels];
            gather.product(&transposed, in_channels, &mut class);
            let class_row = gather.target_width * in_channels;
            dxs.par_chunks_mut(self.height * self.width * in_channels)
                .zip(class.par_chunks(gather.target_height * class_row))
                .for_each(|(image, class)| {
                    for (y, row) in class.chunks(class_row).enumerate() {
                        for (x, pixel) in row.chunks(in_channels).enumerate() {
                            let at = ((y * stride + py) * self.width + x * stride + px) * in_channels;
                            image[at..at + in_channels].copy_from_slice(pixel);
                        }
                    }
                });
        }
    }

    /// The gradient of the weights.
    pub(super) fn weight_gradient(&self, xs: &[f32], dys: &[f32]) -> Vec<f32> {
        let Geometry { in_channels, out_channels, kernel, .. } = self.geometry;
        let gather = self.gather(xs);
        let taps = kernel * kernel;
        let of_tap = in_channels * out_channels;
        let pieces = if taps * of_tap > SMALL_WEIGHT { 2 } else { 8 };
        let tap_groups = if taps * of_tap > SMALL_WEIGHT { taps.div_ceil(3) } else { 1 };
        let taps_per_group = taps.div_ceil(tap_groups);
        let rows_per_piece = self.output_pixels().div_ceil(pieces).max(1);
        let tile_rows = TILE_ROWS.min(rows_per_piece);
        let mut partials: Vec<Vec<f32>> = (0..pieces * tap_groups)
            .into_par_iter()
            .map(|task| {
                let (piece, group) = (task / tap_groups, task % tap_groups);
                let tap_range = group * taps_per_group..((group + 1) * taps_per_group).min(taps);
                let columns = tap_range.len() * in_channels;
                let mut sum = vec![0.0; columns * out_channels];
                let mut panel = vec![0.0; if self.is_product() { 0 } else { tile_rows * columns }];
                let end = ((piece + 1) * rows_per_piece).min(self.output_pixels());
                for start in (piece * rows_per_piece..end).step_by(tile_rows) {
                    let rows = tile_rows.min(end - start);
                    let inputs = if self.is_product() {
                        &xs[start * in_channels..]
                    } else {
                        gather.fill(start, rows, tap_range.clone(), &mut panel);
                        &panel
                    };
                    let dys = View::rows(&dys[start * out_channels..], out_channels);
                    let sizes = [columns, out_channels, rows];
                    multiply(sizes, View::rows(inputs, columns).t(), dys, &mut sum, out_channels, true);
                }
                sum
            })
            .collect();
        let rest = partials.split_off(tap_groups);
        for (index, partial) in rest.iter().enumerate() {
            add(&mut partials[index % tap_groups], partial);
        }
        partials.concat()
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}

/// Appends the `[out][in]` transpose of `[in][out]` weights.
fn append_transposed(target: &mut Vec<f32>, weight: &[f32], inputs: usize, outputs: usize) {
    const BLOCK: usize = 16;
    let start = target.len();
    target.resize(start + weight.len(), 0.0);
    target[start..].par_chunks_mut(inputs * BLOCK).enumerate().for_each(|(block, rows)| {
        for input in 0..inputs {
            let row = &weight[input * outputs + block * BLOCK..];
            for (output, target) in rows.chunks_mut(inputs).enumerate() {
                target[input] = row[output];
            }
        }
    });
}

/// Neighbouring taps of a kernel row.
#[derive(Debug, Clone, Copy)]
struct Run {
    dy: isize,
    dx: isize,
    length: usize,
}

/// For each target pixel, the source pixels under its taps; source row = target row * stride + tap, zero outside.
#[derive(Debug)]
struct Gather<'a> {
    source: &'a [f32],
    height: usize,
    width: usize,
    channels: usize,
    target_height: usize,
    target_width: usize,
    stride: isize,
    taps: Vec<(isize, isize)>,
}

impl Gather<'_> {
    /// Rows `[start, start + rows)` of the gathered matrix, columns of the taps in `taps`.
    fn fill(&self, start: usize, rows: usize, taps: Range<usize>, panel: &mut [f32]) {
        let per_image = self.target_height * self.target_width;
        let (mut image, pixel) = (start / per_image, start % per_image);
        let (mut y, mut x) = (pixel / self.target_width, pixel % self.target_width);
        let row_length = taps.len() * self.channels;
        let runs = self.runs(taps);
        for row in panel.chunks_exact_mut(row_length).take(rows) {
            let mut row = row;
            for run in &runs {
                let (target, rest) = row.split_at_mut(run.length * self.channels);
                row = rest;
                let (sy, sx) = (y as isize * self.stride + run.dy, x as isize * self.stride + run.dx);
                if sy < 0 || sy >= self.height as isize {
                    target.fill(0.0);
                    continue;
                }
                // Of the run's pixels, `[from, to)` lie inside the image.
                let from = (-sx).clamp(0, run.length as isize) as usize;
                let to = (self.width as isize - sx).clamp(from as isize, run.length as isize) as usize;
                target[..from * self.channels].fill(0.0);
                target[to * self.channels..].fill(0.0);
                if from < to {
                    let pixel = (image * self.height + sy as usize) * self.width + (sx + from as isize) as usize;
                    let source = &self.source[pixel * self.channels..][..(to - from) * self.channels];
                    target[from * self.channels..to * self.channels].copy_from_slice(source);
                }
            }
            x += 1;
            if x == self.target_width {
                (x, y) = (0, y + 1);
                if y == self.target_height {
                    (y, image) = (0, image + 1);
                }
            }
        }
    }

    /// Taps that lie side by side in a row of the source, so that one copy serves them.
    fn runs(&self, taps: Range<usize>) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for &(dy, dx) in &self.taps[taps] {
            match runs.last_mut() {
                Some(run) if run.dy == dy && run.dx + run.length as isize == dx => run.length += 1,
                _ => runs.push(Run { dy, dx, length: 1 }),
            }
        }
        runs
    }

    /// `out = gathered * weight`, `weight` is `[taps * channels][outputs]`.
    fn product(&self, weight: &[f32], outputs: usize, out: &mut [f32]) {
        let columns = self.taps.len() * self.channels;
        if columns == 0 {
            out.fill(0.0);
            return;
        }
        let rows = out.len() / outputs;
        let tile_rows = TILE_ROWS.min((PANEL_FLOATS / columns).max(128)).min(rows.div_ceil(8).max(32));
        out.par_chunks_mut(tile_rows * outputs).enumerate().for_each_init(
            || vec![0.0; tile_rows * columns],
            |panel, (tile, out)| {
                let rows = out.len() / outputs;
                self.fill(tile * tile_rows, rows, 0..self.taps.len(), panel);
                let sizes = [rows, outputs, columns];
                multiply(sizes, View::rows(panel, columns), View::rows(weight, outputs), out, outputs, false);
            },
        );
    }
}
