//! Runs that die: by `kill -9` at any moment, by a request to stop, by a disk that fills up. What goes on has the bytes of a
//! straight run.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use shared::rng::KeyedRng;
use shared::{Error, Result};

use crate::workspace::Workspace;

/// The smallest network there is, and a single checkpoint at the end unless told otherwise.
/// Not a deeper network: in one whose last layers see one pixel of four images, batch norm makes gradients leave the range of f32.
const QUICK: [&str; 5] = ["--student=resnet18", "--lr=0.0001", "--threads=2", "--checkpoint-minutes=1000", "--keep=1"];

fn command(workspace: &Workspace, run: &str, more: &[&str]) -> Command {
    let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
    process.args(&workspace.arguments("pretrain", run, &[&QUICK, more].concat())[1..]).stdin(Stdio::null());
    process
}

fn start(workspace: &Workspace, run: &str, more: &[&str]) -> Result<Child> {
    let mut process = command(workspace, run, more);
    process.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(Error::io("run", "student-train"))
}

/// Runs to the end; the exit status and both outputs.
fn output(mut process: Command) -> Result<(Option<i32>, String, String)> {
    process.output().map_err(Error::io("run", "student-train")).map(texts)
}

fn wait(child: Child) -> Result<(Option<i32>, String, String)> {
    child.wait_with_output().map_err(Error::io("wait for", "student-train")).map(texts)
}

