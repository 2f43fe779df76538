//! Small shard sets and runs for the tests of `student-eval`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Mutex;

use candle_core::Tensor;
use serde_json::{Value, json};
use shared::io::write_atomic;
use shared::manifest::{Identity, Stage};
use shared::models::{Arch, Encoder};
use shared::output::{Begun, OutputDir};
use shared::shard::{ShardSetDetails, ShardWriter, VIEW_PARAMETERS, sample_id, shard_file_name};
use shared::tensor_file::write_tensors;

/// Height and width of the pictures.
pub(crate) const SIDE: usize = 32;

/// A shard set of coloured noise: the class decides the colour.
#[derive(Debug, Clone)]
pub(crate) struct Shards<'a> {
    pub(crate) name: &'a str,
    pub(crate) samples: usize,
    pub(crate) views: usize,
    pub(crate) classes: &'a [&'a str],
    pub(crate) per_shard: usize,
}

impl Shards<'_> {
    pub(crate) fn write(&self, directory: &Path) -> PathBuf {
        let path = directory.join(self.name);
        let config = json!({"recipe": self.name, "views": self.views});
        let identity = Identity::new(Stage::DataPrep, &config, 0, Vec::new()).unwrap();
        let Begun::Writing(output) = OutputDir::begin(&path, &identity, false).unwrap() else { return path };
        let mut files = Vec::new();
        for (index, start) in (0..self.samples).step_by(self.per_shard).enumerate() {
            let count = self.per_shard.min(self.samples - start);
            let file = path.join(shard_file_name(index));
            let mut writer = ShardWriter::create(file, count, self.views, SIDE, SIDE).unwrap();
            for sample in start..start + count {
                let class = sample % self.classes.len().max(1);
                let pixels: Vec<u8> =
                    (0..self.views).flat_map(|view| picture(self.name, sample, view, class)).collect();
                let label = if self.classes.is_empty() { -1 } else { i64::try_from(class).unwrap() };
                let params = vec![0.0; self.views * VIEW_PARAMETERS.len()];
                let id = sample_id(&format!("{}/{sample}.png", self.name));
                writer.push(id, label, &pixels, &params).unwrap();
            }
            files.push(writer.finish().unwrap());
        }
        let details = ShardSetDetails {
            views: self.views,
            height: SIDE,
            width: SIDE,
            classes: self.classes.iter().map(ToString::to_string).collect(),
            ..ShardSetDetails::default()
        };
        let counts = BTreeMap::from([("samples".to_string(), self.samples as u64)]);
        output.finish(counts, serde_json::to_value(details).unwrap(), files).unwrap();
        path
    }
}

/// Noise round a colour that the class gives.
fn picture(set: &str, sample: usize, view: usize, class: usize) -> Vec<u8> {
    let mut rng = shared::rng::KeyedRng::new(set, sample as u64, &[view as u64]);
    let colour = [[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]][class % 4];
    let noise = |rng: &mut shared::rng::KeyedRng| rng.below(120) as i32 - 60;
    (0..SIDE * SIDE * 3).map(|i| (colour[i % 3] + noise(&mut rng)).clamp(0, 255) as u8).collect()
}

