//! Drawn values have the distributions of torchvision's and timm's, as `tests/golden/initial_values.py` measured them.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail loudly")]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;
use shared::models::{Arch, Encoder, HeadConfig};

/// Draws of each network, by seed.
const DRAWS: u64 = 2;
/// Standard errors that a statistic may be off. The draws are fixed, so a failure is a difference and no accident.
const ERRORS: f64 = 5.0;

#[derive(Deserialize)]
struct Golden {
    head: [usize; 2],
    students: BTreeMap<String, Student>,
}

#[derive(Deserialize)]
struct Student {
    /// Names by the one value that they hold.
    constants: BTreeMap<String, Vec<String>>,
    random: BTreeMap<String, Statistics>,
}

/// Number of values, mean, standard deviation, kurtosis, least and largest value.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Statistics(f64, f64, f64, f64, f64, f64);

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn statistics(values: &[f64]) -> Statistics {
    let count = values.len() as f64;
    let moment = |power: &dyn Fn(f64) -> f64| values.iter().map(|&value| power(value)).sum::<f64>() / count;
    let mean = moment(&|x| x);
    let variance = moment(&|x| (x - mean).powi(2));
    let kurtosis = moment(&|x| (x - mean).powi(4)) / (variance * variance);
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Statistics(count, mean, variance.sqrt(), kurtosis, least, largest)
}

/// What tells two samples apart that should be of one distribution; none when nothing does.
fn difference(theirs: Statistics, ours: Statistics) -> Option<String> {
    let Statistics(their_count, their_mean, their_std, their_kurtosis, their_least, their_largest) = theirs;
    let Statistics(our_count, our_mean, our_std, our_kurtosis, our_least, our_largest) = ours;
    let error = ERRORS * (1.0 / their_count + 1.0 / our_count).sqrt();
    let bounded = their_kurtosis < 2.4;
    // The largest of n uniform values comes as close to the bound as 1/n of it; of normal ones, the tails vary by themselves.
    let extreme = if bounded { 12.0 / their_count.min(our_count) * their_largest } else { 2.0 * their_std };
    let checks = [
        ("mean", our_mean - their_mean, error * their_std),
        ("standard deviation", our_std / their_std - 1.0, error * ((their_kurtosis - 1.0) / 4.0).sqrt()),
        ("kurtosis", our_kurtosis - their_kurtosis, error * 24f64.sqrt()),
        ("least value", our_least - their_least, extreme),
        ("largest value", our_largest - their_largest, extreme),
    ];
    let (what, found, allowed) = checks.into_iter().find(|(_, found, allowed)| found.abs() > *allowed)?;
    Some(format!("{what} differs by {found}, {allowed} allowed: {theirs:?}, {ours:?}"))
}

#[test]
fn drawn_values_have_the_distributions_of_torchvision_and_timm() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/initial_values.json");
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let head = HeadConfig::mlp(golden.head[0], golden.head[1]);
    assert!(golden.students.len() >= 9);
    for (student, expected) in golden.students {
        let arch: Arch = student.parse().unwrap();
        let draws: Vec<BTreeMap<String, Tensor>> = (1..=DRAWS)
            .map(|seed| Encoder::new(arch, Some(head), seed).unwrap().store().to_tensors().unwrap())
            .collect();
        let constants = expected.constants.values().map(Vec::len).sum::<usize>();
        assert_eq!(draws[0].len(), constants + expected.random.len(), "{student}");
        for (value, names) in &expected.constants {
            let value: f64 = value.parse().unwrap();
            for name in names {
                assert!(
                    values(&draws[0][name]).iter().all(|&found| found == value),
                    "{student}: {name} is not {value}"
                );
            }
        }
        for (name, &theirs) in &expected.random {
            let drawn: Vec<f64> = draws.iter().flat_map(|draw| values(&draw[name])).collect();
            let difference = difference(theirs, statistics(&drawn));
            assert!(difference.is_none(), "{student}: {name}: {}", difference.unwrap_or_default());
        }
    }
}

#[test]
fn wrong_distributions_are_told_apart() {
    let sample = |draw: &dyn Fn(f64) -> f64| {
        let count = 4096;
        statistics(&(0..count).map(|i| draw((f64::from(i) + 0.5) / f64::from(count))).collect::<Vec<_>>())
    };
    let uniform = sample(&|u| 2.0 * u - 1.0);
    assert_eq!(difference(uniform, uniform), None);
    // The logistic distribution stands for any with tails.
    let tailed = sample(&|u| (u / (1.0 - u)).ln());
    let cases = [
        ("mean", uniform, sample(&|u| 2.0 * u - 0.9)),
        ("standard deviation", uniform, sample(&|u| 2.2 * u - 1.1)),
        ("kurtosis", sample(&|u| (2.0 * u - 1.0) * std::f64::consts::PI), tailed),
        ("largest value", uniform, sample(&|u| if u > 0.999 { 1.1 } else { 2.0 * u - 1.0 })),
    ];
    for (what, theirs, ours) in cases {
        let found = difference(theirs, ours).unwrap();
        assert!(found.starts_with(what), "{found}");
    }
}
