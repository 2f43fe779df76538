//! What was drawn for one view, as typed values and as the row of numbers that a shard stores.

use super::color_jitter::{Jitter, JitterStep};
use super::crop::CropBox;
use crate::error::Fault;
use crate::shard::VIEW_PARAMETERS;

/// Which view of a sample: numbers count from 0 within each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum View {
    /// A view of the full size.
    Global(usize),
    /// A small view of multi-crop.
    Local(usize),
}

/// Everything random about one view. With the recipe and the decoded image it gives the pixels of the view again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ViewParams {
    /// Rows and columns of the decoded image that the view was drawn for.
    pub source: (usize, usize),
    /// The part of the image that the view shows, before resizing.
    pub crop: CropBox,
    /// Whether it is mirrored left to right.
    pub flip: bool,
    /// Colour jitter, if any.
    pub jitter: Option<Jitter>,
    /// Whether it turns grey.
    pub grayscale: bool,
    /// Standard deviation of the blur in pixels of the view, if any; above 0.
    pub blur_sigma: Option<f32>,
    /// Bytes from here on are inverted, if any.
    pub solarize_threshold: Option<u8>,
}

/// The largest side of an image: an f32 holds every whole number up to it.
pub const MAX_SIDE: usize = 1 << 24;

impl ViewParams {
    /// The row that a shard stores, in the order of [`VIEW_PARAMETERS`]. It is lossless for sides up to [`MAX_SIDE`].
    pub fn to_row(&self) -> [f32; VIEW_PARAMETERS.len()] {
        let CropBox { top, left, height, width } = self.crop;
        let [brightness, contrast, saturation, hue] = self.jitter.map_or([1.0, 1.0, 1.0, 0.0], |jitter| jitter.factors);
        let order = self.jitter.map_or([-1.0; 4], |jitter| jitter.order.map(|step| f32::from(step as u8)));
        [
            top as f32,
            left as f32,
            height as f32,
            width as f32,
            f32::from(u8::from(self.flip)),
            brightness,
            contrast,
            saturation,
            hue,
            order[0],
            order[1],
            order[2],
            order[3],
            f32::from(u8::from(self.grayscale)),
            self.blur_sigma.unwrap_or(0.0),
            self.solarize_threshold.map_or(-1.0, f32::from),
            self.source.0 as f32,
            self.source.1 as f32,
        ]
    }

    /// The parameters that a row stands for.
    ///
    /// # Errors
    /// [`Fault::Value`], naming the number, when it cannot be what [`ViewParams::to_row`] wrote.
    pub fn from_row(row: &[f32; VIEW_PARAMETERS.len()]) -> Result<Self, Fault> {
        let fault = |i: usize| Fault::Value(format!("view parameter `{}` cannot be {}", VIEW_PARAMETERS[i], row[i]));
        let whole = |i: usize, limit: usize| {
            let fits = row[i] >= 0.0 && row[i] <= limit as f32 && row[i].fract() == 0.0;
            if fits { Ok(row[i] as usize) } else { Err(fault(i)) }
        };
        let source = (whole(16, MAX_SIDE)?, whole(17, MAX_SIDE)?);
        let crop = CropBox {
            top: whole(0, MAX_SIDE)?,
            left: whole(1, MAX_SIDE)?,
            height: whole(2, MAX_SIDE)?,
            width: whole(3, MAX_SIDE)?,
        };
        if !crop.is_inside(source.0, source.1) {
            return Err(Fault::Value(format!(
                "the crop {crop:?} does not lie inside {} x {} pixels",
                source.0, source.1
            )));
        }
        let jitter = if row[9..13].iter().all(|&step| step == -1.0) {
            None
        } else {
            let mut order = JitterStep::ALL;
            let mut seen = [false; 4];
            for (i, step) in order.iter_mut().enumerate() {
                let number = whole(9 + i, 3)?;
                if std::mem::replace(&mut seen[number], true) {
                    return Err(fault(9 + i));
                }
                *step = JitterStep::ALL[number];
            }
            if let Some(i) = (5..9).find(|&i| !row[i].is_finite()) {
                return Err(fault(i));
            }
            Some(Jitter { order, factors: [row[5], row[6], row[7], row[8]] })
        };
        let sigma = row[14];
        if !(sigma.is_finite() && sigma >= 0.0) {
            return Err(fault(14));
        }
        let solarize_threshold = if row[15] == -1.0 { None } else { Some(whole(15, 255)? as u8) };
        Ok(Self {
            source,
            crop,
            flip: whole(4, 1)? == 1,
            jitter,
            grayscale: whole(13, 1)? == 1,
            blur_sigma: (sigma > 0.0).then_some(sigma),
            solarize_threshold,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transforms::Recipe;

    #[test]
    fn rows_are_lossless() {
        let mut recipe = Recipe::moco_v2();
        recipe.global[0].solarize = Some(crate::transforms::recipe::Solarize { probability: 0.5, threshold: 128 });
        for i in 0..500 {
            let params = recipe.draw(1, i, View::Global(0), 1 + (i as usize * 37) % 4000, 900);
            assert_eq!(ViewParams::from_row(&params.to_row()), Ok(params));
        }
    }

    #[test]
    fn impossible_rows_are_refused() {
        let good = Recipe::moco_v2().draw(1, 0, View::Global(0), 300, 400).to_row();
        for (i, value) in [
            (0, -1.0),
            (0, 1.5),
            (2, 0.0),
            (3, 401.0),
            (4, 2.0),
            (9, 4.0),
            (9, -1.0),
            (13, 0.5),
            (14, f32::NAN),
            (14, -0.1),
            (15, 256.0),
            (16, f32::INFINITY),
            (17, 0.0),
        ] {
            let mut row = good;
            row[5..9].copy_from_slice(&[1.0, 1.0, 1.0, 0.0]);
            row[9..13].copy_from_slice(&[0.0, 1.0, 2.0, 3.0]);
            assert!(ViewParams::from_row(&row).is_ok());
            row[i] = value;
            assert!(ViewParams::from_row(&row).is_err(), "{i} {value}");
        }
    }
}
