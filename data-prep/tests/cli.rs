//! The binary as a user meets it: help, sentences, exit statuses, locks, kills.

mod fixtures;

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use fixtures::{Outcome, contents, cut, photos};
use serde_json::Value;
use shared::manifest::{Identity, Stage};
use shared::output::{Begun, OutputDir};

struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
}

fn run(args: &[&str]) -> Ran {
    let output = Command::cargo_bin("data-prep").expect("the binary").args(args).output().expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Ran { status: output.status.code().expect("a status"), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn pack_args<'a>(input: &'a str, output: &'a str) -> Vec<&'a str> {
    let fixed = ["--recipe", "moco-v2", "--views", "2", "--size", "16", "--shard-samples", "3", "--threads", "2"];
    [&["pack", "--input", input, "--output", output][..], &fixed].concat()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Not one file, hidden ones included.
fn untouched(path: &Path) -> bool {
    fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none())
}

#[test]
fn help_is_the_manual() {
    let help = run(&["--help"]);
    assert_eq!(help.status, 0);
    for word in ["pack", "finish", "plan", "verify", "inspect", "EXIF", "rejects.jsonl", "Exit status"] {
        assert!(help.stdout.contains(word), "{word}");
    }
    let pack = run(&["pack", "--help"]).stdout;
    for word in [
        "--recipe",
        "eval-center",
        "--shard-bytes",
        "--max-rejects",
        "--part",
        "--order",
        "Memory:",
        "--config",
        "--overwrite",
        "[default: 224]",
        "--input-format",
        "ilsvrc2012",
        "webdataset",
        "parquet",
        "--split-fraction",
        "--subset",
        "Example",
    ] {
        assert!(pack.contains(word), "{word}");
    }
}

#[test]
fn wrong_usage_exits_with_2() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 2)])?;
    let (input, output_text) = (text(&input), text(&output));
    let base = ["pack", "--input", &input, "--output", &output_text];
    let toml = root.path().join("c.toml");
    shared::io::write_atomic(&toml, b"recipe = 'moco-v2'\nviewz = 3\n")?;
    let toml = text(&toml);
    let cases: [(&[&str], &str); 10] = [
        (&[], "`--recipe` is required"),
        (&["--recipe", "mocov2"], "neither one of"),
        (&["--recipe", "moco-v2", "--views", "0"], "at least 1"),
        (&["--recipe", "eval-center", "--views", "2"], "no chance"),
        (&["--recipe", "moco-v2", "--store", "pixels"], "possible values"),
        (&["--recipe", "moco-v2", "--max-rejects", "some"], "neither a number"),
        (&["--config", &toml], "viewz"),
        (&["--recipe", "moco-v2", "--part", "5/4"], "numbered from 1/4 to 4/4"),
        (&["--recipe", "moco-v2", "--part", "2"], "not a part such as 2/4"),
        (&["--recipe", "moco-v2", "--part", "1/2", "--overwrite"], "work of all parts"),
    ];
    for (more, sentence) in cases {
        let ran = run(&[&base[..], more].concat());
        assert_eq!(ran.status, 2, "{more:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(sentence), "{more:?}: {}", ran.stderr);
        assert!(!output.exists());
    }
    Ok(())
}

#[test]
fn unusable_inputs_exit_with_1_and_leave_nothing() -> Outcome {
    let root = tempfile::tempdir()?;
    let (missing, empty, output) = (root.path().join("missing"), root.path().join("empty"), root.path().join("out"));
    fs::create_dir(&empty)?;
    for (input, sentence) in [(&missing, "does not exist"), (&empty, "holds no image")] {
        let ran = run(&pack_args(&text(input), &text(&output)));
        assert_eq!(ran.status, 1);
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains(sentence), "{}", ran.stderr);
        assert!(ran.stderr.lines().count() <= 2, "{}", ran.stderr);
        assert!(untouched(&output));
    }
    Ok(())
}

#[test]
fn naming_an_instruction_set_changes_no_byte() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, best, portable) = (root.path().join("in"), root.path().join("best"), root.path().join("portable"));
    photos(&input, &[("a", 4)])?;
    assert_eq!(run(&pack_args(&text(&input), &text(&best))).status, 0);
    let named = run(&[&pack_args(&text(&input), &text(&portable))[..], &["--isa", "portable"]].concat());
    assert_eq!(named.status, 0, "{}", named.stderr);
    assert!(contents(&best)? == contents(&portable)?);
    let unknown = run(&[&pack_args(&text(&input), &text(&portable))[..], &["--isa", "mmx"]].concat());
    assert_eq!(unknown.status, 2, "{}", unknown.stderr);
    Ok(())
}

