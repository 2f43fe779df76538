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
pub(crate) struct Trace {
    pub(crate) losses: Vec<Losses>,
    pub(crate) pointer: u64,
    pub(crate) tensors: BTreeMap<String, Vec<f64>>,
}

fn config(objective: Objective) -> Result<Config> {
    let options = Options {
        batch_size: Some(8),
        bn_groups: Some(2),
        head_hidden: Some(64),
        embedding_dim: Some(32),
        queue_size: Some(QUEUE),
        ..Options::default()
    };
    Ok(Config::new(objective, &options, None)?)
}

fn batch(config: &Config, step: u64) -> Result<Batch> {
    let (size, width) = (config.batch_size, config.embedding_dim);
    let view = |which: &str| values(&format!("view {which} {step}"), &[size, SIZE, SIZE, 3], -2.0, 2.0);
    let target = |which: &str| unit_rows(&format!("teacher {which} {step}"), size, width);
    let teacher = match config.objective {
        Objective::Distill => Some([target("q")?, target("k")?]),
        Objective::Pretrain => None,
    };
    let sample_ids = (0..size as u64).collect();
    let views = [view("q")?, view("k")?];
    Ok(Batch { step, epoch: 0, sample_ids, views, locals: None, teacher, shuffled_keys: None })
}

/// The scripts' shifts of batch norm, far from the kink of `ReLU`.
pub(crate) fn shift(name: &str, count: usize) -> Result<Tensor> {
    let inside = name.ends_with("bn1.bias") || name == "projection_head.1.bias";
    let negative = |u: f64| u < 0.25 && inside;
    let shifts: Vec<f32> =
        unit(name, count).map(|u| if negative(u) { -3.0 - 4.0 * u } else { 3.0 + u } as f32).collect();
    Ok(Tensor::from_vec(shifts, count, &Device::Cpu)?)
}

/// The scripts' query encoder.
pub(crate) fn query(config: &Config) -> Result<Encoder> {
    let query = Encoder::new(config.student, Some(config.head()), 0)?;
    let mut weights = parameters(&query.store().names_and_shapes())?;
    let of_layer =
        |name: &str| ["fc.", "projection_head.0.", "projection_head.3."].iter().any(|head| name.starts_with(head));
    for (name, tensor) in &mut weights {
        if name.ends_with("bias") && !of_layer(name) {
            *tensor = shift(name, tensor.elem_count())?;
        }
    }
    query.store().load(&weights)?;
    Ok(query)
}

fn relative(found: f32, golden: f32) -> f64 {
    (f64::from(found) - f64::from(golden)).abs() / f64::from(golden).abs().max(1e-30)
}

/// Makes the steps of a trace of momentum contrast.
pub(crate) fn check(config: &Config, golden: &Trace, shuffles: &[Vec<u32>]) -> Result<()> {
    let query = query(config)?;
    let (MethodConfig::MocoV2(moco) | MethodConfig::MocoV1(moco)) = &config.method else {
        anyhow::bail!("another method")
    };
    let queue = Queue::from_keys(unit_rows("queue", QUEUE, config.embedding_dim)?, 0)?;
    let moco = Moco::from_parts(moco, &query, queue)?;
    let mut state = TrainingState::from_parts(query, Method::Moco(Box::new(moco)), config)?;
    for (step, (golden, shuffle)) in golden.losses.iter().zip(shuffles).enumerate() {
        let found = state.step(&batch(config, step as u64)?, shuffle, config.optimisation.lr)?;
        check_losses(step, &found, golden);
    }
    assert_eq!(state.counters()["queue_pointer"], golden.pointer);
    check_tensors(&state, &golden.tensors, |_| true)
}

/// Compares the losses of a step.
pub(crate) fn check_losses(step: usize, found: &Losses, golden: &Losses) {
    assert_eq!(found.terms.keys().collect::<Vec<_>>(), golden.terms.keys().collect::<Vec<_>>(), "step {step}");
    let terms = golden.terms.iter().map(|(name, &value)| (name.as_str(), found.terms[name], value));
    for (term, found, golden) in std::iter::once(("loss", found.loss, golden.loss)).chain(terms) {
        let error = relative(found, golden);
        assert!(error < TOLERANCE, "step {step}, {term}: {found}, expected {golden}, relative error {error:e}");
    }
}

/// Compares the tensors of a state whose names `compared` picks; all must be there.
pub(crate) fn check_tensors(
    state: &TrainingState,
    golden: &BTreeMap<String, Vec<f64>>,
    compared: impl Fn(&str) -> bool,
) -> Result<()> {
    let renamed = |name: String| name.replacen("sgd.query.", "sgd.", 1);
    let tensors: BTreeMap<String, Tensor> =
        state.to_tensors()?.into_iter().map(|(name, tensor)| (renamed(name), tensor)).collect();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), golden.keys().collect::<Vec<_>>());
    let mut worst = [(0f64, ""); 2];
    for (name, golden) in golden.iter().filter(|(name, _)| compared(name)) {
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
    check(&config(Objective::Distill)?, &golden.distill, &golden.shuffles)
}

#[test]
fn three_moco_steps_equal_pytorch() -> Result<()> {
    let golden = golden()?;
    check(&config(Objective::Pretrain)?, &golden.pretrain, &golden.shuffles)
}