/// A finished run of an untrained ResNet-18, with the metrics of a made-up training.
pub(crate) fn write_run(path: &Path, seed: u64, distilled: bool, lr: f64) -> PathBuf {
    let objective = if distilled { "distill" } else { "pretrain" };
    let config = json!({"objective": objective, "student": "resnet18", "lr": lr, "epochs": 3});
    let inputs =
        vec![shared::manifest::Input { role: "shards".into(), path: "shards".into(), fingerprint: "5".repeat(64) }];
    let identity = Identity::new(Stage::StudentTrain, &config, seed, inputs).unwrap();
    let Begun::Writing(output) = OutputDir::begin(path, &identity, false).unwrap() else { return path.into() };
    let tensors = weights(seed);
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string()), ("arch".into(), "resnet18".into())]);
    let checkpoint = "checkpoints/step-00000012";
    std::fs::create_dir(path.join("checkpoints")).unwrap();
    let inside = |name: &str, mut entry: shared::io::FileEntry| {
        entry.path = name.into();
        entry
    };
    let config_toml = format!("student = \"resnet18\"\nlr = {lr}\nepochs = 3\nseed = {seed}\noutput = \"x\"\n");
    let names = [format!("{checkpoint}.safetensors"), format!("{checkpoint}.json")];
    let files = vec![
        write_atomic(path.join("config.toml"), config_toml.as_bytes()).unwrap(),
        write_atomic(path.join("metrics.jsonl"), metrics(seed, distilled).as_bytes()).unwrap(),
        write_tensors(path.join("student.safetensors"), &metadata, &tensors).unwrap(),
        inside(&names[0], write_tensors(path.join(&names[0]), &metadata, &BTreeMap::new()).unwrap()),
        inside(&names[1], write_atomic(path.join(&names[1]), b"{}\n").unwrap()),
    ];
    let counts = [("samples", 40), ("steps", 12), ("epochs", 3), ("images", 480)];
    let counts = counts.map(|(name, count)| (name.to_string(), count)).into();
    let mut last = json!({"loss": 5.0, "info_nce": 4.0, "top1": 50.0});
    if distilled {
        last["distill_q"] = 0.25.into();
        last["distill_k"] = 0.25.into();
    }
    let details = json!({
        "objective": objective, "arch": "resnet18", "feature_width": 512, "head_hidden": 2048, "embedding_dim": 128,
        "image_size": [SIDE, SIDE], "checkpoint": names[0], "final": last,
    });
    output.finish(counts, details, files).unwrap();
    path.into()
}

/// A random ResNet-18, drawn once per seed.
fn weights(seed: u64) -> BTreeMap<String, Tensor> {
    static DRAWN: Mutex<BTreeMap<u64, BTreeMap<String, Tensor>>> = Mutex::new(BTreeMap::new());
    let mut drawn = DRAWN.lock().unwrap();
    let draw = || Encoder::new(Arch::ResNet18, None, seed).unwrap().store().to_tensors().unwrap();
    drawn.entry(seed).or_insert_with(draw).clone()
}

fn metrics(seed: u64, distilled: bool) -> String {
    let mut text = String::new();
    let mut line = |mut value: Value, step: u64| {
        let fall = 1.0 / (1.0 + step as f64 / 4.0 + seed as f64 / 10.0);
        value["lr"] = 0.03.into();
        value["info_nce"] = (3.0 + 2.0 * fall).into();
        value["loss"] = (3.0 + 2.0 * fall + if distilled { 20.0 * fall } else { 0.0 }).into();
        value["top1"] = (100.0 - 90.0 * fall).into();
        if distilled {
            value["distill_q"] = (0.3 * fall).into();
            value["distill_k"] = (0.32 * fall).into();
        }
        text.push_str(&value.to_string());
        text.push('\n');
    };
    for epoch in 0..3u64 {
        for step in 1..=4u64 {
            line(json!({"step": epoch * 4 + step, "epoch": epoch}), epoch * 4 + step);
        }
        line(json!({"event": "epoch", "epoch": epoch, "step": epoch * 4 + 4}), epoch * 4 + 4);
    }
    text
}

/// Runs `student-eval` in `directory`.
pub(crate) fn student_eval(directory: &Path, args: &[&str]) -> Output {
    assert_cmd::Command::cargo_bin("student-eval").unwrap().current_dir(directory).args(args).output().unwrap()
}

/// Standard error of a command that must fail with `status`.
pub(crate) fn failure(directory: &Path, args: &[&str], status: i32) -> String {
    let output = student_eval(directory, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    stderr
}

/// Standard output of a command that must succeed.
pub(crate) fn success(directory: &Path, args: &[&str]) -> String {
    let output = student_eval(directory, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Every file below a directory with its contents, but for locks.
pub(crate) fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            for (below, bytes) in contents(&path) {
                found.insert(format!("{name}/{below}"), bytes);
            }
        } else if name != ".lock" {
            found.insert(name, std::fs::read(&path).unwrap());
        }
    }
    found
}
