//! The two forms of a picture: interleaved as decoded and stored, and planar while it is augmented.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "instruction sets chosen at run time"))]

use super::level::{Level, kernel};
use crate::error::{Error, Result};

/// A picture with interleaved channels: `(H, W, 3)` u8, red, green, blue, never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    height: usize,
    width: usize,
    pixels: Vec<u8>,
}

impl RgbImage {
    /// A picture of `height` x `width` pixels.
    ///
    /// # Errors
    /// [`Error::Shape`] when a side is 0 or the number of bytes is not `height * width * 3`.
    pub fn new(height: usize, width: usize, pixels: Vec<u8>) -> Result<Self> {
        let bytes = height.checked_mul(width).and_then(|n| n.checked_mul(3));
        if bytes != Some(pixels.len()) || pixels.is_empty() {
            return Err(Error::Shape {
                op: "image",
                expected: "(H, W, 3), neither side 0".into(),
                got: format!("({height}, {width}, 3) with {} bytes", pixels.len()),
            });
        }
        Ok(Self { height, width, pixels })
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The bytes, row by row, pixel by pixel.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Gives the bytes back, so that their memory can be used again.
    pub fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }
}

/// A picture as three planes, red, green and blue one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Planes {
    height: usize,
    width: usize,
    bytes: Vec<u8>,
}

impl Planes {
    /// The planes of an interleaved picture.
    pub fn from_rgb(image: &RgbImage) -> Self {
        let mut planes = Self::default();
        planes.reset(image.height, image.width);
        let [red, green, blue] = planes.split_mut();
        let pixels = image.pixels.as_chunks::<3>().0;
        for (((r, g), b), pixel) in red.iter_mut().zip(green).zip(blue).zip(pixels) {
            [*r, *g, *b] = *pixel;
        }
        planes
    }

    /// Takes a new size; the contents are undefined.
    pub(super) fn reset(&mut self, height: usize, width: usize) {
        (self.height, self.width) = (height, width);
        self.bytes.resize(height * width * 3, 0);
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// All three planes as one slice.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The planes one by one.
    pub fn split_mut(&mut self) -> [&mut [u8]; 3] {
        let plane = self.height * self.width;
        let (red, rest) = self.bytes.split_at_mut(plane);
        let (green, blue) = rest.split_at_mut(plane);
        [red, green, blue]
    }

    /// Sets row `y` of all planes from a line of red, green and blue part.
    pub(super) fn set_row(&mut self, y: usize, line: &[u8]) {
        let width = self.width;
        for (plane, part) in self.split_mut().into_iter().zip(line.chunks_exact(width)) {
            plane[y * width..][..width].copy_from_slice(part);
        }
    }

    /// Writes the picture with interleaved channels.
    ///
    /// # Panics
    /// When `out` is not exactly as long as the picture.
    pub fn write_rgb(&self, level: Level, out: &mut [u8]) {
        assert_eq!(out.len(), self.bytes.len(), "the output holds the picture");
        let plane = self.height * self.width;
        interleave(level, &self.bytes[..plane], &self.bytes[plane..2 * plane], &self.bytes[2 * plane..], out);
    }
}

/// Pixels that are interleaved together.
const LANES: usize = 16;

kernel! {
    fn interleave(red: &[u8], green: &[u8], blue: &[u8], out: &mut [u8]) {
        let (r, red) = red.as_chunks::<LANES>();
        let (g, green) = green.as_chunks::<LANES>();
        let (b, blue) = blue.as_chunks::<LANES>();
        let (whole, rest) = out.split_at_mut(r.len() * LANES * 3);
        for (((out, r), g), b) in whole.as_chunks_mut::<{ LANES * 3 }>().0.iter_mut().zip(r).zip(g).zip(b) {
            for i in 0..LANES {
                out[3 * i] = r[i];
                out[3 * i + 1] = g[i];
                out[3 * i + 2] = b[i];
            }
        }
        for (((out, r), g), b) in rest.as_chunks_mut::<3>().0.iter_mut().zip(red).zip(green).zip(blue) {
            *out = [*r, *g, *b];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transforms::reference;

    #[test]
    fn planes_and_back_is_the_identity_at_every_level() {
        for (height, width) in [(1, 1), (3, 5), (16, 16), (7, 67)] {
            let image = reference::noise(height, width, 9);
            for level in Level::available() {
                let mut out = vec![0; height * width * 3];
                Planes::from_rgb(&image).write_rgb(level, &mut out);
                assert_eq!(out, image.pixels());
            }
        }
    }

    #[test]
    fn empty_and_mismatched_pictures_are_refused() {
        assert!(RgbImage::new(0, 4, vec![]).is_err());
        assert!(RgbImage::new(2, 2, vec![0; 11]).is_err());
        assert!(RgbImage::new(usize::MAX, 2, vec![0; 6]).is_err());
    }
}
