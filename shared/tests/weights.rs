//! Checkpoints made by PyTorch (`tests/golden/weights.py`) are read exactly, and hostile ones run nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail loudly")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use shared::models::{Arch, Encoder, names_and_shapes};
use shared::tensor_file::write_tensors;
use shared::weights::{Checkpoint, Format, names};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/weights").join(name)
}

fn expected() -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(golden("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

#[test]
fn every_golden_checkpoint_is_read_exactly() {
    let expected = expected();
    assert_eq!(expected.len(), 18);
    for (name, expected) in expected {
        let checkpoint = Checkpoint::open(golden(&name)).unwrap();
        assert_eq!(checkpoint.format().to_string(), expected["format"].as_str().unwrap(), "{name}");
        assert_eq!(checkpoint.state_key(), expected["state_key"].as_str().unwrap(), "{name}");
        for (key, value) in expected["metadata"].as_object().unwrap() {
            assert_eq!(checkpoint.metadata().get(key), Some(value), "{name}: {key}");
        }
        let tensors = expected["tensors"].as_object().unwrap();
        assert_eq!(checkpoint.entries().len(), tensors.len(), "{name}");
        for entry in checkpoint.entries() {
            let label = format!("{name}: {}", entry.name());
            let tensor = &tensors[entry.name()];
            assert_eq!(entry.dtype().to_string(), tensor["dtype"].as_str().unwrap(), "{label}");
            let shape: Vec<_> = entry.shape().iter().map(|size| Value::from(*size)).collect();
            assert_eq!(&shape, tensor["shape"].as_array().unwrap(), "{label}");
            let read = checkpoint.tensor(entry.name()).unwrap();
            assert_eq!(read.dims(), entry.shape(), "{label}");
            let values = read.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values, floats(&tensor["values"]), "{label}");
        }
    }
}

#[test]
fn torchvisions_efficientnets_are_recognised_by_its_names() {
    let text = std::fs::read_to_string(golden("../torchvision_names.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let networks = json["networks"].as_object().unwrap();
    assert_eq!(networks.len(), 2);
    let directory = tempfile::tempdir().unwrap();
    for (name, pairs) in networks {
        let arch: Arch = name.parse().unwrap();
        let pairs: Vec<_> =
            pairs.as_array().unwrap().iter().map(|pair| pair.as_str().unwrap().split_once(' ').unwrap()).collect();
        let tensors = Encoder::new(arch, None, 1).unwrap().store().to_tensors().unwrap();
        assert_eq!(pairs.len(), tensors.len());
        for prefix in ["", "module."] {
            let mut theirs: BTreeMap<_, _> =
                pairs.iter().map(|(theirs, ours)| (format!("{prefix}{theirs}"), tensors[*ours].clone())).collect();
            theirs.insert(
                format!("{prefix}classifier.1.weight"),
                Tensor::zeros((10, 1280), DType::F32, &Device::Cpu).unwrap(),
            );
            let path = directory.path().join("theirs.safetensors");
            write_tensors(&path, &BTreeMap::new(), &theirs).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            let entries: Vec<_> =
                checkpoint.entries().iter().map(|entry| (entry.name().to_owned(), entry.shape().to_vec())).collect();
            let found = names::recognise(&entries).unwrap().remove(0);
            assert_eq!((found.arch, found.prefix.as_str(), found.embedding_dim()), (arch, prefix, 1280));
            assert!(found.is_complete() && found.unexpected.is_empty() && found.left_over.len() == 1, "{found:?}");
            let mut loaded = found.load(&checkpoint).unwrap();
            let counts = found.load_batch_counts(&checkpoint).unwrap();
            assert_eq!(counts.len(), pairs.iter().filter(|(_, ours)| ours.ends_with("num_batches_tracked")).count());
            loaded.extend(counts);
            assert_eq!(loaded.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
            let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (name, tensor) in tensors.iter().filter(|(_, tensor)| tensor.dtype() == DType::F32) {
                assert!(values(tensor) == values(&loaded[name]), "{name}");
            }
        }
    }
    // The larger network is not taken for the smaller one, whose tensors it has with other shapes or beside more.
    let entries: Vec<_> = networks["efficientnet_b1"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| pair.as_str().unwrap().split_once(' ').unwrap())
        .map(|(theirs, ours)| {
            let shapes = names_and_shapes(Arch::EfficientNetB1, None).unwrap();
            (theirs.to_owned(), shapes.into_iter().find(|(name, _)| name == ours).unwrap().1)
        })
        .collect();
    let smaller = names::fit(&entries, Arch::EfficientNetB0, None).unwrap();
    assert!(smaller.is_complete() && smaller.has_further_layers());
}

#[test]
fn the_state_dict_can_be_chosen() {
    let path = golden("two_networks.pth");
    let default = Checkpoint::open(&path).unwrap();
    assert_eq!(default.state_key(), "teacher");
    assert_eq!(default.other_state_keys(), [("student".to_owned(), 1)]);
    let student = Checkpoint::open_at(&path, Some("student")).unwrap();
    assert_eq!(student.entries().len(), 1);
    let message = Checkpoint::open_at(&path, Some("ema")).unwrap_err().to_string();
    assert!(message.ends_with("it has no state dict at `ema`, but at `teacher`, `student`"), "{message}");
}

#[test]
fn entries_that_are_not_read_are_listed() {
    let checkpoint = Checkpoint::open(golden("dtypes_zip.pth")).unwrap();
    let what = "a tensor of `ComplexFloatStorage`, which is not read".to_owned();
    assert_eq!(checkpoint.skipped(), [("complex".to_owned(), what)]);
    assert!(checkpoint.unknown_globals().is_empty(), "{:?}", checkpoint.unknown_globals());
}

#[test]
fn settings_scalars_and_other_objects_are_no_obstacle() {
    for name in ["objects_zip.pth", "objects_legacy.pth"] {
        let checkpoint = Checkpoint::open(golden(name)).unwrap();
        assert!(checkpoint.unknown_globals().is_empty(), "{:?}", checkpoint.unknown_globals());
        assert!(!checkpoint.metadata().contains_key("best_acc1"), "a numpy scalar stays opaque");
    }
}

#[test]
fn a_pickle_that_asks_for_a_function_does_not_get_it_called() {
    for (name, function) in [
        ("hostile_system.pth", "posix.system"),
        ("hostile_system_legacy.pth", "posix.system"),
        ("hostile_eval.pth", "builtins.eval"),
        ("hostile_eval_legacy.pth", "builtins.eval"),
    ] {
        let checkpoint = Checkpoint::open(golden(name)).unwrap();
        assert_eq!(checkpoint.values("w").unwrap().len(), 2, "{name}");
        assert_eq!(checkpoint.unknown_globals(), [function], "{name}");
        assert!(!Path::new("hostile_ran").exists(), "{name} was run");
    }
}

#[test]
fn safetensors_are_read_through_the_same_surface() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bin");
    let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let words: Vec<u8> = [3i64].iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensors = [
        ("h", safetensors::tensor::TensorView::new(safetensors::Dtype::F16, vec![2, 1], &halves).unwrap()),
        ("n", safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![], &words).unwrap()),
    ];
    let metadata = Some([("arch".to_owned(), "resnet18".to_owned())].into());
    let bytes = safetensors::serialize(tensors, metadata).unwrap();
    shared::io::write_atomic(&path, &bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.format(), Format::Safetensors);
    assert_eq!(checkpoint.values("h").unwrap(), [1.5, -2.0]);
    assert_eq!(checkpoint.tensor("n").unwrap().to_scalar::<f32>().unwrap(), 3.0);
    assert_eq!(checkpoint.metadata()["arch"], "resnet18");
    shared::io::write_atomic(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("is damaged: safetensors: "));
}
