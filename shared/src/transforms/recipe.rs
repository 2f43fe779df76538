//! Recipes: which augmentations the views of a sample go through, in which ranges. Some are [built in](super::built_in), others are
//! TOML files.
//!
//! ```toml
//! name = "mine"
//! pass-order = "pillow13"      # or "horizontal": as Pillow up to 12
//!
//! [[global]]                   # one block: all views alike; two blocks: views 0, 2, 4, ... and 1, 3, 5, ...; and so on
//!
//! [global.crop]
//! kind = "random-resized"      # or "center" with `fraction`
//! scale = [0.2, 1.0]           # share of the area
//! ratio = [0.75, 1.3333334]    # width over height; three quarters to four thirds, if left out
//! interpolation = "bicubic"    # or "bilinear", the default
//!
//! [global.color-jitter]        # every section from here on may be left out
//! probability = 0.8
//! brightness = 0.4
//! contrast = 0.4
//! saturation = 0.4
//! hue = 0.1
//!
//! [global.grayscale]
//! probability = 0.2
//! before-jitter = true         # false, if left out
//!
//! [global.gaussian-blur]
//! probability = 0.5
//! sigma = [0.1, 2.0]
//!
//! [global.solarize]
//! probability = 0.2
//! threshold = 128
//!
//! [global.flip]
//! probability = 0.5
//! ```
//!
//! The steps always run in this order, but for `before-jitter`. Small views beside the global ones (multi-crop) are `[local]` with `size = 96` and one or more
//! `[[local.view]]` blocks: every round of `[[global]]` blocks has a round of them.
//!
//! Global view `v` is drawn from the generator `KeyedRng::new("view", seed, &[sample_id, v])`, local view `w` from
//! `KeyedRng::new("local view", seed, &[sample_id, w])`, by nothing else.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::RgbImage;
use super::built_in::{self, BUILT_IN};
use super::resize::PassOrder;
use crate::error::{Error, Result};
use crate::rng::KeyedRng;

pub use super::view::{MAX_SIDE, View, ViewParams};
pub use super::view_recipe::{Chance, ColorJitter, Crop, GaussianBlur, Grayscale, Scratch, Solarize, ViewRecipe};

/// How all views of a sample are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recipe {
    /// What it is called in manifests and reports.
    pub name: String,
    /// Which resize pass runs first.
    #[serde(default)]
    pub pass_order: PassOrder,
    /// The global views: view `v` is made by entry `v` modulo their number. Never empty.
    pub global: Vec<ViewRecipe>,
    /// The small views of multi-crop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalViews>,
}

/// The small views of multi-crop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LocalViews {
    /// Height and width in pixels.
    pub size: usize,
    /// Local view `w` is made by entry `w` modulo their number. Never empty; as many as go with one round of global views.
    pub view: Vec<ViewRecipe>,
}

