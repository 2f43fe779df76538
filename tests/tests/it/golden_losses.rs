//! Both losses and the moving average against `PyTorch`.
//!
//! `tests/golden/losses_and_optimisers.py` computed the values in f64 and says how.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor, Var};
use serde::Deserialize;
use shared::losses::{self, InfoNce};
use shared::ops::{Builder, ParameterStore};
use shared::optim::ema_update;
use tests::formula::{fingerprint_distance, parameter, parameters, unit_rows, values};

const BATCH: usize = 20;
const WIDTH: usize = 32;
const QUEUE: usize = 150;

#[derive(Deserialize)]
struct Golden {
    info_nce: Vec<Contrast>,
    distillation: Distillation,
    ema: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct Contrast {
    temperature: f64,
    loss: f64,
    top1: f32,
    gradient: Vec<f64>,
}

#[derive(Deserialize)]
struct Distillation {
    loss: f64,
    gradient: Vec<f64>,
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/losses_and_optimisers.json")).context("golden values")
}

fn store() -> Result<ParameterStore> {
    let mut builder = Builder::new(&Device::Cpu);
    builder.linear("fc", 5, 6)?;
    builder.batch_norm("bn", 7)?;
    let store = builder.finish(0)?;
    store.load(&parameters(&store.names_and_shapes())?)?;
    Ok(store)
}

fn assert_close(tensors: &BTreeMap<String, Tensor>, golden: &BTreeMap<String, Vec<f64>>) -> Result<()> {
    for (name, numbers) in golden {
        let distance = fingerprint_distance(name, &tensors[name], numbers)?;
        assert!(distance < 1e-6, "{name}: relative error {distance:e}");
    }
    Ok(())
}

#[test]
fn info_nce_is_pytorchs_cross_entropy() -> Result<()> {
    let (q, k, queue) =
        (unit_rows("q", BATCH, WIDTH)?, unit_rows("k", BATCH, WIDTH)?, unit_rows("queue", QUEUE, WIDTH)?);
    let k = (k.to_dtype(DType::F64)? + (q.to_dtype(DType::F64)? * 0.5)?)?;
    let k = k.broadcast_div(&k.sqr()?.sum_keepdim(1)?.sqrt()?)?.to_dtype(DType::F32)?;
    for golden in golden()?.info_nce {
        let q = Var::from_tensor(&q)?;
        let InfoNce { loss, top1 } = losses::info_nce(&q, &k, &queue, golden.temperature)?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(&q).context("q has a gradient")?;
        assert!((f64::from(loss.to_scalar::<f32>()?) / golden.loss - 1.0).abs() < 1e-6);
        assert_eq!(top1.to_scalar::<f32>()?, golden.top1);
        assert!(fingerprint_distance("q", gradient, &golden.gradient)? < 1e-6);
    }
    Ok(())
}

#[test]
fn distillation_is_pytorchs_summed_squared_error_over_the_batch() -> Result<()> {
    let golden = golden()?.distillation;
    let student = Var::from_tensor(&unit_rows("q", BATCH, WIDTH)?)?;
    let loss = losses::distillation(&student, &unit_rows("k", BATCH, WIDTH)?)?;
    let gradients = loss.backward()?;
    let gradient = gradients.get(&student).context("the student has a gradient")?;
    assert!((f64::from(loss.to_scalar::<f32>()?) / golden.loss - 1.0).abs() < 1e-6);
    assert!(fingerprint_distance("q", gradient, &golden.gradient)? < 1e-6);
    Ok(())
}

#[test]
fn ten_steps_of_the_moving_average_are_pytorchs() -> Result<()> {
    let (key, query) = (store()?, store()?);
    let mut tensors = query.to_tensors()?;
    for name in ["fc.weight", "fc.bias", "bn.weight", "bn.bias"] {
        let shape = tensors[name].dims().to_vec();
        tensors.insert(name.into(), values(&format!("query {name}"), &shape, -1.0, 1.0)?);
    }
    tensors.insert("bn.running_mean".into(), Tensor::zeros(7, DType::F32, &Device::Cpu)?);
    query.load(&tensors)?;
    for _ in 0..10 {
        ema_update(&key, &query, 0.99)?;
    }
    let after = key.to_tensors()?;
    assert_close(&after, &golden()?.ema)?;
    let (kept, first) = (&after["bn.running_mean"], parameter("bn.running_mean", &[7])?);
    assert_eq!(kept.to_vec1::<f32>()?, first.to_vec1::<f32>()?);
    Ok(())
}
