//! Contact sheets: a row for each sample, a column for each view, every view with what was drawn for it.

use shared::shard::{ShardSet, ViewReader};
use shared::transforms::{View, ViewParams};
use shared::typeface::Weight;
use shared::{Error, Result};

use super::caption::{LINES, caption};
use crate::sheet::{Area, GREY, INK, Rgb, Sheet};

const GAP_PX: usize = 8;
const LINE_PX: usize = 14;
const TEXT: f64 = 10.0;
/// A column is at least this wide, so that captions have room under small views.
const NARROWEST_COLUMN_PX: usize = 150;
/// Frames of the crops in a picture of the source image, in turns.
const FRAMES: [Rgb; 8] = [
    [230, 25, 75],
    [60, 180, 75],
    [0, 130, 200],
    [245, 130, 48],
    [145, 30, 180],
    [0, 128, 128],
    [240, 50, 230],
    [128, 128, 0],
];

/// One view to be shown.
struct Cell {
    view: View,
    size: (usize, usize),
}

fn cells(set: &ShardSet, views: usize) -> Vec<Cell> {
    let global = (0..set.views().min(views)).map(|v| Cell { view: View::Global(v), size: (set.height(), set.width()) });
    let local =
        (0..set.local_views().min(views)).map(|w| Cell { view: View::Local(w), size: set.view_size(View::Local(w)) });
    global.chain(local).collect()
}

/// Width of the column of a cell: captions need some room.
fn column_px(cell: &Cell) -> usize {
    cell.size.1.max(NARROWEST_COLUMN_PX) + GAP_PX
}

/// `samples` samples, spread evenly over the set, with the first `views` global and local views of each.
///
/// # Errors
/// [`shared::Error::Usage`] when the sheet would be too large; as [`ViewReader::read`].
pub(super) fn grid(set: &ShardSet, samples: usize, views: usize) -> Result<Sheet> {
    let samples = samples.min(set.len());
    let cells = cells(set, views);
    let row_px = GAP_PX + (1 + LINES) * LINE_PX + cells.iter().map(|cell| cell.size.0).max().unwrap_or(0);
    let width = GAP_PX + cells.iter().map(column_px).sum::<usize>();
    let mut sheet = Sheet::new(width, samples * row_px + GAP_PX)?;
    let mut reader = ViewReader::default();
    for row in 0..samples {
        let sample = row * set.len() / samples;
        let top = row * row_px + GAP_PX;
        sheet.text((GAP_PX, top), width - GAP_PX, (TEXT + 1.0, Weight::Bold, INK), &title(set, sample));
        draw_cells(&mut sheet, set, (sample, top + LINE_PX), &cells, &mut reader)?;
    }
    Ok(sheet)
}

/// One sample: its views at their full size, and for a source set the image with the outlines of their crops.
///
/// # Errors
/// As [`grid`].
pub(super) fn portrait(set: &ShardSet, sample: usize, views: usize) -> Result<Sheet> {
    let cells = cells(set, views);
    let mut reader = ViewReader::default();
    let source = reader.source(set, sample)?.map(|image| (image.height(), image.width(), image.pixels().to_vec()));
    let source_px = source.as_ref().map_or(0, |(height, _, _)| height + GAP_PX + LINE_PX);
    let cells_px = (LINES * LINE_PX) + cells.iter().map(|cell| cell.size.0).max().unwrap_or(0);
    let width =
        cells.iter().map(column_px).sum::<usize>().max(source.as_ref().map_or(0, |(_, width, _)| width + GAP_PX));
    let top = GAP_PX + LINE_PX;
    let mut sheet = Sheet::new(width + GAP_PX, top + source_px + cells_px + GAP_PX)?;
    sheet.text((GAP_PX, GAP_PX), width, (TEXT + 1.0, Weight::Bold, INK), &title(set, sample));
    if let Some((height, image_width, pixels)) = &source {
        sheet.picture(GAP_PX, top, *image_width, pixels);
        for (index, cell) in cells.iter().enumerate() {
            let crop = drawn(set, sample, cell.view)?.crop;
            let area = Area { left: GAP_PX + crop.left, top: top + crop.top, width: crop.width, height: crop.height };
            sheet.frame(area, FRAMES[index % FRAMES.len()]);
        }
        let text = format!("stored image, {image_width} x {height}, with the crops of the views");
        sheet.text((GAP_PX, top + height + 2), width, (TEXT, Weight::Regular, GREY), &text);
        for (index, left) in lefts(&cells).into_iter().enumerate() {
            let area = Area { left, top: top + source_px - 4, width: cells[index].size.1, height: 2 };
            sheet.frame(area, FRAMES[index % FRAMES.len()]);
        }
    }
    draw_cells(&mut sheet, set, (sample, top + source_px), &cells, &mut reader)?;
    Ok(sheet)
}

fn title(set: &ShardSet, sample: usize) -> String {
    let class = usize::try_from(set.label(sample)).ok().and_then(|label| set.classes().get(label));
    format!("sample {sample}, {:016x}, {}", set.sample_id(sample), class.map_or("no class", String::as_str))
}

fn lefts(cells: &[Cell]) -> Vec<usize> {
    cells
        .iter()
        .scan(GAP_PX, |left, cell| {
            let this = *left;
            *left += column_px(cell);
            Some(this)
        })
        .collect()
}

pub(super) fn drawn(set: &ShardSet, sample: usize, view: View) -> Result<ViewParams> {
    ViewParams::from_row(&set.view_params(sample, view)?).map_err(|fault| Error::damaged(set.files_directory(), fault))
}

fn draw_cells(
    sheet: &mut Sheet,
    set: &ShardSet,
    (sample, top): (usize, usize),
    cells: &[Cell],
    reader: &mut ViewReader,
) -> Result<()> {
    for (cell, left) in cells.iter().zip(lefts(cells)) {
        sheet.picture(left, top, cell.size.1, reader.read(set, sample, cell.view)?);
        let mut line_top = top + cell.size.0 + 2;
        for line in caption(&drawn(set, sample, cell.view)?) {
            sheet.text((left, line_top), column_px(cell) - 4, (TEXT, Weight::Regular, INK), &line);
            line_top += LINE_PX;
        }
    }
    Ok(())
}
