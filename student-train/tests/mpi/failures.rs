//! What fails on one rank ends all, with one sentence and no hang.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use shared::embedding::{EmbeddingDtype, EmbeddingSetDetails, embedding_file_name, write_embeddings};
use shared::manifest::{Manifest, Stage};
use shared::{Error, Result};

use crate::workspace::{EMBEDDING_DIM, write_embedding_set, write_shards_of};
use crate::{SAMPLES, arguments, mpirun, spawn, train, wait, workspace};

/// A job of two ranks with different command lines, each behind a piece of shell.
fn two_ranks(first: (&str, &[String]), second: (&str, &[String])) -> Command {
    let mut job = mpirun();
    for (index, (shell, arguments)) in [first, second].into_iter().enumerate() {
        if index > 0 {
            job.arg(":");
        }
        let script = format!("{shell} exec \"$0\" \"$@\"");
        job.args(["-n", "1", "sh", "-c", &script, env!("CARGO_BIN_EXE_student-train")]).args(arguments);
    }
    job
}

#[test]
fn wrong_use_is_told_once() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    let cases: [(&[&str], &str); 4] = [
        (&["--batch-size=12", "--bn-groups=4"], "error: `--bn-groups` 4 is of all ranks together"),
        (&["--batch-size=16", "--bn-groups=2"], "error: `--batch-size` 16 is of all ranks together"),
        (&["--lr=-1"], "error: `--lr` must be positive"),
        (&["--no-such-flag"], "error: unexpected argument"),
    ];
    for (flags, message) in cases {
        let ended = train(&workspace, Some(3), ("pretrain", "run"), flags)?;
        assert_eq!((ended.status, ended.errors().len()), (Some(2), 1), "{ended:?}");
        assert!(ended.errors()[0].starts_with(message), "{ended:?}");
    }
    assert!(!workspace.path("run").exists());
    let mut help = mpirun();
    help.args(["-n", "2", env!("CARGO_BIN_EXE_student-train"), "--help"]);
    let ended = wait(spawn(help)?)?;
    assert_eq!((ended.status, ended.stdout.matches("Usage:").count()), (Some(0), 1), "{ended:?}");
    Ok(())
}

#[test]
fn what_is_missing_or_different_on_one_rank_is_named() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    write_shards_of(&workspace.path("others"), SAMPLES, 2, None, 1, 32)?;
    let shards = |name: &str| format!("--shards={}", workspace.path(name).display());
    let of = |flag: &str| arguments(&workspace, "pretrain", "run", &[flag]);
    let usual = of(&shards("images"));
    for (other, message) in [
        (of(&shards("nowhere")), "rank 1 on `"),
        (of(&shards("others")), "rank 1 has other settings or inputs"),
        (of("--seed=6"), "rank 1 has other settings or inputs"),
    ] {
        let ended = wait(spawn(two_ranks(("", &usual), ("", &other)))?)?;
        assert_eq!((ended.status, ended.errors().len()), (Some(1), 1), "{ended:?}");
        assert!(ended.errors()[0].contains(message), "{ended:?}");
        assert!(!workspace.path("run").exists(), "{message}");
    }
    Ok(())
}

#[test]
fn failure_of_one_rank_in_the_middle_ends_the_job() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    let usual = arguments(&workspace, "pretrain", "run", &["--checkpoint-steps=1"]);
    // The first rank cannot write its checkpoint of more than 51 MB; the other waits for it in a step.
    let ended = wait(spawn(two_ranks(("ulimit -f 100000;", &usual), ("", &usual)))?)?;
    assert_eq!((ended.status, ended.errors().len()), (Some(1), 1), "{ended:?}");
    assert!(ended.errors()[0].starts_with("error: rank 0 on `"), "{ended:?}");
    assert!(ended.errors()[0].contains("step-00000001.safetensors"), "{ended:?}");
    Ok(())
}

#[test]
fn loss_that_is_not_finite_is_told_by_the_rank_that_has_the_samples() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    // One row of the teacher is not a number.
    let (shards, teacher) = (workspace.path("images"), workspace.path("broken"));
    write_embedding_set(&teacher, &shards, SAMPLES, 2, 0)?;
    let ids: Vec<u64> = (0..SAMPLES as u64 / 2).map(|i| i * 7 + 1).collect();
    let mut rows = vec![0.5f32; ids.len() * 2 * EMBEDDING_DIM];
    rows[..2 * EMBEDDING_DIM].fill(f32::NAN);
    let details = EmbeddingSetDetails { views: 2, embedding_dim: EMBEDDING_DIM, dtype: EmbeddingDtype::F16 };
    let entry = write_embeddings(teacher.join(embedding_file_name(0)), &details, &ids, &rows)?;
    let mut manifest = Manifest::read(&teacher, Stage::TeacherEmbed)?;
    for file in manifest.files.iter_mut().filter(|file| file.path == entry.path) {
        *file = entry.clone();
    }
    Manifest::new(manifest.identity, manifest.counts, manifest.details, manifest.files).write(&teacher)?;

    let embeddings = format!("--embeddings={}", teacher.display());
    let ended = train(&workspace, Some(2), ("distill", "run"), &[&embeddings, "--method=none"])?;
    assert_eq!((ended.status, ended.errors().len()), (Some(1), 1), "{ended:?}");
    assert!(ended.errors()[0].contains("the loss became NaN"), "{ended:?}");
    // The samples of the share are named, eight of sixteen.
    let named = ended.errors()[0].split_once("on the samples ").map(|(_, ids)| ids.split(", ").count());
    assert_eq!(named, Some(8), "{ended:?}");
    Ok(())
}

#[test]
fn dead_rank_ends_the_job_and_the_run_goes_on_afterwards() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    let usual = arguments(&workspace, "pretrain", "run", &["--epochs=50", "--checkpoint-steps=2"]);
    let pid_file = workspace.path("pid");
    let note_pid = format!("echo $$ > '{}';", pid_file.display());
    let job = spawn(two_ranks(("", &usual), (&note_pid, &usual)))?;
    let (metrics, begun) = (workspace.path("run").join("metrics.jsonl"), Instant::now());
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 3 {
        assert!(begun.elapsed() < crate::PATIENCE, "nothing happens");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = fs::read_to_string(&pid_file).map_err(Error::io("read", &pid_file))?;
    let kill = Command::new("kill").args(["-9", pid.trim()]).stdout(Stdio::null()).status();
    assert!(kill.map_err(Error::io("run", "kill"))?.success());
    let killed = Instant::now();
    let ended = wait(job)?;
    assert!(!matches!(ended.status, Some(0) | None), "{ended:?}");
    assert!(killed.elapsed() < Duration::from_secs(30), "{:?}", killed.elapsed());
    let ended = train(&workspace, Some(2), ("pretrain", "run"), &["--epochs=50", "--stop-after-steps=1"])?;
    assert_eq!(ended.status, Some(0), "{ended:?}");
    Ok(())
}
