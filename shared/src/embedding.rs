//! Embedding sets: the teacher's final embeddings of every view of a shard set, row for row.
//!
//! ```text
//! manifest.json                    names the shard set by its fingerprint
//! embeddings-00000.safetensors …   one per shard:
//!     embeddings  [n, V, D]  f16, bf16 or f32, rows of unit L2 norm, starts on a 4096-byte boundary
//!     sample_ids  [n]        u64, the same as the shard's
//! projection.safetensors           only in a set made with `--center` or `--pca`; see [`Projection`]:
//!     mean            [F]     f32, mean of the teacher's outputs over every view of every sample
//!     components      [D, F]  f32, orthonormal rows; only with `--pca`, as the two below
//!     variances       [D]     f64, of the outputs along each component, over their number less one
//!     total_variance  [1]     f64, along all F directions together
//! head.safetensors                 the teacher's projection head, in a set without a projection whose teacher has one;
//!                                  see [`crate::models::MlpHead`]: an embedding is its output at unit length
//! ```
//!
//! With a projection, an embedding is `(x - mean) @ components^T` scaled to unit length, or `x - mean` scaled so, where `x`
//! is the teacher's output before any scaling.

mod projection;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Fault, Result};
use crate::io::{FileEntry, hash_file};
use crate::manifest::{MANIFEST_FILE, Manifest, Stage, short};
use crate::models::MlpHead;
use crate::shard::ShardSet;
use crate::tensor_file::{TensorFile, TensorFileWriter, TensorSpec};

pub use projection::{PROJECTION_FILE, Projection, Reduction};

/// The role under which an embedding set records its shard set.
pub const SHARDS_ROLE: &str = "shards";

/// File name of the teacher's projection head.
pub const HEAD_FILE: &str = "head.safetensors";

/// Element type of stored embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EmbeddingDtype {
    /// 11 significant bits: relative error 2^-11 at most, ample for unit rows.
    #[default]
    F16,
    /// 8 significant bits.
    Bf16,
    /// As computed.
    F32,
}

impl EmbeddingDtype {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        self.stored().bitsize() / 8
    }

    fn stored(self) -> Dtype {
        match self {
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
            Self::F32 => Dtype::F32,
        }
    }
}

/// What a reader must know of an embedding set, kept as the manifest's `details` under these keys (others may stand beside).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmbeddingSetDetails {
    /// V: views per sample.
    pub views: usize,
    /// D: width of an embedding.
    pub embedding_dim: usize,
    /// Element type.
    pub dtype: EmbeddingDtype,
}

/// File name of a shard's embeddings.
pub fn embedding_file_name(index: usize) -> String {
    format!("embeddings-{index:05}.safetensors")
}

/// Writes the embeddings of one shard.
///
/// # Shapes
/// - `sample_ids`: `(n,)`
/// - `embeddings`: `(n, V, D)` f32, rows of unit L2 norm, flattened
///
/// # Errors
/// [`Error::Shape`] when the lengths do not fit, [`Error::Io`].
pub fn write_embeddings(
    path: impl AsRef<Path>,
    details: &EmbeddingSetDetails,
    sample_ids: &[u64],
    embeddings: &[f32],
) -> Result<FileEntry> {
    let shape = [sample_ids.len(), details.views, details.embedding_dim];
    if shape.iter().product::<usize>() != embeddings.len() {
        let got = format!("{} elements", embeddings.len());
        return Err(Error::Shape { op: "writing embeddings", expected: format!("[n, V, D] = {shape:?}"), got });
    }
    let specs = vec![
        TensorSpec::new("sample_ids", Dtype::U64, &[sample_ids.len()]),
        TensorSpec::new("embeddings", details.dtype.stored(), &shape),
    ];
    let mut writer = TensorFileWriter::create(path, specs, 1, &BTreeMap::new())?;
    writer.append(sample_ids)?;
    match details.dtype {
        EmbeddingDtype::F16 => writer.append(&embeddings.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>())?,
        EmbeddingDtype::Bf16 => writer.append(&embeddings.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>())?,
        EmbeddingDtype::F32 => writer.append(embeddings)?,
    }
    writer.finish()
}

/// A finished embedding set, paired with its shard set.
#[derive(Debug)]
pub struct EmbeddingSet {
    directory: PathBuf,
    manifest: Manifest,
    details: EmbeddingSetDetails,
    files: Vec<TensorFile>,
    /// Index of the first sample of each file, and the number of samples at the end.
    starts: Vec<usize>,
}

