//! Trainings by several ranks under `mpirun`: the losses of one process, restarts with other numbers of ranks, failures that end.
//!
//! Skipped aloud where there is no `mpirun`.

#[path = "../training/workspace.rs"]
mod workspace;

mod curves;
mod failures;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use shared::shard::LocalDetails;
use shared::{Error, Result};
use workspace::{Workspace, write_embedding_set, write_shards_of};

/// No job of these tests takes longer, on a busy machine either.
const PATIENCE: Duration = Duration::from_mins(2);
/// Samples of a set; with those of a batch, 4 steps an epoch.
const SAMPLES: usize = 64;

/// How a job ended.
#[derive(Debug)]
struct Ended {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    /// The lines that the ranks printed as errors; the launcher adds a report of its own.
    fn errors(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.starts_with("error: ")).collect()
    }
}

/// A workspace with images of 32 pixels, or none where there is no `mpirun`, which is said.
fn workspace() -> Result<Option<Workspace>> {
    if !Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success()) {
        shared::progress::note("SKIPPED: there is no `mpirun` here");
        return Ok(None);
    }
    let workspace = Workspace::new()?;
    let local = Some(LocalDetails { views: 3, size: 16 });
    write_shards_of(&workspace.path("images"), SAMPLES, 2, local, 0, 32)?;
    write_embedding_set(&workspace.path("teacher"), &workspace.path("images"), SAMPLES, 2, 0)?;
    Ok(Some(workspace))
}

/// The arguments of a training on these images.
fn arguments(workspace: &Workspace, command: &str, run: &str, more: &[&str]) -> Vec<String> {
    let shards = format!("--shards={}", workspace.path("images").display());
    let embeddings = format!("--embeddings={}", workspace.path("teacher").display());
    let name = |flag: &str| flag.split('=').next().unwrap_or_default().to_string();
    let mut flags = vec![shards.as_str(), "--batch-size=16", "--bn-groups=4", "--queue-size=48", "--threads=1"];
    if command == "distill" {
        flags.push(&embeddings);
    }
    flags.retain(|flag| !more.iter().any(|given| name(given) == name(flag)));
    flags.extend(more);
    workspace.arguments(command, run, &flags)[1..].to_vec()
}

/// `mpirun`, on this machine alone, with more ranks than cores if need be.
fn mpirun() -> Command {
    let mut launcher = Command::new("mpirun");
    launcher.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "--mca", "plm", "isolated"]);
    launcher.stdin(Stdio::null());
    launcher
}

/// Waits for a job; one that hangs is killed, and fails the test.
fn wait(mut child: Child) -> Result<Ended> {
    let begun = Instant::now();
    let mut hung = false;
    while child.try_wait().map_err(Error::io("wait for", "mpirun"))?.is_none() {
        if begun.elapsed() > PATIENCE {
            hung = true;
            child.kill().map_err(Error::io("kill", "mpirun"))?;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().map_err(Error::io("wait for", "mpirun"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let ended = Ended { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
    assert!(!hung, "the job hung: {ended:?}");
    Ok(ended)
}

/// Starts a job with its output in pipes, which are large enough for what these jobs say.
fn spawn(mut command: Command) -> Result<Child> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(Error::io("run", "mpirun"))
}

/// Runs a training by some ranks; none for a process without a launcher.
fn train(workspace: &Workspace, ranks: Option<usize>, (command, run): (&str, &str), more: &[&str]) -> Result<Ended> {
    let program = env!("CARGO_BIN_EXE_student-train");
    let mut job = match ranks {
        None => Command::new(program),
        Some(ranks) => {
            let mut job = mpirun();
            job.args(["-n", &ranks.to_string(), program]);
            job
        }
    };
    job.args(arguments(workspace, command, run, more));
    wait(spawn(job)?)
}
