//! Encoders and their stores: initial values, loading, copies, what is refused.

use candle_core::{DType, Device, Tensor};
use shared::models::{Arch, Encoder, HeadConfig, names_and_shapes};
use shared::ops::{Engine, Mode};

type TestResult = Result<(), Box<dyn std::error::Error>>;

const HEAD: HeadConfig = HeadConfig { hidden: 300, embedding_dim: 20 };

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)).and_then(|t| t.to_vec1()).expect("a float tensor")
}

fn mean_and_std(xs: &[f64]) -> (f64, f64) {
    let mean = xs.iter().sum::<f64>() / xs.len() as f64;
    (mean, (xs.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / xs.len() as f64).sqrt())
}

#[test]
fn initial_values_have_pytorchs_distributions() -> TestResult {
    let tensors = Encoder::new(Arch::ResNet18, Some(HEAD), 11)?.store().to_tensors()?;
    for (name, tensor) in &tensors {
        let xs = if tensor.dtype().is_float() { values(tensor) } else { Vec::new() };
        match tensor.dims() {
            // kaiming_normal_(mode="fan_out", nonlinearity="relu")
            &[out, _, kh, kw] => {
                let (mean, std) = mean_and_std(&xs);
                let expected = (2.0 / (out * kh * kw) as f64).sqrt();
                let slack = 4.0 / (xs.len() as f64).sqrt();
                assert!((std / expected - 1.0).abs() < slack && mean.abs() < slack * expected, "{name} {mean} {std}");
                let beyond = xs.iter().filter(|x| x.abs() > 2.0 * expected).count() as f64 / xs.len() as f64;
                assert!((beyond - 0.0455).abs() < 0.01, "{name}: {beyond} beyond two standard deviations");
            }
            // kaiming_uniform_(a=sqrt(5)) and the bias' own bound: both U(-1/sqrt(in), 1/sqrt(in))
            _ if name.starts_with("fc.") => {
                let inputs = if name.starts_with("fc.0") { 512.0 } else { 300.0f64 };
                let bound = 1.0 / inputs.sqrt();
                let top = xs.iter().fold(0f64, |top, x| top.max(x.abs()));
                assert!(top <= bound && top > 0.8 * bound, "{name}: {top} of {bound}");
                let (mean, std) = mean_and_std(&xs);
                let slack = 4.0 / (xs.len() as f64).sqrt();
                assert!((std * 3f64.sqrt() / bound - 1.0).abs() < slack && mean.abs() < slack * bound, "{name}");
            }
            _ if name.ends_with("num_batches_tracked") => assert_eq!(tensor.to_scalar::<i64>()?, 0),
            _ => {
                let one = name.ends_with("weight") || name.ends_with("running_var");
                assert!(xs.iter().all(|&x| x == f64::from(u8::from(one))), "{name}");
            }
        }
    }
    Ok(())
}

#[test]
fn initial_values_depend_on_seed_and_name_only() -> TestResult {
    let plain = Encoder::new(Arch::ResNet18, None, 3)?.store().to_tensors()?;
    let headed = Encoder::new(Arch::ResNet18, Some(HEAD), 3)?.store().to_tensors()?;
    let other = Encoder::new(Arch::ResNet18, None, 4)?.store().to_tensors()?;
    for (name, tensor) in &plain {
        if tensor.rank() == 4 {
            assert_eq!(values(tensor), values(&headed[name]), "{name}");
            assert_ne!(values(tensor), values(&other[name]), "{name}");
        }
    }
    assert_ne!(values(&plain["layer1.0.conv1.weight"]), values(&plain["layer1.0.conv2.weight"]));
    Ok(())
}

#[test]
fn all_architectures_have_the_papers_parameters() -> TestResult {
    let millions = [11.18, 21.28, 23.51, 42.50, 58.14];
    for (arch, expected) in Arch::ALL.into_iter().zip(millions) {
        let count: usize = names_and_shapes(arch, None)?
            .iter()
            .filter(|(name, _)| !name.contains("running_") && !name.ends_with("num_batches_tracked"))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        assert!((count as f64 / 1e6 - expected).abs() < 0.01, "{arch}: {count}");
        assert_eq!(arch.name().parse::<Arch>()?, arch);
    }
    assert!("resnet19".parse::<Arch>().is_err());
    Ok(())
}

