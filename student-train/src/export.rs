//! The student as others take it: the backbone alone, under the names of torchvision and timm.

use std::path::{Path, PathBuf};

use serde::Serialize;
use shared::cli::may_write;
use shared::io::{FileEntry, write_atomic};
use shared::models::Encoder;
use shared::run::{Run, STUDENT_FILE};
use shared::tensor_file::write_tensors;
use shared::transforms::normalize::{IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD};
use shared::{Error, Result};

use crate::args::{ExportArgs, ExportFormat};

/// Writes `student.safetensors` into a run: weights and batch-norm buffers, without the head.
///
/// The header's text entries say how to use it: architecture, feature width, the size of the training views, and the mean and
/// standard deviation of the pixels in 0..1.
///
/// # Errors
/// [`Error::Io`].
pub fn write_student(run: &Path, encoder: &Encoder, image_size: [usize; 2]) -> Result<FileEntry> {
    let [height, width] = image_size;
    let input = [
        ("image_size", format!("{height}x{width}")),
        ("mean", format!("{IMAGENET_DEFAULT_MEAN:?}")),
        ("std", format!("{IMAGENET_DEFAULT_STD:?}")),
    ];
    write_backbone(&run.join(STUDENT_FILE), encoder, input)
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
    let network = [
        ("format", "pt".to_string()),
        ("arch", encoder.arch().name().to_string()),
        ("feature_width", encoder.arch().feature_width().to_string()),
    ];
    let metadata = network.into_iter().chain(input).map(|(key, value)| (key.to_string(), value)).collect();
    write_tensors(path, &metadata, &tensors)
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
/// As [`Run::open`]; [`Error::Damaged`] when the run's student was changed; [`Error::Usage`] when the file exists and `--overwrite` is
/// not given; [`Error::Io`].
pub fn export(args: &ExportArgs) -> Result<Exported> {
    let run = Run::open(&args.run)?;
    may_write(&args.output, args.overwrite)?;
    let entry = match args.format {
        ExportFormat::Safetensors => {
            let path = run.student_path();
            run.check_hash(STUDENT_FILE)?;
            write_atomic(&args.output, &std::fs::read(&path).map_err(Error::io("read", &path))?)?
        }
    };
    Ok(Exported {
        output: args.output.clone(),
        student: run.details().arch.name().into(),
        bytes: entry.bytes,
        blake3: entry.blake3,
    })
}
