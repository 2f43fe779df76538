//! Test tensors, and how far two of them are apart.

use candle_core::{DType, Device, Tensor};
use shared::Error;
use shared::ops::{Activation, Engine, Mode, Pass};
use shared::rng::KeyedRng;

/// What a test returns.
pub(crate) type TestResult = Result<(), Box<dyn std::error::Error>>;

/// Training with one group.
pub(crate) const TRAIN: Mode = Mode::Train { bn_groups: 1 };

/// Training with two groups.
pub(crate) const GROUPS: Mode = Mode::Train { bn_groups: 2 };

/// All there are.
pub(crate) const ACTIVATIONS: [Activation; 6] = [
    Activation::Identity,
    Activation::Relu,
    Activation::Relu6,
    Activation::Silu,
    Activation::HardSwish,
    Activation::Gelu,
];

/// Independent normal values, a function of shape and seed.
pub(crate) fn normal(shape: &[usize], seed: u64) -> Result<Tensor, Error> {
    let mut rng = KeyedRng::new("tests of ops", seed, &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal() as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// All values, as f64.
pub(crate) fn flat(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).and_then(|tensor| tensor.flatten_all());
    tensor.and_then(|tensor| tensor.to_vec1()).expect("any tensor of numbers")
}

/// The L2 norm.
pub(crate) fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// The L2 norms of the difference and of `expected`.
pub(crate) fn difference(expected: &Tensor, found: &Tensor) -> (f64, f64) {
    assert_eq!(expected.dims(), found.dims());
    let (expected, found) = (flat(expected), flat(found));
    let apart: Vec<f64> = expected.iter().zip(&found).map(|(a, b)| a - b).collect();
    (norm(&apart), norm(&expected))
}

/// A pass that records wherever batch norm trains.
pub(crate) fn pass(engine: Engine, mode: Mode) -> Pass {
    Pass { mode, record: mode != Mode::Eval, engine }
}
