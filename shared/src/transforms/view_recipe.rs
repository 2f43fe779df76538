//! What one view goes through: its steps, drawing their parameters, applying them.
//!
//! The steps always run in the order of the fields of [`ViewRecipe`], but for grey, which can come before the jitter.

use serde::{Deserialize, Serialize};

use super::color_jitter;
use super::crop::{self, CropBox};
use super::gaussian_blur::{self, BlurScratch};
use super::level::Level;
use super::resize::{Interpolation, PassOrder, Resize, ResizeScratch, crop_resize};
use super::view::ViewParams;
use super::{Planes, RgbImage, flip, grayscale, solarize};
use crate::error::{Error, Result};
use crate::rng::KeyedRng;

/// The augmentations of one view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ViewRecipe {
    /// Which part of the image is shown.
    pub crop: Crop,
    /// Brightness, contrast, saturation and hue, in random order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color_jitter: Option<ColorJitter>,
    /// Grey views.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grayscale: Option<Grayscale>,
    /// Blurred views.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gaussian_blur: Option<GaussianBlur>,
    /// Solarised views.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solarize: Option<Solarize>,
    /// Mirrored views.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flip: Option<Chance>,
}

/// How the part of the image is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Crop {
    /// A random box, resized to the size of the view.
    RandomResized {
        /// Share of the image's area.
        scale: [f64; 2],
        /// Width over height.
        #[serde(default = "default_ratio")]
        ratio: [f64; 2],
        /// Filter of the resize.
        #[serde(default)]
        interpolation: Interpolation,
    },
    /// The short side is resized to the size of the view divided by `fraction`, then the centre is kept.
    Center {
        /// Share of the short side that is kept, 0.875 for the usual 224 of 256.
        fraction: f64,
        /// Filter of the resize.
        #[serde(default)]
        interpolation: Interpolation,
    },
}

/// Three quarters and four thirds. All numbers of a recipe are written with few digits, so that they survive JSON and TOML exactly,
/// and become f32 when a view is drawn, as in PyTorch.
pub(super) fn default_ratio() -> [f64; 2] {
    [0.75, 1.333_333_4]
}

pub(super) fn as_f32(range: [f64; 2]) -> [f32; 2] {
    range.map(|limit| limit as f32)
}

/// A step that is all or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Chance {
    /// How often it happens, 0 to 1.
    pub probability: f64,
}

/// Grey views.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Grayscale {
    /// How often it happens, 0 to 1.
    pub probability: f64,
    /// Whether it comes before the colour jitter, as in the first MoCo, and not after it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub before_jitter: bool,
}

/// Colour jitter; a strength of 0 leaves that property alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ColorJitter {
    /// How often it happens, 0 to 1.
    pub probability: f64,
    /// Largest distance of the brightness factor from 1.
    #[serde(default)]
    pub brightness: f64,
    /// Largest distance of the contrast factor from 1.
    #[serde(default)]
    pub contrast: f64,
    /// Largest distance of the saturation factor from 1.
    #[serde(default)]
    pub saturation: f64,
    /// Largest turn of the hue, as a share of the circle; at most 0.5.
    #[serde(default)]
    pub hue: f64,
}

impl ColorJitter {
    fn strengths(&self) -> color_jitter::Strengths {
        [self.brightness, self.contrast, self.saturation, self.hue].map(|strength| strength as f32)
    }
}

/// Gaussian blur.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct GaussianBlur {
    /// How often it happens, 0 to 1.
    pub probability: f64,
    /// Range of the standard deviation, in pixels of the view.
    pub sigma: [f64; 2],
}

/// Solarisation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Solarize {
    /// How often it happens, 0 to 1.
    pub probability: f64,
    /// Bytes from here on are inverted.
    pub threshold: u8,
}

/// All memory that a worker needs to make views, and the instruction set it uses.
#[derive(Debug, Default)]
pub struct Scratch {
    level: Level,
    resize: ResizeScratch,
    planes: Planes,
    blur: BlurScratch,
}

impl Scratch {
    /// Empty memory for kernels of a given level; `Scratch::default()` takes the best one.
    pub fn new(level: Level) -> Self {
        Self { level, ..Self::default() }
    }
}

impl ViewRecipe {
    /// A view that only shows its part of the image.
    pub fn bare(crop: Crop) -> Self {
        Self { crop, color_jitter: None, grayscale: None, gaussian_blur: None, solarize: None, flip: None }
    }

