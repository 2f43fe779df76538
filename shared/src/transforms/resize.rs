//! Crop, antialiased resize (bilinear or bicubic) and optional horizontal flip in one go, from interleaved RGB to three planes, with the
//! bytes of torchvision's `resized_crop` on a Pillow image.
//!
//! The image is cropped first: the filter never sees pixels outside the crop. Sums are 32-bit integers with 22 fraction bits, and
//! the image between the two passes is rounded to bytes. Sixteen rows go through the horizontal pass together, a lane for each.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "instruction sets chosen at run time, byte transposes in registers")
)]

use serde::{Deserialize, Serialize};

use super::crop::CropBox;
use super::level::{Level, kernel};
use super::weights::{BITS, Weights};
use super::{Planes, RgbImage};

/// Which of the two passes of a resize runs first. It changes bytes by 1 here and there, because the image between the passes is
/// rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PassOrder {
    /// The horizontal pass, always, as Pillow up to version 12.
    Horizontal,
    /// As Pillow from version 13 on: the vertical pass exactly when it removes more than twice as many rows as the horizontal
    /// pass removes columns.
    #[default]
    Pillow13,
}

impl PassOrder {
    /// Whether a resize from `crop` to `target` (rows, columns) runs the vertical pass first.
    pub fn vertical_first(self, crop: CropBox, target: (usize, usize)) -> bool {
        let rows = crop.height as i64 - target.0 as i64;
        let columns = crop.width as i64 - target.1 as i64;
        self == Self::Pillow13 && rows > 0 && rows > 2 * columns
    }
}

/// Filter of a resize; it widens when the image shrinks, so that nothing aliases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interpolation {
    /// A triangle: two samples when nothing shrinks.
    #[default]
    Bilinear,
    /// Keys's cubic with a = -0.5: four samples, with negative lobes.
    Bicubic,
}

/// Geometry of one resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// The part of the source that is resized.
    pub crop: CropBox,
    /// Rows and columns that the crop is resized to.
    pub target: (usize, usize),
    /// The part of the target that is computed and kept.
    pub window: CropBox,
    /// Whether the result is mirrored left to right.
    pub flip: bool,
    /// Which pass runs first.
    pub order: PassOrder,
    /// The filter.
    pub interpolation: Interpolation,
}

/// Memory that a resize needs; nothing is allocated once it has seen the largest image.
#[derive(Debug, Default)]
pub struct ResizeScratch {
    across: Weights,
    down: Weights,
    lanes: LaneScratch,
    /// The image between the passes, or a block of its rows.
    between: Vec<u8>,
    /// Finished rows: red, green and blue part one after the other.
    lines: Vec<u8>,
}

/// Crops, resizes and flips `image` into `out`, which takes the size of the window.
///
/// # Panics
/// When the crop does not lie inside the image, the window not inside the target, or one of them is empty.
pub fn crop_resize(level: Level, image: &RgbImage, resize: &Resize, scratch: &mut ResizeScratch, out: &mut Planes) {
    let Resize { crop, target, window, flip, order, interpolation } = *resize;
    assert!(crop.is_inside(image.height(), image.width()), "the crop lies inside the image");
    assert!(window.is_inside(target.0, target.1), "the window lies inside the target");
    let ResizeScratch { across, down, lanes, between, lines } = scratch;
    let lobes = interpolation == Interpolation::Bicubic;
    let columns = across.fill(interpolation, crop.width, target.1, window.left, window.width);
    let rows = down.fill(interpolation, crop.height, target.0, window.top, window.height);
    if flip {
        across.reverse();
    }
    out.reset(window.height, window.width);
    let pitch = image.width() * 3;
    let source = &image.pixels()[((crop.top + rows.start) * image.width() + crop.left + columns.start) * 3..];
    let (length, line) = (columns.len() * 3, window.width * 3);
    if order.vertical_first(crop, target) {
        between.resize(length * BLOCK, 0);
        lines.resize(line * BLOCK, 0);
        for y in (0..window.height).step_by(BLOCK) {
            let count = BLOCK.min(window.height - y);
            for (i, row) in between.chunks_exact_mut(length).enumerate().take(count) {
                let (start, weights) = down.at(y + i);
                vertical_row(level, &source[start * pitch..], pitch, weights, lobes, row);
            }
            horizontal_block(level, Rows { bytes: between, pitch: length, length, count }, across, lobes, lanes, lines);
            for (i, line) in lines.chunks_exact(line).enumerate().take(count) {
                out.set_row(y + i, line);
            }
        }
        return;
    }
    between.resize(rows.len() * line, 0);
    for (i, lines) in between.chunks_mut(line * BLOCK).enumerate() {
        let block = Rows { bytes: &source[i * BLOCK * pitch..], pitch, length, count: lines.len() / line };
        horizontal_block(level, block, across, lobes, lanes, lines);
    }
    lines.resize(line, 0);
    for y in 0..window.height {
        let (start, weights) = down.at(y);
        vertical_row(level, &between[start * line..], line, weights, lobes, &mut lines[..line]);
        out.set_row(y, &lines[..line]);
    }
}

