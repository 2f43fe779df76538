//! Activations and their derivatives against `PyTorch`, at the kinks too, by both engines.
//!
//! `tests/golden/activations.py` computed the values and says how.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use candle_core::{Device, Tensor, Var};
use serde::Deserialize;
use shared::ops::{self, Activation, Builder, Engine, Mode, Pass};

#[derive(Deserialize)]
struct Golden {
    points: Vec<f32>,
    activations: BTreeMap<String, AtPoints>,
}

#[derive(Deserialize)]
struct AtPoints {
    values: Vec<f32>,
    derivatives: Vec<f32>,
}

#[test]
fn values_and_derivatives_are_pytorchs_at_the_kinks_and_between() -> Result<()> {
    let golden: Golden = serde_json::from_str(include_str!("../../golden/activations.json"))?;
    // A linear layer that changes nothing: weight 1, bias 0.
    let mut builder = Builder::new(&Device::Cpu);
    let layer = builder.linear("fc", 1, 1)?;
    let store = builder.finish(0)?;
    let one = BTreeMap::from([
        ("fc.weight".to_owned(), Tensor::ones((1, 1), candle_core::DType::F32, &Device::Cpu)?),
        ("fc.bias".to_owned(), Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu)?),
    ]);
    store.load(&one)?;
    let count = golden.points.len();
    for (name, act) in [
        ("relu", Activation::Relu),
        ("relu6", Activation::Relu6),
        ("silu", Activation::Silu),
        ("hard_swish", Activation::HardSwish),
    ] {
        let expected = golden.activations.get(name).context(name)?;
        for engine in [Engine::Reference, Engine::Cpu] {
            let xs = Var::from_tensor(&Tensor::from_vec(golden.points.clone(), (count, 1), &Device::Cpu)?)?;
            let pass = Pass { mode: Mode::Train { bn_groups: 1 }, record: true, engine };
            let out = ops::linear(&xs, &layer, act, &pass)?;
            let derivatives = out.sum_all()?.backward()?.get(&xs).context("xs is a variable")?.flatten_all()?;
            for (what, expected, found) in [
                ("value", &expected.values, out.flatten_all()?.to_vec1::<f32>()?),
                ("derivative", &expected.derivatives, derivatives.to_vec1::<f32>()?),
            ] {
                for ((point, expected), found) in golden.points.iter().zip(expected).zip(found) {
                    let close = (expected - found).abs() <= 1e-6 * expected.abs() + 1e-7;
                    assert!(close, "{name} by {engine:?}, {what} at {point}: {found} instead of {expected}");
                }
            }
        }
    }
    Ok(())
}
