//! Recipes: which augmentations a view goes through, in which ranges. Three are built in, others are TOML files.
//!
//! ```toml
//! name = "mine"
//! pass-order = "pillow13"      # or "horizontal": as Pillow up to 12
//!
//! [crop]
//! kind = "random-resized"      # or "center" with `fraction`
//! scale = [0.2, 1.0]           # share of the area
//! ratio = [0.75, 1.3333334]    # width over height
//!
//! [color-jitter]               # every section from here on may be left out
//! probability = 0.8
//! brightness = 0.4
//! contrast = 0.4
//! saturation = 0.4
//! hue = 0.1
//!
//! [grayscale]
//! probability = 0.2
//!
//! [gaussian-blur]
//! probability = 0.5
//! sigma = [0.1, 2.0]
//!
//! [solarize]
//! probability = 0.2
//! threshold = 128
//!
//! [flip]
//! probability = 0.5
//! ```
//!
//! The steps always run in this order. A view is drawn from the generator `KeyedRng::new("view", seed, &[sample_id, view])`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::color_jitter;
use super::crop::{self, CropBox};
use super::gaussian_blur::{self, BlurScratch};
use super::level::Level;
use super::resize::{PassOrder, Resize, ResizeScratch, crop_resize};
use super::{Planes, RgbImage, flip, grayscale, solarize};
use crate::error::{Error, Result};
use crate::rng::KeyedRng;

pub use super::view::{MAX_SIDE, ViewParams};

/// A sequence of augmentations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recipe {
    /// What it is called in manifests and reports.
    pub name: String,
    /// Which resize pass runs first.
    #[serde(default)]
    pub pass_order: PassOrder,
    /// Which part of the image is shown.
    pub crop: Crop,
    /// Brightness, contrast, saturation and hue, in random order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color_jitter: Option<ColorJitter>,
    /// Grey views.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grayscale: Option<Chance>,
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
    },
    /// The short side is resized to the size of the view divided by `fraction`, then the centre is kept.
    Center {
        /// Share of the short side that is kept, 0.875 for the usual 224 of 256.
        fraction: f64,
    },
}

/// Three quarters and four thirds. All numbers of a recipe are written with few digits, so that they survive JSON and TOML exactly,
/// and become f32 when a view is drawn, as in PyTorch.
fn default_ratio() -> [f64; 2] {
    [0.75, 1.333_333_4]
}

fn as_f32(range: [f64; 2]) -> [f32; 2] {
    range.map(|limit| limit as f32)
}

/// A step that is all or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Chance {
    /// How often it happens, 0 to 1.
    pub probability: f64,
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

impl Recipe {
    /// Names of the built-in recipes.
    pub const BUILT_IN: [&str; 3] = ["moco-v2", "linear-train", "eval-center"];

    /// Views for contrastive training.
    ///
    /// # Source
    /// MoCo v2, arXiv 2003.04297, section 3; official `main_moco.py` with `--aug-plus`, which DisCo takes over.
    pub fn moco_v2() -> Self {
        Self {
            color_jitter: Some(ColorJitter {
                probability: 0.8,
                brightness: 0.4,
                contrast: 0.4,
                saturation: 0.4,
                hue: 0.1,
            }),
            grayscale: Some(Chance { probability: 0.2 }),
            gaussian_blur: Some(GaussianBlur { probability: 0.5, sigma: [0.1, 2.0] }),
            flip: Some(Chance { probability: 0.5 }),
            ..Self::bare("moco-v2", Crop::RandomResized { scale: [0.2, 1.0], ratio: default_ratio() })
        }
    }

    /// Views for training a linear probe: a random resized crop and a flip.
    pub fn linear_train() -> Self {
        Self {
            flip: Some(Chance { probability: 0.5 }),
            ..Self::bare("linear-train", Crop::RandomResized { scale: [0.08, 1.0], ratio: default_ratio() })
        }
    }

    /// The view for evaluation: the short side resized to 256/224 of the size, then the centre.
    pub fn eval_center() -> Self {
        Self::bare("eval-center", Crop::Center { fraction: 0.875 })
    }

    fn bare(name: &str, crop: Crop) -> Self {
        Self {
            name: name.into(),
            pass_order: PassOrder::default(),
            crop,
            color_jitter: None,
            grayscale: None,
            gaussian_blur: None,
            solarize: None,
            flip: None,
        }
    }