/// Rows that go through the horizontal pass together.
const BLOCK: usize = 16;

/// One byte of each of the rows.
type Lanes = [u8; BLOCK];

/// Up to 16 rows of interleaved RGB, `pitch` bytes apart, of which `length` bytes each are used.
#[derive(Clone, Copy)]
struct Rows<'a> {
    bytes: &'a [u8],
    pitch: usize,
    length: usize,
    count: usize,
}

/// Rows turned into columns, before and after the horizontal pass.
#[derive(Debug, Default)]
struct LaneScratch {
    columns: Vec<Lanes>,
    sums: Vec<Lanes>,
}

kernel! {
    /// Horizontal pass of a block. The result is rows of red, green and blue part, each as long as there are weights.
    fn horizontal_block(rows: Rows<'_>, weights: &Weights, lobes: bool, scratch: &mut LaneScratch, out: &mut [u8]) {
        let LaneScratch { columns, sums } = scratch;
        // rows to columns: one `Lanes` for each byte position
        columns.resize(rows.length.next_multiple_of(BLOCK), [0; BLOCK]);
        for (j, block) in columns.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let mut matrix = [[0u8; BLOCK]; BLOCK];
            let at = j * BLOCK;
            let n = BLOCK.min(rows.length - at);
            for (r, lane) in matrix.iter_mut().enumerate().take(rows.count) {
                let row = &rows.bytes[r * rows.pitch + at..];
                if let (BLOCK, Some(full)) = (n, row.first_chunk::<BLOCK>()) {
                    *lane = *full;
                } else {
                    lane[..n].copy_from_slice(&row[..n]);
                }
            }
            *block = transpose(&matrix);
        }
        // weighted sums, a lane for each row
        let width = weights.len();
        sums.resize((width * 3).next_multiple_of(BLOCK), [0; BLOCK]);
        if lobes {
            sum_columns::<true>(columns, weights, sums);
        } else {
            sum_columns::<false>(columns, weights, sums);
        }
        // columns back to rows
        for (j, block) in sums.as_chunks::<BLOCK>().0.iter().enumerate() {
            let matrix = transpose(block);
            let at = j * BLOCK;
            let n = BLOCK.min(width * 3 - at);
            for (row, lane) in out.chunks_exact_mut(width * 3).zip(&matrix).take(rows.count) {
                if n == BLOCK {
                    row[at..at + BLOCK].copy_from_slice(lane);
                } else {
                    row[at..at + n].copy_from_slice(&lane[..n]);
                }
            }
        }
    }
}

#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn sum_columns<const LOBES: bool>(columns: &[Lanes], weights: &Weights, sums: &mut [Lanes]) {
    let width = weights.len();
    let (red, rest) = sums.split_at_mut(width);
    let (green, blue) = rest.split_at_mut(width);
    for ((((start, taps), red), green), blue) in weights.iter().zip(red).zip(green).zip(blue) {
        let mut sum = [[1i32 << (BITS - 1); BLOCK]; 3];
        let source = &columns[start * 3..(start + taps.len()) * 3];
        for (pixel, &tap) in source.as_chunks::<3>().0.iter().zip(taps) {
            for c in 0..3 {
                for i in 0..BLOCK {
                    sum[c][i] = sum[c][i].wrapping_add(i32::from(pixel[c][i]).wrapping_mul(tap));
                }
            }
        }
        for (lane, sum) in [red, green, blue].into_iter().zip(&sum) {
            for i in 0..BLOCK {
                lane[i] = to_byte::<LOBES>(sum[i]);
            }
        }
    }
}

/// The byte of a weighted sum. Only weights with negative lobes can make it negative.
#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn to_byte<const LOBES: bool>(sum: i32) -> u8 {
    let sum = if LOBES { sum.max(0) } else { sum };
    (sum >> BITS).min(255) as u8
}

/// Bytes that the vertical pass computes together.
const WIDE: usize = 64;

kernel! {
    /// Weighted sum of rows: `rows` holds rows `pitch` bytes apart, `taps` one weight for each of the first ones.
    fn vertical_row(rows: &[u8], pitch: usize, taps: &[i32], lobes: bool, out: &mut [u8]) {
        if lobes {
            sum_rows::<true>(rows, pitch, taps, out);
        } else {
            sum_rows::<false>(rows, pitch, taps, out);
        }
    }
}

