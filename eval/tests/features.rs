//! Feature sets: what they hold, that they do not depend on threads or interruptions, and how damage is named.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

mod common;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use common::{Shards, contents, failure, student_eval, success, write_run};
use eval::features::{Extractor, FeatureSet, extract};
use shared::data_loader::normalized_batch;
use shared::io::write_atomic;
use shared::manifest::{Input, Manifest, Stage};
use shared::models::{Arch, Encoder};
use shared::ops::Mode;
use shared::shard::ShardSet;
use shared::tensor_file::write_tensors;
use shared::transforms::normalize::Normalization;
use shared::{Error, Fault, Result};

const TRAIN: Shards<'_> = Shards { name: "train", samples: 40, views: 2, classes: &["red", "green"], per_shard: 20 };

/// Mean and maximum of each picture's three channels; may be told to die.
struct Simple {
    batches_left: Cell<usize>,
}

impl Extractor for Simple {
    fn arch(&self) -> String {
        "simple".into()
    }

    fn feature_width(&self) -> usize {
        6
    }

    fn features(&self, xs: &Tensor) -> Result<Tensor> {
        let Some(left) = self.batches_left.get().checked_sub(1) else {
            return Err(Error::invalid("killed", ""));
        };
        self.batches_left.set(left);
        let flat = xs.flatten(1, 2)?;
        Ok(Tensor::cat(&[flat.mean(1)?, flat.max(1)?], 1)?)
    }
}

/// The one feature set of a run.
fn only_feature_set(run: &Path) -> PathBuf {
    let mut sets = fs::read_dir(run.join("features")).unwrap();
    let set = sets.next().unwrap().unwrap().path();
    assert!(sets.next().is_none());
    set
}

fn manifest(directory: &Path) -> Manifest {
    Manifest::read(directory, Stage::StudentEval).unwrap()
}

fn run_simple(shards: &ShardSet, directory: &Path, batches: usize) -> Result<FeatureSet> {
    let weights = Input { role: "weights".into(), path: "w".into(), fingerprint: "7".repeat(64) };
    let simple = Simple { batches_left: Cell::new(batches) };
    extract(&simple, weights, Normalization::Imagenet, shards, directory, (false, true))
}

#[test]
fn features_stand_row_for_row_with_the_shards() {
    let root = tempfile::tempdir().unwrap();
    let shards = ShardSet::open(TRAIN.write(root.path())).unwrap();
    let set = run_simple(&shards, &root.path().join("f"), 100).unwrap();
    let rows = set.rows().unwrap();
    assert_eq!((rows.len(), rows.views(), rows.width()), (40, 2, 6));
    assert_eq!((manifest(set.directory()).files.len(), set.details().classes.len()), (2, 2));
    for sample in 0..40 {
        assert_eq!(rows.sample_ids()[sample], shards.sample_id(sample));
        assert_eq!(rows.labels()[sample], shards.label(sample));
        for view in 0..2 {
            let pixels = shards.pixels(sample, view).unwrap();
            let red = pixels.iter().step_by(3).map(|&x| f64::from(x)).sum::<f64>() / (pixels.len() / 3) as f64;
            let want = (red / 255.0 - 0.485) / 0.229;
            assert!((f64::from(rows.row(sample, view)[0]) - want).abs() < 1e-4);
        }
    }
}

#[test]
fn killed_and_resumed_equals_a_straight_run() {
    let root = tempfile::tempdir().unwrap();
    let shards = ShardSet::open(TRAIN.write(root.path())).unwrap();
    let (straight, killed) = (root.path().join("straight"), root.path().join("killed"));
    run_simple(&shards, &straight, 100).unwrap();
    for batches in [0, 1, 3] {
        assert_eq!(run_simple(&shards, &killed, batches).unwrap_err().to_string(), "killed");
        assert!(!killed.join("manifest.json").exists());
    }
    run_simple(&shards, &killed, 100).unwrap();
    assert!(contents(&straight) == contents(&killed));
    // Finished: not a single batch is computed again.
    run_simple(&shards, &killed, 0).unwrap();
}

#[test]
fn an_interrupted_shard_is_not_trusted_unless_it_is_whole() {
    let root = tempfile::tempdir().unwrap();
    let shards = ShardSet::open(TRAIN.write(root.path())).unwrap();
    let directory = root.path().join("f");
    run_simple(&shards, &directory, 2).unwrap_err();
    let file = directory.join("features-00000.safetensors");
    let whole = fs::read(&file).unwrap();
    write_atomic(&file, &whole[..whole.len() - 4]).unwrap();
    run_simple(&shards, &directory, 100).unwrap();
    assert!(fs::read(&file).unwrap() == whole);
}

