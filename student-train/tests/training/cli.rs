//! The binary as a process: what it prints where, and its exit statuses.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use shared::logging::read_json_lines;
use shared::models::{Arch, Encoder};
use shared::ops::Isa;
use shared::tensor_file::write_tensors;
use shared::{Error, Result};
use student_train::Timing;

use crate::workspace::Workspace;

fn student_train(workspace: &Workspace, command: &str, run: &str, more: &[&str]) -> Command {
    let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
    process.args(&workspace.arguments(command, run, more)[1..]).stdin(Stdio::null());
    process
}

fn output(mut process: Command) -> Result<(Option<i32>, String, String)> {
    let output = process.output().map_err(Error::io("run", "student-train"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code(), text(output.stdout), text(output.stderr)))
}

#[test]
fn summary_is_json_on_standard_output() -> Result<()> {
    let workspace = Workspace::new()?;
    let (status, stdout, stderr) = output(student_train(&workspace, "distill", "run", &["--json"]))?;
    assert_eq!((status, stderr.as_str()), (Some(0), ""));
    let summary: serde_json::Value = serde_json::from_str(&stdout).map_err(|e| Error::usage(e.to_string()))?;
    assert_eq!((&summary["finished"], &summary["steps"]), (&serde_json::json!(true), &serde_json::json!(4)));
    assert!(summary["final"]["distill_q"].is_number(), "{stdout}");
    let (status, stdout, _) = output(student_train(&workspace, "distill", "run", &[]))?;
    assert_eq!(status, Some(0));
    assert!(stdout.contains("nothing to do"), "{stdout}");
    Ok(())
}

#[test]
fn wrong_use_is_status_2_and_failure_is_status_1() -> Result<()> {
    let workspace = Workspace::new()?;
    let (status, stdout, stderr) =
        output(student_train(&workspace, "pretrain", "run", &["--batch-size=12", "--queue-size=12"]))?;
    assert_eq!((status, stdout.as_str()), (Some(2), ""));
    assert!(stderr.starts_with("error: `--batch-size` 12"), "{stderr}");
    let (status, _, stderr) = output(student_train(&workspace, "pretrain", "run", &["--no-such-flag"]))?;
    assert_eq!(status, Some(2), "{stderr}");
    let (status, _, stderr) = output(student_train(&workspace, "pretrain", "run", &["--shards=nowhere"]))?;
    assert_eq!(status, Some(1));
    let lines: Vec<&str> = stderr.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("error: ") && lines[1].starts_with("hint: "), "{stderr}");
    Ok(())
}

#[test]
fn help_names_every_default() -> Result<()> {
    let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
    process.args(["distill", "--help"]);
    let (status, stdout, _) = output(process)?;
    assert_eq!(status, Some(0));
    let stdout = stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    for word in ["--embeddings", "[default: 0.03, for sgd", "[default: 65536]", "[default: 0.2]", "--distill-weight"] {
        assert!(stdout.contains(word), "{word} is not in {stdout}");
    }
    for words in ["Continue from a timm or torchvision checkpoint", "512 for MobileNetV3, 1280 for other students"] {
        assert!(stdout.contains(words), "{words} is not in {stdout}");
    }
    let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
    process.args(["pretrain", "--help"]);
    assert!(!output(process)?.1.contains("--embeddings"));
    Ok(())
}

#[test]
fn help_of_export_shows_how_to_read_each_format() -> Result<()> {
    let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
    process.args(["export", "--help"]);
    let (status, stdout, _) = output(process)?;
    assert_eq!(status, Some(0));
    for word in
        ["safetensors.torch.load_file(", "weights_only=True", "cfg.MODEL.WEIGHTS", "onnxruntime.InferenceSession("]
    {
        assert!(stdout.contains(word), "{word} is not in {stdout}");
    }
    Ok(())
}

