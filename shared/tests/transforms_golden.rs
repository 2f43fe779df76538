//! The augmentations against torchvision + Pillow: no byte may differ, at any instruction set of this machine.
//! `tests/golden/transforms.py` made the values and says with which versions.

use serde::Deserialize;
use shared::transforms::color_jitter::{JitterStep, apply_step};
use shared::transforms::gaussian_blur::{self, BlurScratch};
use shared::transforms::normalize::Normalization;
use shared::transforms::{
    Level, PassOrder, Planes, Recipe, RgbImage, Scratch, View as Which, ViewParams, grayscale, solarize,
};

#[derive(Deserialize)]
struct Golden {
    made_with: String,
    pictures: Vec<(u64, usize, usize, String)>,
    views: Vec<View>,
    steps: Vec<(u64, String, f32, String)>,
}

#[derive(Deserialize)]
struct View {
    picture: u64,
    recipe: String,
    order: PassOrder,
    size: usize,
    row: [f32; 18],
    checks: Vec<(String, String)>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../tests/golden/transforms.json")).expect("the golden file is JSON")
}

fn crc32(bytes: impl IntoIterator<Item = u8>) -> String {
    let crc = !bytes.into_iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| (c >> 1) ^ (0xedb8_8320 & (c & 1).wrapping_neg()))
    });
    format!("{crc:08x}")
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

fn pictures(golden: &Golden) -> impl Fn(u64) -> RgbImage {
    let made: Vec<(u64, RgbImage)> =
        golden.pictures.iter().map(|(seed, h, w, _)| (*seed, picture(*seed, *h, *w))).collect();
    move |seed| made.iter().find(|(s, _)| *s == seed).map(|(_, image)| image.clone()).expect("a picture of the file")
}

#[test]
fn pictures_are_those_of_the_script() {
    for (seed, height, width, crc) in golden().pictures {
        assert_eq!(crc32(picture(seed, height, width).pixels().iter().copied()), crc, "picture {seed}");
    }
}

/// The recipe cut down to the first `steps` of the view's steps, and its parameters.
fn cut(view: &View, recipe: &Recipe, params: &ViewParams, last: &str) -> (Recipe, ViewParams) {
    let (mut recipe, mut params) = (recipe.clone(), *params);
    let names: Vec<&str> = view.checks.iter().map(|(name, _)| name.as_str()).collect();
    let reached = |name: &str| {
        let position = |name| names.iter().position(|n| *n == name).unwrap_or(usize::MAX);
        position(name) <= position(last)
    };
    if let Some(jitter) = &mut recipe.global[0].color_jitter {
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
    (recipe, params)
}

#[test]
fn views_have_the_bytes_of_torchvision_and_pillow() {
    let golden = golden();
    assert!(golden.made_with.contains("Pillow 13.0.0"), "{}", golden.made_with);
    let image = pictures(&golden);
    let (mut checked, mut reordered) = (0, 0);
    for level in Level::available() {
        let mut scratch = Scratch::new(level);
        for view in &golden.views {
            let image = image(view.picture);
            let recipe =
                Recipe { pass_order: view.order, ..Recipe::named_or_file(&view.recipe).expect("a built-in recipe") };
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
                    let (recipe, params) = cut(view, &recipe, &params, name);
                    recipe.apply(Which::Global(0), &image, &params, view.size, &mut scratch, &mut out).expect("a view");
                    crc32(out.iter().copied())
                };
                assert_eq!(&found, crc, "{} {}: {name} of {} {params:?}", level.name(), view.picture, view.recipe);
                checked += 1;
            }
        }
    }
    println!("{checked} steps at {:?}, {reordered} vertical first", Level::available());
    assert!(checked >= 600 && reordered >= 20, "{checked} {reordered}");
}

#[test]
fn single_steps_have_the_bytes_of_pillow_beyond_the_recipes_ranges() {
    let golden = golden();
    let image = pictures(&golden);
    for level in Level::available() {
        for (seed, name, value, crc) in &golden.steps {
            let image = image(*seed);
            let mut planes = Planes::from_rgb(&image);
            match name.as_str() {
                "brightness" => apply_step(level, &mut planes, JitterStep::Brightness, *value),
                "contrast" => apply_step(level, &mut planes, JitterStep::Contrast, *value),
                "saturation" => apply_step(level, &mut planes, JitterStep::Saturation, *value),
                "hue" => apply_step(level, &mut planes, JitterStep::Hue, *value),
                "blur" => gaussian_blur::apply(level, &mut planes, *value, &mut BlurScratch::default()),
                "solarize" => solarize::apply(level, &mut planes, *value as u8),
                _ => grayscale::apply(level, &mut planes),
            }
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
    let recipe = Recipe::eval_center();
    let params = recipe.draw(0, 0, Which::Global(0), 10_000, 3);
    let mut out = vec![0; 224 * 224 * 3];
    recipe.apply(Which::Global(0), &image, &params, 224, &mut Scratch::default(), &mut out).expect("a view");
    assert_eq!(ViewParams::from_row(&params.to_row()), Ok(params));
}
