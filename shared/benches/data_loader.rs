//! Batches of 128 views of 224 x 224 from every layout of a shard set, and a plain copy of as many numbers to compare with.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use shared::data_loader::normalized_batch;
use shared::manifest::{Identity, Manifest, Stage};
use shared::rng::KeyedRng;
use shared::shard::{
    Codec, DEFAULT_QUALITY, PackingOrder, Pieces, SampleViews, ShardConfig, ShardSet, ShardWriter, Store, StoredJpeg,
    VIEW_PARAMETERS, encode_jpeg, shard_file_name,
};
use shared::transforms::decode::DECODER;
use shared::transforms::normalize::Normalization;
use shared::transforms::{Level, Recipe};

const SAMPLES: usize = 128;
const SIZE: usize = 224;
const SOURCE: (usize, usize) = (256, 341);

/// A picture of its own for every sample, as smooth as photographs.
fn photo(sample: usize, (height, width): (usize, usize)) -> Vec<u8> {
    let mut rng = KeyedRng::new("bench", 0, &[sample as u64]);
    let value = |i: usize| (i / 3 / width) / 2 + (i / 3 % width) / 3 + 40 * (i % 3) + sample;
    (0..height * width * 3).map(|i| (value(i) % 230 + rng.below(10)) as u8).collect()
}

fn write_set(directory: &Path, store: Store, codec: Codec) -> shared::Result<ShardSet> {
    let config = ShardConfig {
        recipe: Recipe::moco_v2(),
        views: 1,
        size: SIZE,
        store,
        codec,
        order: PackingOrder::Random,
        shard_samples: SAMPLES,
        decoder: DECODER.into(),
        short_side: (store == Store::Source).then_some(SOURCE.0),
        jpeg: (codec == Codec::Jpeg).then(|| StoredJpeg::new(DEFAULT_QUALITY)),
    };
    let details = config.details(Vec::new());
    let mut writer = ShardWriter::with_layout(directory.join(shard_file_name(0)), SAMPLES, &details)?;
    for sample in 0..SAMPLES {
        let size = if store == Store::Source { SOURCE } else { (SIZE, SIZE) };
        let pixels = photo(sample, size);
        let mut stored = SampleViews::default();
        match codec {
            Codec::Raw => stored.global.bytes = pixels,
            Codec::Jpeg => encode_jpeg(&pixels, size, DEFAULT_QUALITY, &mut stored.global.bytes)?,
        }
        stored.global = Pieces { lengths: vec![stored.global.bytes.len()], ..stored.global };
        if store == Store::Source {
            stored.source_size = [size.0 as u32, size.1 as u32];
        } else {
            stored.global.params = vec![0.0; VIEW_PARAMETERS.len()];
        }
        writer.push_sample(sample as u64, -1, &stored)?;
    }
    let identity = Identity::new(Stage::DataPrep, &config, 0, Vec::new())?;
    let counts = BTreeMap::from([("samples".to_string(), SAMPLES as u64)]);
    Manifest::new(identity, counts, serde_json::json!(details), vec![writer.finish()?]).write(directory)?;
    ShardSet::open(directory)
}

fn normalizing(criterion: &mut Criterion) {
    // Far more than any cache: what counts is memory.
    let values = SAMPLES * SIZE * SIZE * 3;
    let (bytes, copied, mut out) = (vec![77u8; values], vec![0.5f32; values], vec![0f32; values]);
    let mut group = criterion.benchmark_group("numbers_of_128_views_of_224_into_place");
    group.throughput(Throughput::Bytes(values as u64 * 4));
    group.bench_function("plain_copy", |b| b.iter(|| out.copy_from_slice(black_box(&copied))));
    for level in Level::available() {
        group.bench_function(BenchmarkId::new("normalize", level.name()), |b| {
            b.iter(|| Normalization::Imagenet.write_at(level, black_box(&bytes), &mut out));
        });
    }
    group.finish();
}

fn batches(criterion: &mut Criterion) {
    let values = SAMPLES * SIZE * SIZE * 3;
    let copied = Arc::new(vec![0.5f32; values]);
    let rows: Vec<(usize, usize)> = (0..SAMPLES).map(|sample| (sample, 0)).collect();
    let mut group = criterion.benchmark_group("batch_of_128_views_of_224");
    group.sample_size(20);
    group.throughput(Throughput::Elements(SAMPLES as u64));
    group.bench_function("plain_copy", |b| b.iter(|| black_box(&copied).to_vec()));
    for (name, store, codec) in [
        ("views_raw", Store::Views, Codec::Raw),
        ("views_jpeg", Store::Views, Codec::Jpeg),
        ("source_raw", Store::Source, Codec::Raw),
        ("source_jpeg", Store::Source, Codec::Jpeg),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let set = write_set(directory.path(), store, codec).expect("a shard set");
        group.bench_function(name, |b| {
            b.iter(|| normalized_batch(&set, &rows, Normalization::Imagenet).expect("a batch"));
        });
    }
    group.finish();
}

criterion_group!(benches, normalizing, batches);
criterion_main!(benches);