#[test]
fn loading_what_was_saved_gives_the_same_embeddings() -> TestResult {
    let (a, b) = (Encoder::new(Arch::ResNet18, Some(HEAD), 1)?, Encoder::new(Arch::ResNet18, Some(HEAD), 2)?);
    let xs = Tensor::arange(0f32, 2.0 * 32.0 * 32.0 * 3.0, &Device::Cpu)?.sin()?.reshape((2, 32, 32, 3))?;
    b.store().load(&a.store().to_tensors()?)?;
    assert_eq!(values(&a.embeddings(&xs, Mode::Eval)?), values(&b.embeddings(&xs, Mode::Eval)?));
    let halves = a.store().to_tensors()?.into_iter().map(|(name, tensor)| {
        let dtype = if tensor.dtype().is_float() { DType::F16 } else { tensor.dtype() };
        Ok((name, tensor.to_dtype(dtype)?))
    });
    b.store().load(&halves.collect::<candle_core::Result<_>>()?)?;
    let close = values(&a.embeddings(&xs, Mode::Eval)?).into_iter().zip(values(&b.embeddings(&xs, Mode::Eval)?));
    assert!(close.into_iter().all(|(a, b)| (a - b).abs() < 1e-2));
    Ok(())
}

#[test]
fn weights_of_another_model_are_refused_by_name_and_nothing_changes() -> TestResult {
    let small = Encoder::new(Arch::ResNet18, Some(HEAD), 1)?;
    let before = small.store().to_tensors()?;
    let error = small.store().load(&Encoder::new(Arch::ResNet50, None, 1)?.store().to_tensors()?).expect_err("other");
    let message = error.to_string();
    for part in [
        "4 missing: `fc.0.bias`, `fc.0.weight`, `fc.2.bias`, `fc.2.weight`",
        "unexpected: `layer1.0.bn3.bias`",
        "`layer1.0.conv1.weight` (expected [64, 64, 3, 3], found [64, 64, 1, 1])",
        "more",
    ] {
        assert!(message.contains(part), "{part} in {message}");
    }
    assert!(error.hint().is_some());
    let after = small.store().to_tensors()?;
    assert!(before.iter().all(|(name, tensor)| !tensor.dtype().is_float() || values(tensor) == values(&after[name])));
    Ok(())
}

#[test]
fn missing_batch_counters_are_taken_as_zero() -> TestResult {
    let encoder = Encoder::new(Arch::ResNet18, None, 1)?;
    let xs = Tensor::ones((2, 32, 32, 3), DType::F32, &Device::Cpu)?;
    encoder.features(&xs, Mode::Train { bn_groups: 1 })?;
    let mut tensors = encoder.store().to_tensors()?;
    assert_eq!(tensors["bn1.num_batches_tracked"].to_scalar::<i64>()?, 1);
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    encoder.store().load(&tensors)?;
    assert_eq!(encoder.store().to_tensors()?["bn1.num_batches_tracked"].to_scalar::<i64>()?, 0);
    Ok(())
}

#[test]
fn a_momentum_copy_has_parameters_of_its_own_and_records_nothing() -> TestResult {
    let query = Encoder::new(Arch::ResNet18, Some(HEAD), 1)?;
    for engine in [Engine::Cpu, Engine::Reference] {
        let key = query.momentum_copy()?.with_engine(engine);
        let xs = Tensor::arange(0f32, 2.0 * 40.0 * 40.0 * 3.0, &Device::Cpu)?.sin()?.reshape((2, 40, 40, 3))?;
        let embeddings = key.embeddings(&xs, Mode::Train { bn_groups: 1 })?;
        assert!(!embeddings.track_op());
        assert!(!query.embeddings(&xs, Mode::Eval)?.track_op());
        assert!(query.embeddings(&xs, Mode::Train { bn_groups: 1 })?.track_op());
        let moved = key.store().to_tensors()?["bn1.running_mean"].clone();
        assert_ne!(values(&moved), vec![0.0; 64]);
    }
    Ok(())
}

#[test]
fn an_encoder_without_a_head_has_no_embeddings() -> TestResult {
    let encoder = Encoder::new(Arch::ResNet18, None, 1)?;
    let xs = Tensor::zeros((1, 32, 32, 3), DType::F32, &Device::Cpu)?;
    let error = encoder.embeddings(&xs, Mode::Eval).expect_err("no head");
    assert!(error.to_string().contains("no projection head"));
    Ok(())
}