#[test]
fn one_broken_photo_does_not_stop_the_others() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 3), ("b", 3)])?;
    cut(&input.join("b/001.jpg"))?;
    let ran = run(&[&pack_args(&text(&input), &text(&output))[..], &["--json"]].concat());
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains("b/001.jpg"), "{}", ran.stderr);
    let summary: Value = serde_json::from_str(&ran.stdout)?;
    assert_eq!((&summary["samples"], &summary["rejects"]), (&5.into(), &1.into()));
    assert!(fs::read_to_string(output.join("rejects.jsonl"))?.contains("b/001.jpg"));

    let again = run(&pack_args(&text(&input), &text(&output)));
    assert!(again.status == 0 && again.stderr.contains("already finished"), "{}", again.stderr);
    let verified = run(&["verify", &text(&output), "--source", &text(&input), "--quiet"]);
    assert!(verified.status == 0 && verified.stdout.contains("is sound"), "{}", verified.stderr);
    let grid = root.path().join("grid.png");
    let inspected = run(&["inspect", &text(&output), "--grid", &text(&grid)]);
    assert!(inspected.status == 0 && inspected.stdout.contains("moco-v2") && grid.exists(), "{}", inspected.stderr);
    Ok(())
}

#[test]
fn configuration_file_and_flags_make_the_same_set() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, flags, file) = (root.path().join("in"), root.path().join("flags"), root.path().join("file"));
    photos(&input, &[("a", 4)])?;
    assert_eq!(run(&pack_args(&text(&input), &text(&flags))).status, 0);
    let toml = root.path().join("c.toml");
    let keys = format!("input = '{}'\nrecipe = 'moco-v2'\nviews = 7\nsize = 16\nshard-samples = 3\n", input.display());
    shared::io::write_atomic(&toml, keys.as_bytes())?;
    let ran = run(&["pack", "--config", &text(&toml), "--views", "2", "--output", &text(&file), "--quiet"]);
    assert!(ran.status == 0 && ran.stderr.is_empty() && ran.stdout.is_empty(), "{}{}", ran.stderr, ran.stdout);
    assert!(contents(&flags)? == contents(&file)?);
    Ok(())
}

#[test]
fn input_options_are_flags_and_keys() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 10), ("b", 20)])?;
    let toml = root.path().join("c.toml");
    shared::io::write_atomic(&toml, b"split = 'val'\nsplit-fraction = 0.1\nsplit-seed = 3\nviews = 2\nsize = 16\n")?;
    let input = text(&input);
    let packed = |more: &[&str]| -> Outcome<u64> {
        let output = text(&output);
        let base = ["--input", &input, "--output", &output, "--recipe", "moco-v2", "--config", &text(&toml), "--json"];
        let ran = run(&[&["pack", "--overwrite", "--quiet"], &base[..], more].concat());
        assert_eq!(ran.status, 0, "{}", ran.stderr);
        Ok(serde_json::from_str::<Value>(&ran.stdout)?["samples"].as_u64().expect("a count"))
    };
    assert_eq!(packed(&["--split", "train"])?, 27);
    assert_eq!(packed(&[])?, 3);
    let output = text(&output);
    let verify =
        ["verify", &output, "--source", &input, "--split", "val", "--split-fraction", "0.1", "--split-seed", "3"];
    assert_eq!(run(&verify).status, 0);
    let ran = run(&[&verify[..9], &["4"]].concat());
    assert!(ran.status == 1 && ran.stderr.contains("error: sample "), "{}", ran.stderr);
    for (wrong, sentence) in [
        (["--split-fraction", "1"], "must be a share"),
        (["--input-format", "zip"], "possible values"),
        (["--root", "elsewhere"], "`--root` is for lists"),
    ] {
        let ran = run(&[&["plan", "--recipe", "moco-v2", "--input", &input], &wrong[..]].concat());
        assert!(ran.status == 2 && ran.stderr.contains(sentence), "{wrong:?}: {}", ran.stderr);
    }
    Ok(())
}

#[test]
fn plan_prints_and_writes_nothing() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 4)])?;
    let (input, output_text) = (text(&input), text(&output));
    let base = ["plan", "--input", &input, "--output", &output_text, "--recipe", "moco-v2"];
    let ran = run(&base);
    assert!(ran.status == 0 && ran.stdout.contains("4 images, 1 class,"), "{}{}", ran.stdout, ran.stderr);
    let plan: Value = serde_json::from_str(&run(&[&base[..], &["--json"]].concat()).stdout)?;
    assert_eq!((&plan["samples"], &plan["fits"]), (&4.into(), &true.into()));
    assert!(!output.exists());
    Ok(())
}

#[test]
fn second_writer_is_refused() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 2)])?;
    let identity = Identity::new(Stage::DataPrep, &Value::Null, 0, Vec::new())?;
    let Begun::Writing(held) = OutputDir::begin(&output, &identity, false)? else { return Err("finished".into()) };
    let ran = run(&pack_args(&text(&input), &text(&output)));
    assert!(ran.status == 1 && ran.stderr.contains("another process is writing"), "{}", ran.stderr);
    drop(held);
    Ok(())
}

#[test]
fn foreign_directory_is_refused() -> Outcome {
    let root = tempfile::tempdir()?;
    let input = root.path().join("in");
    photos(&input, &[("a", 2)])?;
    let ran = run(&[&pack_args(&text(&input), &text(&input))[..], &["--overwrite"]].concat());
    assert!(ran.status == 1 && ran.stderr.contains("was not written by"), "{}", ran.stderr);
    assert!(input.join("a/000.jpg").exists());
    Ok(())
}