#[test]
fn instruction_set_can_be_chosen_and_is_recorded() -> Result<()> {
    let workspace = Workspace::new()?;
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        let run = isa.name();
        let mut arguments = workspace.arguments("pretrain", run, &[&format!("--isa={isa}"), "--threads=2"]);
        arguments.retain(|argument| argument != "--quiet");
        let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
        process.args(&arguments[1..]);
        let (status, _, stderr) = output(process)?;
        if !Isa::available().contains(&isa) {
            assert_eq!(status, Some(2), "{stderr}");
            assert!(stderr.starts_with(&format!("error: this machine has no {isa} instructions")), "{stderr}");
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
            assert!(!workspace.path(run).exists());
            continue;
        }
        assert_eq!(status, Some(0), "{stderr}");
        assert!(stderr.starts_with(&format!("CPU: {isa}, 2 threads\n")), "{stderr}");
        let timing: Vec<Timing> = read_json_lines(workspace.path(run).join("timing.jsonl"))?;
        assert_eq!(timing.len(), 2);
        for line in timing {
            assert_eq!((line.isa, line.threads), (isa, 2));
            assert_eq!(line.peak_memory_bytes.is_some(), cfg!(target_os = "linux"));
            // The student, its momenta and the key encoder alone are 11.2 million numbers each.
            assert!(line.peak_memory_bytes.is_none_or(|bytes| bytes > 3 * 4 * 11_200_000), "{line:?}");
        }
    }
    let (status, _, stderr) = output(student_train(&workspace, "pretrain", "run", &["--isa=sse9"]))?;
    assert_eq!(status, Some(2), "{stderr}");
    Ok(())
}

#[test]
fn going_on_with_another_instruction_set_is_said() -> Result<()> {
    let [first, .., last] = Isa::available()[..] else {
        // A machine with portable code alone cannot change.
        return Ok(());
    };
    let workspace = Workspace::new()?;
    let train = |isa: Isa, more: &[&str]| {
        let isa = format!("--isa={isa}");
        output(student_train(&workspace, "pretrain", "run", &[&[isa.as_str(), "--checkpoint-steps=1"], more].concat()))
    };
    assert_eq!(train(first, &["--stop-after-steps=1"])?.0, Some(0));
    let (status, _, stderr) = train(first, &["--stop-after-steps=1"])?;
    assert_eq!((status, stderr.as_str()), (Some(0), ""));
    let (status, _, stderr) = train(last, &[])?;
    assert_eq!(status, Some(0), "{stderr}");
    assert!(stderr.contains(&format!("computed with {first} and goes on with {last}")), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    Ok(())
}

#[test]
fn progress_goes_to_standard_error() -> Result<()> {
    let workspace = Workspace::new()?;
    let mut arguments = workspace.arguments("pretrain", "run", &[]);
    arguments.retain(|argument| argument != "--quiet");
    let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
    process.args(&arguments[1..]);
    let (status, stdout, stderr) = output(process)?;
    assert_eq!(status, Some(0), "{stderr}");
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    assert!(stderr.contains("training: 4/4 steps") && stderr.contains("lr 0.015"), "{stderr}");
    Ok(())
}

#[test]
fn what_a_run_starts_from_is_said() -> Result<()> {
    let workspace = Workspace::new()?;
    for (arch, pixels) in
        [(Arch::ResNet18, ""), (Arch::EfficientNetLite0, "normalised as inception, a run normalises as")]
    {
        let file = workspace.path(&format!("{arch}.safetensors"));
        write_tensors(&file, &BTreeMap::new(), &Encoder::new(arch, None, 1)?.store().to_tensors()?)?;
        let (init, student) = (format!("--init={}", file.display()), format!("--student={arch}"));
        let mut arguments = workspace.arguments("pretrain", arch.name(), &[&init, &student, "--stop-after-steps=0"]);
        arguments.retain(|argument| argument != "--quiet");
        let mut process = Command::new(env!("CARGO_BIN_EXE_student-train"));
        process.args(&arguments[1..]);
        let (status, _, stderr) = output(process)?;
        assert_eq!(status, Some(0), "{stderr}");
        let line = stderr.lines().find(|line| line.starts_with("starting from ")).unwrap_or_default();
        assert!(line.contains(&format!("tensors of {arch} in `")) && line.contains("; the head is drawn"), "{stderr}");
        assert!(line.contains(pixels) && line.contains("pixels") != pixels.is_empty(), "{stderr}");
    }
    Ok(())
}
