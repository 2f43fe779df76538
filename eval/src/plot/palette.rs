//! Colours of runs and classes.

use plotters::style::RGBColor;

/// Ten colours that are told apart at a glance; the first ones are used first.
const TEN: [RGBColor; 10] = [
    RGBColor(0x3b, 0x6f, 0xd4),
    RGBColor(0xe8, 0x7d, 0x1e),
    RGBColor(0x2f, 0x9e, 0x5b),
    RGBColor(0xd6, 0x3f, 0x52),
    RGBColor(0x86, 0x5c, 0xc8),
    RGBColor(0x14, 0x9f, 0xb0),
    RGBColor(0xd1, 0x5f, 0xa8),
    RGBColor(0x94, 0x6b, 0x45),
    RGBColor(0x9a, 0x9a, 0x1c),
    RGBColor(0x70, 0x78, 0x84),
];

/// The colour of item `index` of `count`: one of ten, or of an even wheel where there are more items.
pub(crate) fn color(index: usize, count: usize) -> RGBColor {
    if count <= TEN.len() {
        return TEN[index % TEN.len()];
    }
    // Neighbours in number lie far apart on the wheel, and alternate in lightness.
    let hue = (index as f64 * 0.618_033_988_749_895).fract();
    let lightness = [0.42, 0.56, 0.34][index % 3];
    from_hsl(hue, 0.62, lightness)
}

/// Between white and `color`; 1 is `color`.
pub(crate) fn tint(color: RGBColor, strength: f64) -> RGBColor {
    let mix = |x: u8| (255.0 + (f64::from(x) - 255.0) * strength).round() as u8;
    RGBColor(mix(color.0), mix(color.1), mix(color.2))
}

fn from_hsl(hue: f64, saturation: f64, lightness: f64) -> RGBColor {
    let chroma = (1.0 - (2.0 * lightness - 1.0).abs()) * saturation;
    let channel = |offset: f64| {
        let position = (hue * 12.0 + offset) % 12.0;
        let wave = (position - 3.0).min(9.0 - position).clamp(-1.0, 1.0);
        ((lightness - chroma / 2.0 * wave) * 255.0).round() as u8
    };
    RGBColor(channel(0.0), channel(8.0), channel(4.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifty_runs_get_fifty_colours() {
        let mut seen: Vec<_> = (0..50).map(|i| color(i, 50)).map(|c| (c.0, c.1, c.2)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 50);
    }

    #[test]
    fn hues_of_hand_values() {
        assert_eq!(from_hsl(0.0, 1.0, 0.5), RGBColor(255, 0, 0));
        assert_eq!(from_hsl(1.0 / 3.0, 1.0, 0.5), RGBColor(0, 255, 0));
        assert_eq!(from_hsl(0.5, 0.0, 0.2), RGBColor(51, 51, 51));
        assert_eq!(tint(RGBColor(0, 100, 255), 0.5), RGBColor(128, 178, 255));
    }
}
