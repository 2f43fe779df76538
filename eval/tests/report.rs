//! `student-eval report`: the page, the numbers and the pictures, for measured and unmeasured runs.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

mod common;

use std::fs;
use std::path::Path;

use common::{Shards, contents, failure, student_eval, success, write_run};
use serde_json::Value;
use shared::io::write_atomic;

const COLOURS: &[&str] = &["red", "green", "blue"];
const TRAIN: Shards<'_> = Shards { name: "train", samples: 30, views: 2, classes: COLOURS, per_shard: 20 };
const VAL: Shards<'_> = Shards { name: "val", samples: 12, views: 1, classes: COLOURS, per_shard: 20 };

/// Three runs, probed but for the last.
fn project() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let path = root.path();
    TRAIN.write(path);
    VAL.write(path);
    for (seed, name) in ["teacher", "alone", "distilled"].iter().enumerate() {
        write_run(&path.join("runs").join(name), seed as u64, *name == "distilled", 0.03);
    }
    let linear = ["linear", "--train", "train", "--val", "val", "--epochs", "10", "--lr", "0.1,1"];
    success(path, &[&linear[..], &["runs/teacher", "runs/alone"]].concat());
    success(path, &["knn", "--train", "train", "--val", "val", "-k", "1,20", "runs/teacher", "runs/alone"]);
    root
}

fn report(root: &Path, runs: &[&str]) -> String {
    success(root, &[&["report", "--output", "report"], runs].concat())
}

const RUNS: &[&str] = &["runs/teacher", "runs/alone", "runs/distilled"];

/// Hashes differ where weights or features do in their last bits.
fn without_hashes(text: &str) -> String {
    let mask = |word: &str| {
        let hex = word.len() == 12 && word.chars().all(|c| c.is_ascii_hexdigit());
        if hex { "#".repeat(12) } else { word.to_string() }
    };
    text.split('`').map(mask).collect::<Vec<_>>().join("`")
}

/// Replaces measured numbers, which other processors may round otherwise, by made-up ones.
fn make_up_results(run: &Path, index: usize) {
    for file in contents(&run.join("eval")).into_keys() {
        let path = run.join("eval").join(file);
        let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let top1 = |step: usize| 40.0 + (index * 10 + step * 5) as f64;
        if record["kind"] == "knn" {
            for (step, accuracy) in record["result"].as_array_mut().unwrap().iter_mut().enumerate() {
                accuracy["top1"] = top1(step).into();
                accuracy["top5"] = 100.0.into();
            }
        } else {
            for (step, head) in record["result"]["heads"].as_array_mut().unwrap().iter_mut().enumerate() {
                head["final"]["top1"] = top1(step).into();
                head["final"]["top5"] = 90.0.into();
                head["best"] =
                    serde_json::json!({"epoch": 7, "train_loss": 0.5, "top1": top1(step) + 2.5, "top5": 95.0});
                head["per_class_top1"] = serde_json::json!([top1(step), null, 0.0]);
                head["diverged"] = (index == 1 && step == 1).into();
            }
        }
        write_atomic(&path, &serde_json::to_vec(&record).unwrap()).unwrap();
    }
}

#[test]
fn the_page_is_as_recorded() {
    let root = project();
    for (index, name) in ["teacher", "alone"].iter().enumerate() {
        make_up_results(&root.path().join("runs").join(name), index);
    }
    let shown = report(root.path(), RUNS);
    let page = fs::read_to_string(root.path().join("report/report.md")).unwrap();
    insta::assert_snapshot!("report_md", without_hashes(&page));
    insta::assert_snapshot!("report_stdout", shown);
}

#[test]
fn every_picture_of_the_page_is_there_and_is_a_png() {
    let root = project();
    report(root.path(), RUNS);
    let directory = root.path().join("report");
    let numbers: Value = serde_json::from_slice(&fs::read(directory.join("report.json")).unwrap()).unwrap();
    let page = fs::read_to_string(directory.join("report.md")).unwrap();
    let files: Vec<&str> =
        numbers["pictures"].as_array().unwrap().iter().map(|picture| picture["file"].as_str().unwrap()).collect();
    assert_eq!(files.len(), 7, "{files:?}");
    for file in files {
        assert!(page.contains(&format!("]({file})")), "{file}");
        let picture = image::open(directory.join(file)).unwrap();
        assert!(picture.width() > 300 && picture.height() > 200, "{file}");
    }
}

#[test]
fn a_report_repeats_to_the_byte_at_any_thread_count_and_drops_old_pictures() {
    let root = project();
    report(root.path(), &[RUNS, &["--threads", "1"]].concat());
    let first = contents(&root.path().join("report"));
    report(root.path(), &[RUNS, &["--threads", "2"]].concat());
    assert!(first == contents(&root.path().join("report")));
    report(root.path(), &["runs/distilled"]);
    let pictures = contents(&root.path().join("report")).into_keys().filter(|name| name.contains(".png"));
    assert_eq!(pictures.collect::<Vec<_>>(), ["losses.png"]);
}

