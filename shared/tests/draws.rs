//! What is random about every view of every built-in recipe, against torchvision's draws in distribution.
//! `tests/golden/draws.py` made the quantiles.

use std::collections::BTreeMap;

use serde::Deserialize;
use shared::rng::KeyedRng;
use shared::transforms::built_in::BUILT_IN;
use shared::transforms::recipe::Crop;
use shared::transforms::{Recipe, View, ViewParams, ViewRecipe, crop};

const DRAWS: usize = 20_000;
const SIZES: [(usize, usize); 3] = [(333, 500), (32, 32), (160, 456)];

#[derive(Deserialize)]
struct Golden {
    whole: BTreeMap<String, Vec<i64>>,
    real: BTreeMap<String, Vec<i64>>,
    chance: BTreeMap<String, f64>,
}

impl Golden {
    fn read() -> Self {
        serde_json::from_str(include_str!("../../tests/golden/draws.json")).expect("the golden file is JSON")
    }

    /// The quantiles of a quantity, rising.
    fn quantiles(&self, name: &str) -> Vec<f64> {
        let (steps, unit) = match (self.whole.get(name), self.real.get(name)) {
            (Some(steps), _) => (steps, 1.0),
            (None, Some(steps)) => (steps, 1e-4),
            _ => panic!("no golden draws of {name}"),
        };
        let sums = steps.iter().scan(0, |sum, step| {
            *sum += step;
            Some(*sum)
        });
        sums.map(|value| value as f64 * unit).collect()
    }
}

/// Largest distance between the distributions of two rising samples (Kolmogorov and Smirnov).
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let share = |sample: &[f64], x: f64| sample.partition_point(|value| *value <= x) as f64 / sample.len() as f64;
    a.iter().chain(b).map(|&x| (share(a, x) - share(b, x)).abs()).fold(0.0, f64::max)
}

/// What two samples of one distribution stay below: `n` draws of ours and 400,000 of torchvision's.
///
/// About 270 comparisons are made; each is wrong with a probability of 4e-6, so all together with one of 0.001. The 513 quantiles are
/// within 1/512 of the distribution of the draws that they stand for; rounding real ones to 0.0001 adds 0.0003 at the most.
fn threshold(n: usize) -> f64 {
    let each: f64 = 4e-6;
    ((2.0 / each).ln() / 2.0).sqrt() * (1.0 / n as f64 + 1.0 / 400_000.0).sqrt() + 1.0 / 512.0 + 0.0003
}

/// Distance of drawn values from those of torchvision, as a share of the threshold: above 1, they are different.
fn deviation(golden: &Golden, name: &str, mut values: Vec<f64>) -> f64 {
    assert!(values.len() >= 1500, "only {} draws of {name}", values.len());
    values.sort_by(f64::total_cmp);
    distance(&golden.quantiles(name), &values) / threshold(values.len())
}

/// Every quantity of one kind of view: its deviations by name.
fn deviations(
    golden: &Golden,
    draw: &dyn Fn(u64, (usize, usize)) -> ViewParams,
    steps: &ViewRecipe,
) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    for size in SIZES {
        let drawn: Vec<ViewParams> = (0..DRAWS as u64).map(|sample| draw(sample, size)).collect();
        if let Crop::RandomResized { scale, .. } = steps.crop {
            found.extend(crop_deviations(golden, scale, size, &drawn));
        }
        if size != SIZES[0] {
            continue;
        }
        let mut chance = |name: &str, probability: f64, happened: &dyn Fn(&ViewParams) -> bool| {
            let share = drawn.iter().filter(|params| happened(params)).count() as f64 / DRAWS as f64;
            let name = format!("{name} {probability}");
            // two values only: the distance of the distributions is that of the shares
            let limit = threshold(DRAWS) - 1.0 / 512.0;
            found.push((name.clone(), (share - golden.chance[&name]).abs() / limit));
        };
        if let Some(jitter) = steps.color_jitter {
            chance("jitter", jitter.probability, &|params| params.jitter.is_some());
        }
        if let Some(grey) = steps.grayscale {
            chance("grayscale", grey.probability, &|params| params.grayscale);
        }
        if let Some(blur) = steps.gaussian_blur {
            chance("blur", blur.probability, &|params| params.blur_sigma.is_some());
        }
        if let Some(solarize) = steps.solarize {
            chance("solarize", solarize.probability, &|params| params.solarize_threshold == Some(128));
        }
        if let Some(flip) = steps.flip {
            chance("flip", flip.probability, &|params| params.flip);
        }
        if let Some(jitter) = steps.color_jitter {
            let jitters: Vec<_> = drawn.iter().filter_map(|params| params.jitter).collect();
            let strengths = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue];
            for (i, strength) in strengths.into_iter().enumerate() {
                let name = format!("{} {strength}", if i == 3 { "hue" } else { "factor" });
                let values = jitters.iter().map(|jitter| f64::from(jitter.factors[i])).collect();
                found.push((name.clone(), deviation(golden, &name, values)));
            }
            let number = |order: [usize; 4]| (64 * order[0] + 16 * order[1] + 4 * order[2] + order[3]) as f64;
            let orders = jitters.iter().map(|jitter| number(jitter.order.map(|step| step as usize))).collect();
            found.push(("order".into(), deviation(golden, "order", orders)));
        }
        if steps.gaussian_blur.is_some() {
            let sigmas = drawn.iter().filter_map(|params| params.blur_sigma.map(f64::from)).collect();
            found.push(("sigma".into(), deviation(golden, "sigma 0.1-2", sigmas)));
        }
    }
    found
}

