//! The binary: help, exit statuses, one sentence for each wrong use, and configuration files.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

mod embed;
mod fixture;
mod projection;

use std::path::Path;

use assert_cmd::Command;
use fixture::{network, write, write_moco, write_shards};
use shared::models::Arch;

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
        "--pixel-normalization",
        "inception",
        "--center",
        "--pca",
        "projection.safetensors",
        "without a projection head",
        "agreement between views",
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
    let zero = b"shards = \"s\"\nweights = \"w.pth\"\noutput = \"out\"\npca = 0";
    shared::io::write_atomic(directory.path().join("zero.toml"), zero).unwrap();
    let cases: [(&[&str], i32, &str); 12] = [
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
        (&["embed", "--config", "zero.toml"], 2, "`pca` must keep at least 1 component"),
        (
            &["embed", "--config", "zero.toml", "--pca", "4", "--center=false"],
            2,
            "`pca` always takes the mean off first",
        ),
        (&["embed", "--pca", "0"], 2, "invalid value '0' for '--pca <D>'"),
        (&["describe", "w.pth"], 1, "`w.pth` is not a checkpoint: it is a web page"),
        (&["verify", "empty"], 1, "empty/manifest.json"),
    ];
    for (arguments, status, sentence) in cases {
        let outcome = teacher_embed(directory.path(), arguments);
        assert_eq!(outcome.status, status, "{arguments:?}: {}", outcome.stderr);
        let error = outcome.stderr.lines().next().unwrap();
        assert!(error.starts_with("error: ") && error.contains(sentence), "{arguments:?}: {}", outcome.stderr);
        let ours = !error.contains("invalid value");
        assert!(!ours || outcome.stderr.lines().skip(1).all(|line| line.starts_with("hint: ")), "{}", outcome.stderr);
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
    assert!(verified.stdout.contains("3 rows computed again"), "{}", verified.stdout);
    assert!(verified.stderr.contains("CPU: portable, "), "{}", verified.stderr);

    let described = teacher_embed(path, &["describe", weights.to_str().unwrap(), "--json"]);
    let description: serde_json::Value = serde_json::from_str(&described.stdout).unwrap();
    assert_eq!(description["recognised"][0]["method"], "moco-v2");
}

#[test]
fn a_dominant_mean_is_warned_of_and_taken_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write_shards(&path.join("shards"), 1).unwrap();
    write(path, "backbone.safetensors", &network(Arch::ResNet18, None, "", 1).unwrap()).unwrap();
    let embed = |more: &[&str]| {
        let flags = ["embed", "--shards", "shards", "--weights", "backbone.safetensors", "--json"];
        let outcome = teacher_embed(path, &[&flags, more].concat());
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        (serde_json::from_str::<serde_json::Value>(&outcome.stdout).unwrap(), outcome.stderr)
    };
    let (plain, stderr) = embed(&["--output", "plain", "--quiet"]);
    let warnings: Vec<&str> = stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 1, "{stderr}");
    assert!(warnings[0].contains("`--center`") && warnings[0].contains("`--pca D`"), "{stderr}");
    assert!(plain["projection"].is_null() && plain["statistics"]["mean-cosine"].as_f64().unwrap() > 0.5, "{plain}");

    let (centred, stderr) = embed(&["--output", "centred", "--center"]);
    assert!(!stderr.contains("warning") && stderr.contains("for files that are removed at the end"), "{stderr}");
    assert_eq!((&centred["embedding-dim"], &centred["projection"]["feature-width"]), (&512.into(), &512.into()));

    shared::io::write_atomic(path.join("pca.toml"), b"pca = 20\ncenter = true\n").unwrap();
    let (reduced, _) = embed(&["--output", "reduced", "--config", "pca.toml"]);
    assert_eq!(reduced["embedding-dim"], 20);
    assert!(reduced["projection"]["kept-variance"].as_f64().unwrap() > 0.5, "{reduced}");
    assert!(reduced["statistics"]["mean-cosine"].as_f64().unwrap() < 0.2, "{reduced}");
}

/// The same command after a kill, wherever the kill falls, gives the same files.
#[test]
fn a_killed_run_ends_with_the_same_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write_shards(&path.join("shards"), 1).unwrap();
    write(path, "backbone.safetensors", &network(Arch::ResNet18, None, "", 1).unwrap()).unwrap();
    let flags =
        ["embed", "--shards", "shards", "--weights", "backbone.safetensors", "--pca", "9", "--quiet", "--output"];
    let run = |output: &str| teacher_embed(path, &[&flags[..], &[output]].concat());
    assert_eq!(run("straight").status, 0);
    for (index, awaited) in ["outputs-00000", "outputs-00001", "projection", "embeddings-00000"].iter().enumerate() {
        let output = format!("killed-{index}");
        let file = path.join(&output).join(format!("{awaited}.safetensors"));
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_teacher-embed"));
        let stdio = std::process::Stdio::null;
        let mut child =
            command.current_dir(path).args(flags).arg(&output).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        while !file.exists() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let again = run(&output);
        assert_eq!(again.status, 0, "{}", again.stderr);
        for name in
            ["manifest.json", "projection.safetensors", "embeddings-00000.safetensors", "embeddings-00001.safetensors"]
        {
            let read = |set: &str| std::fs::read(path.join(set).join(name)).unwrap();
            assert!(read("straight") == read(&output), "{awaited}: {name}");
        }
        assert!(!path.join(&output).join("outputs-00000.safetensors").exists());
    }
}