    /// Checks that every number makes sense; says what does not.
    pub(super) fn validate(&self) -> Result<(), String> {
        let rising = |what: &str, range: [f64; 2], low: f64, high: f64| {
            let ok = range[0] > low && range[0] <= range[1] && range[1] <= high;
            if ok { Ok(()) } else { Err(format!("`{what}` must rise within {low} to {high}, found {range:?}")) }
        };
        let within = |what: &str, value: f64, high: f64| {
            let ok = (0.0..=high).contains(&value);
            if ok { Ok(()) } else { Err(format!("`{what}` must lie in 0 to {high}, found {value}")) }
        };
        match self.crop {
            Crop::RandomResized { scale, ratio, interpolation: _ } => {
                rising("crop.scale", scale, 0.0, 1.0)?;
                rising("crop.ratio", ratio, 0.0, 1000.0)?;
            }
            Crop::Center { fraction, interpolation: _ } => {
                if !(0.01..=1.0).contains(&fraction) {
                    return Err(format!("`crop.fraction` must lie in 0.01 to 1, found {fraction}"));
                }
            }
        }
        if let Some(jitter) = &self.color_jitter {
            within("color-jitter.probability", jitter.probability, 1.0)?;
            within("color-jitter.brightness", jitter.brightness, 100.0)?;
            within("color-jitter.contrast", jitter.contrast, 100.0)?;
            within("color-jitter.saturation", jitter.saturation, 100.0)?;
            within("color-jitter.hue", jitter.hue, 0.5)?;
        }
        if let Some(blur) = &self.gaussian_blur {
            within("gaussian-blur.probability", blur.probability, 1.0)?;
            rising("gaussian-blur.sigma", blur.sigma, 0.0, 100.0)?;
        }
        for (what, probability) in [
            ("grayscale.probability", self.grayscale.map(|step| step.probability)),
            ("solarize.probability", self.solarize.map(|step| step.probability)),
            ("flip.probability", self.flip.map(|step| step.probability)),
        ] {
            within(what, probability.unwrap_or(0.0), 1.0)?;
        }
        Ok(())
    }

    /// Whether two views of one image can differ.
    pub fn is_random(&self) -> bool {
        matches!(self.crop, Crop::RandomResized { .. })
            || self.color_jitter.is_some()
            || self.grayscale.is_some()
            || self.gaussian_blur.is_some()
            || self.solarize.is_some()
            || self.flip.is_some()
    }

    /// Draws one view of an image of `height` x `width` pixels, neither 0.
    ///
    /// # Source
    /// torchvision 0.29.2, the transforms' `get_params`: same distributions. The stream of random numbers is our own.
    pub fn draw(&self, rng: &mut KeyedRng, height: usize, width: usize) -> ViewParams {
        let crop = match self.crop {
            Crop::RandomResized { scale, ratio, .. } => crop::draw(rng, height, width, as_f32(scale), as_f32(ratio)),
            Crop::Center { .. } => CropBox::whole(height, width),
        };
        let jitter = self.color_jitter.filter(|jitter| rng.unit_f32() <= jitter.probability as f32);
        let jitter = jitter.map(|jitter| color_jitter::draw(rng, jitter.strengths()));
        let grayscale = self.grayscale.is_some_and(|step| grayscale::draw(rng, step.probability as f32));
        let blur_sigma =
            self.gaussian_blur.and_then(|step| gaussian_blur::draw(rng, step.probability as f32, as_f32(step.sigma)));
        let solarize = self.solarize.filter(|step| solarize::draw(rng, step.probability as f32));
        ViewParams {
            source: (height, width),
            crop,
            flip: self.flip.is_some_and(|step| flip::draw(rng, step.probability as f32)),
            jitter,
            grayscale,
            blur_sigma,
            solarize_threshold: solarize.map(|step| step.threshold),
        }
    }

    /// Makes the pixels of a drawn view: `size` x `size`, interleaved RGB.
    ///
    /// # Shapes
    /// - `out`: `(size, size, 3)` u8
    ///
    /// # Errors
    /// [`Error::Invalid`] when the view was drawn for an image of another size, [`Error::Shape`] when `out` has another length.
    pub fn apply(
        &self,
        image: &RgbImage,
        params: &ViewParams,
        order: PassOrder,
        size: usize,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<()> {
        let found = (image.height(), image.width());
        if params.source != found || !params.crop.is_inside(found.0, found.1) {
            let (rows, columns) = params.source;
            return Err(Error::invalid(
                format!("the view was drawn for {rows} x {columns} pixels, the image has {} x {}", found.0, found.1),
                "the source image was changed since it was packed",
            ));
        }
        if size == 0 || out.len() != size * size * 3 {
            return Err(Error::Shape {
                op: "view",
                expected: format!("({size}, {size}, 3), size above 0"),
                got: format!("{} bytes", out.len()),
            });
        }
        let Scratch { level, resize, planes, blur } = scratch;
        let level = *level;
        crop_resize(level, image, &self.geometry(params, order, size), resize, planes);
        let grey_first = self.grayscale.is_some_and(|step| step.before_jitter);
        if params.grayscale && grey_first {
            grayscale::apply(level, planes);
        }
        if let (Some(drawn), Some(jitter)) = (&params.jitter, &self.color_jitter) {
            color_jitter::apply(level, planes, drawn, jitter.strengths());
        }
        if params.grayscale && !grey_first {
            grayscale::apply(level, planes);
        }
        if let Some(sigma) = params.blur_sigma {
            gaussian_blur::apply(level, planes, sigma, blur);
        }
        if let Some(threshold) = params.solarize_threshold {
            solarize::apply(level, planes, threshold);
        }
        planes.write_rgb(level, out);
        Ok(())
    }

    fn geometry(&self, params: &ViewParams, order: PassOrder, size: usize) -> Resize {
        let (target, window, interpolation) = match self.crop {
            Crop::RandomResized { interpolation, .. } => ((size, size), CropBox::whole(size, size), interpolation),
            Crop::Center { fraction, interpolation } => {
                let short = ((size as f64 / fraction).round() as usize).max(size);
                let target = crop::resize_short_side(params.crop.height, params.crop.width, short);
                (target, crop::center(target.0, target.1, size), interpolation)
            }
        };
        Resize { crop: params.crop, target, window, flip: params.flip, order, interpolation }
    }
}
