//! Runs of every objective of distillation from the command line: what they hold, and that they go on to the same bytes.

use shared::Result;
use shared::run::Run;
use shared::tensor_file::TensorFile;

use crate::workspace::{EMBEDDING_DIM, HEAD_INPUTS, Workspace, add_teacher_head, write_embedding_set};
use crate::{train, train_with};

/// A student with few features, and so a small predictor.
const SMALL: &str = "--student=vit_tiny_patch16_224";
const ALL_TERMS: &str = "--distill=mse=32,rkd=1@query,seed=0.5,simreg=2@query";

/// Arguments without a flag and its value.
fn without(flag: &str, mut arguments: Vec<String>) -> Vec<String> {
    if let Some(at) = arguments.iter().position(|argument| argument == flag) {
        arguments.drain(at..at + 2);
    }
    arguments
}

/// Names of the tensors of a run's last checkpoint.
fn tensor_names(run: &Run) -> Result<Vec<String>> {
    Ok(TensorFile::open(run.directory().join(&run.details().checkpoint))?.names())
}

#[test]
fn all_terms_at_once_go_on_to_the_same_bytes() -> Result<()> {
    let workspace = Workspace::new()?;
    let options = [SMALL, ALL_TERMS, "--seed-queue-size=11"];
    train(&workspace, "distill", "straight", &options)?;
    // The steps after 1 and 3 are in the middle of epochs, and of turns of the queue.
    for stop in ["--stop-after-steps=1", "--stop-after-steps=2"] {
        let some_steps = [options.as_slice(), &["--checkpoint-steps=1", stop]].concat();
        assert!(!train(&workspace, "distill", "killed", &some_steps)?.finished);
    }
    train(&workspace, "distill", "killed", &options)?;
    let (straight, killed) = (workspace.contents("straight"), workspace.contents("killed"));
    for name in ["manifest.json", "metrics.jsonl", "config.toml", "student.safetensors", "step-00000004.safetensors"] {
        assert!(straight.contains_key(name) && straight.get(name) == killed.get(name), "{name}");
    }

    let run = Run::open(workspace.path("straight"))?;
    let metrics = run.metrics()?;
    let terms: Vec<&str> = metrics.steps[0].losses.terms.keys().map(String::as_str).collect();
    let expected =
        ["distill_k", "distill_q", "info_nce", "rkd_angle_q", "rkd_distance_q", "seed_k", "seed_q", "simreg_q", "top1"];
    assert_eq!(terms, expected);
    let losses = &metrics.steps[3].losses;
    let weights = [32.0, 32.0, 1.0, 2.0, 1.0, 0.5, 0.5, 2.0, 0.0];
    let sum: f64 = losses.terms.values().zip(weights).map(|(term, weight)| f64::from(*term) * weight).sum();
    assert!((sum - f64::from(losses.loss)).abs() < 1e-5 * sum, "{sum} {}", losses.loss);
    // Four steps of two views of four samples: the ring of 11 was filled and gone around.
    let tensors = TensorFile::open(run.directory().join(&run.details().checkpoint))?;
    assert_eq!(tensors.shape("seed_queue")?, [11, EMBEDDING_DIM]);
    for name in ["simreg.predictor.7.weight", "simreg.predictor.1.running_var", "sgd.simreg.predictor.0.weight"] {
        assert!(tensors.names().iter().any(|known| known == name), "{name}");
    }
    Ok(())
}

#[test]
fn a_teacher_alone_needs_no_key_encoder() -> Result<()> {
    let workspace = Workspace::new()?;
    let options = [SMALL, "--method=none", "--distill=mse=8,rkd=1,simreg=1"];
    let arguments = without("--queue-size", workspace.arguments("distill", "run", &options));
    let trained = train_with(&arguments)?;
    assert!(trained.finished);
    let run = Run::open(workspace.path("run"))?;
    let names = tensor_names(&run)?;
    assert!(names.iter().all(|name| !name.starts_with("key.") && name != "queue"), "{names:?}");
    let losses = &run.details().final_losses;
    assert!(losses.term("info_nce").is_none() && losses.term("simreg_k").is_some_and(|term| term > 0.0));
    assert_eq!(run.query_encoder()?.head().map(|head| head.embedding_dim), Some(EMBEDDING_DIM));
    Ok(())
}

