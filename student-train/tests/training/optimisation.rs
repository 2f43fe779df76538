//! Optimisers, schedules and the averaged student in whole trainings: exact resuming, what is exported, what stops a run, and what
//! is printed instead of one.

use std::fs;

use clap::Parser as _;
use shared::run::{QUERY_PREFIX, Run, prefixed};
use shared::tensor_file::TensorFile;
use shared::{Error, Result};
use student_train::dry_run::{Planned, RunState};
use student_train::{Args, Summary};

use crate::train;
use crate::workspace::Workspace;

/// Most of the flags at once.
const FLAGS: [&str; 8] = [
    "--optimizer=adamw",
    "--lr=0.001",
    "--no-decay=norm-and-bias",
    "--clip-norm=1",
    "--ema-decay=0.5",
    "--lr-unit=step",
    "--warmup-epochs=1",
    "--accumulate=1",
];

fn planned(workspace: &Workspace, command: &str, more: &[&str]) -> Result<Planned> {
    let flags: Vec<&str> = more.iter().copied().chain(["--dry-run"]).collect();
    match student_train::run(&Args::parse_from(workspace.arguments(command, "run", &flags)))? {
        Summary::Planned(planned) => Ok(*planned),
        Summary::Trained(_) | Summary::Exported(_) | Summary::Imported(_) => Err(Error::usage("not a plan")),
    }
}

#[test]
fn every_optimiser_resumes_to_the_same_bytes() -> Result<()> {
    let workspace = Workspace::new()?;
    let lars = ["--optimizer=lars", "--lr=0.1", "--trust-coefficient=0.01"];
    let larc = ["--optimizer=larc", "--lr=0.1", "--nesterov", "--schedule=steps", "--milestones=1"];
    for (name, flags) in [("adamw", &FLAGS[..]), ("lars", &lars[..]), ("larc", &larc[..])] {
        let straight = format!("{name}-straight");
        let flags: Vec<&str> = flags.iter().copied().chain(["--checkpoint-steps=1"]).collect();
        assert!(train(&workspace, "distill", &straight, &flags)?.finished);
        for stop in ["--stop-after-steps=1", "--stop-after-steps=2", "--stop-after-steps=9"] {
            let flags: Vec<&str> = flags.iter().copied().chain([stop]).collect();
            train(&workspace, "distill", name, &flags)?;
        }
        let (expected, found) = (workspace.contents(&straight), workspace.contents(name));
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{name}");
        assert!(expected.iter().all(|(file, contents)| found[file] == *contents), "{name}");
    }
    Ok(())
}

#[test]
fn the_average_is_exported_and_the_last_weights_can_be() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "distill", "run", &FLAGS)?;
    let run = Run::open(workspace.path("run"))?;
    assert!(run.details().averaged);
    let (average, last) = (run.encoder()?.store().to_tensors()?, run.query_encoder()?.store().to_tensors()?);
    let bits = |tensor: &candle_core::Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let name = "layer1.0.conv1.weight";
    assert_ne!(bits(&average[name])?, bits(&last[name])?);
    assert_eq!(bits(&average["bn1.running_var"])?, bits(&last["bn1.running_var"])?);
    assert_eq!(bits(&run.student()?.store().to_tensors()?[name])?, bits(&average[name])?);
    for (which, expected) in [("student", &average), ("last", &last)] {
        let file = workspace.path(&format!("{which}.safetensors"));
        let (run, output) = (workspace.path("run").display().to_string(), file.display().to_string());
        let weights = format!("--weights={which}");
        student_train::run(&Args::parse_from(["student-train", "export", &run, "--output", &output, &weights]))?;
        let exported = TensorFile::open(&file)?.tensors()?;
        assert_eq!(bits(&exported[name])?, bits(&expected[name])?, "{which}");
    }
    let checkpoint = TensorFile::open(workspace.path("run").join(&run.details().checkpoint))?;
    assert_eq!(bits(&prefixed(&checkpoint, QUERY_PREFIX)?[name])?, bits(&last[name])?);
    // The gradient's norm is a reported term.
    assert!(run.metrics()?.steps.iter().all(|step| step.losses.term("grad_norm").is_some_and(|norm| norm > 0.0)));
    Ok(())
}

