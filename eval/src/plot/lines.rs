//! Line charts in panels that share one legend: losses and accuracies over training.

use plotters::chart::ChartBuilder;
use plotters::element::Rectangle;
use plotters::series::LineSeries;
use plotters::style::{Color as _, ShapeStyle, TRANSPARENT};
use plotters_backend::text_anchor::{HPos, VPos};
use shared::Result;

use super::canvas::{AXIS, Area, Canvas, DrawError, GRID, INK, MUTED, TextLook, px, text, tick, whole_tick};
use super::palette;
use shared::typeface::{self, Weight};

const WIDTH: f64 = 860.0;
const PANEL_HEIGHT: f64 = 270.0;
const LEGEND_LINE: f64 = 20.0;
const LEGEND_SIZE: f64 = 12.0;
/// The widest name in a legend.
const LEGEND_NAME: f64 = 240.0;

/// One curve.
#[derive(Debug, Clone)]
pub(crate) struct Curve {
    /// Index of the run, which gives the colour.
    pub(crate) run: usize,
    /// The line; what is not finite is left out.
    pub(crate) points: Vec<(f64, f64)>,
    /// A finer record, drawn pale behind the line.
    pub(crate) pale: Vec<(f64, f64)>,
}

/// One chart.
#[derive(Debug, Clone)]
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) x_label: String,
    pub(crate) y_label: String,
    pub(crate) curves: Vec<Curve>,
}

/// Draws panels side by side, two to a row, and a legend of `runs` below.
///
/// # Errors
/// When drawing fails.
pub(crate) fn draw(panels: &[Panel], runs: &[String]) -> Result<Vec<u8>> {
    let columns = panels.len().clamp(1, 2);
    let rows = panels.len().div_ceil(columns);
    let legend = legend_layout(runs);
    let legend_lines = legend.last().map_or(0, |item| item.line + 1);
    let height = rows as f64 * PANEL_HEIGHT + legend_lines as f64 * LEGEND_LINE + 24.0;
    let mut canvas = Canvas::new(WIDTH, height);
    canvas.draw(|area| {
        let panel_width = WIDTH / columns as f64;
        for (index, panel) in panels.iter().enumerate() {
            let (column, row) = (index % columns, index / columns);
            let left = px(column as f64 * panel_width);
            let top = px(row as f64 * PANEL_HEIGHT);
            let part = area.clone().shrink((left, top), (px(panel_width), px(PANEL_HEIGHT)));
            draw_panel(&part, panel, panel_width, runs.len())?;
        }
        draw_legend(area, &legend, rows as f64 * PANEL_HEIGHT + 10.0, runs.len())
    })?;
    canvas.into_png()
}

fn draw_panel(area: &Area<'_>, panel: &Panel, width: f64, runs: usize) -> Result<(), DrawError> {
    text(area, &panel.title, (16.0, 18.0), TextLook::new(14.0).bold())?;
    let Some((x_range, y_range)) = ranges(&panel.curves) else {
        let look = TextLook::new(12.0).color(MUTED).anchor(HPos::Center, VPos::Center);
        return text(area, "no finite values", (width / 2.0, PANEL_HEIGHT / 2.0), look);
    };
    let y_span = y_range.end - y_range.start;
    let mut chart = ChartBuilder::on(area)
        .margin_top(px(34.0))
        .margin_right(px(18.0))
        .margin_left(px(6.0))
        .margin_bottom(px(4.0))
        .x_label_area_size(px(42.0))
        .y_label_area_size(px(56.0))
        .build_cartesian_2d(x_range, y_range)?;
    let label = TextLook::new(11.0).color(MUTED).style();
    chart
        .configure_mesh()
        .bold_line_style(GRID.stroke_width(px(0.75) as u32))
        .light_line_style(TRANSPARENT)
        .axis_style(AXIS.stroke_width(px(0.75) as u32))
        .set_all_tick_mark_size(px(3.0))
        .x_labels(7)
        .y_labels(6)
        .x_desc(panel.x_label.as_str())
        .y_desc(panel.y_label.as_str())
        .label_style(label)
        .axis_desc_style(TextLook::new(11.5).color(INK).style())
        .x_label_formatter(&|x| whole_tick(*x))
        .y_label_formatter(&|y| tick(*y, y_span))
        .draw()?;
    let pale =
        panel.curves.iter().map(|curve| (&curve.pale, palette::tint(palette::color(curve.run, runs), 0.35), 0.8));
    let bold = panel.curves.iter().map(|curve| (&curve.points, palette::color(curve.run, runs), 2.0));
    for (points, color, thickness) in pale.chain(bold) {
        for piece in points.split(|point| !point.1.is_finite()).filter(|piece| piece.len() > 1) {
            let style = color.stroke_width(px(thickness) as u32);
            chart.draw_series(LineSeries::new(piece.iter().copied(), style))?;
        }
    }
    for curve in &panel.curves {
        let color = palette::color(curve.run, runs);
        // A single epoch has no line: mark it, and the end of every curve.
        if let Some(&last) = curve.points.iter().rfind(|point| point.1.is_finite()) {
            let dot = plotters::element::Circle::new(last, px(3.0), color.filled());
            chart.draw_series(std::iter::once(dot))?;
        }
    }
    Ok(())
}