#[test]
fn unmeasured_runs_get_the_command_that_measures_them() {
    let root = project();
    report(root.path(), &["runs/distilled", "--neighbours", "0"]);
    let page = fs::read_to_string(root.path().join("report/report.md")).unwrap();
    assert!(page.contains("`student-eval linear --train SHARDS --val SHARDS runs/distilled`"), "{page}");
    report(root.path(), RUNS);
    let page = fs::read_to_string(root.path().join("report/report.md")).unwrap();
    assert!(
        page.contains("like the other runs: run `student-eval knn --train train --val val runs/distilled`"),
        "{page}"
    );
}

#[test]
fn runs_of_the_same_name_are_told_apart_by_their_parents() {
    let root = tempfile::tempdir().unwrap();
    write_run(&root.path().join("a/run"), 1, false, 0.03);
    write_run(&root.path().join("b/run"), 2, true, 0.06);
    let shown = report(root.path(), &["a/run", "b/run"]);
    assert!(shown.contains("a/run") && shown.contains("b/run"), "{shown}");
    // What differs becomes a column.
    assert!(shown.contains("lr    seed") && shown.contains("0.06"), "{shown}");
    let message = failure(root.path(), &["report", "--output", "r", "a/run", "a/../a/run"], 2);
    assert!(message.contains("is given twice"), "{message}");
}

#[test]
fn unfinished_runs_and_files_of_weights_have_their_place() {
    let root = project();
    let unfinished = root.path().join("runs/unfinished");
    fs::create_dir(&unfinished).unwrap();
    fs::copy(root.path().join("runs/alone/manifest.json"), unfinished.join("unfinished.json")).unwrap();
    let weights =
        ["--train", "train", "--val", "val", "-k", "1,20", "--output", "file", "runs/teacher/student.safetensors"];
    success(root.path(), &[&["knn"], &weights[..]].concat());
    report(root.path(), &["runs/teacher", "runs/unfinished", "file"]);
    let page = fs::read_to_string(root.path().join("report/report.md")).unwrap();
    assert!(page.contains("`unfinished` is unfinished"), "{page}");
    let numbers: Value = serde_json::from_slice(&fs::read(root.path().join("report/report.json")).unwrap()).unwrap();
    let file = numbers["runs"].as_array().unwrap().iter().find(|run| run["name"] == "file").unwrap();
    assert_eq!((&file["state"], &file["arch"]), (&"weights".into(), &"resnet18".into()));
    assert_eq!(file["knn"], numbers["runs"][0]["knn"]);
}

#[test]
fn fifty_runs_fit_into_one_report() {
    let root = tempfile::tempdir().unwrap();
    let first = write_run(&root.path().join("runs/run-00"), 0, true, 0.03);
    let mut runs = vec!["runs/run-00".to_string()];
    for index in 1..50 {
        let copy = root.path().join(format!("runs/run-{index:02}"));
        fs::create_dir_all(copy.join("checkpoints")).unwrap();
        for name in contents(&first).into_keys() {
            // A hard link: the weights are the same anyway.
            fs::hard_link(first.join(&name), copy.join(&name)).unwrap();
        }
        runs.push(format!("runs/run-{index:02}"));
    }
    let runs: Vec<&str> = runs.iter().map(String::as_str).collect();
    report(root.path(), &runs);
    let picture = image::open(root.path().join("report/losses.png")).unwrap();
    assert!(picture.height() > picture.width() / 2);
}

#[test]
fn shards_that_moved_cost_the_neighbours_not_the_report() {
    let root = project();
    fs::rename(root.path().join("train"), root.path().join("elsewhere")).unwrap();
    let output = student_eval(root.path(), &["report", "--output", "report", "runs/teacher"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.contains("nearest neighbours"), "{stderr}");
    let pictures = contents(&root.path().join("report"));
    assert!(pictures.keys().any(|name| name.starts_with("features-")), "{:?}", pictures.keys());
}

#[test]
fn wrong_uses_get_one_sentence_and_leave_nothing() {
    let root = project();
    let message = failure(root.path(), &["report", "--output", "r", "runs/no"], 1);
    assert!(message.starts_with("error: run `runs/no` does not exist"), "{message}");
    let message = failure(root.path(), &["report", "--output", "r", "train"], 1);
    assert!(message.contains("`train`") && message.contains("student-train"), "{message}");
    failure(root.path(), &["report", "--output", "r"], 2);
    assert!(!root.path().join("r").exists());
    fs::create_dir(root.path().join("mine")).unwrap();
    write_atomic(root.path().join("mine/thesis.tex"), b"x").unwrap();
    let message = failure(root.path(), &["report", "--output", "mine", "runs/alone"], 1);
    assert!(message.contains("`mine` is not empty"), "{message}");
    let result = fs::read_dir(root.path().join("runs/alone/eval")).unwrap().next().unwrap().unwrap().path();
    write_atomic(&result, b"[]").unwrap();
    let message = failure(root.path(), &["report", "--output", "r", "runs/alone"], 1);
    assert!(message.contains("is damaged: not a stored result"), "{message}");
}

#[test]
fn help_is_as_recorded() {
    let root = tempfile::tempdir().unwrap();
    for command in ["", "features", "knn", "linear", "report"] {
        let args: Vec<&str> = [command, "--help"].into_iter().filter(|arg| !arg.is_empty()).collect();
        insta::assert_snapshot!(format!("help_{command}"), success(root.path(), &args));
    }
}
