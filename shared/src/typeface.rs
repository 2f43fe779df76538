//! The typeface of all pictures, `DejaVu` Sans, embedded: measuring text, shortening it, and painting it pixel by pixel.

use std::sync::LazyLock;

use ab_glyph::{Font as _, FontRef, Glyph, PxScale, ScaleFont as _, point};

/// Height of capitals above the baseline, as a fraction of the size.
const CAPITAL: f64 = 0.73;
/// Space above capitals and below the baseline that belongs to a line of text: equal, so that capitals and digits are
/// centred where the text is.
const MARGIN: f64 = 0.14;

/// A weight of the typeface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// For almost everything.
    Regular,
    /// For titles.
    Bold,
}

type Loaded = Option<FontRef<'static>>;
static REGULAR: LazyLock<Loaded> = LazyLock::new(|| FontRef::try_from_slice(dejavu::sans::regular()).ok());
static BOLD: LazyLock<Loaded> = LazyLock::new(|| FontRef::try_from_slice(dejavu::sans::bold()).ok());

fn font(weight: Weight) -> Option<&'static FontRef<'static>> {
    match weight {
        Weight::Regular => REGULAR.as_ref(),
        Weight::Bold => BOLD.as_ref(),
    }
}

/// Width and height of a line of text whose em is `size` pixels.
pub fn measure(text: &str, size: f64, weight: Weight) -> (f64, f64) {
    let (_, width) = lay_out(text, size, weight);
    (width, (CAPITAL + 2.0 * MARGIN) * size)
}

/// Shortens `text` in its middle until it is at most `width` wide.
pub fn fit(text: &str, size: f64, weight: Weight, width: f64) -> String {
    let wide = |text: &str| measure(text, size, weight).0 > width;
    if !wide(text) {
        return text.to_string();
    }
    let letters: Vec<char> = text.chars().collect();
    for kept in (0..letters.len()).rev() {
        let head = kept.div_ceil(2);
        let tail = letters.len() - (kept - head);
        let shorter: String = letters[..head].iter().chain(&['…']).chain(&letters[tail..]).collect();
        if !wide(&shorter) {
            return shorter;
        }
    }
    String::new()
}

/// Calls `paint` with (x, y, coverage) for every pixel of a line of text whose upper left corner is (0, 0).
pub fn paint(text: &str, size: f64, weight: Weight, mut paint: impl FnMut(i32, i32, f64)) {
    let Some(font) = font(weight) else { return };
    let baseline = ((CAPITAL + MARGIN) * size) as f32;
    for mut glyph in lay_out(text, size, weight).0 {
        glyph.position.y = baseline;
        if let Some(outline) = font.outline_glyph(glyph) {
            let bounds = outline.px_bounds();
            let (left, top) = (bounds.min.x as i32, bounds.min.y as i32);
            outline.draw(|x, y, coverage| paint(left + x as i32, top + y as i32, f64::from(coverage.min(1.0))));
        }
    }
}

/// Glyphs on the baseline, and the width of all.
fn lay_out(text: &str, size: f64, weight: Weight) -> (Vec<Glyph>, f64) {
    let Some(font) = font(weight) else { return (Vec::new(), 0.0) };
    // ab_glyph's scale is the height from ascent to descent, not the em.
    let em = font.units_per_em().unwrap_or(2048.0);
    let scale = PxScale::from(size as f32 * font.height_unscaled() / em);
    let scaled = font.as_scaled(scale);
    let mut glyphs: Vec<Glyph> = Vec::new();
    let mut x = 0.0;
    for letter in text.chars() {
        let id = font.glyph_id(letter);
        if let Some(previous) = glyphs.last() {
            x += scaled.kern(previous.id, id);
        }
        glyphs.push(id.with_scale_and_position(scale, point(x, 0.0)));
        x += scaled.h_advance(id);
    }
    (glyphs, f64::from(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn width_grows_with_text_and_size() {
        let width = |text, size| measure(text, size, Weight::Regular).0;
        assert!(width("ab", 10.0) > width("a", 10.0));
        assert!((width("ab", 20.0) / width("ab", 10.0) - 2.0).abs() < 1e-3);
        assert!(measure("ab", 10.0, Weight::Bold).0 > width("ab", 10.0));
        assert_eq!(width("", 10.0), 0.0);
    }

    #[test]
    fn long_names_lose_their_middle() {
        let width = measure("student-distilled", 10.0, Weight::Regular).0;
        assert_eq!(fit("student-distilled", 10.0, Weight::Regular, width), "student-distilled");
        let short = fit("student-distilled", 10.0, Weight::Regular, 0.6 * width);
        assert!(short.starts_with("stu") && short.ends_with("led") && short.contains('…'), "{short}");
        assert_eq!(fit("student", 10.0, Weight::Regular, 1.0), "");
    }

    #[test]
    fn paint_stays_in_the_line_and_covers_pixels() {
        let (width, height) = measure("Ägypt 100 %", 40.0, Weight::Regular);
        let mut covered = 0.0;
        paint("Hg 100 %", 40.0, Weight::Regular, |x, y, coverage| {
            assert!(x >= -2 && f64::from(x) < width && y >= 0 && f64::from(y) < height + 12.0, "{x} {y}");
            covered += coverage;
        });
        assert!(covered > 500.0, "{covered}");
    }
}
