//! Three whole steps of SwAV, alone and under a teacher, and of MoCo v1, against PyTorch; Sinkhorn-Knopp by itself.
//!
//! `tests/golden/swav_steps.py` computed the values in f64 and says how. Errors are those of `golden_disco`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use shared::losses::sinkhorn;
use shared::run::Objective;
use student_train::config::{MethodConfig, MethodName, OptimizerName};
use student_train::method::{Method, Swav};
use student_train::step::{Batch, TrainingState};
use student_train::{Config, Options};
use tests::formula::{fingerprint_distance, parameter, unit_rows, values};

use crate::golden_disco::{MOMENTUM_TOLERANCE, Trace, check, check_losses, check_tensors, query};

/// At this temperature PyTorch's own momenta in f32 and f64 differ by 2.6e-3.
const MOCO_V1_MOMENTUM_TOLERANCE: f64 = 1e-2;
const BATCH: usize = 8;
const SIZE: usize = 64;
const LOCALS: usize = 3;
const LOCAL_SIZE: usize = 32;
const PROTOTYPES: usize = 24;

#[derive(Deserialize)]
struct Golden {
    shuffles: Vec<Vec<u32>>,
    distill: Trace,
    pretrain: Trace,
    moco_v1: Trace,
    sinkhorn: Vec<f64>,
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/swav_steps.json")).context("tests/golden/swav_steps.json")
}

fn options(method: MethodName) -> Options {
    Options {
        method: Some(method),
        optimizer: Some(OptimizerName::Sgd),
        batch_size: Some(BATCH),
        bn_groups: Some(2),
        embedding_dim: Some(32),
        lr: Some(0.03),
        weight_decay: Some(1e-4),
        ..Options::default()
    }
}

fn config(objective: Objective, accumulate: usize) -> Result<Config> {
    let options = Options {
        accumulate: Some(accumulate),
        head_hidden: Some(64),
        prototypes: Some(PROTOTYPES),
        swav_queue_size: Some(BATCH),
        queue_from_epoch: Some(1),
        freeze_prototypes_steps: Some(1),
        distill_weight: (objective == Objective::Distill).then_some(4.0),
        ..options(MethodName::Swav)
    };
    Ok(Config::new(objective, &options, None)?)
}

/// The first step is an epoch of its own: the queue begins to fill in the second.
fn batch(config: &Config, step: u64) -> Result<Batch> {
    let view = |which: &str| values(&format!("view {which} {step}"), &[BATCH, SIZE, SIZE, 3], -2.0, 2.0);
    let target = |which: &str| unit_rows(&format!("teacher {which} {step}"), BATCH, config.embedding_dim);
    let teacher = match config.objective {
        Objective::Distill => Some([target("q")?, target("k")?]),
        Objective::Pretrain => None,
    };
    let locals = values(&format!("locals {step}"), &[BATCH, LOCALS, LOCAL_SIZE, LOCAL_SIZE, 3], -2.0, 2.0)?;
    Ok(Batch {
        step,
        epoch: step.min(1),
        sample_ids: (0..BATCH as u64).collect(),
        views: [view("q")?, view("k")?],
        locals: Some(locals),
        teacher,
        shuffled_keys: None,
    })
}

fn check_swav(objective: Objective, accumulate: usize, golden: &Trace) -> Result<()> {
    let config = config(objective, accumulate)?;
    let query = query(&config)?;
    let MethodConfig::Swav(settings) = &config.method else { anyhow::bail!("another method") };
    let swav = Swav::new(settings, &query, 0)?;
    let prototypes = parameter("prototypes.weight", &[PROTOTYPES, config.embedding_dim])?;
    swav.trainable().store.load(&BTreeMap::from([("weight".to_owned(), prototypes)]))?;
    let mut state = TrainingState::from_parts(query, Method::Swav(Box::new(swav)), &config)?;
    for (step, golden) in golden.losses.iter().enumerate() {
        let found = state.step(&batch(&config, step as u64)?, &[], config.optimisation.lr)?;
        check_losses(step, &found, golden);
    }
    assert_eq!(state.counters()["swav_queue_entered"], golden.pointer);
    // Running statistics move once for every piece of a batch.
    let compared =
        |name: &str| accumulate == 1 || !(name.contains(".running_") || name.ends_with("num_batches_tracked"));
    check_tensors(&state, &golden.tensors, MOMENTUM_TOLERANCE, compared)
}

#[test]
fn three_swav_steps_equal_pytorch() -> Result<()> {
    check_swav(Objective::Pretrain, 1, &golden()?.pretrain)
}

#[test]
fn three_swav_steps_under_a_teacher_equal_pytorch_in_one_piece_and_in_two() -> Result<()> {
    let golden = golden()?;
    check_swav(Objective::Distill, 1, &golden.distill)?;
    check_swav(Objective::Distill, 2, &golden.distill)
}

#[test]
fn three_moco_v1_steps_equal_pytorch() -> Result<()> {
    let golden = golden()?;
    let options = Options { queue_size: Some(20), ..options(MethodName::MocoV1) };
    let config = Config::new(Objective::Pretrain, &options, None)?;
    check(&config, &golden.moco_v1, &golden.shuffles, MOCO_V1_MOMENTUM_TOLERANCE)
}

#[test]
fn sinkhorn_equals_the_official_formula() -> Result<()> {
    let scores = values("sinkhorn scores", &[200, PROTOTYPES], -1.0, 1.0)?;
    let error = fingerprint_distance("sinkhorn", &sinkhorn(&scores, 0.05, 3, 60)?, &golden()?.sinkhorn)?;
    assert!(error < 1e-5, "relative error {error:e}");
    Ok(())
}
