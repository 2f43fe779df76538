//! Three whole steps of every objective of distillation against PyTorch: losses, the student, the predictor and the queues.
//!
//! `tests/golden/distill_steps.py` computed the values in f64 and says how. Errors are measured as in `golden_disco`.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use candle_core::Tensor;
use serde::Deserialize;
use shared::models::{MlpConfig, MlpHead, MlpLayer};
use shared::run::{Losses, Objective};
use student_train::config::{Ensemble, HeadSource, MethodConfig, MethodName};
use student_train::method::{Method, Moco, Queue};
use student_train::step::{Batch, TrainingState};
use student_train::teachers::combine;
use student_train::{Config, Options};
use tests::formula::{fingerprint_distance, parameters, unit_rows, values};

use crate::golden_disco::{check_losses, query, shift};

/// Largest relative error after three steps in f32, against f64.
const TOLERANCE: f64 = 1e-4;
const SIZE: usize = 64;
const BATCH: usize = 8;
const WIDTH: usize = 32;
const QUEUE: usize = 20;

#[derive(Deserialize)]
struct Golden {
    shuffles: Vec<Vec<u32>>,
    traces: BTreeMap<String, Trace>,
}

#[derive(Deserialize)]
struct Trace {
    losses: Vec<Losses>,
    counters: BTreeMap<String, u64>,
    tensors: BTreeMap<String, Vec<f64>>,
}

fn config(distill: &str, method: MethodName, head: Option<&MlpHead>) -> Result<Config> {
    let contrast = method == MethodName::MocoV2;
    let options = Options {
        batch_size: Some(BATCH),
        bn_groups: Some(2),
        head: head.map(|_| HeadSource::Retro),
        head_hidden: head.is_none().then_some(64),
        embedding_dim: Some(WIDTH),
        method: Some(method),
        queue_size: contrast.then_some(QUEUE),
        distill: Some(distill.parse().map_err(anyhow::Error::msg)?),
        seed_queue_size: distill.contains("seed").then_some(QUEUE),
        ..Options::default()
    };
    let mut config = Config::new(Objective::Distill, &options, None)?;
    if let Some(head) = head {
        config.reuse_head(head.config());
    }
    Ok(config)
}

/// The script's head of the teacher.
fn teacher_head() -> Result<MlpHead> {
    let linear =
        |name: &str, inputs, outputs, bias| MlpLayer::Linear { name: format!("head.{name}"), inputs, outputs, bias };
    let norm = MlpLayer::BatchNorm { name: "head.bn1".into(), width: 40, affine: true };
    let (first, second, third) = (linear("0", 48, 40, true), linear("3", 40, 36, false), linear("5", 36, WIDTH, true));
    let layers = vec![first, norm, MlpLayer::Relu, second, MlpLayer::Gelu, third];
    let config = MlpConfig::new(layers).map_err(anyhow::Error::msg)?;
    let mut weights = parameters(&config.names_and_shapes())?;
    weights.insert("head.bn1.bias".into(), shift("head.bn1.bias", 40)?);
    Ok(MlpHead::new(&config, &weights)?)
}

fn target(which: &str, step: u64, teachers: usize) -> Result<Tensor> {
    match teachers {
        1 => unit_rows(&format!("teacher {which} {step}"), BATCH, WIDTH),
        2 => {
            let part = |teacher: &str, width| unit_rows(&format!("teacher {teacher} {which} {step}"), BATCH, width);
            Ok(combine(&[part("a", 20)?, part("b", 12)?], Ensemble::Concat)?)
        }
        other => bail!("{other} teachers"),
    }
}

fn batch(step: u64, teachers: usize) -> Result<Batch> {
    let view = |which: &str| values(&format!("view {which} {step}"), &[BATCH, SIZE, SIZE, 3], -2.0, 2.0);
    Ok(Batch {
        step,
        epoch: 0,
        sample_ids: (0..BATCH as u64).collect(),
        views: [view("q")?, view("k")?],
        locals: None,
        teacher: Some([target("q", step, teachers)?, target("k", step, teachers)?]),
        shuffled_keys: None,
    })
}