impl Recipe {
    /// A built-in recipe by name, or a recipe from a TOML file.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is neither, or the file has unknown keys or values that make no sense; [`Error::Io`].
    pub fn named_or_file(name: &str) -> Result<Self> {
        if let Some(built_in) = BUILT_IN.iter().find(|built_in| built_in.name == name) {
            return Ok((built_in.recipe)());
        }
        let path = Path::new(name);
        if !path.is_file() {
            let known = built_in::names();
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
        if self.global.is_empty() {
            return Err("it needs at least one `[[global]]` view".into());
        }
        for view in self.global.iter().chain(self.local.iter().flat_map(|local| &local.view)) {
            view.validate()?;
        }
        match &self.local {
            Some(local) if local.view.is_empty() => Err("`local` needs at least one `[[local.view]]`".into()),
            Some(local) if !(1..=4096).contains(&local.size) => {
                Err(format!("`local.size` must lie in 1 to 4096, found {}", local.size))
            }
            _ => Ok(()),
        }
    }

    /// How many local views go with `global_views` global ones.
    pub fn local_views(&self, global_views: usize) -> usize {
        self.local.as_ref().map_or(0, |local| global_views.div_ceil(self.global.len()) * local.view.len())
    }

    /// Whether two views of one image can differ.
    pub fn is_random(&self) -> bool {
        self.global.len() > 1 || self.local.is_some() || self.global.iter().any(ViewRecipe::is_random)
    }

    /// The steps of a view. Without local views, theirs are the global ones.
    ///
    /// # Panics
    /// When the recipe has no views at all, which no recipe that was read has.
    pub fn view(&self, view: View) -> &ViewRecipe {
        let global = &self.global[..];
        let (views, index) = match view {
            View::Global(v) => (global, v),
            View::Local(w) => (self.local.as_ref().map_or(global, |local| &local.view), w),
        };
        &views[index % views.len()]
    }

    /// Draws a view of the sample of a given identity, whose decoded image has `height` x `width` pixels, neither 0.
    ///
    /// # Panics
    /// As [`Recipe::view`].
    pub fn draw(&self, seed: u64, sample_id: u64, view: View, height: usize, width: usize) -> ViewParams {
        let mut rng = match view {
            View::Global(v) => KeyedRng::new("view", seed, &[sample_id, v as u64]),
            View::Local(w) => KeyedRng::new("local view", seed, &[sample_id, w as u64]),
        };
        self.view(view).draw(&mut rng, height, width)
    }

    /// Makes the pixels of a drawn view: `size` x `size`, interleaved RGB.
    ///
    /// # Shapes
    /// - `out`: `(size, size, 3)` u8
    ///
    /// # Errors
    /// As [`ViewRecipe::apply`].
    ///
    /// # Panics
    /// As [`Recipe::view`].
    pub fn apply(
        &self,
        view: View,
        image: &RgbImage,
        params: &ViewParams,
        size: usize,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<()> {
        self.view(view).apply(image, params, self.pass_order, size, scratch, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transforms::Level;
    use crate::transforms::reference;
    use crate::transforms::view_recipe::{as_f32, default_ratio};

    #[test]
    fn a_stored_row_gives_the_same_pixels_again() {
        let image = reference::noise(70, 90, 4);
        let size = 48;
        for recipe in BUILT_IN.map(|built_in| (built_in.recipe)()) {
            for view in (0..20).flat_map(|view| [View::Global(view), View::Local(view)]) {
                let params = recipe.draw(3, 77, view, 70, 90);
                let (mut first, mut second) = (vec![0; size * size * 3], vec![1; size * size * 3]);
                recipe.apply(view, &image, &params, size, &mut Scratch::default(), &mut first).unwrap();
                let again = ViewParams::from_row(&params.to_row()).unwrap();
                recipe.apply(view, &image, &again, size, &mut Scratch::new(Level::SCALAR), &mut second).unwrap();
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
            let view = View::Global(0);
            let params = recipe.draw(3, i, view, height, width);
            let (mut a, mut b) = (vec![0; size * size * 3], vec![1; size * size * 3]);
            recipe.apply(view, &image, &params, size, &mut used, &mut a).unwrap();
            recipe.apply(view, &image, &params, size, &mut Scratch::default(), &mut b).unwrap();
            assert!(a == b, "{params:?}");
        }
    }

    #[test]
    fn draws_are_pinned() {
        // A change here changes every view of every shard set: it needs a new format version.
        let row = Recipe::moco_v2().draw(0, 2, View::Global(0), 333, 500).to_row();
        let text: Vec<String> = row.iter().map(f32::to_string).collect();
        let pinned = "30 124 236 192 1 1.1554246 0.63702536 0.6752035 -0.026892051 1 0 3 2 0 0.53188616 -1 333 500";
        assert_eq!(text.join(" "), pinned);
    }

    #[test]
    fn recipes_survive_json_and_toml_exactly() {
        for built_in in BUILT_IN {
            let recipe = Recipe::named_or_file(built_in.name).unwrap();
            assert_eq!(recipe.name, built_in.name);
            recipe.validate().unwrap();
            let text = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe);
            assert_eq!(
                serde_json::to_string(&serde_json::from_str::<serde_json::Value>(&text).unwrap()).unwrap().len(),
                text.len()
            );
            let text = toml::to_string(&recipe).unwrap();
            assert_eq!(toml::from_str::<Recipe>(&text).unwrap(), recipe, "{text}");
        }
        assert_eq!(as_f32(default_ratio()), [3.0 / 4.0, 4.0 / 3.0]);
        assert_eq!(
            (Recipe::dino().local_views(2), Recipe::swav().local_views(4), Recipe::byol().local_views(2)),
            (8, 12, 0)
        );
    }

    #[test]
    fn files_with_unknown_keys_or_senseless_numbers_are_refused() {
        let read = |text: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("r.toml");
            crate::io::write_atomic(&path, text.as_bytes()).unwrap();
            Recipe::named_or_file(path.to_str().unwrap())
        };
        let crop = "name = 'x'\n[[global]]\n[global.crop]\nkind = 'random-resized'\nscale = [0.2, 1.0]\n";
        assert!(read(crop).is_ok());
        let whole = format!(
            "{crop}interpolation = 'bicubic'\n[global.grayscale]\nprobability = 0.5\nbefore-jitter = true\n[local]\nsize = 96\n[[local.view]]\ncrop = {{ kind = 'center', fraction = 1.0, interpolation = 'bicubic' }}\n"
        );
        assert_eq!(read(&whole).unwrap().local_views(2), 2);
        for wrong in [
            "colour = 1\n",
            "name = 'x'\nglobal = []\n",
            "name = 'x'\n[[global]]\n[global.crop]\nkind = 'random-resized'\nscale = [0.2, 1.0]\nsize = 3\n",
            "name = 'x'\n[[global]]\n[global.crop]\nkind = 'center'\nfraction = 1.5\n",
            "name = 'x'\n[[global]]\n[global.crop]\nkind = 'random-resized'\nscale = [0.9, 0.2]\n",
            &format!("{crop}[global.grayscale]\nprobability = 1.5\n"),
            &format!("{crop}[global.grayscale]\nprob = 0.5\n"),
            &format!("{crop}interpolation = 'nearest'\n"),
            &format!("{crop}ratio = [1.0]\n"),
            &format!("{crop}[global.grayscale]\nprobability = 0.5\nbefore-jitter = 1\n"),
            &format!("{crop}[local]\nsize = 0\n[[local.view]]\ncrop = {{ kind = 'center', fraction = 1.0 }}\n"),
            &format!("{crop}[local]\nsize = 96\nview = []\n"),
            &format!("{crop}[global.color-jitter]\nprobability = 0.5\nhue = 0.6\n"),
            &format!("{crop}[global.gaussian-blur]\nprobability = 0.5\nsigma = [nan, 1.0]\n"),
        ] {
            let error = read(wrong).unwrap_err();
            assert!(error.exit_status() == 2 && error.to_string().contains("r.toml"), "{error}");
        }
        assert_eq!(Recipe::named_or_file("mocov2").unwrap_err().exit_status(), 2);
    }

    #[test]
    fn a_view_of_another_image_is_refused() {
        let recipe = Recipe::moco_v2();
        let view = View::Global(0);
        let params = recipe.draw(0, 0, view, 30, 40);
        let image = reference::noise(40, 30, 0);
        let mut out = vec![0; 8 * 8 * 3];
        assert!(recipe.apply(view, &image, &params, 8, &mut Scratch::default(), &mut out).is_err());
        let image = reference::noise(30, 40, 0);
        assert!(recipe.apply(view, &image, &params, 9, &mut Scratch::default(), &mut out).is_err());
    }

    #[test]
    fn every_step_happens_about_as_often_as_it_says() {
        let mut recipe = Recipe::moco_v2();
        recipe.global[0].solarize = Some(Solarize { probability: 0.2, threshold: 128 });
        let (n, mut counts) = (20_000u32, [0u32; 5]);
        for i in 0..n {
            let view = recipe.draw(5, u64::from(i), View::Global(0), 333, 500);
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
