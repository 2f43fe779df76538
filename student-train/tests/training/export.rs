//! Exported students: the formats hold the run's weights, and what is refused leaves no file.

use std::fs;
use std::path::Path;

use shared::tensor_file::TensorFile;
use shared::weights::{Checkpoint, Format};
use shared::{Error, Result};
use student_train::args::{ExportFormat, TensorNames};
use student_train::{ExportArgs, Exported};

use crate::train;
use crate::workspace::Workspace;

fn arguments(workspace: &Workspace, format: ExportFormat) -> ExportArgs {
    ExportArgs {
        run: workspace.path("run"),
        format,
        output: workspace.path("exported"),
        names: TensorNames::Timm,
        size: None,
        head: false,
        overwrite: false,
        json: false,
    }
}

fn export(args: &ExportArgs) -> Result<Exported> {
    student_train::export::export(args)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io("read", path))
}

#[test]
fn safetensors_are_the_runs_own() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &[])?;
    let args = arguments(&workspace, ExportFormat::Safetensors);
    let exported = export(&args)?;
    assert_eq!(exported.student, "resnet18");
    let original = workspace.path("run").join("student.safetensors");
    assert_eq!(read(&exported.output)?, read(&original)?);
    let file = TensorFile::open(&exported.output)?;
    assert_eq!(file.metadata()["arch"], "resnet18");
    assert_eq!(file.shape("conv1.weight")?, [64, 3, 7, 7]);

    assert!(matches!(export(&args), Err(Error::Usage { .. })));
    let args = ExportArgs { overwrite: true, ..args };
    export(&args)?;
    let mut bytes = read(&original)?;
    if let Some(last) = bytes.last_mut() {
        *last ^= 1;
    }
    shared::io::write_atomic(&original, &bytes)?;
    for format in [ExportFormat::Safetensors, ExportFormat::Pth, ExportFormat::Onnx] {
        let error = export(&ExportArgs { format, ..args.clone() }).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    }
    Ok(())
}

#[test]
fn pytorch_files_hold_the_same_numbers_under_either_names() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &[])?;
    let own = TensorFile::open(workspace.path("run").join("student.safetensors"))?.tensors()?;
    let values = |tensor: &candle_core::Tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>());

    let args = arguments(&workspace, ExportFormat::Pth);
    let timm = Checkpoint::open(export(&args)?.output)?;
    assert_eq!((timm.format(), timm.state_key(), timm.entries().len()), (Format::PytorchZip, "", own.len()));
    for (name, tensor) in own.iter().filter(|(_, tensor)| tensor.dtype().is_float()) {
        assert_eq!(values(&timm.tensor(name)?)?, values(tensor)?, "{name}");
    }

    let args = ExportArgs { names: TensorNames::Detectron2, overwrite: true, ..args };
    let detectron2 = Checkpoint::open(export(&args)?.output)?;
    assert_eq!((detectron2.state_key(), detectron2.entries().len()), ("model", own.len()));
    for (ours, theirs) in
        [("conv1.weight", "stem.conv1.weight"), ("layer2.0.downsample.1.bias", "res3.0.shortcut.norm.bias")]
    {
        assert_eq!(values(&detectron2.tensor(theirs)?)?, values(&own[ours])?);
    }
    Ok(())
}

#[test]
fn graphs_are_the_same_bytes_every_time_and_take_the_size_they_are_asked_for() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &[])?;
    let args = ExportArgs { overwrite: true, ..arguments(&workspace, ExportFormat::Onnx) };
    let first = export(&args)?;
    assert_eq!(export(&args)?, first);
    let other = export(&ExportArgs { size: Some(64), ..args.clone() })?;
    assert_ne!(other.blake3, first.blake3);
    let headed = export(&ExportArgs { head: true, ..args })?;
    assert!(headed.bytes > first.bytes + 4 * 512 * 8, "the head's weights are there: {} bytes", headed.bytes);
    Ok(())
}

#[test]
fn options_that_do_not_go_together_are_refused() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &["--student=efficientnet_b0"])?;
    let plain = arguments(&workspace, ExportFormat::Safetensors);
    let detectron2 = ExportArgs { names: TensorNames::Detectron2, ..arguments(&workspace, ExportFormat::Pth) };
    for (args, words) in [
        (ExportArgs { size: Some(64), ..plain.clone() }, "`--size` is for `--format onnx`"),
        (ExportArgs { head: true, ..plain.clone() }, "`--head` is for `--format onnx`"),
        (ExportArgs { names: TensorNames::Detectron2, ..plain }, "`--names detectron2` is for `--format pth`"),
        (detectron2, "`--names detectron2` is for ResNets"),
    ] {
        let error = export(&args).map(|_| ()).unwrap_err();
        assert!(error.exit_status() == 2 && error.to_string().contains(words), "{error}");
        assert!(!args.output.exists());
    }
    Ok(())
}

#[test]
fn an_unfinished_run_is_refused() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &["--stop-after-steps=3"])?;
    let args = arguments(&workspace, ExportFormat::Safetensors);
    let error = export(&args).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert!(!args.output.exists());
    Ok(())
}
