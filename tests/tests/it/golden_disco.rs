//! Three whole steps of DisCo, and of MoCo v2, against PyTorch: losses, both encoders, momenta and the queue.
//!
//! `tests/golden/disco_steps.py` computed the values in f64 and says how. The relative error of a loss is
//! `|found - golden| / |golden|`; that of a tensor is [`fingerprint_distance`], relative to the tensor's norm.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use candle_core::{Device, Tensor};
use serde::Deserialize;
use shared::models::Encoder;
use shared::run::{Losses, Objective};
use student_train::config::MethodConfig;
use student_train::method::{Method, Moco, Queue};
use student_train::step::{Batch, TrainingState};
use student_train::{Config, Options};
use tests::formula::{fingerprint_distance, parameters, unit, unit_rows, values};

/// Largest relative error after three steps in f32, against f64.
const TOLERANCE: f64 = 1e-4;
/// The same for momenta, which are gradients: one pixel that the max pool takes from next door moves them by 1e-3.
const MOMENTUM_TOLERANCE: f64 = 4e-3;
const SIZE: usize = 64;
const QUEUE: usize = 20;

#[derive(Deserialize)]
struct Golden {
    shuffles: Vec<Vec<u32>>,
    distill: Trace,
    pretrain: Trace,
}

#[derive(Deserialize)]
struct Trace {
    losses: Vec<Losses>,
    pointer: u64,
    tensors: BTreeMap<String, Vec<f64>>,
}

/// The script's settings, and `more`.
pub(crate) fn config(objective: Objective, more: Options) -> Result<Config> {
    let options = Options {
        batch_size: Some(8),
        bn_groups: Some(2),
        head_hidden: Some(64),
        embedding_dim: Some(32),
        queue_size: Some(QUEUE),
        ..more
    };
    Ok(Config::new(objective, &options, None)?)
}

/// What the script feeds to a step.
pub(crate) fn batch(config: &Config, step: u64) -> Result<Batch> {
    let (size, width) = (config.batch_size, config.embedding_dim);
    let view = |which: &str| values(&format!("view {which} {step}"), &[size, SIZE, SIZE, 3], -2.0, 2.0);
    let target = |which: &str| unit_rows(&format!("teacher {which} {step}"), size, width);
    let teacher = match config.objective {
        Objective::Distill => Some([target("q")?, target("k")?]),
        Objective::Pretrain => None,
    };
    let sample_ids = (0..size as u64).collect();
    Ok(Batch { step, sample_ids, views: [view("q")?, view("k")?], teacher })
}

/// The script's shifts of batch norm, far from the kink of `ReLU`.
fn shift(name: &str, count: usize) -> Result<Tensor> {
    let negative = |u: f64| u < 0.25 && name.ends_with("bn1.bias");
    let shifts: Vec<f32> =
        unit(name, count).map(|u| if negative(u) { -3.0 - 4.0 * u } else { 3.0 + u } as f32).collect();
    Ok(Tensor::from_vec(shifts, count, &Device::Cpu)?)
}

fn relative(found: f32, golden: f32) -> f64 {
    (f64::from(found) - f64::from(golden)).abs() / f64::from(golden).abs().max(1e-30)
}

/// The state that the script starts from.
pub(crate) fn state(config: &Config) -> Result<TrainingState> {
    let query = Encoder::new(config.student, Some(config.head()), 0)?;
    let mut weights = parameters(&query.store().names_and_shapes())?;
    for (name, tensor) in &mut weights {
        if name.ends_with("bias") && !name.starts_with("fc.") {
            *tensor = shift(name, tensor.elem_count())?;
        }
    }
    query.store().load(&weights)?;
    let MethodConfig::MocoV2(moco) = &config.method else { anyhow::bail!("another method") };
    let queue = Queue::from_keys(unit_rows("queue", QUEUE, config.embedding_dim)?, 0)?;
    let moco = Moco::from_parts(moco, &query, queue)?;
    Ok(TrainingState::from_parts(query, Method::Moco(Box::new(moco)), config)?)
}

/// Compares the losses of a step, and what was reported of it.
pub(crate) fn assert_losses(step: u64, found: &Losses, golden: &Losses) {
    assert_eq!(found.terms.keys().collect::<Vec<_>>(), golden.terms.keys().collect::<Vec<_>>(), "step {step}");
    let terms = golden.terms.iter().map(|(name, &value)| (name.as_str(), found.terms[name], value));
    for (term, found, golden) in std::iter::once(("loss", found.loss, golden.loss)).chain(terms) {
        let error = relative(found, golden);
        assert!(error < TOLERANCE, "step {step}, {term}: {found}, expected {golden}, relative error {error:e}");
    }
}

/// The orders in which the key encoder sees the samples.
pub(crate) fn shuffles() -> Result<Vec<Vec<u32>>> {
    Ok(golden()?.shuffles)
}

fn check(objective: Objective, golden: &Trace, shuffles: &[Vec<u32>]) -> Result<()> {
    let config = config(objective, Options::default())?;
    let mut state = state(&config)?;
    for (step, (golden, shuffle)) in (0..).zip(golden.losses.iter().zip(shuffles)) {
        let found = state.step(&batch(&config, step)?, shuffle, config.optimisation.lr)?;
        assert_losses(step, &found, golden);
    }
    assert_eq!(state.counters()["queue_pointer"], golden.pointer);
    let renamed = |name: String| name.replacen("sgd.query.", "sgd.", 1);
    let tensors: BTreeMap<String, Tensor> =
        state.to_tensors()?.into_iter().map(|(name, tensor)| (renamed(name), tensor)).collect();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), golden.tensors.keys().collect::<Vec<_>>());
    let mut worst = [(0f64, ""); 2];
    for (name, golden) in &golden.tensors {
        let error = fingerprint_distance(name, &tensors[name], golden)?;
        let kind = &mut worst[usize::from(name.starts_with("sgd."))];
        if error > kind.0 {
            *kind = (error, name);
        }
    }
    let [(tensor_error, tensor), (momentum_error, momentum)] = worst;
    assert!(tensor_error < TOLERANCE, "tensor `{tensor}`: relative error {tensor_error:e}");
    assert!(momentum_error < MOMENTUM_TOLERANCE, "momentum `{momentum}`: relative error {momentum_error:e}");
    Ok(())
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/disco_steps.json")).context("tests/golden/disco_steps.json")
}

#[test]
fn three_disco_steps_equal_pytorch() -> Result<()> {
    let golden = golden()?;
    check(Objective::Distill, &golden.distill, &golden.shuffles)
}

#[test]
fn three_moco_steps_equal_pytorch() -> Result<()> {
    let golden = golden()?;
    check(Objective::Pretrain, &golden.pretrain, &golden.shuffles)
}