fn texts(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Waits until something has happened, a minute at most.
fn until(happened: impl Fn() -> bool) {
    let begun = Instant::now();
    while !happened() && begun.elapsed() < Duration::from_mins(1) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn lines(run: &Path) -> usize {
    std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Names of the files in the directory of checkpoints that are being written.
fn unfinished(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(".tmp-"))
        .collect()
}

/// A straight run and another are the same, byte for byte.
fn assert_same(workspace: &Workspace, run: &str) {
    let (straight, found) = (workspace.contents("straight"), workspace.contents(run));
    assert_eq!(straight.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, contents) in &straight {
        assert!(contents == &found[name], "`{name}` differs");
    }
}

#[test]
fn twenty_kills_at_random_moments_change_no_byte() -> Result<()> {
    // More steps than the kills let happen.
    const EPOCHS: &str = "--epochs=60";
    const STEPS: f64 = 120.0;
    let workspace = Workspace::new()?;
    let begun = Instant::now();
    assert_eq!(output(command(&workspace, "killed", &[EPOCHS, "--stop-after-steps=0"]))?.0, Some(0));
    let starting = begun.elapsed();
    assert_eq!(output(command(&workspace, "straight", &[EPOCHS]))?.0, Some(0));
    // From the first instruction to some steps.
    let longest = starting + begun.elapsed().saturating_sub(2 * starting).mul_f64(8.0 / STEPS);
    let run = workspace.path("killed");
    let mut random = KeyedRng::new("kills", 0, &[]);
    let mut inside_a_checkpoint = 0;
    for kill in 0..20 {
        let mut child = start(&workspace, "killed", &[EPOCHS, "--checkpoint-steps=1"])?;
        if kill % 4 == 3 {
            // A random moment need not fall where a checkpoint is half written.
            until(|| !unfinished(&run).is_empty());
        } else {
            std::thread::sleep(longest.mul_f64(random.below(1000) as f64 / 1000.0));
        }
        child.kill().map_err(Error::io("kill", "student-train"))?;
        assert_eq!(wait(child)?.0, None, "kill {kill} came after the end");
        inside_a_checkpoint += usize::from(!unfinished(&run).is_empty());
    }
    assert!(inside_a_checkpoint >= 1, "{inside_a_checkpoint}");
    assert!(lines(&run) > 0 && !run.join("manifest.json").exists());
    assert_eq!(output(command(&workspace, "killed", &[EPOCHS]))?.0, Some(0));
    assert!(unfinished(&run).is_empty());
    assert_same(&workspace, "killed");
    Ok(())
}

#[test]
fn requests_to_stop_leave_a_checkpoint_and_status_0() -> Result<()> {
    const EPOCHS: &str = "--epochs=40";
    let workspace = Workspace::new()?;
    assert_eq!(output(command(&workspace, "straight", &[EPOCHS]))?.0, Some(0));
    let run = workspace.path("stopped");
    let mut done = 0;
    for (signal, name) in [("-TERM", "SIGTERM"), ("-INT", "SIGINT"), ("-USR1", "SIGUSR1")] {
        let before = lines(&run);
        let child = start(&workspace, "stopped", &[EPOCHS, "--json"])?;
        until(|| lines(&run) > before);
        send(signal, &child)?;
        let (status, stdout, stderr) = wait(child)?;
        assert_eq!((status, stderr.as_str()), (Some(0), ""));
        let summary: serde_json::Value = serde_json::from_str(&stdout).map_err(|e| Error::usage(e.to_string()))?;
        assert_eq!(summary["finished"], false);
        assert_eq!((&summary["stopped-by"], &summary["of-steps"]), (&name.into(), &80.into()));
        let steps = summary["steps"].as_u64().unwrap_or_default();
        assert!(steps > done, "{stdout}");
        done = steps;
        // Nothing is done twice: the checkpoint is of the last step.
        assert!(run.join(format!("checkpoints/step-{done:08}.json")).is_file());
    }
    let before = lines(&run);
    let child = start(&workspace, "stopped", &[EPOCHS])?;
    until(|| lines(&run) > before);
    send("-TERM", &child)?;
    let (status, stdout, _) = wait(child)?;
    assert_eq!(status, Some(0));
    assert!(stdout.starts_with("stopped `") && stdout.contains("because of SIGTERM: the same command"), "{stdout}");
    assert_eq!(output(command(&workspace, "stopped", &[EPOCHS]))?.0, Some(0));
    assert_same(&workspace, "stopped");
    Ok(())
}

#[test]
fn second_request_ends_at_once() -> Result<()> {
    let workspace = Workspace::new()?;
    let run = workspace.path("run");
    // Drawing 60 million weights takes longer than it takes to ask twice.
    let child = start(&workspace, "run", &["--student=resnet152"])?;
    until(|| run.join("config.toml").exists());
    send("-INT", &child)?;
    std::thread::sleep(Duration::from_millis(20));
    send("-INT", &child)?;
    assert_eq!(wait(child)?.0, Some(130));
    Ok(())
}

#[test]
fn disk_that_fills_up_is_a_sentence_and_the_run_goes_on_later() -> Result<()> {
    let often = ["--checkpoint-steps=2", "--epochs=4"];
    let workspace = Workspace::new()?;
    assert_eq!(output(command(&workspace, "straight", &often))?.0, Some(0));
    let stopped = output(command(&workspace, "full", &[&often[..], &["--stop-after-steps=3"]].concat()))?;
    assert_eq!(stopped.0, Some(0), "{stopped:?}");
    let before = workspace.contents("full");
    let mut limited = Command::new("sh");
    // In units of 512 or 1024 bytes: a checkpoint has 41 MB.
    let unlimited = command(&workspace, "full", &often);
    limited.args(["-c", "ulimit -f 30000; exec \"$@\"", "sh"]).arg(unlimited.get_program()).args(unlimited.get_args());
    let (status, _, stderr) = output(limited)?;
    assert_eq!(status, Some(1), "{stderr}");
    assert!(stderr.starts_with("error: cannot write `") && stderr.contains("step-00000004.safetensors"), "{stderr}");
    assert!(!stderr.contains("panicked") && stderr.lines().count() <= 2, "{stderr}");
    let after = workspace.contents("full");
    for name in ["step-00000002.json", "step-00000002.safetensors"] {
        assert!(before.contains_key(name) && after.get(name) == before.get(name), "`{name}` changed");
    }
    assert_eq!(output(command(&workspace, "full", &often))?.0, Some(0));
    assert_same(&workspace, "full");
    Ok(())
}

/// On a file system of its own that is really full, where this user may mount one.
#[cfg(target_os = "linux")]
#[test]
fn full_file_system_is_a_sentence_too() -> Result<()> {
    let workspace = Workspace::new()?;
    let small = workspace.path("small");
    std::fs::create_dir(&small).map_err(Error::io("create", &small))?;
    // Room for one checkpoint and a half.
    let script = "mount -t tmpfs -o size=200m small \"$0\" 2>/dev/null || exit 77; \"$@\"; status=$?; \
        ls -A \"$0/run/checkpoints\" >&2; exit $status";
    let process = command(&workspace, "small/run", &["--checkpoint-steps=1", "--keep=2"]);
    let mut mounted = Command::new("unshare");
    mounted.args(["--mount", "--map-root-user", "sh", "-c", script]).arg(&small);
    mounted.arg(process.get_program()).args(process.get_args());
    let (status, _, stderr) = output(mounted).unwrap_or((Some(77), String::new(), String::new()));
    if status == Some(77) || stderr.starts_with("unshare:") {
        shared::progress::note("skipped: this user may not mount a file system");
        return Ok(());
    }
    assert_eq!(status, Some(1), "{stderr}");
    assert!(stderr.starts_with("error: cannot ") && stderr.contains("step-0000000"), "{stderr}");
    // The first checkpoint is whole, and nothing of the second is left in its way.
    assert!(
        stderr.contains("\nstep-00000001.json\nstep-00000001.safetensors\n") && !stderr.contains("\n.tmp-"),
        "{stderr}"
    );
    Ok(())
}

fn send(signal: &str, child: &Child) -> Result<()> {
    let status =
        Command::new("kill").args([signal, &child.id().to_string()]).status().map_err(Error::io("run", "kill"))?;
    if status.success() { Ok(()) } else { Err(Error::usage("kill failed")) }
}
