//! A picture under construction: a `plotters` backend that draws finer than the file and paints text itself.
//!
//! The bitmap backend of plotters places glyphs without their side bearings and does not smooth thick lines. Here text
//! is laid out by [`shared::typeface`], and everything is drawn at twice the file's resolution and averaged, which smooths all
//! edges.

use std::io::Cursor;

use image::RgbImage;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use plotters::backend::{BitMapBackend, DrawingBackend};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea as _};
use plotters::style::{Color as _, FontTransform, RGBColor, TextStyle};
use plotters_backend::text_anchor::{HPos, Pos, VPos};
use plotters_backend::{BackendColor, BackendCoord, BackendStyle, BackendTextStyle, DrawingErrorKind, FontStyle};
use shared::{Error, Result};

use shared::typeface::{self, Weight};

/// Pixels of the file per unit.
const DENSITY: u32 = 2;
/// Drawn pixels per pixel of the file, in each direction.
const OVERSAMPLING: u32 = 2;

/// The drawing surface of all charts.
pub(crate) type Area<'a> = DrawingArea<Fine<'a>, Shift>;
/// What drawing can fail with.
pub(crate) type DrawError = DrawingAreaErrorKind<<BitMapBackend<'static> as DrawingBackend>::ErrorType>;

/// Units in drawn pixels.
pub(crate) fn px(units: f64) -> i32 {
    (units * f64::from(DENSITY * OVERSAMPLING)).round() as i32
}

/// A white picture, drawn on and then written as PNG.
#[derive(Debug)]
pub(crate) struct Canvas {
    size: (u32, u32),
    pixels: Vec<u8>,
}

impl Canvas {
    /// A picture of `width` × `height` units.
    pub(crate) fn new(width: f64, height: f64) -> Self {
        // Whole pixels of the file.
        let side = |units: f64| (units.max(1.0).ceil() as u32) * DENSITY * OVERSAMPLING;
        let size = (side(width), side(height));
        Self { size, pixels: vec![255; size.0 as usize * size.1 as usize * 3] }
    }

    /// Lets `draw` draw.
    ///
    /// # Errors
    /// [`Error::Invalid`] with what plotters says.
    pub(crate) fn draw(&mut self, draw: impl FnOnce(&Area<'_>) -> Result<(), DrawError>) -> Result<()> {
        let backend = Fine(BitMapBackend::with_buffer(&mut self.pixels, self.size));
        let area = backend.into_drawing_area();
        draw(&area).map_err(|e| Error::invalid(format!("a chart cannot be drawn: {e}"), ""))
    }

    /// Places an RGB image into the square or rectangle at (`left`, `top`), scaled to `width` × `height` units.
    pub(crate) fn place(&mut self, image: &RgbImage, (left, top): (f64, f64), (width, height): (f64, f64)) {
        let (width, height) = (px(width) as u32, px(height) as u32);
        let scaled = image::imageops::resize(image, width, height, image::imageops::FilterType::CatmullRom);
        let (left, top) = (px(left) as u32, px(top) as u32);
        for (row, line) in scaled.as_raw().chunks(width as usize * 3).enumerate() {
            let y = top + row as u32;
            if y < self.size.1 && left + width <= self.size.0 {
                let start = (y * self.size.0 + left) as usize * 3;
                self.pixels[start..start + line.len()].copy_from_slice(line);
            }
        }
    }

    /// The finished picture as the bytes of a PNG file.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it cannot be encoded.
    pub(crate) fn into_png(self) -> Result<Vec<u8>> {
        let (width, height) = (self.size.0 / OVERSAMPLING, self.size.1 / OVERSAMPLING);
        let stride = self.size.0 as usize * 3;
        let step = OVERSAMPLING as usize;
        let smooth = RgbImage::from_fn(width, height, |x, y| {
            let corner = y as usize * step * stride + x as usize * step * 3;
            image::Rgb(std::array::from_fn(|channel| {
                let samples = (0..step * step)
                    .map(|i| u32::from(self.pixels[corner + i / step * stride + i % step * 3 + channel]));
                let count = OVERSAMPLING * OVERSAMPLING;
                ((samples.sum::<u32>() + count / 2) / count) as u8
            }))
        });
        let mut bytes = Cursor::new(Vec::new());
        let encoder = PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive);
        smooth
            .write_with_encoder(encoder)
            .map_err(|e| Error::invalid(format!("a picture cannot be encoded: {e}"), ""))?;
        Ok(bytes.into_inner())
    }
}

