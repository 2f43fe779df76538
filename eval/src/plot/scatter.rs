//! Features in the plane of their two leading principal components, coloured by class.

use plotters::chart::ChartBuilder;
use plotters::element::Circle;
use plotters::style::{Color as _, TRANSPARENT};
use shared::Result;

use super::canvas::{AXIS, Canvas, GRID, INK, MUTED, TextLook, px, text, tick};
use super::palette;
use shared::typeface::{self, Weight};

const PLOT_WIDTH: f64 = 560.0;
const HEIGHT: f64 = 440.0;
const LEGEND_SIZE: f64 = 12.0;
const LEGEND_LINE: f64 = 21.0;
/// More classes than these get no legend: it would not help.
pub(crate) const MAX_LEGEND_CLASSES: usize = 18;

/// What the scatter shows.
#[derive(Debug, Clone)]
pub(crate) struct Scatter<'a> {
    pub(crate) title: String,
    pub(crate) points: &'a [[f64; 2]],
    /// The class of each point, if it has one.
    pub(crate) classes: &'a [Option<usize>],
    pub(crate) class_names: &'a [String],
    /// Share of the variance along each axis, from 0 to 1.
    pub(crate) explained: [f64; 2],
}

/// Draws the scatter.
///
/// # Errors
/// When drawing fails.
pub(crate) fn draw(scatter: &Scatter<'_>) -> Result<Vec<u8>> {
    let names = scatter.class_names;
    let with_legend = (2..=MAX_LEGEND_CLASSES).contains(&names.len());
    let legend: Vec<String> =
        names.iter().map(|name| typeface::fit(name, LEGEND_SIZE, Weight::Regular, 200.0)).collect();
    let widest = legend.iter().map(|name| typeface::measure(name, LEGEND_SIZE, Weight::Regular).0).fold(0.0, f64::max);
    let width = PLOT_WIDTH + if with_legend { widest + 50.0 } else { 0.0 };
    let mut canvas = Canvas::new(width, HEIGHT);
    canvas.draw(|area| {
        let title = typeface::fit(&scatter.title, 14.0, Weight::Bold, width - 32.0);
        text(area, &title, (16.0, 20.0), TextLook::new(14.0).bold())?;
        let plot = area.clone().shrink((0, 0), (px(PLOT_WIDTH), px(HEIGHT)));
        let axis =
            |index: usize| format!("component {} ({:.0} % of variance)", index + 1, 100.0 * scatter.explained[index]);
        let (x_range, y_range) = (range(scatter.points, 0), range(scatter.points, 1));
        let (x_span, y_span) = (x_range.end - x_range.start, y_range.end - y_range.start);
        let mut chart = ChartBuilder::on(&plot)
            .margin_top(px(38.0))
            .margin_right(px(14.0))
            .margin_left(px(6.0))
            .margin_bottom(px(4.0))
            .x_label_area_size(px(42.0))
            .y_label_area_size(px(56.0))
            .build_cartesian_2d(x_range, y_range)?;
        chart
            .configure_mesh()
            .bold_line_style(GRID.stroke_width(px(0.75) as u32))
            .light_line_style(TRANSPARENT)
            .axis_style(AXIS.stroke_width(px(0.75) as u32))
            .set_all_tick_mark_size(px(3.0))
            .x_labels(7)
            .y_labels(7)
            .x_desc(axis(0))
            .y_desc(axis(1))
            .label_style(TextLook::new(11.0).color(MUTED).style())
            .axis_desc_style(TextLook::new(11.5).color(INK).style())
            .x_label_formatter(&|x| tick(*x, x_span))
            .y_label_formatter(&|y| tick(*y, y_span))
            .draw()?;
        let radius = match scatter.points.len() {
            0..400 => 3.6,
            400..1500 => 2.8,
            _ => 1.8,
        };
        chart.draw_series(scatter.points.iter().zip(scatter.classes).map(|(point, class)| {
            let color = class.map_or(MUTED, |class| palette::color(class, names.len()));
            Circle::new((point[0], point[1]), px(radius), color.mix(0.8).filled())
        }))?;
        if with_legend {
            let top = (HEIGHT - LEGEND_LINE * legend.len() as f64) / 2.0;
            for (class, name) in legend.iter().enumerate() {
                let y = top + LEGEND_LINE * (class as f64 + 0.5);
                let dot = palette::color(class, names.len()).filled();
                area.draw(&Circle::new((px(PLOT_WIDTH + 12.0), px(y)), px(4.5), dot))?;
                text(area, name, (PLOT_WIDTH + 24.0, y), TextLook::new(LEGEND_SIZE))?;
            }
        }
        Ok(())
    })?;
    canvas.into_png()
}

fn range(points: &[[f64; 2]], axis: usize) -> std::ops::Range<f64> {
    let (low, high) = points
        .iter()
        .map(|point| point[axis])
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    let air = if high > low { 0.05 * (high - low) } else { 0.5 };
    if low <= high { low - air..high + air } else { -1.0..1.0 }
}
