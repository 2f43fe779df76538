//! The augmentations against torchvision + Pillow: no byte may differ, at any instruction set of this machine.
//! `tests/golden/transforms.py` made the values and says with which versions.

#[path = "support/checksum.rs"]
mod checksum;

use std::collections::BTreeMap;
use std::path::Path;

use checksum::crc32;
use serde::Deserialize;
use shared::transforms::color_jitter::{JitterStep, apply_step};
use shared::transforms::gaussian_blur::{self, BlurScratch};
use shared::transforms::normalize::Normalization;
use shared::transforms::{
    Level, PassOrder, Planes, Recipe, RgbImage, Scratch, View as Which, ViewParams, ViewRecipe, built_in, decode,
    grayscale, solarize,
};

#[derive(Deserialize)]
struct Golden {
    made_with: String,
    recipes: BTreeMap<String, Recipe>,
    pictures: Vec<(u64, usize, usize, String)>,
    photos: Vec<(u64, String, String)>,
    views: Vec<View>,
    steps: Vec<(u64, String, f32, String)>,
    colors: Vec<(String, f32, String)>,
}

#[derive(Deserialize)]
struct View {
    picture: u64,
    recipe: String,
    view: (Kind, usize),
    order: PassOrder,
    size: usize,
    row: [f32; 18],
    checks: Vec<(String, String)>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Global,
    Local,
}

impl View {
    fn which(&self) -> Which {
        match self.view.0 {
            Kind::Global => Which::Global(self.view.1),
            Kind::Local => Which::Local(self.view.1),
        }
    }
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../tests/golden/transforms.json")).expect("the golden file is JSON")
}

/// The formula of `picture` in the script.
fn picture(seed: u64, height: usize, width: usize) -> RgbImage {
    let (rows, columns) = (height as u64, width as u64);
    let spread = if seed.is_multiple_of(2) { 41 } else { 301 };
    let byte = |i: u64| {
        let (y, x, c) = (i / 3 / columns, i / 3 % columns, i % 3);
        let mut n = i + seed * 1_000_003;
        n = ((n ^ (n >> 15)) * 0x2c1b_3c6d) & 0xffff_ffff;
        n = ((n ^ (n >> 12)) * 0x297a_2d39) & 0xffff_ffff;
        n ^= n >> 15;
        let ramp = [x * 255 / columns, y * 255 / rows, (x + y) * 255 / (rows + columns)][c as usize];
        (ramp as i64 + (n % spread) as i64 - spread as i64 / 2).clamp(0, 255) as u8
    };
    RgbImage::new(height, width, (0..rows * columns * 3).map(byte).collect()).expect("sizes agree")
}

fn photo(name: &str) -> RgbImage {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/photos");
    decode::read(&folder.join(name)).expect("a golden photo")
}

fn pictures(golden: &Golden) -> BTreeMap<u64, RgbImage> {
    let made = golden.pictures.iter().map(|(seed, h, w, _)| (*seed, picture(*seed, *h, *w)));
    made.chain(golden.photos.iter().map(|(number, name, _)| (*number, photo(name)))).collect()
}

#[test]
fn pictures_are_those_of_the_script() {
    let golden = golden();
    let pictures = pictures(&golden);
    let made = golden.pictures.iter().map(|(seed, _, _, crc)| (seed, crc));
    for (number, crc) in made.chain(golden.photos.iter().map(|(number, _, crc)| (number, crc))) {
        assert_eq!(&crc32(pictures[number].pixels().iter().copied()), crc, "picture {number}");
    }
}

/// The steps of the view cut down to those up to `last`, and its parameters.
fn cut(view: &View, steps: &ViewRecipe, params: &ViewParams, last: &str) -> (ViewRecipe, ViewParams) {
    let (mut steps, mut params) = (steps.clone(), *params);
    let names: Vec<&str> = view.checks.iter().map(|(name, _)| name.as_str()).collect();
    let reached = |name: &str| {
        let position = |name| names.iter().position(|n| *n == name).unwrap_or(usize::MAX);
        position(name) <= position(last)
    };
    if let Some(jitter) = &mut steps.color_jitter {
        for (name, strength) in [
            ("brightness", &mut jitter.brightness),
            ("contrast", &mut jitter.contrast),
            ("saturation", &mut jitter.saturation),
            ("hue", &mut jitter.hue),
        ] {
            *strength = if reached(name) { *strength } else { 0.0 };
        }
    }
    params.grayscale &= reached("grayscale");
    params.blur_sigma = params.blur_sigma.filter(|_| reached("blur"));
    params.solarize_threshold = params.solarize_threshold.filter(|_| reached("solarize"));
    (steps, params)
}

fn recipe_of(golden: &Golden, view: &View) -> Recipe {
    let custom = golden.recipes.get(&view.recipe).cloned();
    Recipe {
        pass_order: view.order,
        ..custom.unwrap_or_else(|| Recipe::named_or_file(&view.recipe).expect("a built-in recipe"))
    }
}