/// How a text is set.
#[derive(Clone, Copy)]
pub(crate) struct TextLook {
    pub(crate) size: f64,
    pub(crate) weight: Weight,
    pub(crate) color: RGBColor,
    /// Which point of the text is placed.
    pub(crate) horizontal: HPos,
    /// Which point of the text is placed.
    pub(crate) vertical: VPos,
}

impl TextLook {
    /// Dark, regular, placed by the middle of its left end.
    pub(crate) fn new(size: f64) -> Self {
        let (horizontal, vertical) = (HPos::Left, VPos::Center);
        Self { size, weight: Weight::Regular, color: INK, horizontal, vertical }
    }

    pub(crate) fn bold(self) -> Self {
        Self { weight: Weight::Bold, ..self }
    }

    pub(crate) fn color(self, color: RGBColor) -> Self {
        Self { color, ..self }
    }

    pub(crate) fn anchor(self, horizontal: HPos, vertical: VPos) -> Self {
        Self { horizontal, vertical, ..self }
    }

    /// The same as a style of plotters, for axis labels.
    pub(crate) fn style(self) -> TextStyle<'static> {
        let style = if self.weight == Weight::Bold { FontStyle::Bold } else { FontStyle::Normal };
        let font =
            plotters::style::FontDesc::new(plotters::style::FontFamily::SansSerif, f64::from(px(self.size)), style);
        let pos = Pos::new(self.horizontal, self.vertical);
        TextStyle { font, color: self.color.to_backend_color(), pos }
    }
}

/// Text.
pub(crate) const INK: RGBColor = RGBColor(0x22, 0x26, 0x2e);
/// Lesser text.
pub(crate) const MUTED: RGBColor = RGBColor(0x6b, 0x72, 0x80);
/// Grid lines.
pub(crate) const GRID: RGBColor = RGBColor(0xe5, 0xe7, 0xeb);
/// Axes.
pub(crate) const AXIS: RGBColor = RGBColor(0x9c, 0xa3, 0xaf);

/// Sets a text at (`x`, `y`) units.
pub(crate) fn text(area: &Area<'_>, text: &str, (x, y): (f64, f64), look: TextLook) -> Result<(), DrawError> {
    area.draw_text(text, &look.style(), (px(x), px(y)))
}

/// A tick label with as many decimals as the span of the axis needs.
pub(crate) fn tick(x: f64, span: f64) -> String {
    let decimals = if span > 0.0 { (1.0 - span.log10()).ceil().clamp(0.0, 6.0) as usize } else { 1 };
    let text = if x.abs() >= 1e5 { format!("{x:.1e}") } else { format!("{x:.decimals$}") };
    // Ticks next to zero are zero: rounding errors of the axis must not show as a sign.
    let zero = text.chars().all(|c| matches!(c, '-' | '0' | '.'));
    if zero { "0".into() } else { text.replace('-', "\u{2212}") }
}

/// A tick label of an axis that counts: nothing between whole numbers.
pub(crate) fn whole_tick(x: f64) -> String {
    if (x - x.round()).abs() > 1e-6 { String::new() } else { tick(x.round(), 100.0) }
}

/// The twofold finer backend: shapes by plotters' bitmap backend, text by ours.
pub(crate) struct Fine<'a>(BitMapBackend<'a>);

type BackendResult<'a> = Result<(), DrawingErrorKind<<BitMapBackend<'a> as DrawingBackend>::ErrorType>>;

impl<'a> DrawingBackend for Fine<'a> {
    type ErrorType = <BitMapBackend<'a> as DrawingBackend>::ErrorType;

    fn get_size(&self) -> (u32, u32) {
        self.0.get_size()
    }

