//! Query pictures and their nearest training pictures, framed by whether the class agrees.

use image::RgbImage;
use plotters::element::Rectangle;
use plotters::style::{RGBColor, ShapeStyle};
use plotters_backend::text_anchor::{HPos, VPos};
use shared::Result;

use super::canvas::{Area, Canvas, DrawError, INK, MUTED, TextLook, px, text};
use shared::typeface::{self, Weight};

const CELL: f64 = 112.0;
const GAP: f64 = 14.0;
/// Between the query and its neighbours.
const QUERY_GAP: f64 = 34.0;
const FRAME: f64 = 3.0;
const CAPTION: f64 = 24.0;
const TOP: f64 = 66.0;
const SAME: RGBColor = RGBColor(0x2f, 0x9e, 0x5b);
const OTHER: RGBColor = RGBColor(0xd6, 0x3f, 0x52);

/// A picture with its caption.
#[derive(Debug, Clone)]
pub(crate) struct Picture {
    pub(crate) image: RgbImage,
    pub(crate) class: String,
}

/// A query and its neighbours, nearest first.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) query: Picture,
    /// Picture, cosine similarity.
    pub(crate) neighbours: Vec<(Picture, f32)>,
}

/// Draws a gallery.
///
/// # Errors
/// When drawing fails.
pub(crate) fn draw(title: &str, rows: &[Row]) -> Result<Vec<u8>> {
    let columns = rows.iter().map(|row| row.neighbours.len()).max().unwrap_or(0) as f64;
    let width = 16.0 + CELL + QUERY_GAP + columns * (CELL + GAP) + 4.0;
    let row_height = CELL + CAPTION + 8.0;
    let mut canvas = Canvas::new(width, TOP + rows.len() as f64 * row_height + 4.0);
    let column_left = |column: usize| 16.0 + CELL + QUERY_GAP + column as f64 * (CELL + GAP);
    canvas.draw(|area| {
        let title = typeface::fit(title, 14.0, Weight::Bold, width - 32.0);
        text(area, &title, (16.0, 20.0), TextLook::new(14.0).bold())?;
        let head = TextLook::new(12.0).color(MUTED).anchor(HPos::Left, VPos::Center);
        text(area, "validation", (16.0, 50.0), head)?;
        text(area, "nearest in the training set, most similar first", (column_left(0), 50.0), head)?;
        for (index, row) in rows.iter().enumerate() {
            let top = TOP + index as f64 * row_height;
            caption(area, &row.query.class, (16.0, top), INK)?;
            for (column, (picture, similarity)) in row.neighbours.iter().enumerate() {
                let same = picture.class == row.query.class;
                let (color, mark) = if same { (SAME, '✓') } else { (OTHER, '✗') };
                let left = column_left(column);
                let corners = [(px(left - FRAME), px(top - FRAME)), (px(left + CELL + FRAME), px(top + CELL + FRAME))];
                area.draw(&Rectangle::new(corners, ShapeStyle::from(color).filled()))?;
                let score = format!("{mark} {similarity:.2}");
                let taken = typeface::measure(&score, 11.0, Weight::Regular).0 + 6.0;
                let class = typeface::fit(&picture.class, 11.0, Weight::Regular, CELL - taken);
                let y = top + CELL + FRAME + 10.0;
                text(area, &class, (left, y), TextLook::new(11.0))?;
                let right = TextLook::new(11.0).color(color).anchor(HPos::Right, VPos::Center);
                text(area, &score, (left + CELL, y), right)?;
            }
        }
        Ok(())
    })?;
    for (index, row) in rows.iter().enumerate() {
        let top = TOP + index as f64 * row_height;
        canvas.place(&row.query.image, (16.0, top), (CELL, CELL));
        for (column, (picture, _)) in row.neighbours.iter().enumerate() {
            canvas.place(&picture.image, (column_left(column), top), (CELL, CELL));
        }
    }
    canvas.into_png()
}

fn caption(area: &Area<'_>, class: &str, (left, top): (f64, f64), color: RGBColor) -> Result<(), DrawError> {
    let class = typeface::fit(class, 11.0, Weight::Regular, CELL);
    text(area, &class, (left, top + CELL + FRAME + 10.0), TextLook::new(11.0).color(color))
}