#[test]
fn features_of_a_network_do_not_depend_on_threads() {
    let root = tempfile::tempdir().unwrap();
    TRAIN.write(root.path());
    let mut sets = Vec::new();
    for (index, flag) in ["--threads=1", "--threads=2"].iter().enumerate() {
        let run = write_run(&root.path().join(format!("run{index}")), 1, false, 0.03);
        let name = format!("run{index}");
        success(root.path(), &["features", "--shards", "train", &name, flag]);
        sets.push(contents(&only_feature_set(&run)));
    }
    assert!(sets[0].len() == 3 && sets[0].keys().eq(sets[1].keys()));
    for (name, bytes) in &sets[0] {
        // Manifests name the run's path; their fingerprints do not.
        if name != "manifest.json" {
            assert!(bytes == &sets[1][name], "{name}");
        }
    }
}

#[test]
fn the_instruction_set_is_said_and_not_guessed() {
    let root = tempfile::tempdir().unwrap();
    TRAIN.write(root.path());
    write_run(&root.path().join("run"), 0, false, 0.03);
    let output = student_eval(root.path(), &["features", "--shards", "train", "run", "--isa=portable", "--threads=1"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.starts_with("CPU: portable, 1 thread\n"), "{stderr}");
    for command in ["features", "knn", "linear"] {
        assert!(failure(root.path(), &[command, "run", "--isa=sse9"], 2).contains("sse9"), "{command}");
    }
}

#[test]
fn a_file_of_weights_gives_the_features_of_its_run() {
    let root = tempfile::tempdir().unwrap();
    TRAIN.write(root.path());
    let run = write_run(&root.path().join("run"), 1, false, 0.03);
    success(root.path(), &["features", "--shards", "train", "run"]);
    let file = "run/student.safetensors";
    let shown = success(root.path(), &["features", "--shards", "train", file, "--output", "other", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((&shown[0]["arch"], &shown[0]["samples"]), (&"resnet18".into(), &40.into()));
    let (a, b) = (only_feature_set(&run), only_feature_set(&root.path().join("other")));
    assert_eq!(manifest(&a).fingerprint, manifest(&b).fingerprint);
    let message = failure(root.path(), &["features", "--shards", "train", file], 2);
    assert!(message.contains("say with `--output` where its results go"), "{message}");
    let message =
        failure(root.path(), &["features", "--shards", "train", file, "--output", "o2", "--arch=resnet50"], 1);
    assert!(message.contains("does not hold the weights of resnet50"), "{message}");
}

#[test]
fn pixels_are_normalised_as_asked_and_as_the_architecture_was_published() {
    let root = tempfile::tempdir().unwrap();
    let shards = ShardSet::open(TRAIN.write(root.path())).unwrap();
    write_run(&root.path().join("run"), 1, false, 0.03);
    let lite = Encoder::new(Arch::EfficientNetLite0, None, 1).unwrap();
    let write = |name: &str, mean: &str| {
        let metadata = BTreeMap::from([("mean".to_owned(), mean.to_owned())]);
        write_tensors(root.path().join(name), &metadata, &lite.store().to_tensors().unwrap()).unwrap();
    };
    write("published.safetensors", "unknown");
    write("exported.safetensors", "[0.485, 0.456, 0.406]");

    let file = |name, output, more: &[&'static str]| {
        [&["features", "--shards", "train", name, "--output", output], more].concat()
    };
    let imagenet = ["--pixel-normalization", "imagenet"];
    for (name, output, more, expected) in [
        ("published.safetensors", "a", &[][..], Normalization::Inception),
        ("published.safetensors", "b", &imagenet[..], Normalization::Imagenet),
        ("exported.safetensors", "c", &[][..], Normalization::Imagenet),
        ("run/student.safetensors", "d", &[][..], Normalization::Imagenet),
    ] {
        success(root.path(), &file(name, output, more));
        let set = FeatureSet::open(only_feature_set(&root.path().join(output))).unwrap();
        assert_eq!(set.pixel_normalization().unwrap(), expected, "{output}");
        if name.starts_with("run") {
            continue;
        }
        let xs = normalized_batch(&shards, &[(3, 1)], expected).unwrap();
        let features: Vec<f32> = lite.features(&xs, Mode::Eval).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let (rows, scale) = (set.rows().unwrap(), features.iter().fold(0f32, |top, x| top.max(x.abs())));
        let close = rows.row(3, 1).iter().zip(&features).all(|(a, b)| (a - b).abs() < 1e-4 * scale);
        assert!(close, "{output}: features of other pixels");
    }
    // A cached set of other pixels is not taken for what was asked.
    let message = failure(root.path(), &file("published.safetensors", "a", &imagenet), 1);
    assert!(message.contains("`pixel-normalization`") && message.contains("--overwrite"), "{message}");
    let args = ["features", "--shards", "train", "run", "--pixel-normalization"];
    let message = failure(root.path(), &[&args[..], &["inception"]].concat(), 2);
    assert!(message.contains("`run` is a run: leave `--pixel-normalization` out"), "{message}");
}

#[test]
fn a_second_process_and_a_finished_set_are_told_apart() {
    let root = tempfile::tempdir().unwrap();
    TRAIN.write(root.path());
    let run = write_run(&root.path().join("run"), 1, false, 0.03);
    let args = ["features", "--shards", "train", "run"];
    success(root.path(), &args);
    let before = contents(&run);
    success(root.path(), &args);
    assert!(before == contents(&run));
    let set = only_feature_set(&run);
    let lock = fs::File::options().write(true).open(set.join(".lock")).unwrap();
    lock.lock().unwrap();
    let message = failure(root.path(), &["features", "--shards", "train", "run", "--overwrite"], 1);
    assert!(message.contains("another process is writing"), "{message}");
}

#[test]
fn features_of_other_weights_are_refused_until_overwritten() {
    let root = tempfile::tempdir().unwrap();
    TRAIN.write(root.path());
    write_run(&root.path().join("a"), 1, false, 0.03);
    write_run(&root.path().join("b"), 2, false, 0.03);
    success(root.path(), &["features", "--shards", "train", "a", "--output", "home"]);
    let args = ["features", "--shards", "train", "b", "--output", "home"];
    let message = failure(root.path(), &args, 1);
    assert!(message.contains("input `weights`") && message.contains("--overwrite"), "{message}");
    success(root.path(), &[&args[..], &["--overwrite"]].concat());
}

/// What opening a set says after one of its files was changed.
fn fault_after(change: impl FnOnce(&mut Vec<u8>)) -> Error {
    let root = tempfile::tempdir().unwrap();
    let shards = ShardSet::open(TRAIN.write(root.path())).unwrap();
    let directory = root.path().join("f");
    run_simple(&shards, &directory, 100).unwrap();
    let path = directory.join("features-00001.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    write_atomic(&path, &bytes).unwrap();
    FeatureSet::open(&directory).unwrap_err()
}

fn replace(bytes: &mut [u8], from: &str, to: &str) {
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn damaged_feature_files_are_named() {
    let error = fault_after(|bytes| bytes.truncate(bytes.len() - 1));
    assert!(matches!(error, Error::Damaged { fault: Fault::Length { .. }, .. }), "{error}");
    let error = fault_after(|bytes| replace(bytes, "\"features\"", "\"featured\""));
    assert!(
        matches!(&error, Error::Damaged { fault: Fault::MissingTensor(name), .. } if name == "features"),
        "{error}"
    );
    let error = fault_after(|bytes| replace(bytes, "[20,2,6]", "[2,20,6]"));
    assert!(matches!(error, Error::Damaged { fault: Fault::Shape { .. }, .. }), "{error}");
    let error = fault_after(|bytes| replace(bytes, "\"F32\"", "\"I32\""));
    assert!(matches!(error, Error::Damaged { fault: Fault::Dtype { .. }, .. }), "{error}");
    let error = fault_after(|bytes| replace(bytes, "{", "["));
    assert!(matches!(error, Error::Damaged { fault: Fault::Syntax(_), .. }), "{error}");
}

#[test]
fn labels_outside_the_classes_are_damage() {
    let error = fault_after(|bytes| {
        let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap() + 8;
        // Twenty sample ids of eight bytes, then the labels.
        bytes[header + 160] = 9;
    });
    assert!(matches!(&error, Error::Damaged { fault: Fault::Value(text), .. } if text.contains("label 9")), "{error}");
}