    fn ensure_prepared(&mut self) -> BackendResult<'a> {
        self.0.ensure_prepared()
    }

    fn present(&mut self) -> BackendResult<'a> {
        self.0.present()
    }

    fn draw_pixel(&mut self, point: BackendCoord, color: BackendColor) -> BackendResult<'a> {
        self.0.draw_pixel(point, color)
    }

    fn draw_line<S: BackendStyle>(&mut self, from: BackendCoord, to: BackendCoord, style: &S) -> BackendResult<'a> {
        self.0.draw_line(from, to, style)
    }

    fn draw_rect<S: BackendStyle>(
        &mut self,
        upper_left: BackendCoord,
        bottom_right: BackendCoord,
        style: &S,
        fill: bool,
    ) -> BackendResult<'a> {
        self.0.draw_rect(upper_left, bottom_right, style, fill)
    }

    fn draw_path<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        path: I,
        style: &S,
    ) -> BackendResult<'a> {
        self.0.draw_path(path, style)
    }

    fn draw_circle<S: BackendStyle>(
        &mut self,
        center: BackendCoord,
        radius: u32,
        style: &S,
        fill: bool,
    ) -> BackendResult<'a> {
        self.0.draw_circle(center, radius, style, fill)
    }

    fn fill_polygon<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        corners: I,
        style: &S,
    ) -> BackendResult<'a> {
        self.0.fill_polygon(corners, style)
    }

    fn draw_text<T: BackendTextStyle>(&mut self, text: &str, style: &T, at: BackendCoord) -> BackendResult<'a> {
        let (size, weight, color) = (style.size(), weight_of(style), style.color());
        let (width, height) = typeface::measure(text, size, weight);
        let left = match style.anchor().h_pos {
            HPos::Left => 0.0,
            HPos::Center => -width / 2.0,
            HPos::Right => -width,
        };
        let top = match style.anchor().v_pos {
            VPos::Top => 0.0,
            VPos::Center => -height / 2.0,
            VPos::Bottom => -height,
        };
        let (left, top) = (left.round() as i32, top.round() as i32);
        let bounds = self.get_size();
        let mut failure = Ok(());
        typeface::paint(text, size, weight, |x, y, coverage| {
            let (x, y) = style.transform().transform(left + x, top + y);
            let (x, y) = (at.0 + x, at.1 + y);
            let inside = x >= 0 && y >= 0 && (x as u32) < bounds.0 && (y as u32) < bounds.1;
            if inside && failure.is_ok() {
                let color = BackendColor { alpha: color.alpha * coverage, ..color };
                failure = self.0.draw_pixel((x, y), color);
            }
        });
        failure
    }

    fn estimate_text_size<T: BackendTextStyle>(
        &self,
        text: &str,
        style: &T,
    ) -> Result<(u32, u32), DrawingErrorKind<Self::ErrorType>> {
        let (width, height) = typeface::measure(text, style.size(), weight_of(style));
        let (width, height) = (width.ceil() as u32, height.ceil() as u32);
        Ok(match style.transform() {
            FontTransform::None | FontTransform::Rotate180 => (width, height),
            FontTransform::Rotate90 | FontTransform::Rotate270 => (height, width),
        })
    }

    fn blit_bitmap(&mut self, at: BackendCoord, size: (u32, u32), source: &[u8]) -> BackendResult<'a> {
        self.0.blit_bitmap(at, size, source)
    }
}

fn weight_of<T: BackendTextStyle>(style: &T) -> Weight {
    if matches!(style.style(), FontStyle::Bold) { Weight::Bold } else { Weight::Regular }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_of_the_announced_size_that_repeats_to_the_byte() {
        let draw = || {
            let mut canvas = Canvas::new(60.0, 30.0);
            canvas.draw(|area| text(area, "abc", (5.0, 15.0), TextLook::new(12.0))).unwrap();
            canvas.into_png().unwrap()
        };
        let png = draw();
        assert_eq!(png, draw());
        let image = image::load_from_memory(&png).unwrap().to_rgb8();
        assert_eq!(image.dimensions(), (120, 60));
        assert!(image.pixels().any(|pixel| pixel.0[0] < 80), "no ink");
        assert_eq!(image.get_pixel(0, 0).0, [255; 3]);
    }

    #[test]
    fn tick_labels_have_the_decimals_that_the_span_needs() {
        assert_eq!(tick(40.0, 100.0), "40");
        assert_eq!(tick(2.0, 3.0), "2.0");
        assert_eq!(tick(0.125, 0.3), "0.12");
        assert_eq!(tick(250_000.0, 1e6), "2.5e5");
        assert_eq!(tick(-0.5, 3.0), "\u{2212}0.5");
        assert_eq!((tick(-1e-17, 3.0), tick(0.0, 0.1)), ("0".into(), "0".into()));
        assert_eq!((whole_tick(3.0), whole_tick(2.5), whole_tick(0.0)), ("3".into(), String::new(), "0".into()));
    }

    #[test]
    fn text_at_the_border_is_cut_off_not_an_error() {
        let mut canvas = Canvas::new(20.0, 10.0);
        canvas.draw(|area| text(area, "a long line of text", (-8.0, 9.0), TextLook::new(12.0))).unwrap();
    }
}
