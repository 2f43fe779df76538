//! Transformers against timm: names, shapes, features of images of two sizes, and backward passes.
//!
//! `tests/golden/transformers.py` computed the values in f64 and says how. Features within a relative error of 1e-4 have a cosine of
//! more than 0.99999999 with timm's.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use candle_core::{Device, Tensor};
use serde::Deserialize;
use shared::models::{Arch, Encoder, VitOptions, names_and_shapes};
use shared::ops::{self, Engine, Mode, Pass, PositionResampling};
use shared::{Error, losses};
use tests::formula::{fingerprint_distance, parameters, unit_rows, values};

use crate::golden_models::{Backward, assert_close, digest, is_transformer};

#[derive(Deserialize)]
struct Golden {
    scales: BTreeMap<String, f64>,
    evaluation: BTreeMap<Arch, Evaluation>,
    dino: BTreeMap<Arch, Images>,
    twelve_heads: Images,
    training: BTreeMap<Arch, Training>,
}

#[derive(Deserialize)]
struct Evaluation {
    tensors: usize,
    names_and_shapes: u64,
    images: Vec<Images>,
}

#[derive(Deserialize)]
struct Images {
    size: [usize; 2],
    batch: usize,
    features: Vec<f64>,
}

#[derive(Deserialize)]
struct Training {
    size: [usize; 2],
    batch: usize,
    rows: Vec<f64>,
    #[serde(flatten)]
    backward: Backward,
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/transformers.json")).context("tests/golden/transformers.json")
}

fn encoder(arch: Arch, options: VitOptions, engine: Engine, scales: &BTreeMap<String, f64>) -> Result<Encoder> {
    let encoder = Encoder::with_vit_options(arch, None, options, 0, &Device::Cpu)?.with_engine(engine);
    let mut tensors = parameters(&encoder.store().names_and_shapes())?;
    for (name, tensor) in &mut tensors {
        let last = name.rsplit('.').next().unwrap_or_default();
        if let Some((_, scale)) = scales.iter().find(|(start, _)| last.starts_with(start.as_str())) {
            *tensor = (&*tensor * *scale)?;
        }
    }
    encoder.store().load(&tensors)?;
    Ok(encoder)
}

fn images(batch: usize, [height, width]: [usize; 2]) -> Result<Tensor> {
    values("images", &[batch, height, width, 3], -2.0, 2.0)
}

fn assert_features(what: &str, encoder: &Encoder, golden: &Images) -> Result<()> {
    let found = encoder.features(&images(golden.batch, golden.size)?, Mode::Eval)?;
    let what = format!("features of {what}, {:?} pixels, by {:?}", golden.size, encoder.engine());
    assert_close(&what, fingerprint_distance("features", &found, &golden.features)?);
    Ok(())
}

#[test]
fn names_and_shapes_are_timms() -> Result<()> {
    let golden = golden()?.evaluation;
    assert!(golden.keys().eq(Arch::ALL.iter().filter(|arch| is_transformer(**arch))));
    for (arch, golden) in golden {
        let named = names_and_shapes(arch, None)?;
        assert_eq!(named.len(), golden.tensors, "{arch}");
        assert_eq!(digest(&named)?, golden.names_and_shapes, "{arch}");
    }
    Ok(())
}

fn evaluated_like_timm(is_tested: impl Fn(Arch) -> bool, engine: Engine) -> Result<()> {
    let golden = golden()?;
    let tested: Vec<_> = golden.evaluation.into_iter().filter(|(arch, _)| is_tested(*arch)).collect();
    assert!(!tested.is_empty());
    for (arch, evaluation) in tested {
        let encoder = encoder(arch, VitOptions::default(), engine, &golden.scales)?;
        for images in evaluation.images {
            assert_features(arch.name(), &encoder, &images)?;
        }
    }
    Ok(())
}

fn is_xcit(arch: Arch) -> bool {
    arch.name().starts_with("xcit")
}

#[test]
fn evaluated_vision_transformers_are_timms() -> Result<()> {
    evaluated_like_timm(|arch| !is_xcit(arch), Engine::Cpu)
}

#[test]
fn evaluated_cross_covariance_transformers_are_timms() -> Result<()> {
    evaluated_like_timm(is_xcit, Engine::Cpu)
}

#[test]
fn evaluated_tiny_transformers_are_timms_by_the_reference() -> Result<()> {
    evaluated_like_timm(|arch| [Arch::VitTinyPatch16, Arch::XcitTiny12Patch16].contains(&arch), Engine::Reference)
}

#[test]
fn positions_can_be_resampled_as_dino_does() -> Result<()> {
    let golden = golden()?;
    let options = VitOptions { positions: PositionResampling::Dino, ..VitOptions::default() };
    for (arch, images) in &golden.dino {
        for engine in [Engine::Cpu, Engine::Reference] {
            assert_features(arch.name(), &encoder(*arch, options, engine, &golden.scales)?, images)?;
        }
    }
    Ok(())
}

#[test]
fn heads_are_an_option() -> Result<()> {
    let golden = golden()?;
    let options = VitOptions { heads: Some(12), ..VitOptions::default() };
    let twelve = encoder(Arch::VitSmallPatch16, options, Engine::Cpu, &golden.scales)?;
    assert_features("twelve heads", &twelve, &golden.twelve_heads)?;
    assert_features("a copy with twelve heads", &twelve.momentum_copy()?, &golden.twelve_heads)?;
    let error = encoder(
        Arch::VitSmallPatch16,
        VitOptions { heads: Some(7), ..VitOptions::default() },
        Engine::Cpu,
        &golden.scales,
    )
    .expect_err("7 does not divide 384");
    assert!(error.to_string().contains("384 channels cannot be cut into 7 heads"), "{error}");
    Ok(())
}

#[test]
fn images_that_are_no_whole_patches_are_refused() -> Result<()> {
    let encoder = Encoder::new(Arch::VitTinyPatch16, None, 0)?;
    let error = encoder.features(&images(1, [32, 40])?, Mode::Eval).expect_err("40 is no multiple of 16");
    assert!(matches!(error, Error::Shape { .. }));
    assert!(error.to_string().contains("multiples of 16 pixels"), "{error}");
    Ok(())
}

fn trained_like_timm(arch: Arch, engine: Engine) -> Result<()> {
    let mut all = golden()?;
    let golden = all.training.remove(&arch).context("no golden training pass")?;
    let encoder = encoder(arch, VitOptions::default(), engine, &all.scales)?;
    let features = encoder.features(&images(golden.batch, golden.size)?, Mode::Train { bn_groups: 1 })?;
    let pass = Pass { mode: Mode::Train { bn_groups: 1 }, record: true, engine };
    let rows = ops::l2_normalise(&features, &pass)?;
    let loss = losses::distillation(&rows, &unit_rows("target", golden.batch, arch.feature_width())?)?;
    assert_close("rows", fingerprint_distance("rows", &rows, &golden.rows)?);
    golden.backward.check(&encoder, &loss)
}

#[test]
fn a_training_pass_of_a_vision_transformer_is_timms() -> Result<()> {
    trained_like_timm(Arch::VitTinyPatch16, Engine::Cpu)?;
    trained_like_timm(Arch::VitTinyPatch16, Engine::Reference)
}

#[test]
fn a_training_pass_of_a_cross_covariance_transformer_is_timms() -> Result<()> {
    trained_like_timm(Arch::XcitTiny12Patch16, Engine::Cpu)?;
    trained_like_timm(Arch::XcitTiny12Patch16, Engine::Reference)
}
