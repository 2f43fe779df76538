//! Runs of every objective of distillation from the command line: what they hold, and that they go on to the same bytes.

use shared::Result;
use shared::run::Run;
use shared::tensor_file::TensorFile;

use crate::train;
use crate::workspace::{EMBEDDING_DIM, Workspace, write_embedding_set};

/// A student with few features, and so a small predictor.
const SMALL: &str = "--student=vit_tiny_patch16_224";
const ALL_TERMS: &str = "--distill=mse=32,rkd=1@query,seed=0.5,simreg=2@query";

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
    let mut arguments =
        workspace.arguments("distill", "run", &[SMALL, "--method=none", "--distill=mse=8,rkd=1,simreg=1"]);
    // What `--method none` does not take.
    let queue = arguments.iter().position(|argument| argument == "--queue-size").unwrap_or(0);
    arguments.drain(queue..queue + 2);
    let trained = crate::train_with(&arguments)?;
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
    // The first `--embeddings` is taken out for the one given here, so both are named.
    let first = format!("--embeddings={}", workspace.path("embeddings").display());
    let mut students = Vec::new();
    for (how, width) in [("mean", EMBEDDING_DIM), ("concat", 2 * EMBEDDING_DIM), ("random", EMBEDDING_DIM)] {
        let ensemble = format!("--ensemble={how}");
        train(&workspace, "distill", how, &[SMALL, &first, &second, &ensemble, "--epochs=1"])?;
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

    let refused = |more: &[&str]| train(&workspace, "distill", "refused", more).map(drop).unwrap_err().to_string();
    assert!(refused(&[&first, &first.clone()]).contains("is given twice"));
    assert!(refused(&["--ensemble=mean"]).contains("needs `--embeddings` twice"));
    Ok(())
}
