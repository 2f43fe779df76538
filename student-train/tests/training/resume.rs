//! Interrupted or not, on one thread or two: the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use shared::run::{Objective, Run};
use shared::tensor_file::TensorFile;
use shared::{Error, Result};
use student_train::StopReason;

use crate::train;
use crate::workspace::{EMBEDDING_DIM, Workspace};

/// Steps of the tiny run.
const STEPS: u64 = 4;

#[test]
fn killed_run_resumes_to_the_bytes_of_a_straight_one() -> Result<()> {
    let workspace = Workspace::new()?;
    for command in ["distill", "pretrain"] {
        let often = "--checkpoint-steps=1";
        let straight = format!("{command} straight");
        assert!(train(&workspace, command, &straight, &[often])?.finished);
        let expected = workspace.contents(&straight);
        // Every call may make one step before it dies; one call dies before its first.
        let run = format!("{command} killed");
        for (call, steps) in [1, 0, 1, 1].into_iter().enumerate() {
            let trained = train(&workspace, command, &run, &[often, &format!("--stop-after-steps={steps}")])?;
            assert!(!trained.finished, "call {call}");
        }
        let trained = train(&workspace, command, &run, &[often])?;
        assert_eq!((trained.finished, trained.steps), (true, STEPS));
        assert_same(&expected, &workspace.contents(&run));
    }
    Ok(())
}

#[test]
fn steps_after_the_last_checkpoint_are_made_again() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "distill", "straight", &[])?;
    // Checkpoints at epochs only, after steps 2 and 4: a death after 1 starts again, one after 3 goes back to 2.
    let epochs = "--checkpoint-epochs=1";
    train(&workspace, "distill", "killed", &[epochs, "--stop-after-steps=1"])?;
    let stopped = train(&workspace, "distill", "killed", &[epochs, "--stop-after-steps=3"])?;
    assert_eq!(stopped.steps, 3);
    let lines = |run: &str| fs::read_to_string(workspace.path(run).join("metrics.jsonl")).unwrap_or_default();
    assert_eq!(lines("killed").lines().count(), 4);
    let resumed = train(&workspace, "distill", "killed", &[epochs, "--stop-after-steps=1"])?;
    assert_eq!((resumed.steps, resumed.of_steps, resumed.stopped_by), (3, STEPS, Some(StopReason::Steps)));
    train(&workspace, "distill", "killed", &["--keep=1"])?;
    assert_same(&workspace.contents("straight"), &workspace.contents("killed"));
    Ok(())
}

#[test]
fn death_between_checkpoint_and_manifest_is_no_loss() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &[])?;
    let expected = workspace.contents("run");
    let run = workspace.path("run");
    // What a directory looks like whose manifest was not reached.
    let manifest = shared::manifest::Manifest::read(&run, shared::manifest::Stage::StudentTrain)?;
    shared::io::write_json(run.join(shared::output::UNFINISHED_FILE), &manifest.identity)?;
    for name in ["manifest.json", "student.safetensors"] {
        fs::remove_file(run.join(name)).map_err(Error::io("remove", &run))?;
    }
    assert!(train(&workspace, "pretrain", "run", &[])?.finished);
    assert_same(&expected, &workspace.contents("run"));
    Ok(())
}

#[test]
fn thread_count_and_checkpoint_habits_change_no_byte_of_the_result() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "distill", "one", &["--threads=1"])?;
    train(
        &workspace,
        "distill",
        "two",
        &["--threads=2", "--checkpoint-steps=1", "--keep=3", "--checkpoint-minutes=0.001"],
    )?;
    let (one, two) = (workspace.contents("one"), workspace.contents("two"));
    for name in ["manifest.json", "metrics.jsonl", "config.toml", "student.safetensors", "step-00000004.safetensors"] {
        assert_eq!(one.get(name), two.get(name), "{name}");
        assert!(one.contains_key(name), "{name}");
    }
    // A short run has its last checkpoint only, unless it is told otherwise.
    assert_eq!(checkpoints(&one), [4]);
    assert_eq!(checkpoints(&two), [2, 3, 4]);
    train(&workspace, "distill", "epochs", &["--checkpoint-epochs=1", "--threads=2"])?;
    assert_eq!(checkpoints(&workspace.contents("epochs")), [2, 4]);
    Ok(())
}

#[test]
fn damaged_checkpoint_is_passed_over() -> Result<()> {
    let workspace = Workspace::new()?;
    let often = "--checkpoint-steps=1";
    train(&workspace, "pretrain", "straight", &[often])?;
    train(&workspace, "pretrain", "run", &[often, "--stop-after-steps=3"])?;
    let tensors = workspace.path("run").join("checkpoints/step-00000003.safetensors");
    let bytes = fs::read(&tensors).map_err(Error::io("read", &tensors))?;
    shared::io::write_atomic(&tensors, &bytes[..bytes.len() / 2])?;
    let again = train(&workspace, "pretrain", "run", &[often, "--stop-after-steps=0"])?;
    assert_eq!(again.steps, 2);
    train(&workspace, "pretrain", "run", &[often])?;
    assert_same(&workspace.contents("straight"), &workspace.contents("run"));
    Ok(())
}

