//! The student as others take it: the backbone under the names of torchvision, timm or Detectron2, or a graph that runs by itself.

mod detectron2;
mod pth;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use shared::cli::may_write;
use shared::io::{FileEntry, write_atomic};
use shared::models::{Arch, Encoder};
use shared::onnx;
use shared::run::{BEST_STUDENT_FILE, Run, STUDENT_FILE};
use shared::tensor_file::{TensorFile, write_tensors};
use shared::transforms::normalize::{IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD};
use shared::{Error, Result};

use self::pth::Object;
use crate::args::{ExportArgs, ExportFormat, ExportedWeights, TensorNames};

/// Writes `student.safetensors` into a run: weights and batch-norm buffers, without the head.
///
/// The header's text entries say how to use it: architecture, feature width, the size of the training views, and the mean and
/// standard deviation of the pixels in 0..1.
///
/// # Errors
/// [`Error::Io`].
pub fn write_student(run: &Path, encoder: &Encoder, image_size: [usize; 2]) -> Result<FileEntry> {
    write_backbone(&run.join(STUDENT_FILE), encoder, input_entries(image_size))
}

/// Writes `student-best.safetensors` into a run, as [`write_student`].
///
/// # Errors
/// [`Error::Io`].
pub fn write_best(run: &Path, encoder: &Encoder, image_size: [usize; 2]) -> Result<FileEntry> {
    write_backbone(&run.join(BEST_STUDENT_FILE), encoder, input_entries(image_size))
}

