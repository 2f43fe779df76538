//! The probe: what it measures, that it changes nothing of the training, and what it refuses.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use shared::manifest::{Identity, Manifest, Stage};
use shared::rng::KeyedRng;
use shared::run::Run;
use shared::shard::{ShardSet, ShardSetDetails, ShardWriter, VIEW_PARAMETERS, shard_file_name};
use shared::tensor_file::TensorFile;
use shared::{Error, Result};
use student_train::config::{ProbeConfig, ProbePaths};
use student_train::probe::Probe;

use crate::resume::assert_same;
use crate::train;
use crate::workspace::Workspace;

const CLASSES: [&str; 3] = ["a", "b", "c"];

/// A shard of noise with one view and `size` pixels to a side; the samples belong to the classes in turn.
fn write_labelled(directory: &Path, samples: usize, size: usize, classes: &[&str]) -> Result<()> {
    fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    let mut writer = ShardWriter::create(directory.join(shard_file_name(0)), samples, 1, size, size)?;
    for sample in 0..samples as u64 {
        let mut rng = KeyedRng::new("test pixels", 1, &[sample]);
        let pixels: Vec<u8> = (0..size * size * 3).map(|_| rng.below(256) as u8).collect();
        writer.push(sample, (sample % classes.len() as u64) as i64, &pixels, &[0.0; VIEW_PARAMETERS.len()])?;
    }
    let classes = classes.iter().map(ToString::to_string).collect();
    let details = ShardSetDetails { views: 1, height: size, width: size, classes, ..ShardSetDetails::default() };
    let identity = Identity::new(Stage::DataPrep, &serde_json::json!({}), samples as u64, Vec::new())?;
    let counts = BTreeMap::from([("samples".to_string(), samples as u64)]);
    Manifest::new(identity, counts, serde_json::json!(details), vec![writer.finish()?]).write(directory)
}

/// A workspace with labelled sets of 16 pixels, and the flags that probe with them.
fn workspace() -> Result<(Workspace, [String; 2])> {
    let workspace = Workspace::new()?;
    let mut flags = Vec::new();
    for (flag, samples) in [("probe-train", 40), ("probe-val", 11)] {
        write_labelled(&workspace.path(flag), samples, 16, &CLASSES)?;
        flags.push(format!("--{flag}={}", workspace.path(flag).display()));
    }
    let [train, val] = [flags.remove(0), flags.remove(0)];
    Ok((workspace, [train, val]))
}

#[test]
fn probe_is_told_and_changes_nothing_of_the_training() -> Result<()> {
    let (workspace, [train_set, val_set]) = workspace()?;
    train(&workspace, "pretrain", "plain", &["--epochs=3"])?;
    let probed = ["--epochs=3", &train_set, &val_set, "--probe-epochs=2", "--probe-k=5"];
    let summary = train(&workspace, "pretrain", "probed", &probed)?;
    let (plain, run) = (Run::open(workspace.path("plain"))?, Run::open(workspace.path("probed"))?);
    let metrics = run.metrics()?;
    assert_eq!((&metrics.steps, &metrics.epochs), (&plain.metrics()?.steps, &plain.metrics()?.epochs));
    let contents = |run: &str| workspace.contents(run);
    for file in ["student.safetensors", "step-00000006.safetensors"] {
        assert!(contents("plain")[file] == contents("probed")[file], "`{file}` differs");
    }
    // After the second epoch, and at the end.
    let places: Vec<(u64, u64)> = metrics.probes.iter().map(|probe| (probe.epoch, probe.step)).collect();
    assert_eq!(places, [(1, 4), (2, 6)]);
    let roles: Vec<&str> = run.manifest().identity.inputs.iter().map(|input| input.role.as_str()).collect();
    assert_eq!(roles, ["shards", "probe-train", "probe-val"]);

    // The last line is what the finished student gives.
    let paths = ProbePaths { train: workspace.path("probe-train"), val: Some(workspace.path("probe-val")) };
    let shards = ShardSet::open(workspace.path("shards"))?;
    let probe = Probe::open(&paths, ProbeConfig { probe_epochs: 2, probe_k: 5 }, &shards)?;
    assert_eq!(probe.accuracy(&run.student()?)?, metrics.probes[1].accuracy);
    assert_eq!(metrics.probes[1].accuracy.k, 5);

    let Some(best) = run.details().best.clone() else { panic!("nothing was found best") };
    let expected = usize::from(metrics.probes[1].accuracy.top1 > metrics.probes[0].accuracy.top1);
    assert_eq!((best.step, best.accuracy), (metrics.probes[expected].step, metrics.probes[expected].accuracy));
    assert_eq!(summary.best.as_ref(), Some(&best));
    run.check_hash("student-best.safetensors")?;
    let encoder = run.student()?;
    encoder.store().load(&TensorFile::open(workspace.path("probed").join("student-best.safetensors"))?.tensors()?)?;
    assert_eq!(probe.accuracy(&encoder)?, best.accuracy);
    Ok(())
}

#[test]
fn probed_run_resumes_to_the_same_bytes() -> Result<()> {
    let (workspace, [train_set, _]) = workspace()?;
    // Each sample by the others of its set.
    let probed = ["--epochs=3", &train_set, "--probe-epochs=1", "--checkpoint-steps=1"];
    train(&workspace, "pretrain", "straight", &probed)?;
    for steps in [3, 1, 0, 9] {
        train(&workspace, "pretrain", "killed", &[&probed[..], &[&format!("--stop-after-steps={steps}")]].concat())?;
    }
    assert_same(&workspace.contents("straight"), &workspace.contents("killed"));
    let run = Run::open(workspace.path("straight"))?;
    assert_eq!(run.metrics()?.probes.len(), 3);
    // Readers of a training's events get a file from each call.
    let files = |run: &str| fs::read_dir(workspace.path(run).join("tensorboard")).map_or(0, Iterator::count);
    assert_eq!((files("straight"), files("killed")), (1, 4));
    Ok(())
}

#[test]
fn sets_that_do_not_fit_are_refused() -> Result<()> {
    let (workspace, [train_set, _]) = workspace()?;
    write_labelled(&workspace.path("large"), 10, 24, &CLASSES)?;
    write_labelled(&workspace.path("others"), 10, 16, &["a", "d"])?;
    write_labelled(&workspace.path("single"), 1, 16, &CLASSES)?;
    let flag = |flag: &str, set: &str| format!("--{flag}={}", workspace.path(set).display());
    let cases: BTreeMap<Vec<String>, (u8, &str)> = BTreeMap::from([
        (vec![flag("probe-train", "shards")], (1, "has no labels")),
        (vec![flag("probe-train", "large")], (1, "24 x 24")),
        (vec![train_set.clone(), flag("probe-val", "others")], (1, "only the training set has `b`")),
        (vec![flag("probe-train", "single")], (1, "too few samples")),
        (vec!["--probe-k=5".into()], (2, "`--probe-k` needs `--probe-train`")),
        (vec![train_set, "--probe-k=0".into()], (2, "must be at least 1")),
    ]);
    for (flags, (status, words)) in cases {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let error = train(&workspace, "pretrain", "refused", &flags).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.exit_status(), status, "{error}");
    }
    assert!(!workspace.path("refused").exists());
    Ok(())
}
