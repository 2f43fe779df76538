//! The binary: help, exit statuses, one sentence for each wrong use, and configuration files.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

mod embed;
mod fixture;

use std::path::Path;

use assert_cmd::Command;
use fixture::{write_moco, write_shards};

struct Outcome {
    status: i32,
    stdout: String,
    stderr: String,
}

fn teacher_embed(directory: &Path, arguments: &[&str]) -> Outcome {
    let output = Command::cargo_bin("teacher-embed").unwrap().current_dir(directory).args(arguments).output().unwrap();
    Outcome {
        status: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn help_is_a_manual() {
    let directory = tempfile::tempdir().unwrap();
    let help = teacher_embed(directory.path(), &["embed", "--help"]);
    assert_eq!(help.status, 0);
    let words = help.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    for word in [
        "--shards",
        "--weights",
        "--arch",
        "--method",
        "--state-key",
        "--dtype",
        "--batch-size",
        "--config",
        "--overwrite",
        "--threads",
        "--isa",
        "portable",
        "moco-v2",
        "resnet152",
        "efficientnet_b0",
        "mobilenetv3_large_100",
        "resumes",
        "evaluation mode",
    ] {
        assert!(words.contains(word), "{word}");
    }
    for command in ["describe", "verify"] {
        assert_eq!(teacher_embed(directory.path(), &[command, "--help"]).status, 0);
    }
}

#[test]
fn wrong_uses_get_one_sentence_and_write_nothing() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("empty")).unwrap();
    shared::io::write_atomic(directory.path().join("w.pth"), b"<html>").unwrap();
    shared::io::write_atomic(directory.path().join("typo.toml"), b"weight = \"x\"").unwrap();
    let cases: [(&[&str], i32, &str); 9] = [
        (&["embed", "--weights", "w.pth", "--output", "out"], 2, "`--shards` is required"),
        (&["embed", "--shards", "s", "--weights", "w.pth", "--output", "out", "--device", "cuda:0"], 1, "has no CUDA"),
        (
            &["embed", "--shards", "s", "--weights", "w.pth", "--output", "out", "--device", "tpu"],
            2,
            "`tpu` is no device",
        ),
        (
            &["embed", "--shards", "s", "--weights", "no.pth", "--output", "out"],
            1,
            "checkpoint `no.pth` does not exist",
        ),
        (&["embed", "--shards", "s", "--weights", "w.pth", "--output", "out"], 1, "shard set `s` does not exist"),
        (&["embed", "--shards", "empty", "--weights", "w.pth", "--output", "out"], 1, "empty/manifest.json"),
        (&["embed", "--config", "typo.toml"], 2, "typo.toml"),
        (&["describe", "w.pth"], 1, "`w.pth` is not a checkpoint: it is a web page"),
        (&["verify", "empty"], 1, "empty/manifest.json"),
    ];
    for (arguments, status, sentence) in cases {
        let outcome = teacher_embed(directory.path(), arguments);
        assert_eq!(outcome.status, status, "{arguments:?}: {}", outcome.stderr);
        let error = outcome.stderr.lines().next().unwrap();
        assert!(error.starts_with("error: ") && error.contains(sentence), "{arguments:?}: {}", outcome.stderr);
        assert!(outcome.stderr.lines().skip(1).all(|line| line.starts_with("hint: ")), "{}", outcome.stderr);
        assert!(!directory.path().join("out").exists() && outcome.stdout.is_empty());
    }
}

#[test]
fn embeds_from_a_configuration_file_and_says_when_there_is_nothing_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write_shards(&path.join("shards"), 1).unwrap();
    let weights = write_moco(path, 1).unwrap();
    let text = format!("shards = \"shards\"\nweights = {weights:?}\noutput = \"elsewhere\"\ndtype = \"f32\"\n");
    shared::io::write_atomic(path.join("embed.toml"), text.as_bytes()).unwrap();

    let flags = ["embed", "--config", "embed.toml", "--output", "out", "--quiet", "--json"];
    let first = teacher_embed(path, &flags);
    assert_eq!(first.status, 0, "{}", first.stderr);
    let summary: serde_json::Value = serde_json::from_str(&first.stdout).unwrap();
    assert_eq!(summary["teacher"]["arch"], "resnet18");
    assert_eq!(summary["already-finished"], false);
    assert!(summary["statistics"]["view-agreement"].is_number());
    assert!(!path.join("elsewhere").exists(), "a flag wins over the file");

    let again = teacher_embed(path, &flags);
    assert_eq!(again.status, 0, "{}", again.stderr);
    assert!(again.stderr.contains("already finished: nothing to do"), "{}", again.stderr);
    let verify = ["verify", "out", "--weights", weights.to_str().unwrap(), "--sample", "3", "--isa", "portable"];
    let verified = teacher_embed(path, &verify);
    assert_eq!(verified.status, 0, "{}", verified.stderr);
    assert!(verified.stdout.contains("6 rows computed again"), "{}", verified.stdout);
    assert!(verified.stderr.contains("CPU: portable, "), "{}", verified.stderr);

    let described = teacher_embed(path, &["describe", weights.to_str().unwrap(), "--json"]);
    let description: serde_json::Value = serde_json::from_str(&described.stdout).unwrap();
    assert_eq!(description["recognised"][0]["method"], "moco-v2");
}