fn crop_deviations(
    golden: &Golden,
    [low, high]: [f64; 2],
    (rows, columns): (usize, usize),
    drawn: &[ViewParams],
) -> Vec<(String, f64)> {
    type Value = fn(&ViewParams) -> usize;
    let quantities: [(&str, Value); 5] = [
        ("top", |params| params.crop.top),
        ("left", |params| params.crop.left),
        ("height", |params| params.crop.height),
        ("width", |params| params.crop.width),
        ("area", |params| params.crop.height * params.crop.width * 1000 / (params.source.0 * params.source.1)),
    ];
    let compare = |(what, value): (&str, Value)| {
        let name = format!("{what} {low}-{high} {rows}x{columns}");
        let values = drawn.iter().map(|params| value(params) as f64).collect();
        (name.clone(), deviation(golden, &name, values))
    };
    quantities.into_iter().map(compare).collect()
}

/// All views of a recipe that differ from one another, with their steps.
fn kinds(recipe: &Recipe) -> Vec<View> {
    let mut views: Vec<View> = (0..recipe.global.len()).map(View::Global).collect();
    views.extend((0..recipe.local_views(recipe.global.len())).map(View::Local));
    let mut seen: Vec<&ViewRecipe> = Vec::new();
    views.retain(|view| {
        let steps = recipe.view(*view);
        let new = !seen.contains(&steps);
        seen.push(steps);
        new
    });
    views
}

#[test]
fn every_quantity_of_every_recipe_is_distributed_as_torchvision_draws_it() {
    let golden = Golden::read();
    let (mut compared, mut largest) = (0, 0.0f64);
    for recipe in BUILT_IN.map(|built_in| (built_in.recipe)()) {
        for view in kinds(&recipe) {
            let draw = |sample, (height, width)| recipe.draw(1, sample, view, height, width);
            for (name, deviation) in deviations(&golden, &draw, recipe.view(view)) {
                assert!(deviation <= 1.0, "{} {view:?} {name}: {deviation:.2} of the threshold", recipe.name);
                largest = largest.max(deviation);
                compared += 1;
            }
        }
    }
    println!("{compared} quantities, the largest deviation is {largest:.2} of the threshold");
    assert!((240..=290).contains(&compared), "{compared}: the threshold counts on about 270");
}

#[test]
fn wrong_distributions_are_found_out() {
    let golden = Golden::read();
    let recipe = Recipe::moco_v2();
    let steps = &recipe.global[0];
    let right = |sample, (height, width)| recipe.draw(1, sample, View::Global(0), height, width);
    let rng = |sample| KeyedRng::new("wrong", 0, &[sample]);
    type Wrong<'a> = (&'a str, Box<dyn Fn(u64, (usize, usize)) -> ViewParams + 'a>);
    let wrong: Vec<Wrong<'_>> = vec![
        // the side, not the area, is uniform
        (
            "area 0.2-1 333x500",
            Box::new(|sample, (height, width)| {
                let mut params = right(sample, (height, width));
                let side = rng(sample).uniform_f32(0.2f32.sqrt(), 1.0);
                params.crop = crop::draw(&mut rng(sample + 1), height, width, [side * side; 2], [0.75, 4.0 / 3.0]);
                params
            }),
        ),
        // a crop below the limit of the area
        (
            "height 0.2-1 333x500",
            Box::new(|sample, (height, width)| {
                let crop = crop::draw(&mut rng(sample), height, width, [0.08, 1.0], [0.75, 4.0 / 3.0]);
                ViewParams { crop, ..right(sample, (height, width)) }
            }),
        ),
        // aspects beyond the range
        (
            "width 0.2-1 160x456",
            Box::new(|sample, (height, width)| {
                let crop = crop::draw(&mut rng(sample), height, width, [0.2, 1.0], [0.5, 2.0]);
                ViewParams { crop, ..right(sample, (height, width)) }
            }),
        ),
        // the crop always lies at the left edge of where it could
        (
            "left 0.2-1 32x32",
            Box::new(|sample, size| {
                let mut params = right(sample, size);
                params.crop.left /= 2;
                params
            }),
        ),
        (
            "factor 0.4",
            Box::new(|sample, size| {
                let mut params = right(sample, size);
                if let Some(jitter) = &mut params.jitter {
                    jitter.factors[1] = (jitter.factors[1] - 1.0) * 1.1 + 1.0;
                }
                params
            }),
        ),
        (
            "hue 0.1",
            Box::new(|sample, size| {
                let mut params = right(sample, size);
                if let Some(jitter) = &mut params.jitter {
                    jitter.factors[3] = jitter.factors[3].abs();
                }
                params
            }),
        ),
        // two steps always in one order
        (
            "order",
            Box::new(|sample, size| {
                let mut params = right(sample, size);
                if let Some(jitter) = &mut params.jitter {
                    jitter.order[..2].sort_by_key(|step| *step as u8);
                }
                params
            }),
        ),
        (
            "sigma",
            Box::new(|sample, size| {
                let mut params = right(sample, size);
                let sigma = 0.1 * 20.0f32.powf(rng(sample).unit_f32());
                params.blur_sigma = params.blur_sigma.map(|_| sigma);
                params
            }),
        ),
        (
            "flip 0.5",
            Box::new(|sample, size| ViewParams { flip: rng(sample).unit_f32() < 0.53, ..right(sample, size) }),
        ),
    ];
    for (quantity, draw) in wrong {
        let found = deviations(&golden, &*draw, steps);
        let deviation = found.iter().filter(|(name, _)| name == quantity).map(|(_, d)| *d).fold(0.0, f64::max);
        assert!(deviation > 1.0, "{quantity}: a wrong distribution reaches only {deviation:.2} of the threshold");
    }
}