#[test]
fn ensembles_take_every_teacher() -> Result<()> {
    let workspace = Workspace::new()?;
    write_embedding_set(&workspace.path("second"), &workspace.path("shards"), 10, 3, 1)?;
    let second = format!("--embeddings={}", workspace.path("second").display());
    let twice = |mut arguments: Vec<String>, second: &str| {
        arguments.push(second.to_string());
        train_with(&arguments)
    };
    let mut students = Vec::new();
    for (how, width) in [("mean", EMBEDDING_DIM), ("concat", 2 * EMBEDDING_DIM), ("random", EMBEDDING_DIM)] {
        let ensemble = format!("--ensemble={how}");
        twice(workspace.arguments("distill", how, &[SMALL, &ensemble, "--epochs=1"]), &second)?;
        let run = Run::open(workspace.path(how))?;
        assert_eq!(run.details().embedding_dim, width);
        let roles =
            ["embeddings", "embeddings-2"].map(|role| run.manifest().input(role).map(|input| input.path.clone()));
        let paths = ["embeddings", "second"].map(|name| Some(workspace.path(name).display().to_string()));
        assert_eq!(roles, paths);
        let config = workspace.contents(how)["config.toml"].clone();
        assert!(String::from_utf8_lossy(&config).contains(&format!("ensemble = \"{how}\"")));
        students.push(workspace.contents(how)["metrics.jsonl"].clone());
    }
    assert!(students[0] != students[1] && students[0] != students[2]);

    let first = format!("--embeddings={}", workspace.path("embeddings").display());
    let message = twice(workspace.arguments("distill", "refused", &[]), &first).map(drop).unwrap_err().to_string();
    assert!(message.contains("is given twice"), "{message}");
    let message = train(&workspace, "distill", "refused", &["--ensemble=mean"]).map(drop).unwrap_err().to_string();
    assert!(message.contains("needs `--embeddings` twice"), "{message}");
    Ok(())
}

#[test]
fn the_teachers_own_head_stays_as_it_is_and_goes_along() -> Result<()> {
    let workspace = Workspace::new()?;
    let retro = |run: &str, more: &[&str]| {
        let options = [&[SMALL, "--head=retro"], more].concat();
        train_with(&without("--head-hidden", workspace.arguments("distill", run, &options)))
    };
    let message = retro("refused", &[]).map(drop).unwrap_err().to_string();
    assert!(message.contains("carries no projection head"), "{message}");
    let message = train(&workspace, "distill", "refused", &["--head=retro"]).map(drop).unwrap_err().to_string();
    assert!(message.contains("takes no `--head-hidden`"), "{message}");

    add_teacher_head(&workspace.path("embeddings"))?;
    retro("straight", &[])?;
    assert!(!retro("killed", &["--checkpoint-steps=1", "--stop-after-steps=1"])?.finished);
    retro("killed", &[])?;
    let (straight, killed) = (workspace.contents("straight"), workspace.contents("killed"));
    for name in ["manifest.json", "metrics.jsonl", "head.safetensors", "step-00000004.safetensors"] {
        assert!(straight.contains_key(name) && straight.get(name) == killed.get(name), "{name}");
    }
    assert_eq!(straight.get("head.safetensors"), workspace.contents("embeddings").get("head.safetensors"));

    let run = Run::open(workspace.path("straight"))?;
    assert_eq!((run.details().adapter_width, run.details().embedding_dim), (Some(HEAD_INPUTS), EMBEDDING_DIM));
    let encoder = run.query_encoder()?;
    let adapter = encoder.head().map(|head| head.embedding_dim);
    assert_eq!((encoder.embedding_dim(), adapter), (EMBEDDING_DIM, Some(HEAD_INPUTS)));
    // The adapter learns through the frozen head, and the losses are those of the teacher's embeddings.
    let checkpoint = TensorFile::open(run.directory().join(&run.details().checkpoint))?;
    assert!(checkpoint.view::<f32>("sgd.query.fc.weight")?.iter().any(|momentum| momentum.abs() > 1e-6));
    assert_eq!(checkpoint.shape("queue")?, [6, EMBEDDING_DIM]);
    // Another student may start from it, with a head of its own.
    let init = format!("--init={}", workspace.path("straight").display());
    assert!(train(&workspace, "distill", "next", &[SMALL, &init, "--epochs=1"])?.finished);
    Ok(())
}