/// Writes an encoder without its head; the header's text entries are its architecture, its feature width, and `input`.
///
/// # Errors
/// [`Error::Io`].
pub fn write_backbone(
    path: &Path,
    encoder: &Encoder,
    input: impl IntoIterator<Item = (&'static str, String)>,
) -> Result<FileEntry> {
    let mut tensors = encoder.store().to_tensors()?;
    tensors.retain(|name, _| Encoder::is_backbone_tensor(name));
    let mut metadata = description(encoder.arch(), input);
    metadata.insert("format".into(), "pt".into());
    write_tensors(path, &metadata, &tensors)
}

/// What a network takes and gives, as text entries.
fn description(arch: Arch, input: impl IntoIterator<Item = (&'static str, String)>) -> BTreeMap<String, String> {
    let network = [("arch", arch.name().to_string()), ("feature_width", arch.feature_width().to_string())];
    network.into_iter().chain(input).map(|(key, value)| (key.to_string(), value)).collect()
}

/// The images that students are trained with, as text entries.
fn input_entries([height, width]: [usize; 2]) -> [(&'static str, String); 3] {
    [
        ("image_size", format!("{height}x{width}")),
        ("mean", format!("{IMAGENET_DEFAULT_MEAN:?}")),
        ("std", format!("{IMAGENET_DEFAULT_STD:?}")),
    ]
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Exported {
    /// The file.
    pub output: PathBuf,
    /// Architecture, by timm's name.
    pub student: String,
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub blake3: String,
}

/// Writes the student of a finished run to a file.
///
/// # Errors
/// As [`Run::open`]; [`Error::Damaged`] when the run's weights were changed; [`Error::Usage`] when the options do not go together, or the
/// file exists and `--overwrite` is not given; [`Error::Io`].
pub fn export(args: &ExportArgs) -> Result<Exported> {
    check_options(args)?;
    let run = Run::open(&args.run)?;
    may_write(&args.output, args.overwrite)?;
    let contents = match args.format {
        ExportFormat::Safetensors if last_weights(&run, args) => {
            let encoder = encoder(&run, args)?;
            let entry = write_backbone(&args.output, &encoder, input_entries(run.details().image_size))?;
            return Ok(exported(&run, args, entry));
        }
        ExportFormat::Safetensors => {
            let path = checked(&run, STUDENT_FILE)?;
            std::fs::read(&path).map_err(Error::io("read", &path))?
        }
        ExportFormat::Pth => pth_contents(&run, args)?,
        ExportFormat::Onnx => onnx_contents(&run, args)?,
    };
    let entry = write_atomic(&args.output, &contents)?;
    Ok(exported(&run, args, entry))
}

fn exported(run: &Run, args: &ExportArgs, entry: FileEntry) -> Exported {
    let student = run.details().arch.name().into();
    Exported { output: args.output.clone(), student, bytes: entry.bytes, blake3: entry.blake3 }
}

/// Whether the weights that are wanted are others than those of `student.safetensors`.
fn last_weights(run: &Run, args: &ExportArgs) -> bool {
    args.weights == ExportedWeights::Last && run.details().averaged
}

/// The encoder with its head, whose weights are wanted.
fn encoder(run: &Run, args: &ExportArgs) -> Result<Encoder> {
    checked(run, &run.details().checkpoint)?;
    if last_weights(run, args) { run.query_encoder() } else { run.encoder() }
}

fn check_options(args: &ExportArgs) -> Result<()> {
    let only_onnx = [("--size", args.size.is_some()), ("--head", args.head)];
    if let Some((flag, _)) = only_onnx.iter().find(|(_, given)| *given && args.format != ExportFormat::Onnx) {
        return Err(Error::usage(format!("`{flag}` is for `--format onnx`: add that, or leave `{flag}` out")));
    }
    if args.names == TensorNames::Detectron2 && args.format != ExportFormat::Pth {
        let message = "`--names detectron2` is for `--format pth`: Detectron2 reads no other format";
        return Err(Error::usage(message));
    }
    Ok(())
}

fn pth_contents(run: &Run, args: &ExportArgs) -> Result<Vec<u8>> {
    let (arch, names) = (run.details().arch, args.names);
    let rename = |name: &str| match names {
        TensorNames::Timm => Ok(name.to_string()),
        TensorNames::Detectron2 => detectron2::name(arch, name),
    };
    let tensors = if last_weights(run, args) {
        let mut tensors = encoder(run, args)?.store().to_tensors()?;
        tensors.retain(|name, _| Encoder::is_backbone_tensor(name));
        tensors
    } else {
        TensorFile::open(checked(run, STUDENT_FILE)?)?.tensors()?
    };
    let state = tensors.into_iter().map(|(name, tensor)| Ok((rename(&name)?, Object::Tensor(tensor))));
    let state = Object::Dict(state.collect::<Result<_>>()?);
    pth::encode(&match names {
        TensorNames::Timm => state,
        TensorNames::Detectron2 => detectron2::checkpoint(state),
    })
}

fn onnx_contents(run: &Run, args: &ExportArgs) -> Result<Vec<u8>> {
    let details = run.details();
    let size = args.size.map_or(details.image_size, |side| [usize::from(side); 2]);
    let (encoder, outputs) = if args.head {
        (encoder(run, args)?, "`features` [batch, F] and `embeddings` [batch, D], rows of unit length")
    } else if last_weights(run, args) {
        let backbone = Encoder::new(details.arch, None, 0)?;
        let mut tensors = encoder(run, args)?.store().to_tensors()?;
        tensors.retain(|name, _| Encoder::is_backbone_tensor(name));
        backbone.store().load(&tensors)?;
        (backbone, "`features` [batch, F]")
    } else {
        checked(run, STUDENT_FILE)?;
        (run.student()?, "`features` [batch, F]")
    };
    let mut metadata = description(details.arch, input_entries(size));
    if args.head {
        metadata.insert("embedding_dim".into(), details.embedding_dim.to_string());
    }
    let entries: Vec<String> = metadata.iter().map(|(key, value)| format!("{key} {value}")).collect();
    let text = format!(
        "A vision backbone trained without labels. Input: `images` [batch, 3, H, W], RGB in 0..1 minus mean, over std. \
        Output: {outputs}. {}.",
        entries.join(", ")
    );
    onnx::encode(&encoder, size, &metadata, &text).map_err(|error| match error {
        Error::Shape { expected, got, .. } => Error::usage(format!(
            "{} takes no images of {} x {} pixels: expected shape {expected}, got {got}; choose another `--size`",
            details.arch, size[0], size[1]
        )),
        other => other,
    })
}

/// The path of a run's file whose contents are those that were recorded.
fn checked(run: &Run, file: &str) -> Result<PathBuf> {
    run.check_hash(file)?;
    Ok(run.directory().join(file))
}
