//! `student-eval knn` and `linear` from the outside: numbers, files, repetition, and one sentence for each wrong use.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Shards, contents, failure, student_eval, success, write_run};
use serde_json::Value;
use shared::io::write_atomic;

const COLOURS: &[&str] = &["red", "green", "blue"];
const TRAIN: Shards<'_> = Shards { name: "train", samples: 36, views: 2, classes: COLOURS, per_shard: 20 };
const VAL: Shards<'_> = Shards { name: "val", samples: 15, views: 1, classes: COLOURS, per_shard: 20 };

/// The one feature set of a run.
fn only_feature_set(run: &Path) -> PathBuf {
    let mut sets = fs::read_dir(run.join("features")).unwrap();
    let set = sets.next().unwrap().unwrap().path();
    assert!(sets.next().is_none());
    set
}

/// Shards `train` and `val`, and a run `run`.
fn project() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    TRAIN.write(root.path());
    VAL.write(root.path());
    write_run(&root.path().join("run"), 1, false, 0.03);
    root
}

fn json(root: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&success(root, &[args, &["--json", "--quiet"]].concat())).unwrap()
}

const KNN: &[&str] = &["knn", "--train", "train", "--val", "val", "run"];
const LINEAR: &[&str] = &["linear", "--train", "train", "--val", "val", "--epochs", "20", "--lr", "0.1,1", "run"];

#[test]
fn knn_tells_colours_apart_and_states_k_and_temperature() {
    let root = project();
    let shown = success(root.path(), KNN);
    let first = shown.lines().nth(3).unwrap();
    assert!(first.split_whitespace().eq(["run", "1", "0.07", "100.00", "100.00"]), "{shown}");
    // k is capped at the 36 training samples there are.
    assert!(shown.lines().last().unwrap().split_whitespace().nth(1) == Some("36"), "{shown}");
    let record = &json(root.path(), KNN)[0];
    assert_eq!((&record["kind"], &record["arch"]), (&"knn".into(), &"resnet18".into()));
    assert_eq!((&record["train"]["samples"], &record["val"]["samples"]), (&36.into(), &15.into()));
    assert_eq!(record["classes"], serde_json::json!(COLOURS));
    assert_eq!(record["config"]["leave_one_out"], false);
}

#[test]
fn without_a_validation_set_each_sample_is_classified_by_the_others() {
    let root = project();
    let record = &json(root.path(), &["knn", "--train", "train", "-k", "1,35,99", "run"])[0];
    assert_eq!(record["config"]["leave_one_out"], true);
    let ks: Vec<u64> = record["result"].as_array().unwrap().iter().map(|r| r["k"].as_u64().unwrap()).collect();
    assert_eq!(ks, [1, 35]);
}