#[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
#[inline(always)]
fn sum_rows<const LOBES: bool>(rows: &[u8], pitch: usize, taps: &[i32], out: &mut [u8]) {
    let width = out.len();
    if width < WIDE {
        for (x, byte) in out.iter_mut().enumerate() {
            let mut sum = 1i32 << (BITS - 1);
            for (t, &tap) in taps.iter().enumerate() {
                sum = sum.wrapping_add(i32::from(rows[t * pitch + x]).wrapping_mul(tap));
            }
            *byte = to_byte::<LOBES>(sum);
        }
        return;
    }
    for x in (0..width).step_by(WIDE) {
        // the last block overlaps the one before it
        let x = x.min(width - WIDE);
        let mut sum = [1i32 << (BITS - 1); WIDE];
        for (t, &tap) in taps.iter().enumerate() {
            let row = &rows[t * pitch + x..][..WIDE];
            for i in 0..WIDE {
                sum[i] = sum[i].wrapping_add(i32::from(row[i]).wrapping_mul(tap));
            }
        }
        for (byte, sum) in out[x..x + WIDE].iter_mut().zip(&sum) {
            *byte = to_byte::<LOBES>(*sum);
        }
    }
}

/// 16 x 16 bytes, rows to columns.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose(matrix: &[Lanes; BLOCK]) -> [Lanes; BLOCK] {
    use std::arch::x86_64::{__m128i, _mm_unpackhi_epi8, _mm_unpacklo_epi8};
    // A perfect shuffle of the 16 rows, four times: each round interleaves row i with row i + 8.
    // SAFETY: both types are 256 plain bytes.
    let mut rows: [__m128i; BLOCK] = unsafe { std::mem::transmute(*matrix) };
    for _ in 0..4 {
        let mut next = rows;
        for i in 0..8 {
            // SAFETY: SSE2 is part of every x86-64 processor.
            next[2 * i] = unsafe { _mm_unpacklo_epi8(rows[i], rows[i + 8]) };
            // SAFETY: as above.
            next[2 * i + 1] = unsafe { _mm_unpackhi_epi8(rows[i], rows[i + 8]) };
        }
        rows = next;
    }
    // SAFETY: both types are 256 plain bytes.
    unsafe { std::mem::transmute(rows) }
}

/// 16 x 16 bytes, rows to columns.
#[cfg(not(target_arch = "x86_64"))]
fn transpose(matrix: &[Lanes; BLOCK]) -> [Lanes; BLOCK] {
    std::array::from_fn(|i| std::array::from_fn(|j| matrix[j][i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transforms::{flip, reference};
    use proptest::prelude::*;

    #[test]
    fn pass_order_flips_exactly_above_twice_the_columns() {
        let crop = |height, width| CropBox { top: 0, left: 0, height, width };
        let first = |height, width| PassOrder::Pillow13.vertical_first(crop(height, width), (224, 224));
        assert!(!first(324, 274) && first(325, 274) && first(323, 273));
        assert!(!first(224, 100) && first(225, 224) && !first(200, 50));
        assert!(!PassOrder::Horizontal.vertical_first(crop(1000, 10), (224, 224)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_level_equals_the_plain_formula(
            height in 1usize..90, width in 1usize..90, target in (1usize..70, 1usize..70),
            cut in any::<[u16; 8]>(), seed in any::<u64>(), [flip, pillow13, bicubic] in any::<[bool; 3]>(),
        ) {
            let image = reference::noise(height, width, seed);
            let inside = |rows: usize, columns: usize, cut: &[u16]| {
                let (height, width) = (1 + cut[0] as usize % rows, 1 + cut[1] as usize % columns);
                let (top, left) = (cut[2] as usize % (rows - height + 1), cut[3] as usize % (columns - width + 1));
                CropBox { top, left, height, width }
            };
            let order = if pillow13 { PassOrder::Pillow13 } else { PassOrder::Horizontal };
            let (crop, window) = (inside(height, width, &cut[..4]), inside(target.0, target.1, &cut[4..]));
            let interpolation = if bicubic { Interpolation::Bicubic } else { Interpolation::Bilinear };
            let resize = Resize { crop, target, window, flip, order, interpolation };
            let want = reference::crop_resize(&image, &resize);
            let mut scratch = ResizeScratch::default();
            for level in Level::available() {
                let mut got = Planes::default();
                crop_resize(level, &image, &resize, &mut scratch, &mut got);
                prop_assert_eq!(&got, &want, "{:?} {:?}", level, resize);
            }
        }
    }

    #[test]
    fn flipped_weights_equal_a_flip_afterwards() {
        let image = reference::noise(61, 83, 5);
        let whole = CropBox { top: 0, left: 0, height: 61, width: 83 };
        let window = CropBox { top: 0, left: 0, height: 33, width: 31 };
        let (order, interpolation) = (PassOrder::default(), Interpolation::Bicubic);
        let mut resize = Resize { crop: whole, target: (33, 31), window, flip: false, order, interpolation };
        let (mut plain, mut flipped, mut scratch) = (Planes::default(), Planes::default(), ResizeScratch::default());
        crop_resize(Level::best(), &image, &resize, &mut scratch, &mut plain);
        resize.flip = true;
        crop_resize(Level::best(), &image, &resize, &mut scratch, &mut flipped);
        flip::apply(&mut plain);
        assert_eq!(plain, flipped);
    }
}
