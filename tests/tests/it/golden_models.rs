//! The residual networks against torchvision: names, shapes, features, embeddings, and one backward pass.
//!
//! `tests/golden/models.py` computed the values in f64 and says how.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use shared::losses;
use shared::models::{Arch, Encoder, HeadConfig, names_and_shapes};
use shared::ops::{Engine, Mode};
use tests::formula::{fingerprint_distance, parameters, unit, unit_rows, values};

const HEAD: HeadConfig = HeadConfig { hidden: 48, embedding_dim: 16 };
/// Largest relative error of an f32 forward or backward pass against f64.
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    evaluation: BTreeMap<Arch, Evaluation>,
    training: Training,
}

#[derive(Deserialize)]
struct Evaluation {
    tensors: usize,
    names_and_shapes: u64,
    features: Vec<f64>,
    embeddings: Vec<f64>,
}

#[derive(Deserialize)]
struct Training {
    loss: f64,
    embeddings: Vec<f64>,
    gradients: BTreeMap<String, Vec<f64>>,
    buffers: BTreeMap<String, Vec<f64>>,
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/models.json")).context("tests/golden/models.json")
}

fn encoder(arch: Arch, engine: Engine) -> Result<Encoder> {
    let encoder = Encoder::new(arch, Some(HEAD), 0)?.with_engine(engine);
    encoder.store().load(&parameters(&encoder.store().names_and_shapes())?)?;
    Ok(encoder)
}

fn assert_close(what: &str, distance: f64) {
    assert!(distance < TOLERANCE, "{what}: relative error {distance:e}");
}

#[test]
fn names_and_shapes_are_torchvisions() -> Result<()> {
    for (arch, golden) in golden()?.evaluation {
        let named = names_and_shapes(arch, Some(HEAD))?;
        assert_eq!(named.len(), golden.tensors, "{arch}");
        let text: Vec<String> = named
            .iter()
            .map(|(name, shape)| {
                format!("{name}:{}", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
            })
            .collect();
        let digest = unit(&text.join(";"), 1).next().context("one number")? * 16_777_216.0;
        assert_eq!(digest as u64, golden.names_and_shapes, "{arch}");
        assert_eq!(Encoder::new(arch, Some(HEAD), 0)?.store().names_and_shapes(), named);
    }
    Ok(())
}

#[test]
fn evaluated_features_and_embeddings_are_torchvisions() -> Result<()> {
    let xs = values("images", &[2, 64, 64, 3], -2.0, 2.0)?;
    for (arch, golden) in golden()?.evaluation {
        let encoder = encoder(arch, Engine::Cpu)?;
        let features = encoder.features(&xs, Mode::Eval)?;
        assert_close(arch.name(), fingerprint_distance("features", &features, &golden.features)?);
        let embeddings = encoder.embeddings(&xs, Mode::Eval)?;
        assert_close(arch.name(), fingerprint_distance("embeddings", &embeddings, &golden.embeddings)?);
    }
    Ok(())
}

#[test]
fn a_training_pass_has_torchvisions_loss_gradients_and_buffers() -> Result<()> {
    let golden = golden()?.training;
    for engine in [Engine::Cpu, Engine::Reference] {
        let encoder = encoder(Arch::ResNet18, engine)?;
        let xs = values("images 17", &[4, 40, 40, 3], -2.0, 2.0)?;
        let embeddings = encoder.embeddings(&xs, Mode::Train { bn_groups: 1 })?;
        let loss = losses::distillation(&embeddings, &unit_rows("target", 4, HEAD.embedding_dim)?)?;
        let store = encoder.store();
        let gradients = store.to_file_layout(store.backward(&loss)?.iter())?;

        let error = (f64::from(loss.to_scalar::<f32>()?) / golden.loss - 1.0).abs();
        assert_close("loss", error);
        assert_close("embeddings", fingerprint_distance("embeddings", &embeddings, &golden.embeddings)?);
        assert!(gradients.keys().eq(golden.gradients.keys()));
        for (name, numbers) in &golden.gradients {
            assert_close(name, fingerprint_distance(name, &gradients[name], numbers)?);
        }
        let tensors = store.to_tensors()?;
        for (name, numbers) in &golden.buffers {
            assert_close(name, fingerprint_distance(name, &tensors[name], numbers)?);
        }
    }
    Ok(())
}