    /// A built-in recipe by name, or a recipe from a TOML file.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is neither, or the file has unknown keys or values that make no sense; [`Error::Io`].
    pub fn named_or_file(name: &str) -> Result<Self> {
        match name {
            "moco-v2" => return Ok(Self::moco_v2()),
            "linear-train" => return Ok(Self::linear_train()),
            "eval-center" => return Ok(Self::eval_center()),
            _ => {}
        }
        let path = Path::new(name);
        if !path.is_file() {
            let known = Self::BUILT_IN.map(|name| format!("`{name}`")).join(", ");
            return Err(Error::usage(format!("recipe `{name}` is neither one of {known} nor a TOML file")));
        }
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let in_file = |what: String| Error::usage(format!("recipe `{name}`: {what}"));
        let recipe: Self = toml::from_str(&text)
            .map_err(|e| in_file(e.to_string().split_whitespace().collect::<Vec<_>>().join(" ")))?;
        recipe.validate().map_err(in_file)?;
        Ok(recipe)
    }

    /// Checks that every number makes sense; says what does not.
    fn validate(&self) -> Result<(), String> {
        let rising = |what: &str, range: [f64; 2], low: f64, high: f64| {
            let ok = range[0] > low && range[0] <= range[1] && range[1] <= high;
            if ok { Ok(()) } else { Err(format!("`{what}` must rise within {low} to {high}, found {range:?}")) }
        };
        let within = |what: &str, value: f64, high: f64| {
            let ok = (0.0..=high).contains(&value);
            if ok { Ok(()) } else { Err(format!("`{what}` must lie in 0 to {high}, found {value}")) }
        };
        match self.crop {
            Crop::RandomResized { scale, ratio } => {
                rising("crop.scale", scale, 0.0, 1.0)?;
                rising("crop.ratio", ratio, 0.0, 1000.0)?;
            }
            Crop::Center { fraction } => {
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
            Crop::RandomResized { scale, ratio } => crop::draw(rng, height, width, as_f32(scale), as_f32(ratio)),
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
        crop_resize(level, image, &self.geometry(params, size), resize, planes);
        if let (Some(drawn), Some(jitter)) = (&params.jitter, &self.color_jitter) {
            color_jitter::apply(level, planes, drawn, jitter.strengths());
        }
        if params.grayscale {
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

    fn geometry(&self, params: &ViewParams, size: usize) -> Resize {
        let (target, window) = match self.crop {
            Crop::RandomResized { .. } => ((size, size), CropBox::whole(size, size)),
            Crop::Center { fraction } => {
                let short = ((size as f64 / fraction).round() as usize).max(size);
                let target = crop::resize_short_side(params.crop.height, params.crop.width, short);
                (target, crop::center(target.0, target.1, size))
            }
        };
        Resize { crop: params.crop, target, window, flip: params.flip, order: self.pass_order }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transforms::reference;

    #[test]
    fn a_stored_row_gives_the_same_pixels_again() {
        let image = reference::noise(70, 90, 4);
        let size = 48;
        for recipe in [Recipe::moco_v2(), Recipe::linear_train(), Recipe::eval_center()] {
            for view in 0..20 {
                let params = recipe.draw(&mut KeyedRng::new("view", 3, &[77, view]), 70, 90);
                let (mut first, mut second) = (vec![0; size * size * 3], vec![1; size * size * 3]);
                recipe.apply(&image, &params, size, &mut Scratch::default(), &mut first).unwrap();
                let again = ViewParams::from_row(&params.to_row()).unwrap();
                recipe.apply(&image, &again, size, &mut Scratch::new(Level::SCALAR), &mut second).unwrap();
                assert!(first == second, "{} {params:?}", recipe.name);
            }
        }
    }

    #[test]
    fn scratch_that_saw_other_images_changes_nothing() {
        let recipe = Recipe::moco_v2();
        let mut used = Scratch::default();
        for i in 0..30u64 {
            let (height, width, size) = (1 + i as usize * 11 % 97, 1 + i as usize * 29 % 83, 1 + i as usize % 50);
            let image = reference::noise(height, width, i);
            let params = recipe.draw(&mut KeyedRng::new("view", 3, &[i]), height, width);
            let (mut a, mut b) = (vec![0; size * size * 3], vec![1; size * size * 3]);
            recipe.apply(&image, &params, size, &mut used, &mut a).unwrap();
            recipe.apply(&image, &params, size, &mut Scratch::default(), &mut b).unwrap();
            assert!(a == b, "{params:?}");
        }
    }

    #[test]
    fn draws_are_pinned() {
        // A change here changes every view of every shard set: it needs a new format version.
        let row = Recipe::moco_v2().draw(&mut KeyedRng::new("view", 0, &[2, 0]), 333, 500).to_row();
        let text: Vec<String> = row.iter().map(f32::to_string).collect();
        let pinned = "30 124 236 192 1 1.1554246 0.63702536 0.6752035 -0.026892051 1 0 3 2 0 0.53188616 -1 333 500";
        assert_eq!(text.join(" "), pinned);
    }

    #[test]
    fn recipes_survive_json_exactly() {
        for name in Recipe::BUILT_IN {
            let recipe = serde_json::to_value(Recipe::named_or_file(name).unwrap()).unwrap();
            let text = recipe.to_string();
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), recipe);
            assert!(text.len() < 500, "long numbers: {text}");
        }
        assert_eq!(as_f32(default_ratio()), [3.0 / 4.0, 4.0 / 3.0]);
    }

    #[test]
    fn recipes_survive_toml_and_unknown_keys_do_not() {
        for name in Recipe::BUILT_IN {
            let recipe = Recipe::named_or_file(name).unwrap();
            let text = toml::to_string(&recipe).unwrap();
            assert_eq!(toml::from_str::<Recipe>(&text).unwrap(), recipe, "{text}");
            recipe.validate().unwrap();
        }
        let read = |text: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("r.toml");
            crate::io::write_atomic(&path, text.as_bytes()).unwrap();
            Recipe::named_or_file(path.to_str().unwrap())
        };
        let crop = "name = 'x'\n[crop]\nkind = 'random-resized'\nscale = [0.2, 1.0]\n";
        assert!(read(crop).is_ok());
        for wrong in [
            "colour = 1\n",
            "[crop]\nkind = 'random-resized'\nscale = [0.2, 1.0]\nsize = 3\n",
            "name = 'x'\n[crop]\nkind = 'center'\nfraction = 1.5\n",
            "name = 'x'\n[crop]\nkind = 'random-resized'\nscale = [0.9, 0.2]\n",
            &format!("{crop}[grayscale]\nprobability = 1.5\n"),
            &format!("{crop}[grayscale]\nprob = 0.5\n"),
            &format!("{crop}[color-jitter]\nprobability = 0.5\nhue = 0.6\n"),
            &format!("{crop}[gaussian-blur]\nprobability = 0.5\nsigma = [nan, 1.0]\n"),
        ] {
            let error = read(wrong).unwrap_err();
            assert!(error.exit_status() == 2 && error.to_string().contains("r.toml"), "{error}");
        }
        assert_eq!(Recipe::named_or_file("mocov2").unwrap_err().exit_status(), 2);
    }

    #[test]
    fn a_view_of_another_image_is_refused() {
        let recipe = Recipe::moco_v2();
        let params = recipe.draw(&mut KeyedRng::new("view", 0, &[0]), 30, 40);
        let image = reference::noise(40, 30, 0);
        let mut out = vec![0; 8 * 8 * 3];
        assert!(recipe.apply(&image, &params, 8, &mut Scratch::default(), &mut out).is_err());
        let image = reference::noise(30, 40, 0);
        assert!(recipe.apply(&image, &params, 9, &mut Scratch::default(), &mut out).is_err());
    }

    #[test]
    fn every_step_happens_about_as_often_as_it_says() {
        let recipe = Recipe { solarize: Some(Solarize { probability: 0.2, threshold: 128 }), ..Recipe::moco_v2() };
        let (n, mut counts) = (20_000u32, [0u32; 5]);
        for i in 0..n {
            let view = recipe.draw(&mut KeyedRng::new("view", 5, &[u64::from(i)]), 333, 500);
            let steps = [
                view.jitter.is_some(),
                view.grayscale,
                view.blur_sigma.is_some(),
                view.solarize_threshold.is_some(),
                view.flip,
            ];
            for (count, step) in counts.iter_mut().zip(steps) {
                *count += u32::from(step);
            }
        }
        for (count, expected) in counts.into_iter().zip([0.8f64, 0.2, 0.5, 0.2, 0.5]) {
            let deviation = f64::from(count) / f64::from(n) - expected;
            assert!(deviation.abs() < 4.0 * (expected * (1.0 - expected) / f64::from(n)).sqrt(), "{counts:?}");
        }
    }
}
