//! Every wrong use gets one sentence, and nothing is half-written.

use std::fs;

use shared::output::{Begun, OutputDir};
use shared::{Error, Result};

use crate::train;
use crate::workspace::{Workspace, write_embedding_set, write_shards};

/// Runs what must fail without leaving a run behind.
fn refused(workspace: &Workspace, command: &str, more: &[&str]) -> Error {
    let result = train(workspace, command, "run", more);
    assert!(result.is_err(), "not refused: {result:?}");
    assert!(!workspace.path("run").exists(), "a run was begun before {result:?}");
    let error = result.err().unwrap_or_else(|| Error::usage(""));
    assert_eq!(error.to_string().lines().count(), 1, "{error}");
    error
}

#[test]
fn batch_larger_than_the_set() -> Result<()> {
    let error = refused(&Workspace::new()?, "distill", &["--batch-size=12", "--queue-size=12"]);
    assert_eq!(error.to_string(), "`--batch-size` 12 is larger than the set of 10 samples");
    assert_eq!(error.exit_status(), 2);
    Ok(())
}

#[test]
fn single_stored_view() -> Result<()> {
    let workspace = Workspace::new()?;
    write_shards(&workspace.path("single"), 10, 1, 0)?;
    write_embedding_set(&workspace.path("single-embeddings"), &workspace.path("single"), 10, 1, 0)?;
    let shards = format!("--shards={}", workspace.path("single").display());
    let embeddings = format!("--embeddings={}", workspace.path("single-embeddings").display());
    for error in [refused(&workspace, "distill", &[&shards, &embeddings]), refused(&workspace, "pretrain", &[&shards])]
    {
        assert!(error.to_string().contains("two views"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("--views 2")));
    }
    Ok(())
}

#[test]
fn embeddings_of_other_shards() -> Result<()> {
    let workspace = Workspace::new()?;
    write_shards(&workspace.path("other"), 10, 3, 1)?;
    let shards = format!("--shards={}", workspace.path("other").display());
    let error = refused(&workspace, "distill", &[&shards]);
    assert!(matches!(&error, Error::Chain { what, .. } if what.contains("shard set")), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("teacher-embed")));
    Ok(())
}

#[test]
fn missing_inputs() -> Result<()> {
    let workspace = Workspace::new()?;
    let error = refused(&workspace, "pretrain", &["--shards=nowhere"]);
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let error = refused(&workspace, "distill", &["--embeddings=nowhere"]);
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let error = refused(&workspace, "pretrain", &["--config=nowhere.toml"]);
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    Ok(())
}

#[test]
fn teacher_and_flags_that_do_not_fit() -> Result<()> {
    let workspace = Workspace::new()?;
    for (command, flag, word) in [
        ("pretrain", "--embeddings=embeddings", "--embeddings"),
        ("pretrain", "--distill-weight=1", "--distill-weight"),
        ("pretrain", "--distill=mse=1", "--distill"),
        ("distill", "--seed-queue-size=8", "--seed-queue-size"),
        ("distill", "--embedding-dim=64", "--embedding-dim"),
        ("distill", "--bn-groups=3", "--bn-groups"),
        ("distill", "--queue-size=3", "--queue-size"),
        ("distill", "--lr=0", "--lr"),
        ("distill", "--keep=0", "--keep"),
    ] {
        let error = refused(&workspace, command, &[flag]);
        assert_eq!(error.exit_status(), 2, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    Ok(())
}

#[test]
fn unknown_keys_of_a_file() -> Result<()> {
    let workspace = Workspace::new()?;
    let file = workspace.path("typo.toml");
    shared::io::write_atomic(&file, b"batchsize = 4\n")?;
    let error = refused(&workspace, "pretrain", &[&format!("--config={}", file.display())]);
    assert!(error.exit_status() == 2 && error.to_string().contains("batchsize"), "{error}");
    Ok(())
}

#[test]
fn options_of_a_file_are_used_and_flags_win() -> Result<()> {
    let workspace = Workspace::new()?;
    let file = workspace.path("options.toml");
    shared::io::write_atomic(&file, b"temperature = 0.5\nseed = 77\n")?;
    train(&workspace, "pretrain", "run", &["--epochs=1", &format!("--config={}", file.display())])?;
    let resolved = workspace.path("run").join("config.toml");
    let text = fs::read_to_string(&resolved).map_err(Error::io("read", &resolved))?;
    assert!(text.contains("temperature = 0.5") && text.contains("seed = 5\n"), "{text}");
    Ok(())
}

#[test]
fn other_settings_for_an_unfinished_run() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &["--stop-after-steps=3"])?;
    let contents = workspace.contents("run");
    for (command, more, word) in [
        ("pretrain", "--lr=0.1", "`lr`"),
        ("pretrain", "--seed=8", "seed"),
        ("pretrain", "--queue-size=8", "`queue-size`"),
        ("distill", "--lr=0.03", "`distill-weight`"),
    ] {
        let error = train(&workspace, command, "run", &[more]).map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Chain { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(contents == workspace.contents("run"));
    Ok(())
}

#[test]
fn checkpoint_of_another_training() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &["--stop-after-steps=3", "--checkpoint-steps=2"])?;
    train(&workspace, "pretrain", "other", &["--seed=9", "--stop-after-steps=3", "--checkpoint-steps=2"])?;
    for extension in ["json", "safetensors"] {
        let name = format!("checkpoints/step-00000002.{extension}");
        let (from, to) = (workspace.path("other").join(&name), workspace.path("run").join(&name));
        fs::copy(&from, &to).map_err(Error::io("copy", &from))?;
    }
    let error = train(&workspace, "pretrain", "run", &[]).map(|_| ()).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what == "training"), "{error}");
    Ok(())
}

#[test]
fn second_writer() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &["--stop-after-steps=1"])?;
    let unfinished = workspace.path("run").join(shared::output::UNFINISHED_FILE);
    let text = fs::read_to_string(&unfinished).map_err(Error::io("read", &unfinished))?;
    let identity = serde_json::from_str(&text).map_err(|e| Error::invalid(e.to_string(), ""))?;
    let Begun::Writing(held) = OutputDir::begin(workspace.path("run"), &identity, false)? else { panic!("finished") };
    let error = train(&workspace, "pretrain", "run", &[]).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    drop(held);
    assert!(train(&workspace, "pretrain", "run", &[])?.finished);
    Ok(())
}

#[test]
fn foreign_directory() -> Result<()> {
    let workspace = Workspace::new()?;
    let output = format!("--output={}", workspace.path("").display());
    let error = train(&workspace, "pretrain", "run", &[&output, "--overwrite"]).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    let output = format!("--output={}", workspace.path("shards").display());
    let error = train(&workspace, "pretrain", "run", &[&output, "--overwrite"]).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Chain { .. }), "{error}");
    assert!(shared::shard::ShardSet::open(workspace.path("shards")).is_ok());
    Ok(())
}

#[test]
fn loss_that_is_not_finite() -> Result<()> {
    let workspace = Workspace::new()?;
    let error = train(&workspace, "distill", "run", &["--lr=1e30"]).map(|_| ()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("in step 2 on the samples 00000000000000"), "{message}");
    assert!(error.hint().is_some_and(|hint| hint.contains("--lr")));
    assert!(!workspace.path("run").join("manifest.json").exists());
    Ok(())
}