/// Axis ranges that hold every finite point, with a little air above and below.
fn ranges(curves: &[Curve]) -> Option<(std::ops::Range<f64>, std::ops::Range<f64>)> {
    let finite = |point: &&(f64, f64)| point.0.is_finite() && point.1.is_finite();
    let points = || curves.iter().flat_map(|curve| curve.points.iter().chain(&curve.pale)).filter(finite);
    points().next()?;
    let bounds = |value: fn(&(f64, f64)) -> f64| {
        points().map(value).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
    };
    let (x_low, x_high) = bounds(|point| point.0);
    let (y_low, y_high) = bounds(|point| point.1);
    let air = if y_high > y_low { 0.06 * (y_high - y_low) } else { 0.05 * y_high.abs().max(1e-3) };
    // Losses and accuracies are not negative: no axis below 0 for the sake of air.
    let y_start = if y_low >= 0.0 { (y_low - air).max(0.0) } else { y_low - air };
    let x_high = if x_high > x_low { x_high } else { x_low + 1.0 };
    Some((x_low..x_high, y_start..y_high + air))
}

/// An entry of a legend and where it stands.
#[derive(Debug)]
struct LegendItem {
    name: String,
    run: usize,
    left: f64,
    line: usize,
}

fn legend_layout(runs: &[String]) -> Vec<LegendItem> {
    let mut items: Vec<LegendItem> = Vec::new();
    let (mut left, mut line) = (20.0, 0);
    for (run, name) in runs.iter().enumerate() {
        let name = typeface::fit(name, LEGEND_SIZE, Weight::Regular, LEGEND_NAME);
        let width = 26.0 + typeface::measure(&name, LEGEND_SIZE, Weight::Regular).0 + 22.0;
        if left + width > WIDTH && left > 20.0 {
            (left, line) = (20.0, line + 1);
        }
        items.push(LegendItem { name, run, left, line });
        left += width;
    }
    items
}

fn draw_legend(area: &Area<'_>, items: &[LegendItem], top: f64, runs: usize) -> Result<(), DrawError> {
    for item in items {
        let y = top + (item.line as f64 + 0.5) * LEGEND_LINE;
        let corners = [(px(item.left), px(y - 1.5)), (px(item.left + 20.0), px(y + 1.5))];
        area.draw(&Rectangle::new(corners, ShapeStyle::from(palette::color(item.run, runs)).filled()))?;
        text(area, &item.name, (item.left + 26.0, y), TextLook::new(LEGEND_SIZE))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_skip_what_is_not_finite() {
        let curve = |points: &[(f64, f64)]| Curve { run: 0, points: points.to_vec(), pale: Vec::new() };
        let (x, y) = ranges(&[curve(&[(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)])]).unwrap();
        assert_eq!((x.start, x.end), (0.0, 2.0));
        assert!(y.start > 0.8 && y.start < 1.0 && y.end > 3.0 && y.end < 3.2, "{y:?}");
        assert!(ranges(&[curve(&[(0.0, f64::INFINITY)])]).is_none());
        let (x, y) = ranges(&[curve(&[(5.0, 2.0)])]).unwrap();
        assert!(x.start < x.end && y.start < 2.0 && y.end > 2.0);
    }

    #[test]
    fn legends_wrap_before_the_edge() {
        let runs: Vec<String> = (0..50).map(|i| format!("student-with-a-long-name-{i}")).collect();
        let items = legend_layout(&runs);
        assert!(items.iter().all(|item| item.left < WIDTH - 100.0));
        assert!(items[49].line >= 10 && items[0].line == 0);
    }
}