#[test]
fn rates_of_a_warm_up_are_logged() -> Result<()> {
    let workspace = Workspace::new()?;
    let flags = ["--lr=0.4", "--warmup-epochs=1", "--warmup-start-lr=0.2", "--schedule=constant"];
    train(&workspace, "pretrain", "run", &flags)?;
    let rates: Vec<f64> = Run::open(workspace.path("run"))?.metrics()?.steps.iter().map(|step| step.lr).collect();
    assert_eq!(rates, [0.2, 0.4, 0.4, 0.4]);
    Ok(())
}

#[test]
fn numbers_that_are_not_finite_stop_the_run_and_no_checkpoint_holds_them() -> Result<()> {
    let workspace = Workspace::new()?;
    // Good steps, then a rate at which the parameters leave the range of f32.
    let flags = ["--lr=1e39", "--warmup-epochs=2", "--warmup-start-lr=1e-4", "--checkpoint-steps=1"];
    let error = train(&workspace, "pretrain", "run", &flags).map(|_| ()).unwrap_err();
    let message = error.to_string();
    assert_eq!((error.exit_status(), message.lines().count()), (1, 1));
    assert!(message.contains("in step 2 on the samples 00000000000000"), "{message}");
    assert!(message.contains("the parameter `query.") || message.contains("the loss became"), "{message}");
    assert!(message.contains("step-00000001.safetensors`"), "{message}");
    let checkpoints = workspace.path("run").join("checkpoints");
    let mut read = 0;
    for entry in fs::read_dir(&checkpoints).map_err(Error::io("list", &checkpoints))? {
        let path = entry.map_err(Error::io("list", &checkpoints))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            for (name, tensor) in TensorFile::open(&path)?.tensors()? {
                assert!(shared::ops::is_finite(&tensor)?, "`{name}` of {}", path.display());
            }
            read += 1;
        }
    }
    assert_eq!(read, 1);
    Ok(())
}

#[test]
fn a_dry_run_tells_everything_and_writes_nothing() -> Result<()> {
    let workspace = Workspace::new()?;
    let plan = planned(&workspace, "distill", &FLAGS)?;
    assert!(!workspace.path("run").exists());
    assert_eq!((plan.state, plan.steps_per_epoch, plan.steps, plan.samples), (RunState::New, 2, 4, 10));
    assert_eq!(plan.inputs.iter().map(|input| input.role.as_str()).collect::<Vec<_>>(), ["shards", "embeddings"]);
    assert!(plan.config_toml.contains("optimizer = \"adamw\"") && plan.to_string().contains("would be a new run"));
    assert_eq!(plan.config["ema-decay"], 0.5);

    train(&workspace, "distill", "run", &[&FLAGS[..], &["--checkpoint-steps=1", "--stop-after-steps=3"]].concat())?;
    let plan = planned(&workspace, "distill", &FLAGS)?;
    assert_eq!((plan.state, plan.steps_done), (RunState::Resumes, 3));
    assert!(matches!(planned(&workspace, "distill", &["--lr=0.5"]).unwrap_err(), Error::Chain { .. }));
    assert_eq!(planned(&workspace, "distill", &["--lr=0.5", "--overwrite"])?.state, RunState::Replaced);

    train(&workspace, "distill", "run", &FLAGS)?;
    let contents = workspace.contents("run");
    assert_eq!(planned(&workspace, "distill", &FLAGS)?.state, RunState::Finished);
    assert!(contents == workspace.contents("run"));
    // The tensors, without the header and the records' names.
    let file = workspace.path("run").join("checkpoints/step-00000004.safetensors");
    let written = fs::metadata(&file).map_err(Error::io("read", &file))?.len();
    let share = plan.checkpoint_bytes as f64 / written as f64;
    assert!((0.99..=1.0).contains(&share), "{share}");
    assert!(plan.memory_bytes > plan.checkpoint_bytes);
    assert_eq!(planned(&workspace, "distill", &["--epochs=0"]).unwrap_err().exit_status(), 2);
    Ok(())
}
