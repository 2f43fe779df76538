//! The networks against torchvision and timm: names, shapes, features, embeddings, and backward passes.
//!
//! `tests/golden/models.py` computed the values in f64 and says how.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use candle_core::Tensor;
use serde::Deserialize;
use shared::losses;
use shared::models::{Arch, Encoder, HeadConfig, names_and_shapes};
use shared::ops::{Engine, Mode};
use tests::formula::{fingerprint, fingerprint_distance, parameters, unit, unit_rows, values};

const HEAD: HeadConfig = HeadConfig::mlp(48, 16);
/// Largest relative error of an f32 forward or backward pass against f64. `PyTorch`'s own passes in f32 come to 4e-5.
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    evaluation: BTreeMap<Arch, Evaluation>,
    training: BTreeMap<Arch, Training>,
}

#[derive(Deserialize)]
struct Evaluation {
    tensors: usize,
    names_and_shapes: u64,
    variance_scale: f64,
    images: Vec<Images>,
}

#[derive(Deserialize)]
struct Images {
    side: usize,
    features: Vec<f64>,
    embeddings: Vec<f64>,
}

#[derive(Deserialize)]
struct Training {
    images: String,
    embeddings: Vec<f64>,
    #[serde(flatten)]
    backward: Backward,
}

/// What a training pass leaves behind.
#[derive(Deserialize)]
pub(crate) struct Backward {
    loss: f64,
    zero_gradients: Vec<String>,
    gradients: BTreeMap<String, Vec<f64>>,
    buffers: BTreeMap<String, Vec<f64>>,
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/models.json")).context("tests/golden/models.json")
}

fn encoder(arch: Arch, engine: Engine, variance_scale: f64) -> Result<Encoder> {
    let encoder = Encoder::new(arch, Some(HEAD), 0)?.with_engine(engine);
    let mut tensors = parameters(&encoder.store().names_and_shapes())?;
    for (_, variance) in tensors.iter_mut().filter(|(name, _)| name.ends_with("running_var")) {
        *variance = (&*variance * variance_scale)?;
    }
    encoder.store().load(&tensors)?;
    Ok(encoder)
}

pub(crate) fn assert_close(what: &str, distance: f64) {
    assert!(distance < TOLERANCE, "{what}: relative error {distance:e}");
}

/// What the golden scripts store of all names and shapes of a network.
pub(crate) fn digest(named: &[(String, Vec<usize>)]) -> Result<u64> {
    let sizes = |shape: &[usize]| shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let text: Vec<String> = named.iter().map(|(name, shape)| format!("{name}:{}", sizes(shape))).collect();
    Ok((unit(&text.join(";"), 1).next().context("one number")? * 16_777_216.0) as u64)
}

impl Backward {
    /// Runs the backward pass and compares the loss, every gradient and every buffer.
    pub(crate) fn check(&self, encoder: &Encoder, loss: &Tensor) -> Result<()> {
        let store = encoder.store();
        let gradients = store.to_file_layout(store.backward(loss)?.iter())?;
        assert_close("loss", (f64::from(loss.to_scalar::<f32>()?) / self.loss - 1.0).abs());
        assert_eq!(gradients.len(), self.gradients.len() + self.zero_gradients.len());
        for (name, numbers) in &self.gradients {
            assert_close(name, fingerprint_distance(name, &gradients[name], numbers)?);
        }
        for shift in &self.zero_gradients {
            // Relative to the gradient of the same layer's weight or scale, which sums up products of the same size.
            let scale = self.gradients[&shift.replace("bias", "weight")][0];
            assert_close(shift, fingerprint(shift, &gradients[shift])?[0] / scale);
        }
        let tensors = store.to_tensors()?;
        for (name, numbers) in &self.buffers {
            assert_close(name, fingerprint_distance(name, &tensors[name], numbers)?);
        }
        Ok(())
    }
}

#[test]
fn names_and_shapes_are_those_of_torchvision_and_timm() -> Result<()> {
    let golden = golden()?.evaluation;
    assert!(golden.keys().eq(Arch::ALL.iter().filter(|arch| !is_transformer(**arch))));
    for (arch, golden) in golden {
        let named = names_and_shapes(arch, Some(HEAD))?;
        assert_eq!(named.len(), golden.tensors, "{arch}");
        assert_eq!(digest(&named)?, golden.names_and_shapes, "{arch}");
        assert_eq!(Encoder::new(arch, Some(HEAD), 0)?.store().names_and_shapes(), named);
    }
    Ok(())
}

