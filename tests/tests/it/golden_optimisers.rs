//! Every optimiser, clipping and learning rates over time against `PyTorch` and the official numpy formulae; then three whole
//! steps of training with most of them at once.
//!
//! `tests/golden/optimisers.py` and `tests/golden/optimised_steps.py` computed the values in f64 and say how.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use candle_core::{Device, Tensor};
use serde::Deserialize;
use shared::ops::{Builder, Gradients, ParameterStore};
use shared::optim::{NoDecay, Optimizer, OptimizerConfig, Rule, clip_gradients, gradient_norm};
use shared::run::{Losses, Objective};
use shared::schedule::{Curve, Schedule};
use student_train::Options;
use student_train::config::OptimizerName;
use tests::formula::{fingerprint_distance, parameters, values};

use crate::golden_disco::{batch, check_losses, config, shuffles, state};

const STEPS: u32 = 5;
/// Largest relative error of five steps of an optimiser in f32, against f64.
const TOLERANCE: f64 = 1e-5;
/// Largest relative error of parameters after three whole steps.
const WHOLE_TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    optimisers: Vec<Case>,
    schedules: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct Case {
    rule: String,
    #[serde(default)]
    no_decay: bool,
    #[serde(default)]
    nesterov: bool,
    clip: Option<f64>,
    norms: Vec<f64>,
    parameters: BTreeMap<String, Vec<f64>>,
    state: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct Whole {
    losses: Vec<Losses>,
    tensors: BTreeMap<String, Vec<f64>>,
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/optimisers.json")).context("tests/golden/optimisers.json")
}

fn store() -> Result<ParameterStore> {
    let mut builder = Builder::new(&Device::Cpu);
    builder.linear("fc", 5, 6)?;
    builder.batch_norm("bn", 7)?;
    let store = builder.finish(0)?;
    let mut values = parameters(&store.names_and_shapes())?;
    values.insert("bn.bias".into(), values["bn.bias"].zeros_like()?);
    store.load(&values)?;
    Ok(store)
}

fn rule_and_lr(case: &Case) -> (Rule, f64) {
    let (momentum, nesterov, trust_coefficient) = (0.9, case.nesterov, 0.02);
    match case.rule.as_str() {
        "sgd" => (Rule::Sgd { momentum, nesterov }, 0.1),
        "lars" => (Rule::Lars { momentum, trust_coefficient }, 2.0),
        "larc" => (Rule::Larc { momentum, nesterov, trust_coefficient }, 2.0),
        _ => (Rule::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-3 }, 0.01),
    }
}

fn gradients(store: &ParameterStore, names: impl Fn(&str) -> bool, step: u32) -> Result<Gradients> {
    let mut tensors = BTreeMap::new();
    for (name, shape) in store.names_and_shapes().into_iter().filter(|(name, _)| names(name)) {
        let gradient = values(&format!("gradient {step} {name}"), &shape, -1.0, 1.0)?;
        tensors.insert(name, gradient);
    }
    Ok(store.to_memory_layout(&tensors)?.into_iter().collect())
}

fn assert_close(what: &str, found: &BTreeMap<String, Tensor>, golden: &BTreeMap<String, Vec<f64>>) -> Result<()> {
    for (name, numbers) in golden {
        let tensor = found.get(name).with_context(|| format!("{what}: no `{name}`"))?;
        let distance = fingerprint_distance(name, tensor, numbers)?;
        assert!(distance < TOLERANCE, "{what}, `{name}`: relative error {distance:e}");
    }
    Ok(())
}

#[test]
fn five_steps_of_every_optimiser_are_pytorchs_also_across_a_checkpoint() -> Result<()> {
    let cases = golden()?.optimisers;
    assert!(cases.len() > 10);
    for case in cases {
        let what = format!("{} nesterov {} no decay {} clip {:?}", case.rule, case.nesterov, case.no_decay, case.clip);
        let store = store()?;
        let (rule, lr) = rule_and_lr(&case);
        let no_decay = if case.no_decay { NoDecay::NormAndBias } else { NoDecay::None };
        let config = OptimizerConfig { rule, weight_decay: 1e-2, no_decay };
        let mut optimizer = Optimizer::new(config);
        let mut norms = Vec::new();
        for step in 0..STEPS {
            if step == 3 {
                let saved = optimizer.to_tensors("query", &store)?;
                optimizer = Optimizer::new(config);
                optimizer.load("query", &store, &saved)?;
            }
            let gradients = gradients(&store, |name| case.parameters.contains_key(name), step)?;
            if let Some(limit) = case.clip {
                let norm = gradient_norm([&gradients])?;
                clip_gradients([&gradients], norm, limit)?;
                norms.push(norm);
            }
            optimizer.step("query", &store, &gradients, lr / f64::from(1 + step))?;
        }
        assert_eq!(norms.len(), case.norms.len(), "{what}");
        assert!(norms.iter().zip(&case.norms).all(|(a, b)| (a / b - 1.0).abs() < 1e-6), "{what}: {norms:?}");
        assert_close(&what, &store.to_tensors()?, &case.parameters)?;
        assert_close(&what, &optimizer.to_tensors("query", &store)?, &case.state)?;
    }
    Ok(())
}