#[test]
fn linear_reports_last_and_best_epoch_for_every_learning_rate() {
    let root = project();
    let record = &json(root.path(), LINEAR)[0];
    let heads = record["result"]["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 2);
    for head in heads {
        assert_eq!(head["final"]["top1"], 100.0, "{head}");
        assert_eq!(head["final"]["epoch"], 20);
        assert_eq!(head["history"].as_array().unwrap().len(), 20);
        assert_eq!(head["per_class_top1"], serde_json::json!([100.0, 100.0, 100.0]));
    }
    assert_eq!(record["result"]["effective_batch_size"], 36);
    let shown = success(root.path(), LINEAR);
    assert!(shown.starts_with("linear probe, 20 epochs, batch 36, accuracy in percent"), "{shown}");
}

#[test]
fn results_are_the_same_bytes_at_one_and_two_threads_and_when_repeated() {
    let (one, two) = (project(), project());
    for (root, threads) in [(&one, "1"), (&two, "2")] {
        for command in [KNN, LINEAR] {
            success(root.path(), &[command, &["--threads", threads]].concat());
        }
    }
    let results = |root: &tempfile::TempDir| contents(&root.path().join("run/eval"));
    assert_eq!(results(&one).len(), 2);
    assert!(results(&one) == results(&two));
    let before = contents(one.path());
    let again = student_eval(one.path(), KNN);
    assert!(String::from_utf8_lossy(&again.stderr).contains("is up to date"));
    success(one.path(), &[LINEAR, &["--overwrite"]].concat());
    assert!(before == contents(one.path()));
}

#[test]
fn several_runs_are_measured_in_one_call() {
    let root = project();
    write_run(&root.path().join("other"), 2, false, 0.03);
    let records = json(root.path(), &[KNN, &["other"]].concat());
    assert_eq!(records.as_array().unwrap().len(), 2);
    assert_ne!(records[0]["weights"]["fingerprint"], records[1]["weights"]["fingerprint"]);
    let message = failure(root.path(), &[KNN, &["other", "--output", "x"]].concat(), 2);
    assert!(message.contains("`--output` takes the results of one run"), "{message}");
}

#[test]
fn wrong_numbers_are_usage_errors() {
    let root = project();
    for args in [&["--temperature", "0"][..], &["--temperature=-1"], &["-k", "0"], &["-k", "x"], &["--threads", "0"]] {
        failure(root.path(), &[KNN, args].concat(), 2);
    }
    for args in [&["--lr", "0"][..], &["--lr=-1"], &["--epochs", "0"], &["--momentum", "1"], &["--batch-size", "0"]] {
        failure(root.path(), &[&["linear", "--train", "train", "--val", "val", "run"][..], args].concat(), 2);
    }
    assert!(!root.path().join("run/features").exists());
}

/// The message of a failing k-NN command after `change`.
fn message_after(change: impl FnOnce(&Path), args: &[&str]) -> String {
    let root = project();
    change(root.path());
    let message = failure(root.path(), args, 1);
    assert!(!root.path().join("run/eval").exists(), "half-written results");
    message
}

#[test]
fn missing_and_unfinished_runs_are_named() {
    let message = message_after(|_| (), &["knn", "--train", "train", "no"]);
    assert!(message.starts_with("error: run `no` does not exist"), "{message}");
    let unfinished = |root: &Path| {
        fs::rename(root.join("run/manifest.json"), root.join("run/unfinished.json")).unwrap();
    };
    let message = message_after(unfinished, KNN);
    assert!(message.contains("run/manifest.json") && message.contains("finish"), "{message}");
    let message = message_after(|_| (), &["knn", "--train", "run", "run"]);
    assert!(message.contains("`run`") && message.contains("data-prep"), "{message}");
}

#[test]
fn sets_that_do_not_fit_are_refused() {
    let unlabelled = |root: &Path| drop(Shards { name: "plain", classes: &[], ..VAL }.write(root));
    let message = message_after(unlabelled, &["knn", "--train", "train", "--val", "plain", "run"]);
    assert!(message.contains("shard set `plain` has no labels"), "{message}");
    let other = |root: &Path| drop(Shards { name: "cars", classes: &["red", "cyan", "blue"], ..VAL }.write(root));
    let message = message_after(other, &["linear", "--train", "train", "--val", "cars", "run"]);
    assert!(message.contains("different classes: only the training set has `green`"), "{message}");
    let message = message_after(|_| (), &["linear", "--train", "val", "--val", "val", "run"]);
    assert!(message.contains("`val` is given for training and for validation"), "{message}");
}

#[test]
fn a_truncated_feature_file_is_named() {
    let root = project();
    success(root.path(), &["features", "--shards", "train", "run"]);
    let file = only_feature_set(&root.path().join("run")).join("features-00001.safetensors");
    let bytes = fs::read(&file).unwrap();
    write_atomic(&file, &bytes[..bytes.len() / 2]).unwrap();
    let message = failure(root.path(), KNN, 1);
    assert!(message.contains("features-00001.safetensors` is damaged"), "{message}");
    success(root.path(), &[KNN, &["--overwrite"]].concat());
    assert!(fs::read(&file).unwrap() == bytes);
}

#[test]
fn a_damaged_or_foreign_result_is_named_and_can_be_overwritten() {
    let root = project();
    success(root.path(), KNN);
    let file = fs::read_dir(root.path().join("run/eval")).unwrap().next().unwrap().unwrap().path();
    let good = fs::read(&file).unwrap();
    write_atomic(&file, b"{}").unwrap();
    let message = failure(root.path(), KNN, 1);
    assert!(message.contains("is damaged: not a stored result"), "{message}");
    let newer = String::from_utf8(good.clone()).unwrap().replace("\"format_version\": 1", "\"format_version\": 2");
    write_atomic(&file, newer.as_bytes()).unwrap();
    let message = failure(root.path(), KNN, 1);
    assert!(message.contains("format version 2 is not supported"), "{message}");
    success(root.path(), &[KNN, &["--overwrite"]].concat());
    assert!(fs::read(&file).unwrap() == good);
}

#[test]
fn samples_with_the_same_name_are_pointed_out() {
    let root = project();
    // The same pictures in other shards.
    Shards { per_shard: 36, ..TRAIN }.write(&root.path().join("again"));
    let args = ["knn", "--train", "train", "--val", "again/train", "run"];
    let output = student_eval(root.path(), &args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.contains("36 of 36 validation samples"), "{stderr}");
}
