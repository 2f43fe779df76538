//! k-NN and one epoch of the linear probe on 20 000 training features of width 512.
//!
//! Sizes are in the names; `tests/timing/probes.py` times the same work against scikit-learn and PyTorch.
#![expect(clippy::unwrap_used, reason = "a benchmark may fail loudly")]

use shared::feature_rows::FeatureRows;
use shared::knn::{ViewChoice, nearest, vote};
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use eval::linear_probe::{ProbeConfig, train};

const TRAIN: usize = 20_000;
const VAL: usize = 5_000;
const WIDTH: usize = 512;

/// Noise with a signal in the columns that belong to the class.
fn features(count: usize, classes: usize, salt: u64) -> (Vec<f32>, Vec<i64>, Vec<u64>) {
    let mut rng = shared::rng::KeyedRng::new("bench", salt, &[]);
    let labels: Vec<i64> = (0..count).map(|i| i64::try_from(i % classes).unwrap()).collect();
    let data = (0..count * WIDTH)
        .map(|i| rng.unit_f32() - 0.5 + 0.2 * f32::from(i % WIDTH % classes == i / WIDTH % classes))
        .collect();
    (data, labels, (0..count as u64).collect())
}

fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("probes");
    group.sample_size(10);
    for classes in [100, 1000] {
        let (train_set, val_set) = (features(TRAIN, classes, 1), features(VAL, classes, 2));
        let train_rows = FeatureRows::new(vec![&train_set.0], 1, WIDTH, &train_set.1, &train_set.2).unwrap();
        let val_rows = FeatureRows::new(vec![&val_set.0], 1, WIDTH, &val_set.1, &val_set.2).unwrap();
        if classes == 100 {
            let (train_classes, val_classes) =
                (train_rows.class_indices("train", classes).unwrap(), val_rows.class_indices("val", classes).unwrap());
            group.throughput(Throughput::Elements(VAL as u64));
            group.bench_function("knn/20000x512/5000 queries/k 200", |bencher| {
                bencher.iter(|| {
                    let found = nearest(&train_rows, &val_rows, ViewChoice::First, 200, false).unwrap();
                    black_box(vote(&found, &train_classes, &val_classes, classes, &[1, 5, 10, 20, 200], 0.07))
                });
            });
        }
        group.throughput(Throughput::Elements(TRAIN as u64));
        for lrs in [1, 8] {
            let config = ProbeConfig { lr: vec![0.1; lrs], epochs: 1, ..ProbeConfig::default() };
            group.bench_function(
                format!("linear/20000x512/{classes} classes/{lrs} learning rates/1 epoch"),
                |bencher| {
                    bencher.iter(|| black_box(train(&train_rows, &val_rows, classes, &config, |_| ()).unwrap()));
                },
            );
        }
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