#[test]
fn changed_metrics_are_noticed() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &["--checkpoint-steps=2", "--stop-after-steps=3"])?;
    let metrics = workspace.path("run").join("metrics.jsonl");
    let text = fs::read_to_string(&metrics).map_err(Error::io("read", &metrics))?;
    shared::io::write_atomic(&metrics, text.replacen("\"step\":1", "\"step\":9", 1).as_bytes())?;
    let error = train(&workspace, "pretrain", "run", &[]).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("none of the checkpoints"), "{error}");
    Ok(())
}

#[test]
fn finished_run_is_left_alone() -> Result<()> {
    let workspace = Workspace::new()?;
    let first = train(&workspace, "pretrain", "run", &[])?;
    let contents = workspace.contents("run");
    let second = train(&workspace, "pretrain", "run", &[])?;
    assert!(!first.already_finished && second.already_finished);
    assert_eq!((first.fingerprint, first.final_losses), (second.fingerprint, second.final_losses));
    assert_same(&contents, &workspace.contents("run"));
    let third = train(&workspace, "pretrain", "run", &["--overwrite", "--seed=6"])?;
    assert!(third.finished && !third.already_finished);
    assert_ne!(contents["student.safetensors"], workspace.contents("run")["student.safetensors"]);
    Ok(())
}

#[test]
fn run_holds_what_its_readers_need() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "distill", "run", &[])?;
    let run = Run::open(workspace.path("run"))?;
    assert!(Run::is_run(workspace.path("run")) && !Run::is_run(workspace.path("shards")));
    let details = run.details();
    assert_eq!((details.objective, details.embedding_dim), (Objective::Distill, EMBEDDING_DIM));
    assert_eq!(details.image_size, [16, 16]);

    let metrics = run.metrics()?;
    let steps: Vec<u64> = metrics.steps.iter().map(|step| step.step).collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    assert_eq!(metrics.epochs.len(), 2);
    // One rate per epoch, half a cosine: the whole, then half of it.
    assert!(metrics.steps[0].lr == 0.03 && (metrics.steps[3].lr - 0.015).abs() < 1e-12);
    let mean = f64::midpoint(metrics.steps[2].losses.loss.into(), metrics.steps[3].losses.loss.into());
    assert!((f64::from(metrics.epochs[1].losses.loss) - mean).abs() < 1e-4);
    assert_eq!(details.final_losses, metrics.epochs[1].losses);

    // The exported student is the query encoder without its head.
    let (student, query) = (run.student()?.store().to_tensors()?, run.query_encoder()?.store().to_tensors()?);
    let without_head: BTreeSet<_> = query.keys().filter(|name| !name.starts_with("fc.")).collect();
    assert_eq!(student.keys().collect::<BTreeSet<_>>(), without_head);
    let value = |tensor: &candle_core::Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    assert_eq!(value(&student["layer4.1.bn2.running_var"])?, value(&query["layer4.1.bn2.running_var"])?);
    // Query and key encoder have parted, and every key of a full turn of the queue is a unit row.
    let checkpoint = TensorFile::open(workspace.path("run").join(&details.checkpoint))?;
    assert_ne!(checkpoint.view::<f32>("query.conv1.weight")?, checkpoint.view::<f32>("key.conv1.weight")?);
    for row in checkpoint.view::<f32>("queue")?.chunks(EMBEDDING_DIM) {
        assert!((row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    }
    Ok(())
}

/// The steps of which a run holds checkpoints.
fn checkpoints(contents: &BTreeMap<String, Vec<u8>>) -> Vec<u64> {
    let step = |name: &String| name.strip_prefix("step-")?.strip_suffix(".json")?.parse().ok();
    contents.keys().filter_map(step).collect()
}

#[test]
fn time_limit_leaves_a_checkpoint_and_the_same_command_goes_on() -> Result<()> {
    let workspace = Workspace::new()?;
    let long = "--epochs=3000";
    let stopped = train(&workspace, "pretrain", "run", &[long, "--time-limit=1s"])?;
    assert_eq!((stopped.finished, stopped.stopped_by), (false, Some(StopReason::TimeLimit)));
    assert!((1..6000).contains(&stopped.steps), "{stopped:?}");
    assert_eq!(checkpoints(&workspace.contents("run")), [stopped.steps]);
    let resumed = train(&workspace, "pretrain", "run", &[long, "--stop-after-steps=0"])?;
    assert_eq!(resumed.steps, stopped.steps);
    Ok(())
}

pub(crate) fn assert_same<T: PartialEq>(expected: &BTreeMap<String, T>, found: &BTreeMap<String, T>) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, contents) in expected {
        assert!(contents == &found[name], "`{name}` differs");
    }
}
