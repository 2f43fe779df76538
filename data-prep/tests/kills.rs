//! Runs that end at any moment, by a kill or by a limit on what may be written, and go on to the same bytes.

mod fixtures;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fixtures::{Outcome, contents, cut, photos};
use shared::rng::KeyedRng;

fn pack(input: &Path, output: &Path, part: Option<usize>) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("data-prep"));
    command.arg("pack").arg("--input").arg(input).arg("--output").arg(output);
    command.args(["--recipe", "moco-v2", "--views", "6", "--size", "224", "--shard-samples", "2", "--threads", "2"]);
    command.args(["--max-rejects", "3", "--quiet"]);
    if let Some(number) = part {
        command.args(["--part", &format!("{number}/3")]);
    }
    command
}

fn finish(output: &Path) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("data-prep"));
    command.arg("finish").arg("--output").arg(output).args(["--max-rejects", "3", "--quiet"]);
    command
}

fn succeed(command: &mut Command) -> Outcome {
    let Output { status, stderr, .. } = command.output()?;
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
    Ok(())
}

/// Starts a command and kills it after a while; says whether it was at work then.
fn is_killed(command: &mut Command, after: Duration) -> Outcome<bool> {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    std::thread::sleep(after);
    let at_work = child.try_wait()?.is_none();
    child.kill()?;
    child.wait()?;
    Ok(at_work)
}

struct Straight {
    _root: tempfile::TempDir,
    input: PathBuf,
    /// Where other outputs may be made.
    beside: PathBuf,
    files: std::collections::BTreeMap<String, Vec<u8>>,
    time: Duration,
}

/// A set packed without interruption, and how long that took.
fn straight() -> Outcome<Straight> {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("straight"));
    photos(&input, &[("a", 20), ("b", 21)])?;
    cut(&input.join("a/004.jpg"))?;
    cut(&input.join("b/010.jpg"))?;
    let begin = Instant::now();
    succeed(&mut pack(&input, &output, None))?;
    let (time, files) = (begin.elapsed(), contents(&output)?);
    Ok(Straight { input, beside: root.path().to_path_buf(), files, time, _root: root })
}

#[test]
fn twenty_kills_at_random_moments_change_no_byte() -> Outcome {
    let straight = straight()?;
    let mut rng = KeyedRng::new("kills", 1, &[]);
    let (mut kills, mut sets) = (0, 0);
    while kills < 20 {
        // one set may be finished before all kills are done: then another one is begun
        let output = straight.beside.join(format!("killed-{sets}"));
        sets += 1;
        while kills < 20 && !output.join("manifest.json").exists() {
            let after = straight.time.mul_f64(rng.unit_f64() * 0.7);
            kills += usize::from(is_killed(&mut pack(&straight.input, &output, None), after)?);
        }
        succeed(&mut pack(&straight.input, &output, None))?;
        assert!(contents(&output)? == straight.files, "set {sets} after {kills} kills");
    }
    Ok(())
}

#[test]
fn parts_with_kills_among_them_make_the_same_bytes() -> Outcome {
    let straight = straight()?;
    let mut rng = KeyedRng::new("kills of parts", 1, &[]);
    let output = straight.beside.join("parts");
    let mut kills = 0;
    for round in 0..12 {
        let mut command =
            if round % 4 == 3 { finish(&output) } else { pack(&straight.input, &output, Some(1 + rng.below(3))) };
        let after = straight.time.mul_f64(rng.unit_f64() * 0.3);
        kills += usize::from(is_killed(&mut command, after)?);
    }
    assert!(kills > 0, "every part was over before it could be killed");
    for number in [3, 1, 2] {
        succeed(&mut pack(&straight.input, &output, Some(number)))?;
    }
    succeed(&mut finish(&output))?;
    assert!(contents(&output)? == straight.files, "after {kills} kills");
    Ok(())
}

#[cfg(unix)]
#[test]
fn file_that_may_not_grow_is_a_sentence_and_the_run_goes_on_later() -> Outcome {
    let straight = straight()?;
    for part in [None, Some(2)] {
        let output = straight.beside.join(format!("limited-{part:?}"));
        let unlimited = pack(&straight.input, &output, part);
        let mut limited = Command::new("sh");
        // units of 512 or 1024 bytes: a shard has 1.8 MB
        limited
            .args(["-c", "ulimit -f 1000; exec \"$@\"", "sh"])
            .arg(unlimited.get_program())
            .args(unlimited.get_args());
        let Output { status, stderr, .. } = limited.output()?;
        let stderr = String::from_utf8_lossy(&stderr);
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("cannot write `") && stderr.contains("ulimit -f"), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        succeed(&mut pack(&straight.input, &output, part))?;
        if part.is_some() {
            succeed(&mut pack(&straight.input, &output, Some(1)))?;
            succeed(&mut pack(&straight.input, &output, Some(3)))?;
            succeed(&mut finish(&output))?;
        }
        assert!(contents(&output)? == straight.files);
    }
    Ok(())
}
