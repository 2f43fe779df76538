//! A white sheet for pictures, captions and frames, saved as PNG.

use std::io::Cursor;
use std::path::Path;

use image::{ImageFormat, RgbImage};
use shared::io::write_atomic;
use shared::typeface::{self, Weight};
use shared::{Error, Result};

/// The longest side of a sheet.
const LARGEST_SHEET_PX: usize = 32_768;
/// The most pixels of a sheet: 805 MB.
const LARGEST_SHEET_PIXELS: usize = 1 << 28;

/// A colour.
pub(crate) type Rgb = [u8; 3];
/// For captions.
pub(crate) const INK: Rgb = [40, 40, 40];
/// For what matters less.
pub(crate) const GREY: Rgb = [120, 120, 120];

/// A rectangle in pixels of the sheet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) left: usize,
    pub(crate) top: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// A picture being put together.
#[derive(Debug)]
pub(crate) struct Sheet {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Sheet {
    /// A white sheet.
    ///
    /// # Errors
    /// [`Error::Usage`] when it would be too large.
    pub(crate) fn new(width: usize, height: usize) -> Result<Self> {
        let pixels = width.checked_mul(height).filter(|&pixels| pixels <= LARGEST_SHEET_PIXELS);
        match pixels {
            Some(pixels) if width.max(height) <= LARGEST_SHEET_PX => {
                Ok(Self { width, height, pixels: vec![255; pixels * 3] })
            }
            _ => Err(Error::usage(format!(
                "a sheet of {width} x {height} pixels is too large, use fewer `--samples` or `--views`"
            ))),
        }
    }

    fn pixel(&mut self, x: usize, y: usize) -> Option<&mut [u8]> {
        let inside = x < self.width && y < self.height;
        inside.then(|| &mut self.pixels[(y * self.width + x) * 3..][..3])
    }

    /// Puts a picture of interleaved RGB, `width` pixels wide; what lies beyond the sheet is cut off.
    pub(crate) fn picture(&mut self, left: usize, top: usize, width: usize, rgb: &[u8]) {
        for (y, line) in rgb.chunks_exact((width * 3).max(1)).enumerate() {
            let visible = line.len().min(self.width.saturating_sub(left) * 3);
            if top + y < self.height {
                let start = ((top + y) * self.width + left) * 3;
                self.pixels[start..start + visible].copy_from_slice(&line[..visible]);
            }
        }
    }

    /// Writes a line of text whose em is `size` pixels, shortened to `width`.
    pub(crate) fn text(&mut self, (left, top): (usize, usize), width: usize, look: (f64, Weight, Rgb), text: &str) {
        let (size, weight, color) = look;
        let text = typeface::fit(text, size, weight, width as f64);
        typeface::paint(&text, size, weight, |x, y, coverage| {
            let (x, y) = (left as i64 + i64::from(x), top as i64 + i64::from(y));
            if let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y))
                && let Some(pixel) = self.pixel(x, y)
            {
                for (value, ink) in pixel.iter_mut().zip(color) {
                    *value = (f64::from(*value) + (f64::from(ink) - f64::from(*value)) * coverage).round() as u8;
                }
            }
        });
    }

    /// Draws the outline of a rectangle, two pixels wide, inside it.
    pub(crate) fn frame(&mut self, area: Area, color: Rgb) {
        let (right, bottom) = (area.left + area.width.max(1) - 1, area.top + area.height.max(1) - 1);
        for line in 0..2 {
            let vertical = (area.top..=bottom).flat_map(|y| [(area.left + line, y), (right.saturating_sub(line), y)]);
            let across = (area.left..=right).flat_map(|x| [(x, area.top + line), (x, bottom.saturating_sub(line))]);
            for (x, y) in vertical.chain(across) {
                if let Some(pixel) = self.pixel(x, y) {
                    pixel.copy_from_slice(&color);
                }
            }
        }
    }

    /// Saves the sheet.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn save(self, path: &Path) -> Result<()> {
        let side = |px: usize| u32::try_from(px).unwrap_or(u32::MAX);
        let picture = RgbImage::from_raw(side(self.width), side(self.height), self.pixels)
            .ok_or_else(|| Error::invalid("the sheet has no pixels", ""))?;
        let mut png = Cursor::new(Vec::new());
        picture
            .write_to(&mut png, ImageFormat::Png)
            .map_err(|e| Error::invalid(format!("cannot encode `{}`: {e}", path.display()), ""))?;
        write_atomic(path, &png.into_inner()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_and_frames_beyond_the_border_are_cut_off() {
        let mut sheet = Sheet::new(4, 3).unwrap();
        sheet.picture(2, 2, 3, &[7; 3 * 3 * 2]);
        assert_eq!(sheet.pixel(1, 2).unwrap(), [255; 3]);
        assert_eq!(sheet.pixel(3, 2).unwrap(), [7; 3]);
        sheet.frame(Area { left: 0, top: 0, width: 40, height: 2 }, [1, 2, 3]);
        assert_eq!(sheet.pixel(3, 1).unwrap(), [1, 2, 3]);
        assert!(sheet.pixel(4, 0).is_none());
    }

    #[test]
    fn text_leaves_ink_and_huge_sheets_are_refused() {
        let mut sheet = Sheet::new(100, 20).unwrap();
        sheet.text((2, 2), 90, (12.0, Weight::Regular, INK), "crop 10 x 20");
        assert!(sheet.pixels.iter().any(|&value| value < 100));
        assert_eq!(Sheet::new(1 << 15, 1 << 14).unwrap_err().exit_status(), 2);
        assert_eq!(Sheet::new(1 << 16, 1).unwrap_err().exit_status(), 2);
    }
}
