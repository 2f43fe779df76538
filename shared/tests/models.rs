//! Encoders and their stores: initial values, loading, copies, what is refused.

use candle_core::{DType, Device, Tensor};
use clap::ValueEnum as _;
use shared::Error;
use shared::models::{Arch, Encoder, HeadConfig, names_and_shapes};
use shared::ops::{Engine, Mode};

type TestResult = Result<(), Box<dyn std::error::Error>>;

const HEAD: HeadConfig = HeadConfig::mlp(300, 20);
/// One of each kind.
const KINDS: [Arch; 3] = [Arch::ResNet18, Arch::EfficientNetB0, Arch::MobileNetV3Large];

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)).and_then(|t| t.to_vec1()).expect("a float tensor")
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
    // sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters()); the sixth from SwAV's resnet50w2
    let counts = [
        11_176_512, 21_284_672, 23_508_032, 42_500_160, 58_143_808, 93_907_072, 4_007_548, 6_513_184, 4_202_032,
        3_371_008, 4_135_680, 4_811_072, 6_916_096, 11_725_568, 5_524_416, 21_665_664, 85_798_656, 5_526_720,
        21_670_272, 85_807_872, 6_523_272, 25_868_304,
    ];
    assert_eq!(counts.len(), Arch::ALL.len());
    for (arch, expected) in Arch::ALL.into_iter().zip(counts) {
        let count: usize = names_and_shapes(arch, None)?
            .iter()
            .filter(|(name, _)| !name.contains("running_") && !name.ends_with("num_batches_tracked"))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        assert_eq!(count, expected, "{arch}");
    }
    Ok(())
}

#[test]
fn an_architecture_has_one_name_everywhere() -> TestResult {
    for arch in Arch::ALL {
        let name = arch.name();
        assert_eq!((name.parse::<Arch>()?, arch.to_string().as_str()), (arch, name));
        assert_eq!((serde_json::to_value(arch)?, serde_json::from_value::<Arch>(name.into())?), (name.into(), arch));
        let flag = arch.to_possible_value().ok_or("not a flag's value")?;
        assert_eq!(flag.get_name_and_aliases().collect::<Vec<_>>(), [name]);
    }
    assert!("resnet19".parse::<Arch>().is_err());
    Ok(())
}

#[test]
fn loading_what_was_saved_gives_the_same_embeddings() -> TestResult {
    for arch in KINDS {
        check_loading_what_was_saved(arch)?;
    }
    Ok(())
}

fn check_loading_what_was_saved(arch: Arch) -> TestResult {
    let (a, b) = (Encoder::new(arch, Some(HEAD), 1)?, Encoder::new(arch, Some(HEAD), 2)?);
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
fn weights_of_another_efficient_network_are_refused() -> TestResult {
    let other = Encoder::new(Arch::MobileNetV3Large, None, 1)?.store().to_tensors()?;
    let message = Encoder::new(Arch::EfficientNetB0, None, 1)?.store().load(&other).expect_err("other").to_string();
    for part in [
        "missing: `blocks.0.0.se.conv_expand.bias`",
        "unexpected: `blocks.2.2.bn1.bias`",
        "`blocks.0.0.conv_dw.weight` (expected [32, 1, 3, 3], found [16, 1, 3, 3])",
    ] {
        assert!(message.contains(part), "{part} in {message}");
    }
    Ok(())
}

#[test]
fn images_of_any_size_give_features_and_images_of_other_channels_none() -> TestResult {
    for arch in KINDS {
        for engine in [Engine::Cpu, Engine::Reference] {
            let encoder = Encoder::new(arch, None, 1)?.with_engine(engine);
            for (height, width) in [(1, 1), (33, 7)] {
                let xs = Tensor::ones((2, height, width, 3), DType::F32, &Device::Cpu)?;
                assert_eq!(encoder.features(&xs, Mode::Eval)?.dims(), [2, arch.feature_width()]);
            }
            let error = encoder.features(&Tensor::ones((2, 32, 32, 4), DType::F32, &Device::Cpu)?, Mode::Eval);
            assert!(matches!(error, Err(Error::Shape { .. })), "{arch} {engine:?}");
        }
    }
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
    for arch in KINDS {
        let query = Encoder::new(arch, Some(HEAD), 1)?;
        for engine in [Engine::Cpu, Engine::Reference] {
            let key = query.momentum_copy()?.with_engine(engine);
            let xs = Tensor::arange(0f32, 2.0 * 40.0 * 40.0 * 3.0, &Device::Cpu)?.sin()?.reshape((2, 40, 40, 3))?;
            let embeddings = key.embeddings(&xs, Mode::Train { bn_groups: 1 })?;
            assert!(!embeddings.track_op());
            assert!(!query.embeddings(&xs, Mode::Eval)?.track_op());
            assert!(query.embeddings(&xs, Mode::Train { bn_groups: 1 })?.track_op());
            let moved = values(&key.store().to_tensors()?["bn1.running_mean"]);
            assert!(moved.iter().all(|&mean| mean != 0.0));
        }
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
