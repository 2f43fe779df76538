//! Max pool and global average pool over channels-last images; one image is one piece.

use rayon::prelude::*;

/// A 3x3 max pool of stride 2 with padding 1 over a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct MaxPool {
    pub(super) batch: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
}

const KERNEL: usize = 3;
const STRIDE: usize = 2;
const PADDING: usize = 1;

impl MaxPool {
    pub(super) fn output_height(&self) -> usize {
        (self.height + 2 * PADDING - KERNEL) / STRIDE + 1
    }

    pub(super) fn output_width(&self) -> usize {
        (self.width + 2 * PADDING - KERNEL) / STRIDE + 1
    }

    fn output_floats(&self) -> usize {
        self.output_height() * self.output_width() * self.channels
    }

    /// The input pixel under a tap of an output pixel.
    fn source(&self, pixel: usize, tap: usize) -> Option<usize> {
        let (y, x) = (pixel / self.output_width(), pixel % self.output_width());
        let y = (y * STRIDE + tap / KERNEL).checked_sub(PADDING).filter(|&y| y < self.height)?;
        let x = (x * STRIDE + tap % KERNEL).checked_sub(PADDING).filter(|&x| x < self.width)?;
        Some((y * self.width + x) * self.channels)
    }

    /// The maxima and the tap each came from: the first in reading order, and NaN wins, as in `PyTorch`.
    pub(super) fn forward(&self, xs: &[f32]) -> (Vec<f32>, Vec<u8>) {
        let floats = self.output_floats();
        let mut out = vec![f32::NEG_INFINITY; self.batch * floats];
        let mut winners = vec![0u8; self.batch * floats];
        let image = self.height * self.width * self.channels;
        out.par_chunks_mut(floats).zip(winners.par_chunks_mut(floats)).zip(xs.par_chunks(image)).for_each(
            |((out, winners), xs)| {
                let pixels = out.chunks_mut(self.channels).zip(winners.chunks_mut(self.channels));
                for (pixel, (out, winners)) in pixels.enumerate() {
                    let mut first = true;
                    for tap in 0..KERNEL * KERNEL {
                        let Some(at) = self.source(pixel, tap) else { continue };
                        let xs = &xs[at..at + self.channels];
                        if first {
                            out.copy_from_slice(xs);
                            winners.fill(tap as u8);
                            first = false;
                            continue;
                        }
                        for ((out, winner), x) in out.iter_mut().zip(winners.iter_mut()).zip(xs) {
                            let wins = *x > *out || x.is_nan();
                            *out = if wins { *x } else { *out };
                            *winner = if wins { tap as u8 } else { *winner };
                        }
                    }
                }
            },
        );
        (out, winners)
    }

    /// Sends each gradient to the pixel that won.
    pub(super) fn backward(&self, winners: &[u8], dout: &[f32]) -> Vec<f32> {
        let floats = self.output_floats();
        let image = self.height * self.width * self.channels;
        let mut dxs = vec![0.0; self.batch * image];
        dxs.par_chunks_mut(image).zip(winners.par_chunks(floats)).zip(dout.par_chunks(floats)).for_each(
            |((dxs, winners), dout)| {
                let pixels = winners.chunks(self.channels).zip(dout.chunks(self.channels));
                for (pixel, (winners, dout)) in pixels.enumerate() {
                    for tap in 0..KERNEL * KERNEL {
                        let Some(at) = self.source(pixel, tap) else { continue };
                        let dxs = &mut dxs[at..at + self.channels];
                        for ((dx, winner), d) in dxs.iter_mut().zip(winners).zip(dout) {
                            *dx += if *winner == tap as u8 { *d } else { 0.0 };
                        }
                    }
                }
            },
        );
        dxs
    }
}

/// Means over the pixels of each image: `(B, pixels, C)` to `(B, C)`.
pub(super) fn average(xs: &[f32], pixels: usize, channels: usize) -> Vec<f32> {
    let mut out = vec![0.0; xs.len() / pixels];
    out.par_chunks_mut(channels).zip(xs.par_chunks(pixels * channels)).for_each(|(out, xs)| {
        for xs in xs.chunks_exact(channels) {
            for (out, x) in out.iter_mut().zip(xs) {
                *out += x;
            }
        }
        let factor = 1.0 / pixels as f32;
        for out in out {
            *out *= factor;
        }
    });
    out
}

/// The gradient of [`average`].
pub(super) fn average_gradient(dout: &[f32], pixels: usize, channels: usize) -> Vec<f32> {
    let mut dxs = vec![0.0; dout.len() * pixels];
    let factor = 1.0 / pixels as f32;
    dxs.par_chunks_mut(pixels * channels).zip(dout.par_chunks(channels)).for_each(|(dxs, dout)| {
        for dxs in dxs.chunks_exact_mut(channels) {
            for (dx, d) in dxs.iter_mut().zip(dout) {
                *dx = d * factor;
            }
        }
    });
    dxs
}
