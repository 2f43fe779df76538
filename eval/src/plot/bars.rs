//! Accuracies of runs as horizontal bars, the best run on top.

use plotters::element::{PathElement, Rectangle};
use plotters::style::{Color as _, RGBColor, ShapeStyle};
use plotters_backend::text_anchor::{HPos, VPos};
use shared::Result;

use super::canvas::{AXIS, Area, Canvas, DrawError, GRID, INK, MUTED, TextLook, px, text};
use super::palette;
use shared::typeface::{self, Weight};

const WIDTH: f64 = 860.0;
const BAR: f64 = 13.0;
const GROUP_GAP: f64 = 13.0;
const NAME_SIZE: f64 = 12.5;
const VALUE_SIZE: f64 = 11.0;
/// Where the chart begins, below title and legend.
const TOP: f64 = 66.0;

/// What the bars show.
#[derive(Debug, Clone)]
pub(crate) struct Bars {
    pub(crate) title: String,
    /// What each bar of a run measures.
    pub(crate) measures: Vec<String>,
    /// Name and values in percent, one per measure.
    pub(crate) rows: Vec<(String, Vec<Option<f64>>)>,
    /// What no student is needed for: its name and accuracy in percent.
    pub(crate) baseline: Option<(&'static str, f64)>,
}

/// Draws the bars.
///
/// # Errors
/// When drawing fails.
pub(crate) fn draw(bars: &Bars) -> Result<Vec<u8>> {
    let group = BAR * bars.measures.len() as f64 + GROUP_GAP;
    let plot_height = group * bars.rows.len() as f64;
    let mut canvas = Canvas::new(WIDTH, TOP + plot_height + 52.0);
    canvas.draw(|area| {
        let widest = bars.rows.iter().map(|(name, _)| typeface::measure(name, NAME_SIZE, Weight::Regular).0);
        let names = widest.fold(60.0, f64::max).min(0.35 * WIDTH);
        let (left, right) = (names + 30.0, WIDTH - 56.0);
        let values = bars.rows.iter().flat_map(|(_, values)| values.iter().flatten().copied());
        let top_value = values.chain(bars.baseline.map(|(_, accuracy)| accuracy)).fold(0.0, f64::max);
        let limit = ((top_value / 10.0).ceil() * 10.0).clamp(10.0, 100.0);
        let x_of = |value: f64| left + (right - left) * value / limit;
        let bottom = TOP + plot_height;

        text(area, &bars.title, (16.0, 20.0), TextLook::new(14.0).bold())?;
        draw_legend(area, &bars.measures, bars.baseline)?;
        draw_grid(area, limit, &x_of, bottom)?;
        for (index, (name, values)) in bars.rows.iter().enumerate() {
            let top = TOP + group * index as f64 + GROUP_GAP / 2.0;
            let middle = top + BAR * values.len() as f64 / 2.0;
            let name = typeface::fit(name, NAME_SIZE, Weight::Regular, names);
            let look = TextLook::new(NAME_SIZE).anchor(HPos::Right, VPos::Center);
            text(area, &name, (left - 10.0, middle), look)?;
            for (measure, value) in values.iter().enumerate() {
                let y = top + BAR * measure as f64;
                let look = TextLook::new(VALUE_SIZE);
                let Some(value) = value else {
                    text(area, "not measured", (left + 6.0, y + BAR / 2.0), look.color(MUTED))?;
                    continue;
                };
                let corners = [(px(left), px(y + 1.0)), (px(x_of(*value)), px(y + BAR - 0.5))];
                area.draw(&Rectangle::new(corners, ShapeStyle::from(measure_color(measure)).filled()))?;
                text(area, &format!("{value:.1}"), (x_of(*value) + 6.0, y + BAR / 2.0), look.color(INK))?;
            }
        }
        if let Some((_, accuracy)) = bars.baseline {
            let x = x_of(accuracy);
            let mut y = TOP;
            while y < bottom {
                area.draw(&PathElement::new(
                    [(px(x), px(y)), (px(x), px((y + 5.0).min(bottom)))],
                    INK.stroke_width(px(1.0) as u32),
                ))?;
                y += 9.0;
            }
        }
        let look = TextLook::new(11.5).anchor(HPos::Center, VPos::Center);
        text(area, "top-1 accuracy on the validation set, %", (f64::midpoint(left, right), bottom + 38.0), look)
    })?;
    canvas.into_png()
}

fn measure_color(measure: usize) -> RGBColor {
    palette::color(measure, 2)
}

fn draw_grid(area: &Area<'_>, limit: f64, x_of: &impl Fn(f64) -> f64, bottom: f64) -> Result<(), DrawError> {
    let step = if limit > 50.0 {
        20.0
    } else if limit > 20.0 {
        10.0
    } else {
        5.0
    };
    let mut value = 0.0;
    while value <= limit {
        let (x, color) = (x_of(value), if value == 0.0 { AXIS } else { GRID });
        let line = [(px(x), px(TOP)), (px(x), px(bottom))];
        area.draw(&PathElement::new(line, color.stroke_width(px(0.75) as u32)))?;
        let look = TextLook::new(11.0).color(MUTED).anchor(HPos::Center, VPos::Center);
        text(area, &format!("{value:.0}"), (x, bottom + 14.0), look)?;
        value += step;
    }
    Ok(())
}

fn draw_legend(area: &Area<'_>, measures: &[String], baseline: Option<(&str, f64)>) -> Result<(), DrawError> {
    let mut left = 16.0;
    let y = 44.0;
    for (measure, name) in measures.iter().enumerate() {
        let corners = [(px(left), px(y - 5.0)), (px(left + 10.0), px(y + 5.0))];
        area.draw(&Rectangle::new(corners, ShapeStyle::from(measure_color(measure)).filled()))?;
        text(area, name, (left + 16.0, y), TextLook::new(12.0))?;
        left += 16.0 + typeface::measure(name, 12.0, Weight::Regular).0 + 24.0;
    }
    if let Some((name, accuracy)) = baseline {
        for dash in [0.0, 8.0] {
            let line = [(px(left + dash), px(y)), (px(left + dash + 5.0), px(y))];
            area.draw(&PathElement::new(line, INK.stroke_width(px(1.0) as u32)))?;
        }
        text(area, &format!("{name} ({accuracy:.1} %)"), (left + 20.0, y), TextLook::new(12.0))?;
    }
    Ok(())
}
