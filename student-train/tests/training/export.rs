//! Exported students: every format holds the run's weights, and what cannot be exported gets one sentence.

use std::fs;
use std::path::Path;

use clap::Parser as _;
use prost::Message as _;
use shared::onnx::proto::ModelProto;
use shared::tensor_file::TensorFile;
use shared::weights::{Checkpoint, Format};
use shared::{Error, Result};
use student_train::{Args, Exported, Summary};

use crate::train;
use crate::workspace::Workspace;

/// Exports `run` to `file`; `more` are words of a command line.
fn export(workspace: &Workspace, run: &str, file: &str, more: &str) -> Result<Exported> {
    let (run, output) = (workspace.path(run).display().to_string(), workspace.path(file).display().to_string());
    let mut words = vec!["student-train", "export", &run, "--output", &output];
    words.extend(more.split_whitespace());
    let args = Args::try_parse_from(words).map_err(|e| Error::usage(e.to_string()))?;
    match student_train::run(&args)? {
        Summary::Exported(exported) => Ok(exported),
        Summary::Trained(_) | Summary::Imported(_) => Err(Error::usage("not an export")),
    }
}

fn finished(more: &[&str]) -> Result<Workspace> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", more)?;
    Ok(workspace)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io("read", path))
}

fn onnx(exported: &Exported) -> Result<ModelProto> {
    ModelProto::decode(read(&exported.output)?.as_slice()).map_err(|e| Error::invalid(e.to_string(), ""))
}

#[test]
fn safetensors_are_the_runs_own_file() -> Result<()> {
    let workspace = finished(&[])?;
    let exported = export(&workspace, "run", "resnet18.safetensors", "")?;
    assert_eq!(exported.student, "resnet18");
    let original = workspace.path("run").join("student.safetensors");
    assert_eq!(read(&exported.output)?, read(&original)?);
    let file = TensorFile::open(&exported.output)?;
    assert_eq!(file.metadata()["arch"], "resnet18");
    assert_eq!(file.shape("conv1.weight")?, [64, 3, 7, 7]);
    Ok(())
}

#[test]
fn pytorch_files_hold_the_same_tensors() -> Result<()> {
    let workspace = finished(&[])?;
    let original = TensorFile::open(workspace.path("run").join("student.safetensors"))?;
    let plain = Checkpoint::open(export(&workspace, "run", "student.pth", "--format pth")?.output)?;
    assert_eq!((plain.format(), plain.state_key()), (Format::PytorchZip, ""));
    let renamed = export(&workspace, "run", "detectron2.pth", "--format pth --names detectron2")?;
    let renamed = Checkpoint::open(renamed.output)?;
    assert_eq!(plain.entries().len(), original.names().len());
    assert_eq!(renamed.entries().len(), original.names().len());
    assert_eq!(renamed.state_key(), "model");
    let floats = original.tensors()?.into_iter().filter(|(_, tensor)| tensor.dtype().is_float());
    for (name, tensor) in floats {
        assert_eq!(plain.values(&name)?, tensor.flatten_all()?.to_vec1::<f32>()?, "{name}");
    }
    let pairs = [
        ("conv1.weight", "stem.conv1.weight"),
        ("layer2.0.downsample.1.running_var", "res3.0.shortcut.norm.running_var"),
        ("layer4.1.bn2.bias", "res5.1.conv2.norm.bias"),
    ];
    for (timm, detectron2) in pairs {
        let expected: Vec<f32> = original.tensor(timm)?.flatten_all()?.to_vec1()?;
        assert_eq!(renamed.values(detectron2)?, expected);
    }
    Ok(())
}

#[test]
fn onnx_graphs_take_the_runs_size_or_another() -> Result<()> {
    let workspace = finished(&[])?;
    let exported = export(&workspace, "run", "own.onnx", "--format onnx")?;
    let own = onnx(&exported)?;
    let text = own.doc_string.unwrap_or_default();
    assert!(text.contains("image_size 16x16") && !text.contains("embeddings"), "{text}");
    let larger = onnx(&export(&workspace, "run", "larger.onnx", "--format onnx --size 224 --head")?)?;
    let text = larger.doc_string.unwrap_or_default();
    assert!(text.contains("image_size 224x224") && text.contains("embedding_dim 128"), "{text}");
    let entries: Vec<(&str, &str)> = larger
        .metadata_props
        .iter()
        .map(|entry| (entry.key.as_deref().unwrap_or_default(), entry.value.as_deref().unwrap_or_default()))
        .collect();
    assert!(entries.contains(&("arch", "resnet18")) && entries.contains(&("mean", "[0.485, 0.456, 0.406]")));
    let outputs = |model: &Option<shared::onnx::proto::GraphProto>| model.as_ref().map(|graph| graph.output.len());
    assert_eq!((outputs(&own.graph), outputs(&larger.graph)), (Some(1), Some(2)));

    let again = export(&workspace, "run", "own.onnx", "--format onnx --overwrite")?;
    assert_eq!(again.blake3, exported.blake3);
    Ok(())
}

#[test]
fn files_that_exist_are_kept() -> Result<()> {
    let workspace = finished(&[])?;
    export(&workspace, "run", "student", "")?;
    let error = export(&workspace, "run", "student", "--format onnx").map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("`--overwrite`") && error.exit_status() == 2, "{error}");
    export(&workspace, "run", "student", "--overwrite")?;
    Ok(())
}

#[test]
fn changed_weights_are_refused() -> Result<()> {
    let workspace = finished(&[])?;
    let run = shared::run::Run::open(workspace.path("run"))?;
    for (file, formats) in [
        (run.student_path(), vec!["", "--format pth", "--format onnx"]),
        (run.directory().join(&run.details().checkpoint), vec!["--format onnx --head"]),
    ] {
        let original = read(&file)?;
        let mut bytes = original.clone();
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        shared::io::write_atomic(&file, &bytes)?;
        for format in formats {
            let error = export(&workspace, "run", "student", format).map(|_| ()).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{format}: {error}");
        }
        shared::io::write_atomic(&file, &original)?;
    }
    Ok(())
}

#[test]
fn unfinished_runs_are_refused() -> Result<()> {
    let workspace = finished(&["--stop-after-steps=3"])?;
    for format in ["", "--format pth", "--format onnx", "--format onnx --head"] {
        let error = export(&workspace, "run", "student", format).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
        assert!(!workspace.path("student").exists());
    }
    Ok(())
}

#[test]
fn options_that_do_not_go_together_are_refused() -> Result<()> {
    let workspace = finished(&["--student=mobilenetv3_large_100"])?;
    let cases = [
        ("--size 224", "`--format onnx`"),
        ("--format pth --head", "`--format onnx`"),
        ("--names detectron2", "`--format pth`"),
        ("--format pth --names detectron2", "mobilenetv3_large_100"),
        ("--format onnx --size 0", "1..=65535"),
        ("--format onnx --size 70000", "1..=65535"),
    ];
    for (more, expected) in cases {
        let error = export(&workspace, "run", "student", more).map(|_| ()).unwrap_err();
        assert_eq!(error.exit_status(), 2);
        assert!(error.to_string().contains(expected), "{more}: {error}");
        assert!(!workspace.path("student").exists());
    }
    Ok(())
}