impl EmbeddingSet {
    /// Opens a set and checks that it was made from exactly these shards, sample for sample.
    ///
    /// # Errors
    /// As [`Manifest::read`]; [`Error::Chain`] when it was made from other shards; [`Error::Damaged`] when a file breaks the layout.
    pub fn open(directory: impl AsRef<Path>, shards: &ShardSet) -> Result<Self> {
        let directory = directory.as_ref();
        let manifest = Manifest::read(directory, Stage::TeacherEmbed)?;
        let found = manifest.input(SHARDS_ROLE).map_or("none", |input| &input.fingerprint);
        if found != shards.manifest().fingerprint {
            return Err(Error::Chain {
                what: "shard set fingerprint".into(),
                path: directory.into(),
                expected: format!("{} (`{}`)", short(&shards.manifest().fingerprint), shards.directory().display()),
                found: short(found).into(),
                hint: format!(
                    "these embeddings were made from other shards: run `teacher-embed embed --shards {}`",
                    shards.directory().display()
                ),
            });
        }
        manifest.check_lengths(directory)?;
        let fault = |fault| Error::damaged(directory.join(MANIFEST_FILE), fault);
        let details: EmbeddingSetDetails = serde_json::from_value(manifest.details.clone())
            .map_err(|e| fault(Fault::Syntax(format!("not the details of an embedding set: {e}"))))?;
        if details.views != shards.views() || details.embedding_dim == 0 {
            let what = format!("{} views of width {} recorded", details.views, details.embedding_dim);
            return Err(fault(Fault::Value(what)));
        }
        let mut files = Vec::new();
        let mut starts = vec![0];
        for (index, shard) in shards.shards().iter().enumerate() {
            let path = directory.join(embedding_file_name(index));
            files.push(open_file(&path, &details, shard.sample_ids())?);
            starts.push(starts[index] + shard.len());
        }
        Ok(Self { directory: directory.into(), manifest, details, files, starts })
    }

    /// Its record.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// D: width of an embedding.
    pub fn embedding_dim(&self) -> usize {
        self.details.embedding_dim
    }

    /// What was taken off the teacher's outputs before they were scaled to unit length; none for a set of plain outputs.
    ///
    /// # Errors
    /// As [`Projection::open`]; [`Error::Damaged`] when it does not give rows of the set's width.
    pub fn projection(&self) -> Result<Option<Projection>> {
        if !self.manifest.files.iter().any(|file| file.path == PROJECTION_FILE) {
            return Ok(None);
        }
        let path = self.directory.join(PROJECTION_FILE);
        let projection = Projection::open(&path)?;
        let (found, expected) = (projection.embedding_dim(), self.embedding_dim());
        if found != expected {
            let what = format!("it gives embeddings of width {found}, those of the set have {expected}");
            return Err(Error::damaged(path, Fault::Value(what)));
        }
        Ok(Some(projection))
    }

    /// The teacher's projection head; none in a set whose teacher has none, with a projection, or made before sets had heads.
    ///
    /// # Errors
    /// As [`MlpHead::open`]; [`Error::Damaged`] when the file is not the recorded one, or does not give rows of the set's width.
    pub fn head(&self) -> Result<Option<MlpHead>> {
        let Some(recorded) = self.manifest.files.iter().find(|file| file.path == HEAD_FILE) else { return Ok(None) };
        let path = self.directory.join(HEAD_FILE);
        let (expected, found) = (recorded.blake3.clone(), hash_file(&path)?.blake3);
        if found != expected {
            return Err(Error::damaged(path, Fault::Hash { expected, found }));
        }
        let head = MlpHead::open(&path)?;
        let (found, expected) = (head.config().outputs(), self.embedding_dim());
        if found != expected {
            let what = format!("it gives embeddings of width {found}, those of the set have {expected}");
            return Err(Error::damaged(path, Fault::Value(what)));
        }
        Ok(Some(head))
    }

    /// Copies the embedding of one view of a sample, as f32.
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a set that was opened.
    ///
    /// # Panics
    /// When `index` or `view` is out of range or `out` is not D long.
    pub fn read(&self, index: usize, view: usize, out: &mut [f32]) -> Result<()> {
        let EmbeddingSetDetails { views, embedding_dim, dtype } = self.details;
        assert!(view < views && out.len() == embedding_dim, "view {view} or width {} is out of range", out.len());
        let file = self.starts.partition_point(|&start| start <= index) - 1;
        let start = ((index - self.starts[file]) * views + view) * embedding_dim;
        let range = start..start + embedding_dim;
        let file = &self.files[file];
        match dtype {
            EmbeddingDtype::F16 => widen(&file.view::<f16>("embeddings")?[range], out, f16::to_f32),
            EmbeddingDtype::Bf16 => widen(&file.view::<bf16>("embeddings")?[range], out, bf16::to_f32),
            EmbeddingDtype::F32 => out.copy_from_slice(&file.view::<f32>("embeddings")?[range]),
        }
        Ok(())
    }
}

/// Opens the embeddings of one shard and checks them against the layout and the shard's samples.
///
/// # Errors
/// [`Error::Io`]; [`Error::Damaged`] when a tensor is missing, of another type or shape, or the samples differ.
pub fn open_file(path: &Path, details: &EmbeddingSetDetails, sample_ids: &[u64]) -> Result<TensorFile> {
    let file = TensorFile::open(path)?;
    let shape = [sample_ids.len(), details.views, details.embedding_dim];
    let letters = "[n, V, D]";
    match details.dtype {
        EmbeddingDtype::F16 => file.view_shaped::<f16>("embeddings", &shape, letters).map(drop)?,
        EmbeddingDtype::Bf16 => file.view_shaped::<bf16>("embeddings", &shape, letters).map(drop)?,
        EmbeddingDtype::F32 => file.view_shaped::<f32>("embeddings", &shape, letters).map(drop)?,
    }
    file.expect_shape("sample_ids", &[sample_ids.len()], "[n]")?;
    if file.read::<u64>("sample_ids")?.as_ref() != sample_ids {
        return Err(file.fault(Fault::Value("its samples are not those of the shard".into())));
    }
    Ok(file)
}

fn widen<T: Copy>(from: &[T], to: &mut [f32], convert: impl Fn(T) -> f32) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = convert(from);
    }
}
