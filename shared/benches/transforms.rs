//! Time to decode a 500 x 333 photo and to make two MoCo v2 views of it, at every instruction set of the machine, and the views of
//! the other recipes at the best.

use std::hint::black_box;
use std::io::Cursor;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use image::codecs::jpeg::JpegEncoder;
use shared::rng::KeyedRng;
use shared::transforms::built_in::BUILT_IN;
use shared::transforms::decode::decode;
use shared::transforms::normalize::Normalization;
use shared::transforms::{Level, Recipe, RgbImage, Scratch, View};

const SIZE: usize = 224;

fn photo() -> RgbImage {
    let mut rng = KeyedRng::new("bench", 0, &[]);
    let pixels = (0..333 * 500usize).flat_map(|i| {
        let (y, x) = (i / 500, i % 500);
        let grain = rng.below(24);
        [(x / 2 + grain) as u8, (y / 2 + grain + 40) as u8, ((x + y) / 4 + grain) as u8]
    });
    RgbImage::new(333, 500, pixels.collect()).expect("sizes agree")
}

fn transforms(criterion: &mut Criterion) {
    let photo = photo();
    let mut file = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut file, 85)
        .encode(photo.pixels(), 500, 333, image::ExtendedColorType::Rgb8)
        .expect("a picture can be encoded");
    let file = file.into_inner();
    criterion.bench_function("decode_jpeg_500x333", |b| b.iter(|| decode(black_box(&file))));

    let recipe = Recipe::moco_v2();
    let mut group = criterion.benchmark_group("two_moco_v2_views_500x333_to_224");
    group.throughput(Throughput::Elements(1));
    for level in Level::available() {
        let (mut scratch, mut out, mut sample) = (Scratch::new(level), vec![0; SIZE * SIZE * 3], 0);
        group.bench_function(level.name(), |b| {
            b.iter(|| {
                sample += 1;
                for view in 0..2 {
                    let params = recipe.draw(0, sample, View::Global(view), 333, 500);
                    recipe.apply(View::Global(view), &photo, &params, SIZE, &mut scratch, &mut out).expect("a view");
                }
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("all_views_of_500x333_to_224");
    for built_in in BUILT_IN {
        let recipe = (built_in.recipe)();
        let views: Vec<(View, usize)> = (0..2)
            .map(|view| (View::Global(view), SIZE))
            .chain((0..recipe.local_views(2)).map(|view| (View::Local(view), 96)))
            .collect();
        let (mut scratch, mut out, mut sample) = (Scratch::default(), vec![0; SIZE * SIZE * 3], 0);
        group.bench_function(built_in.name, |b| {
            b.iter(|| {
                sample += 1;
                for &(view, size) in &views {
                    let params = recipe.draw(0, sample, view, 333, 500);
                    let out = &mut out[..size * size * 3];
                    recipe.apply(view, &photo, &params, size, &mut scratch, out).expect("a view");
                }
            });
        });
    }
    group.finish();

    let (pixels, mut values) = (vec![77u8; SIZE * SIZE * 3], vec![0f32; SIZE * SIZE * 3]);
    criterion
        .bench_function("normalize_224", |b| b.iter(|| Normalization::Imagenet.write(black_box(&pixels), &mut values)));
}

criterion_group!(benches, transforms);
criterion_main!(benches);
