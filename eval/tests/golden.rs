//! k-NN against scikit-learn and the linear probe's SGD against PyTorch, on data that both sides generate by one formula.
//!
//! The expected values are in `tests/golden/{knn,linear_probe}.json`, beside the scripts that made them.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

use candle_core::{Device, Tensor};
use eval::linear_probe::Heads;
use serde::Deserialize;
use shared::feature_rows::FeatureRows;
use shared::knn::{ViewChoice, nearest, vote};

/// The scripts' `value`: a pseudo-random number in [-0.5, 0.5) with 24 bits.
fn value(index: usize, salt: u64) -> f64 {
    let mask = 0xffff_ffff;
    let mut x = ((index as u64 + 1) * 2_654_435_761 + salt * 40_503) & mask;
    x = ((x ^ (x >> 15)) * 2_246_822_519) & mask;
    x = ((x ^ (x >> 13)) * 3_266_489_917) & mask;
    x ^= x >> 16;
    (x >> 8) as f64 / 16_777_216.0 - 0.5
}

/// Noise plus a signal in the columns that belong to the class, `index % classes`.
fn features(count: usize, width: usize, classes: usize, salt: u64, signal: f64) -> (Vec<f32>, Vec<i64>) {
    let entry = |i: usize| {
        let belongs = (i % width) % classes == (i / width) % classes;
        (value(i, salt) + f64::from(belongs) * signal) as f32
    };
    let labels = (0..count).map(|i| i64::try_from(i % classes).unwrap()).collect();
    ((0..count * width).map(entry).collect(), labels)
}

fn classes_of(labels: &[i64]) -> Vec<u32> {
    labels.iter().map(|&label| u32::try_from(label).unwrap()).collect()
}

#[derive(Deserialize)]
struct KnnGolden {
    temperature: f64,
    results: Vec<shared::knn::KnnAccuracy>,
    nearest: Vec<u32>,
    similarities: Vec<f64>,
}

#[test]
fn knn_equals_scikit_learn() {
    let golden: KnnGolden = serde_json::from_str(include_str!("../../tests/golden/knn.json")).unwrap();
    let (xs, ys) = features(400, 16, 9, 11, 0.3);
    let (queries, truth) = features(120, 16, 9, 12, 0.3);
    let ids: Vec<u64> = (0..400).collect();
    let train = FeatureRows::new(vec![&xs], 1, 16, &ys, &ids).unwrap();
    let val = FeatureRows::new(vec![&queries], 1, 16, &truth, &ids[..120]).unwrap();
    let found = nearest(&train, &val, ViewChoice::First, 200, false).unwrap();
    let ks: Vec<usize> = golden.results.iter().map(|result| result.k).collect();
    let accuracies = vote(&found, &classes_of(&ys), &classes_of(&truth), 9, &ks, golden.temperature);
    for (got, want) in accuracies.iter().zip(&golden.results) {
        assert_eq!(got.k, want.k);
        assert!((got.top1 - want.top1).abs() < 1e-9 && (got.top5 - want.top5).abs() < 1e-9, "{got:?} {want:?}");
    }
    for (query, (indices, similarities)) in golden.nearest.chunks(5).zip(golden.similarities.chunks(5)).enumerate() {
        assert_eq!(&found.indices[query * 200..query * 200 + 5], indices);
        for (got, want) in found.similarities[query * 200..].iter().zip(similarities) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
        }
    }
}

#[derive(Deserialize)]
struct ProbeGolden {
    heads: Vec<HeadGolden>,
}

#[derive(Deserialize)]
struct HeadGolden {
    lr: f64,
    train_loss: Vec<f64>,
    top1: Vec<f64>,
    top5: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

/// Relative to the largest value of the tensor.
fn assert_close(got: &[f32], want: &[f64], what: &str) {
    let largest = want.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((f64::from(*got) - want).abs() <= 1e-4 * largest, "{what}: {got} {want}");
    }
}

#[test]
fn three_epochs_of_the_linear_probe_equal_pytorch() {
    const TRAIN: usize = 200;
    const VAL: usize = 90;
    const WIDTH: usize = 24;
    const CLASSES: usize = 7;
    let golden: ProbeGolden = serde_json::from_str(include_str!("../../tests/golden/linear_probe.json")).unwrap();
    let (xs, ys) = features(TRAIN, WIDTH, CLASSES, 1, 0.5);
    let (val_xs, val_ys) = features(VAL, WIDTH, CLASSES, 2, 0.5);
    let first: Vec<f32> = (0..CLASSES * WIDTH).map(|i| (value(i, 3) * 0.02) as f32).collect();
    let lrs: Vec<f64> = golden.heads.iter().map(|head| head.lr).collect();
    let mut heads = Heads::new(&first, CLASSES, WIDTH, &lrs, 0.9, 1e-4).unwrap();
    let val_xs = Tensor::from_vec(val_xs, (VAL, WIDTH), &Device::Cpu).unwrap();
    for epoch in 0..3 {
        let mut order: Vec<usize> = (0..TRAIN).collect();
        order.sort_by(|&a, &b| value(a, 100 + epoch as u64).total_cmp(&value(b, 100 + epoch as u64)));
        let mut losses = vec![0.0; lrs.len()];
        for batch in order.chunks(64) {
            let rows: Vec<f32> = batch.iter().flat_map(|&i| xs[i * WIDTH..(i + 1) * WIDTH].iter().copied()).collect();
            let rows = Tensor::from_vec(rows, (batch.len(), WIDTH), &Device::Cpu).unwrap();
            let classes: Vec<u32> = batch.iter().map(|&i| u32::try_from(ys[i]).unwrap()).collect();
            let sums = heads.step(&rows, &classes, 0.5_f64.powi(epoch)).unwrap();
            losses.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        let logits = heads.logits(&val_xs).unwrap();
        for (head, want) in golden.heads.iter().enumerate() {
            let epoch = usize::try_from(epoch).unwrap();
            let loss = losses[head] / TRAIN as f64;
            assert!((loss / want.train_loss[epoch] - 1.0).abs() < 1e-4, "{loss} {}", want.train_loss[epoch]);
            let within = |k: usize| {
                let rows = logits.chunks(CLASSES).skip(head).step_by(lrs.len());
                let hit = |(row, &label): (&[f32], &i64)| {
                    let own = row[usize::try_from(label).unwrap()];
                    row.iter().filter(|&&other| other > own).count() < k
                };
                100.0 * rows.zip(&val_ys).filter(|&pair| hit(pair)).count() as f64 / VAL as f64
            };
            assert!((within(1) - want.top1[epoch]).abs() < 1e-9 && (within(5) - want.top5[epoch]).abs() < 1e-9);
        }
    }
    for (head, want) in golden.heads.iter().enumerate() {
        let (weight, bias) = heads.parameters(head).unwrap();
        assert_close(&weight, &want.weight, "weight");
        assert_close(&bias, &want.bias, "bias");
    }
}