fn start(config: &Config, head: Option<MlpHead>) -> Result<TrainingState> {
    let mut query = query(config)?;
    if let Some(head) = head {
        query = query.with_reused_head(Arc::new(head))?;
    }
    let method = match &config.method {
        MethodConfig::MocoV2(moco) => {
            let queue = Queue::from_keys(unit_rows("queue", QUEUE, WIDTH)?, 0)?;
            Method::Moco(Box::new(Moco::from_parts(moco, &query, queue)?))
        }
        MethodConfig::Alone => Method::Alone,
        _ => bail!("another method"),
    };
    let state = TrainingState::from_parts(query, method, config)?;
    for trainable in state.distillation().context("no teacher")?.trainables() {
        let mut weights = parameters(&trainable.store.names_and_shapes())?;
        for name in ["predictor.1.bias", "predictor.5.bias"] {
            weights.insert(name.into(), shift(name, weights[name].elem_count())?);
        }
        trainable.store.load(&weights)?;
    }
    // A checkpoint's tensor of the queue is the queue itself.
    if let Some(queue) = state.to_tensors()?.get("seed_queue") {
        queue.slice_set(&unit_rows("seed queue", QUEUE, WIDTH)?, 0, 0)?;
    }
    Ok(state)
}

fn check(name: &str, distill: &str, method: MethodName, teachers: usize) -> Result<()> {
    check_with_head(name, distill, method, teachers, None)
}

fn check_with_head(
    name: &str,
    distill: &str,
    method: MethodName,
    teachers: usize,
    head: Option<MlpHead>,
) -> Result<()> {
    let golden: Golden =
        serde_json::from_str(include_str!("../../golden/distill_steps.json")).context("distill_steps.json")?;
    let trace = &golden.traces[name];
    let config = config(distill, method, head.as_ref())?;
    let mut state = start(&config, head)?;
    // The script says why.
    let short = ["rkd", "rkd and mse", "simreg"].contains(&name);
    let lr = if short { config.optimisation.lr / 10.0 } else { config.optimisation.lr };
    for (step, (golden, shuffle)) in trace.losses.iter().zip(&golden.shuffles).enumerate() {
        let found = state.step(&batch(step as u64, teachers)?, shuffle, lr)?;
        check_losses(step, &found, golden);
    }
    assert_eq!(state.counters(), trace.counters);
    let mut tensors = state.to_tensors()?;
    tensors.retain(|name, _| !name.starts_with("key.") && !name.starts_with("sgd."));
    assert_eq!(tensors.keys().collect::<Vec<_>>(), trace.tensors.keys().collect::<Vec<_>>());
    for (name, golden) in &trace.tensors {
        let error = fingerprint_distance(name, &tensors[name], golden)?;
        assert!(error < TOLERANCE, "tensor `{name}`: relative error {error:e}");
    }
    Ok(())
}

#[test]
fn three_steps_with_relations_equal_pytorch() -> Result<()> {
    check("rkd", "rkd-distance=1@query,rkd-angle=2@query", MethodName::MocoV2, 1)?;
    check("rkd and mse", "mse=32,rkd-distance=0.5,rkd-angle=1", MethodName::MocoV2, 1)
}

#[test]
fn three_steps_of_seed_equal_pytorch() -> Result<()> {
    check("seed", "seed=1", MethodName::MocoV2, 1)?;
    check("seed alone", "seed=1@query", MethodName::None, 1)
}

#[test]
fn three_steps_of_simreg_equal_pytorch() -> Result<()> {
    check("simreg", "simreg=2", MethodName::MocoV2, 1)
}

#[test]
fn three_steps_of_the_squared_distance_alone_equal_pytorch() -> Result<()> {
    check("mse alone", "mse=32", MethodName::None, 1)
}

#[test]
fn three_steps_with_the_teachers_own_head_equal_pytorch() -> Result<()> {
    check_with_head("retro", "mse=32", MethodName::MocoV2, 1, Some(teacher_head()?))
}

#[test]
fn three_steps_with_two_teachers_equal_pytorch() -> Result<()> {
    check("concat", "mse=32", MethodName::None, 2)
}
