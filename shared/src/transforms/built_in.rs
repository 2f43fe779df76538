//! The built-in recipes: the augmentations of published methods, each after its official code.
//!
//! Official code flips right after the crop or last of all; here the flip is part of the resize. A flip commutes with every other
//! step, so the pixels are the same.

use super::Recipe;
use super::recipe::LocalViews;
use super::resize::{Interpolation, PassOrder};
use super::view_recipe::{Chance, ColorJitter, Crop, GaussianBlur, Grayscale, Solarize, ViewRecipe, default_ratio};

/// A recipe that has a name.
#[derive(Debug, Clone, Copy)]
pub struct BuiltIn {
    /// Its name in flags, manifests and reports.
    pub name: &'static str,
    /// What it is for, in a few words.
    pub summary: &'static str,
    /// The recipe itself.
    pub recipe: fn() -> Recipe,
}

/// All of them, in the order in which they are listed.
pub const BUILT_IN: [BuiltIn; 8] = [
    BuiltIn { name: "moco-v2", summary: "crop, colour jitter, grey, blur, flip", recipe: Recipe::moco_v2 },
    BuiltIn { name: "moco-v1", summary: "crop, grey, colour jitter, flip", recipe: Recipe::moco_v1 },
    BuiltIn { name: "simclr", summary: "as moco-v2 with strong jitter and crops from 8 %", recipe: Recipe::simclr },
    BuiltIn {
        name: "byol",
        summary: "two unlike views: blur always, or seldom with solarisation",
        recipe: Recipe::byol,
    },
    BuiltIn { name: "dino", summary: "two views as byol, and 8 small ones of 96 pixels", recipe: Recipe::dino },
    BuiltIn { name: "swav", summary: "two views, and 6 small ones of 96 pixels", recipe: Recipe::swav },
    BuiltIn { name: "linear-train", summary: "crop and flip, for training a classifier", recipe: Recipe::linear_train },
    BuiltIn { name: "eval-center", summary: "the centre crop for evaluation", recipe: Recipe::eval_center },
];

/// The names of all built-in recipes, as words of a list: `moco-v2, moco-v1, ...`.
pub fn names() -> String {
    BUILT_IN.map(|built_in| built_in.name).join(", ")
}

/// The standard deviations that all methods blur with, in pixels.
const SIGMA: [f64; 2] = [0.1, 2.0];

fn random_crop(low: f64, high: f64, interpolation: Interpolation) -> ViewRecipe {
    let crop = Crop::RandomResized { scale: [low, high], ratio: default_ratio(), interpolation };
    ViewRecipe { flip: Some(Chance { probability: 0.5 }), ..ViewRecipe::bare(crop) }
}

fn jitter(probability: f64, [brightness, contrast, saturation, hue]: [f64; 4]) -> ColorJitter {
    ColorJitter { probability, brightness, contrast, saturation, hue }
}

fn grey(before_jitter: bool) -> Grayscale {
    Grayscale { probability: 0.2, before_jitter }
}

fn blur(probability: f64) -> GaussianBlur {
    GaussianBlur { probability, sigma: SIGMA }
}

/// A view of BYOL: the colours are those of all its views, blur and solarisation tell them apart.
fn byol_view(crop: ViewRecipe, blurred: f64, solarized: f64) -> ViewRecipe {
    ViewRecipe {
        color_jitter: Some(jitter(0.8, [0.4, 0.4, 0.2, 0.1])),
        grayscale: Some(grey(false)),
        gaussian_blur: Some(blur(blurred)),
        solarize: (solarized > 0.0).then_some(Solarize { probability: solarized, threshold: 128 }),
        ..crop
    }
}

/// A view of SimCLR at strength 1, whose colours SwAV takes over.
fn simclr_view(crop: ViewRecipe) -> ViewRecipe {
    ViewRecipe {
        color_jitter: Some(jitter(0.8, [0.8, 0.8, 0.8, 0.2])),
        grayscale: Some(grey(false)),
        gaussian_blur: Some(blur(0.5)),
        ..crop
    }
}

impl Recipe {
    /// Views for contrastive training.
    ///
    /// # Source
    /// MoCo v2, arXiv 2003.04297, section 3; official `main_moco.py` with `--aug-plus`, which DisCo takes over.
    pub fn moco_v2() -> Self {
        Self::alike(
            "moco-v2",
            ViewRecipe {
                color_jitter: Some(jitter(0.8, [0.4, 0.4, 0.4, 0.1])),
                grayscale: Some(grey(false)),
                gaussian_blur: Some(blur(0.5)),
                ..random_crop(0.2, 1.0, Interpolation::Bilinear)
            },
        )
    }