#[test]
fn the_state_of_another_optimiser_is_refused() -> Result<()> {
    let store = store()?;
    let adamw = Rule::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8 };
    let config = |rule| OptimizerConfig { rule, weight_decay: 0.0, no_decay: NoDecay::None };
    let saved = |rule| -> Result<_> {
        let mut optimizer = Optimizer::new(config(rule));
        optimizer.step("query", &store, &gradients(&store, |name| name.starts_with("fc."), 0)?, 0.1)?;
        Ok(optimizer.to_tensors("query", &store)?)
    };
    let sgd = OptimizerConfig::sgd(0.9, 0.0).rule;
    assert!(Optimizer::new(config(adamw)).load("query", &store, &saved(sgd)?).is_err());
    assert!(Optimizer::new(config(sgd)).load("query", &store, &saved(adamw)?).is_err());
    let mut halved = saved(adamw)?;
    halved.remove("exp_avg_sq.fc.weight");
    assert!(Optimizer::new(config(adamw)).load("query", &store, &halved).is_err());
    assert!(Optimizer::new(config(adamw)).load("query", &store, &saved(adamw)?).is_ok());
    Ok(())
}

#[test]
fn rates_are_those_of_torch_and_of_the_official_codes() -> Result<()> {
    let cosine = |final_lr, per_step| Curve::Cosine { final_lr, per_step };
    let steps = Curve::Steps { factor: 0.2, milestones: vec![3, 6] };
    let cases = [
        ("epoch", cosine(0.0, false), 0, 0.0),
        ("step", cosine(0.01, true), 0, 0.0),
        ("steps", steps, 0, 0.0),
        ("swav", cosine(0.006, true), 2, 0.3),
        ("dino", cosine(1e-3, true), 2, 0.0),
    ];
    let golden = golden()?.schedules;
    assert_eq!(golden.len(), cases.len());
    for (name, curve, warmup_epochs, warmup_start_lr) in cases {
        let schedule = Schedule { lr: 0.6, curve, warmup_epochs, warmup_start_lr, epochs: 8, steps_per_epoch: 5 };
        let rates = &golden[name];
        assert_eq!(rates.len(), 40);
        for (step, &rate) in (0..).zip(rates) {
            let found = schedule.lr(step);
            assert!((found - rate).abs() < 1e-12, "{name}, step {step}: {found}, expected {rate}");
        }
    }
    Ok(())
}

#[test]
fn three_whole_steps_with_adamw_warm_up_clipping_pieces_and_an_average_equal_pytorch() -> Result<()> {
    let golden: Whole = serde_json::from_str(include_str!("../../golden/optimised_steps.json"))?;
    let options = Options {
        optimizer: Some(OptimizerName::AdamW),
        lr: Some(0.001),
        warmup_epochs: Some(1),
        warmup_start_lr: Some(0.0002),
        beta2: Some(0.99),
        adam_epsilon: Some(1e-2),
        weight_decay: Some(0.05),
        no_decay: Some(NoDecay::NormAndBias),
        clip_norm: Some(5.0),
        accumulate: Some(2),
        ema_decay: Some(0.9),
        ..Options::default()
    };
    let config = config(Objective::Distill, options)?;
    let schedule = config.optimisation.schedule(2, golden.losses.len() as u64);
    let mut state = state(&config)?;
    for (step, golden) in golden.losses.iter().enumerate() {
        let shuffle = &shuffles()?[step];
        let found = state.step(&batch(&config, step as u64)?, shuffle, schedule.lr(step as u64))?;
        check_losses(step, &found, golden);
    }
    let tensors = state.to_tensors()?;
    let mut worst = (0f64, "");
    for (name, numbers) in &golden.tensors {
        let error = fingerprint_distance(name, &tensors[name], numbers)?;
        if error > worst.0 {
            worst = (error, name);
        }
    }
    assert!(golden.tensors.keys().any(|name| name.starts_with("ema.")));
    assert!(worst.0 < WHOLE_TOLERANCE, "tensor `{}`: relative error {:e}", worst.1, worst.0);
    Ok(())
}