fn evaluated_like_pytorch(is_tested: impl Fn(Arch) -> bool, engine: Engine) -> Result<()> {
    for (arch, golden) in golden()?.evaluation.into_iter().filter(|(arch, _)| is_tested(*arch)) {
        let encoder = encoder(arch, engine, golden.variance_scale)?;
        for Images { side, features, embeddings } in golden.images {
            let xs = values("images", &[2, side, side, 3], -2.0, 2.0)?;
            let what = |what: &str| format!("{what} of {arch} at {side} by {engine:?}");
            let found = encoder.features(&xs, Mode::Eval)?;
            assert_close(&what("features"), fingerprint_distance("features", &found, &features)?);
            let found = encoder.embeddings(&xs, Mode::Eval)?;
            assert_close(&what("embeddings"), fingerprint_distance("embeddings", &found, &embeddings)?);
        }
    }
    Ok(())
}

/// Networks that `golden_transformers` is about.
pub(crate) fn is_transformer(arch: Arch) -> bool {
    arch.name().starts_with("vit_") || arch.name().starts_with("xcit_")
}

fn is_residual(arch: Arch) -> bool {
    arch.name().starts_with("resnet")
}

fn is_lite(arch: Arch) -> bool {
    arch.name().contains("_lite")
}

#[test]
fn evaluated_residual_networks_are_torchvisions() -> Result<()> {
    evaluated_like_pytorch(is_residual, Engine::Cpu)
}

/// The smallest of each family: the reference is slow.
#[test]
fn evaluated_efficient_networks_are_timms_by_the_reference() -> Result<()> {
    let smallest = [Arch::EfficientNetB0, Arch::MobileNetV3Large, Arch::EfficientNetLite0];
    evaluated_like_pytorch(|arch| smallest.contains(&arch), Engine::Reference)
}

#[test]
fn evaluated_efficient_networks_are_timms_by_the_cpu_engine() -> Result<()> {
    evaluated_like_pytorch(|arch| !is_residual(arch) && !is_lite(arch), Engine::Cpu)
}

#[test]
fn evaluated_lite_networks_are_timms_by_the_cpu_engine() -> Result<()> {
    evaluated_like_pytorch(is_lite, Engine::Cpu)
}

fn trained_like_pytorch(arch: Arch, engine: Engine) -> Result<()> {
    let golden = golden()?.training.remove(&arch).context("no golden training pass")?;
    let encoder = encoder(arch, engine, 1.0)?;
    let xs = values(&golden.images, &[4, 40, 40, 3], -2.0, 2.0)?;
    let embeddings = encoder.embeddings(&xs, Mode::Train { bn_groups: 1 })?;
    let loss = losses::distillation(&embeddings, &unit_rows("target", 4, HEAD.embedding_dim)?)?;
    assert_close("embeddings", fingerprint_distance("embeddings", &embeddings, &golden.embeddings)?);
    golden.backward.check(&encoder, &loss)
}

#[test]
fn a_training_pass_of_resnet18_is_torchvisions() -> Result<()> {
    trained_like_pytorch(Arch::ResNet18, Engine::Cpu)?;
    trained_like_pytorch(Arch::ResNet18, Engine::Reference)
}

#[test]
fn a_training_pass_of_efficientnet_b0_is_timms_by_the_reference() -> Result<()> {
    trained_like_pytorch(Arch::EfficientNetB0, Engine::Reference)
}

#[test]
fn a_training_pass_of_efficientnet_b0_is_timms_by_the_cpu_engine() -> Result<()> {
    trained_like_pytorch(Arch::EfficientNetB0, Engine::Cpu)
}

#[test]
fn a_training_pass_of_mobilenetv3_is_timms_by_the_reference() -> Result<()> {
    trained_like_pytorch(Arch::MobileNetV3Large, Engine::Reference)
}

#[test]
fn a_training_pass_of_mobilenetv3_is_timms_by_the_cpu_engine() -> Result<()> {
    trained_like_pytorch(Arch::MobileNetV3Large, Engine::Cpu)
}
