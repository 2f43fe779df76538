//! Max pool and global average pool over channels-last images; one image is one piece.
#![expect(unsafe_code, reason = "vector kernels over raw pointers; every safe function checks the sizes")]
#![expect(clippy::multiple_unsafe_ops_per_block, clippy::inline_always, reason = "kernels are one unsafe computation")]

use rayon::prelude::*;

use super::flow::buffer;
use super::simd::{Simd, dispatch};

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

/// First places of the pixels under the kernel, in reading order, and how many there are.
type Window = ([usize; KERNEL * KERNEL], usize);

impl MaxPool {
    pub(super) fn output_height(&self) -> usize {
        (self.height + 2 * PADDING - KERNEL) / STRIDE + 1
    }

    pub(super) fn output_width(&self) -> usize {
        (self.width + 2 * PADDING - KERNEL) / STRIDE + 1
    }

    fn input_floats(&self) -> usize {
        self.height * self.width * self.channels
    }

    fn output_floats(&self) -> usize {
        self.output_height() * self.output_width() * self.channels
    }

    /// The pixels under the kernel of an output pixel: never none.
    fn window(&self, y: usize, x: usize) -> Window {
        let (mut places, mut count) = ([0; KERNEL * KERNEL], 0);
        let side = |place: usize, length: usize| {
            (place * STRIDE).saturating_sub(PADDING)..(place * STRIDE + KERNEL - PADDING).min(length)
        };
        for row in side(y, self.height) {
            for column in side(x, self.width) {
                places[count] = (row * self.width + column) * self.channels;
                count += 1;
            }
        }
        (places, count)
    }

    /// The maxima; NaN wins, as in `PyTorch`.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, C)`
    /// - returns: `(B, H', W', C)`
    pub(super) fn forward(&self, xs: &[f32]) -> Vec<f32> {
        assert_eq!(xs.len(), self.batch * self.input_floats(), "images of another size");
        let mut out = buffer(self.batch * self.output_floats());
        let row_floats = self.output_width() * self.channels;
        out.par_chunks_mut(self.output_floats()).zip(xs.par_chunks(self.input_floats())).for_each(|(out, xs)| {
            for (y, out) in out.chunks_exact_mut(row_floats).enumerate() {
                // SAFETY: `xs` is an image and `out` a row of outputs, of the sizes that the pool has.
                unsafe { row_maxima(self, y, xs.as_ptr(), out.as_mut_ptr()) };
            }
        });
        out
    }

    /// Sends each gradient to the first pixel in reading order that is the maximum, as `PyTorch` does; none where that is NaN.
    pub(super) fn backward(&self, xs: &[f32], dout: &[f32]) -> Vec<f32> {
        assert_eq!(xs.len(), self.batch * self.input_floats(), "images of another size");
        assert_eq!(dout.len(), self.batch * self.output_floats(), "gradients of another size");
        let mut dxs = buffer(xs.len());
        let (image, output) = (self.input_floats(), self.output_floats());
        let (row_floats, output_row) = (self.width * self.channels, self.output_width() * self.channels);
        let images = xs.par_chunks(image).zip(dout.par_chunks(output));
        dxs.par_chunks_mut(image).zip(images).for_each(|(dxs, (xs, dout))| {
            for (y, dout) in dout.chunks_exact(output_row).enumerate() {
                // The row before was the last one of the window above.
                let rows = y * STRIDE..(y * STRIDE + STRIDE).min(self.height);
                dxs[rows.start * row_floats..rows.end * row_floats].fill(0.0);
                // SAFETY: `xs` and `dxs` are images, `dout` is a row of gradients, of the sizes that the pool has.
                unsafe { row_gradients(self, y, xs.as_ptr(), dout.as_ptr(), dxs.as_mut_ptr()) };
            }
        });
        dxs
    }
}

#[inline(always)]
unsafe fn row_maxima_with<V: Simd>(pool: &MaxPool, y: usize, xs: *const f32, out: *mut f32) {
    for x in 0..pool.output_width() {
        let (places, count) = pool.window(y, x);
        let mut channel = 0;
        while channel < pool.channels {
            let left = pool.channels - channel;
            // SAFETY: the contract of `row_maxima`.
            unsafe {
                let mut top = V::load_first(xs.add(places[0] + channel), left);
                for place in &places[1..count] {
                    top = top.max_or_nan(V::load_first(xs.add(place + channel), left));
                }
                top.store_first(out.add(x * pool.channels + channel), left);
            }
            channel += V::LANES;
        }
    }
}

dispatch!(
    /// # Safety
    /// `xs` is an image, `out` the row `y` of its maxima.
    row_maxima = row_maxima_with(pool: &MaxPool, y: usize, xs: *const f32, out: *mut f32)
);

#[inline(always)]
unsafe fn row_gradients_with<V: Simd>(pool: &MaxPool, y: usize, xs: *const f32, dout: *const f32, dxs: *mut f32) {
    for x in 0..pool.output_width() {
        let (places, count) = pool.window(y, x);
        let mut channel = 0;
        while channel < pool.channels {
            let left = pool.channels - channel;
            // SAFETY: the contract of `row_gradients`.
            unsafe {
                let mut pixels = [V::splat(0.0); KERNEL * KERNEL];
                for (pixel, place) in pixels.iter_mut().zip(&places[..count]) {
                    *pixel = V::load_first(xs.add(place + channel), left);
                }
                let mut top = pixels[0];
                for pixel in &pixels[1..count] {
                    top = top.max_or_nan(*pixel);
                }
                let mut rest = V::load_first(dout.add(x * pool.channels + channel), left);
                for (x, place) in pixels.into_iter().zip(&places[..count]) {
                    let to = dxs.add(place + channel);
                    rest.where_equal(x, top).add(V::load_first(to, left)).store_first(to, left);
                    rest = rest.where_unequal(x, top);
                }
            }
            channel += V::LANES;
        }
    }
}

dispatch!(
    /// # Safety
    /// `xs` and `dxs` are images, `dout` is the row `y` of the maxima's gradients.
    row_gradients = row_gradients_with(pool: &MaxPool, y: usize, xs: *const f32, dout: *const f32, dxs: *mut f32)
);

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