    /// Views of the first MoCo: grey comes before the jitter, which is never left out.
    ///
    /// # Source
    /// MoCo, arXiv 1911.05722, section 3.3; official `main_moco.py` without `--aug-plus`.
    pub fn moco_v1() -> Self {
        Self::alike(
            "moco-v1",
            ViewRecipe {
                color_jitter: Some(jitter(1.0, [0.4, 0.4, 0.4, 0.4])),
                grayscale: Some(grey(true)),
                ..random_crop(0.2, 1.0, Interpolation::Bilinear)
            },
        )
    }

    /// Views of SimCLR at colour strength 1.
    ///
    /// # Source
    /// SimCLR, arXiv 2002.05709, appendix A; official `data_util.py` (google-research/simclr).
    ///
    /// # Deviation
    /// The official code is TensorFlow's: its bicubic resize is not antialiased, its colours are floats, and its blur is a convolution
    /// with a kernel of a tenth of the size. Here all steps are Pillow's, as in the ports to PyTorch.
    pub fn simclr() -> Self {
        Self::alike("simclr", simclr_view(random_crop(0.08, 1.0, Interpolation::Bicubic)))
    }

    /// Views of BYOL: even ones are always blurred, odd ones seldom, but some of them are solarised.
    ///
    /// # Source
    /// BYOL, arXiv 2006.07733, appendix B and table 6.
    ///
    /// # Deviation
    /// The official code is JAX's, with colours in floats and a blur by convolution. Here all steps are Pillow's, as in the official
    /// code of DINO, which took these views over.
    pub fn byol() -> Self {
        let crop = random_crop(0.08, 1.0, Interpolation::Bicubic);
        let global = vec![byol_view(crop.clone(), 1.0, 0.0), byol_view(crop, 0.1, 0.2)];
        Self { name: "byol".into(), pass_order: PassOrder::default(), global, local: None }
    }

    /// Views of DINO: two global ones as in BYOL, and eight local ones.
    ///
    /// # Source
    /// DINO, arXiv 2104.14294; official `main_dino.py`, `DataAugmentationDINO` at its defaults.
    pub fn dino() -> Self {
        let crop = random_crop(0.4, 1.0, Interpolation::Bicubic);
        let local = byol_view(random_crop(0.05, 0.4, Interpolation::Bicubic), 0.5, 0.0);
        Self {
            name: "dino".into(),
            pass_order: PassOrder::default(),
            global: vec![byol_view(crop.clone(), 1.0, 0.0), byol_view(crop, 0.1, 0.2)],
            local: Some(LocalViews { size: 96, view: vec![local; 8] }),
        }
    }

    /// Views of SwAV: two global and six local ones, in the colours of SimCLR.
    ///
    /// # Source
    /// SwAV, arXiv 2006.09882; official `src/multicropdataset.py` with the crops of `main_swav.py`'s defaults, 2 x 224 + 6 x 96.
    ///
    /// # Deviation
    /// The blur is Pillow's (`PILRandomGaussianBlur`), as in the official code today; its first version used OpenCV's.
    pub fn swav() -> Self {
        let view = simclr_view(random_crop(0.14, 1.0, Interpolation::Bilinear));
        let local = simclr_view(random_crop(0.05, 0.14, Interpolation::Bilinear));
        Self {
            name: "swav".into(),
            pass_order: PassOrder::default(),
            global: vec![view; 2],
            local: Some(LocalViews { size: 96, view: vec![local; 6] }),
        }
    }

    /// Views for training a linear probe: a random resized crop and a flip.
    pub fn linear_train() -> Self {
        Self::alike("linear-train", random_crop(0.08, 1.0, Interpolation::Bilinear))
    }

    /// The view for evaluation: the short side resized to 256/224 of the size, then the centre.
    pub fn eval_center() -> Self {
        let crop = Crop::Center { fraction: 0.875, interpolation: Interpolation::Bilinear };
        Self::alike("eval-center", ViewRecipe::bare(crop))
    }

    fn alike(name: &str, view: ViewRecipe) -> Self {
        Self { name: name.into(), pass_order: PassOrder::default(), global: vec![view], local: None }
    }
}