#[test]
fn views_have_the_bytes_of_torchvision_and_pillow() {
    let golden = golden();
    assert!(golden.made_with.contains("Pillow 13.0.0"), "{}", golden.made_with);
    let pictures = pictures(&golden);
    let (mut checked, mut reordered) = (0, 0);
    for level in Level::available() {
        let mut scratch = Scratch::new(level);
        for view in &golden.views {
            let image = &pictures[&view.picture];
            let recipe = recipe_of(&golden, view);
            let params = ViewParams::from_row(&view.row).expect("a row");
            assert_eq!(params.to_row(), view.row);
            reordered += usize::from(view.order.vertical_first(params.crop, (view.size, view.size)));
            let mut out = vec![0; view.size * view.size * 3];
            for (name, crc) in &view.checks {
                let found = if name == "normalize" {
                    let mut values = vec![0.0; out.len()];
                    Normalization::Imagenet.write(&out, &mut values);
                    crc32(values.iter().flat_map(|value| value.to_le_bytes()))
                } else {
                    let (steps, params) = cut(view, recipe.view(view.which()), &params, name);
                    steps.apply(image, &params, view.order, view.size, &mut scratch, &mut out).expect("a view");
                    crc32(out.iter().copied())
                };
                let which = (view.picture, &view.recipe, view.which());
                assert_eq!(&found, crc, "{} {name} of {which:?} {params:?}", level.name());
                checked += 1;
            }
            // the last picture is that of the whole recipe
            let mut whole = vec![1; out.len()];
            recipe.apply(view.which(), image, &params, view.size, &mut scratch, &mut whole).expect("a view");
            assert!(whole == out, "{:?}", view.which());
        }
    }
    println!("{checked} steps at {:?}, {reordered} vertical first", Level::available());
    assert!(checked >= 2000 && reordered >= 60, "{checked} {reordered}");
}

#[test]
fn golden_views_cover_every_step_of_every_recipe_in_both_pass_orders() {
    let golden = golden();
    let mut all: Vec<Recipe> = built_in::BUILT_IN.iter().map(|built_in| (built_in.recipe)()).collect();
    all.extend(golden.recipes.values().cloned());
    for recipe in all {
        let kinds = [(Some(&recipe.global), 0), (recipe.local.as_ref().map(|local| &local.view), 1)];
        for (views, kind) in kinds.into_iter().filter_map(|(views, kind)| views.map(|views| (views, kind))) {
            for order in [PassOrder::Pillow13, PassOrder::Horizontal] {
                for (number, steps) in views.iter().enumerate() {
                    // views made alike need to be seen but once
                    let first = views.iter().position(|other| other == steps).expect("itself");
                    let seen: Vec<&str> = golden
                        .views
                        .iter()
                        .filter(|view| view.recipe == recipe.name && view.order == order)
                        .filter(|view| (view.view.0 as usize, view.view.1) == (kind, first))
                        .flat_map(|view| view.checks.iter().map(|(name, _)| name.as_str()))
                        .collect();
                    for (name, expected) in [
                        ("resize", true),
                        ("brightness", steps.color_jitter.is_some()),
                        ("contrast", steps.color_jitter.is_some()),
                        ("saturation", steps.color_jitter.is_some()),
                        ("hue", steps.color_jitter.is_some()),
                        ("grayscale", steps.grayscale.is_some()),
                        ("blur", steps.gaussian_blur.is_some()),
                        ("solarize", steps.solarize.is_some()),
                        ("normalize", true),
                    ] {
                        assert_eq!(seen.contains(&name), expected, "{} {kind} {number} {order:?} {name}", recipe.name);
                    }
                }
            }
        }
    }
}

fn apply(level: Level, planes: &mut Planes, name: &str, value: f32) {
    match name {
        "brightness" => apply_step(level, planes, JitterStep::Brightness, value),
        "contrast" => apply_step(level, planes, JitterStep::Contrast, value),
        "saturation" => apply_step(level, planes, JitterStep::Saturation, value),
        "hue" => apply_step(level, planes, JitterStep::Hue, value),
        "blur" => gaussian_blur::apply(level, planes, value, &mut BlurScratch::default()),
        "solarize" => solarize::apply(level, planes, value as u8),
        _ => grayscale::apply(level, planes),
    }
}

#[test]
fn every_color_has_the_bytes_of_pillow() {
    let pixels = (0..1u32 << 24).flat_map(|n| [(n >> 16) as u8, (n >> 8) as u8, n as u8]).collect();
    let all = Planes::from_rgb(&RgbImage::new(4096, 4096, pixels).expect("sizes agree"));
    let (mut plain, mut planes) = (Planes::default(), Planes::default());
    let mut out = vec![0; 3 << 24];
    for (name, value, crc) in golden().colors {
        plain.clone_from(&all);
        apply(Level::SCALAR, &mut plain, &name, value);
        plain.write_rgb(Level::SCALAR, &mut out);
        assert_eq!(crc32(out.iter().copied()), crc, "{name} {value}");
        for level in &Level::available()[1..] {
            planes.clone_from(&all);
            apply(*level, &mut planes, &name, value);
            assert!(planes == plain, "{}: {name} {value}", level.name());
        }
    }
}

#[test]
fn single_steps_have_the_bytes_of_pillow_beyond_the_recipes_ranges() {
    let golden = golden();
    let pictures = pictures(&golden);
    for level in Level::available() {
        for (seed, name, value, crc) in &golden.steps {
            let image = &pictures[seed];
            let mut planes = Planes::from_rgb(image);
            apply(level, &mut planes, name, *value);
            let mut out = vec![0; image.pixels().len()];
            planes.write_rgb(level, &mut out);
            assert_eq!(&crc32(out), crc, "{}: {name} {value} of picture {seed}", level.name());
        }
    }
}

#[test]
fn huge_aspects_cost_only_the_window() {
    // torchvision would resize 3 x 10000 pixels to 256 x 853333 first
    let image = picture(6, 10_000, 3);
    for recipe in golden().recipes.into_values().chain([Recipe::eval_center()]) {
        let params = recipe.draw(0, 0, Which::Global(0), 10_000, 3);
        let mut out = vec![0; 224 * 224 * 3];
        recipe.apply(Which::Global(0), &image, &params, 224, &mut Scratch::default(), &mut out).expect("a view");
        assert_eq!(ViewParams::from_row(&params.to_row()), Ok(params));
    }
}
