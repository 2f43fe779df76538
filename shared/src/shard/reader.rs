//! Reading a shard set: every view is a slice of the mapped file.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::{ShardSetDetails, VIEW_PARAMETERS, shard_file_name};
use crate::error::{Error, Fault, Result};
use crate::manifest::{MANIFEST_FILE, Manifest, Stage};
use crate::tensor_file::TensorFile;

/// One shard file.
#[derive(Debug)]
pub struct Shard {
    file: TensorFile,
    sample_ids: Vec<u64>,
    labels: Vec<i64>,
    /// V, H, W.
    dims: [usize; 3],
}

impl Shard {
    /// Opens a shard and checks it against the layout.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when a tensor is missing, of another type or shape, or a label is outside the classes.
    pub fn open(path: impl AsRef<Path>, details: &ShardSetDetails) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let samples = file.shape("sample_ids")?.first().copied().unwrap_or(0);
        let ShardSetDetails { views, height, width, classes } = details;
        let (views, height, width) = (*views, *height, *width);
        file.expect_shape("sample_ids", &[samples], "[n]")?;
        file.expect_shape("labels", &[samples], "[n]")?;
        file.expect_shape("view_params", &[samples, views, VIEW_PARAMETERS.len()], "[n, V, P]")?;
        file.view_shaped::<u8>("pixels", &[samples, views, height, width, 3], "[n, V, H, W, 3]")?;
        file.read::<f32>("view_params")?;
        let sample_ids = file.read::<u64>("sample_ids")?.into_owned();
        let labels = file.read::<i64>("labels")?.into_owned();
        let known = -1..i64::try_from(classes.len()).unwrap_or(i64::MAX);
        if let Some(label) = labels.iter().find(|label| !known.contains(label)) {
            let what = format!("label {label} is outside the {} classes of the set", classes.len());
            return Err(file.fault(Fault::Value(what)));
        }
        Ok(Self { file, sample_ids, labels, dims: [views, height, width] })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.sample_ids.len()
    }

    /// Whether it holds no sample.
    pub fn is_empty(&self) -> bool {
        self.sample_ids.is_empty()
    }

    /// `(n,)`: who the samples are.
    pub fn sample_ids(&self) -> &[u64] {
        &self.sample_ids
    }

    /// `(n,)`: class indices, -1 for none.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// The pixels of one view, `(H, W, 3)` RGB, in place.
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a shard that was opened.
    ///
    /// # Panics
    /// When `row` or `view` is out of range.
    pub fn view(&self, row: usize, view: usize) -> Result<&[u8]> {
        let [views, height, width] = self.dims;
        assert!(row < self.len() && view < views, "view {view} of row {row} is outside the shard");
        let bytes = height * width * 3;
        let start = (row * views + view) * bytes;
        Ok(&self.file.bytes("pixels")?[start..start + bytes])
    }

    /// What was drawn for one view: a row of P numbers, named by [`VIEW_PARAMETERS`].
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a shard that was opened.
    ///
    /// # Panics
    /// When `row` or `view` is out of range.
    pub fn view_params(&self, row: usize, view: usize) -> Result<[f32; VIEW_PARAMETERS.len()]> {
        assert!(row < self.len() && view < self.dims[0], "view {view} of row {row} is outside the shard");
        let all: Cow<'_, [f32]> = self.file.read("view_params")?;
        let start = (row * self.dims[0] + view) * VIEW_PARAMETERS.len();
        Ok(std::array::from_fn(|i| all[start + i]))
    }
}

/// A finished shard set.
#[derive(Debug)]
pub struct ShardSet {
    directory: PathBuf,
    manifest: Manifest,
    details: ShardSetDetails,
    shards: Vec<Shard>,
    /// Index of the first sample of each shard, and the number of samples at the end.
    starts: Vec<usize>,
}

impl ShardSet {
    /// Opens a set: reads the manifest, maps the shards and checks their headers, not their pixels.
    ///
    /// # Errors
    /// As [`Manifest::read`], [`Manifest::check_lengths`] and [`Shard::open`].
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref().to_path_buf();
        let manifest = Manifest::read(&directory, Stage::DataPrep)?;
        manifest.check_lengths(&directory)?;
        let fault = |fault| Error::damaged(directory.join(MANIFEST_FILE), fault);
        let details: ShardSetDetails = serde_json::from_value(manifest.details.clone())
            .map_err(|e| fault(Fault::Syntax(format!("not the details of a shard set: {e}"))))?;
        let count = manifest.files.iter().filter(|file| file.path.starts_with("shard-")).count();
        let mut shards = Vec::new();
        let mut starts = vec![0];
        for index in 0..count {
            let shard = Shard::open(directory.join(shard_file_name(index)), &details)?;
            starts.push(starts[index] + shard.len());
            shards.push(shard);
        }
        let (found, recorded) = (starts[count] as u64, manifest.count("samples"));
        if found != recorded {
            return Err(fault(Fault::Value(format!("{recorded} samples are recorded, the shards hold {found}"))));
        }
        Ok(Self { directory, manifest, details, shards, starts })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its record.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.starts[self.shards.len()]
    }

    /// Whether it holds no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// V: views per sample.
    pub fn views(&self) -> usize {
        self.details.views
    }

    /// H in pixels.
    pub fn height(&self) -> usize {
        self.details.height
    }

    /// W in pixels.
    pub fn width(&self) -> usize {
        self.details.width
    }

    /// Class names; empty when the source has none.
    pub fn classes(&self) -> &[String] {
        &self.details.classes
    }

    /// The shards in order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The shard of a sample and its row there.
    ///
    /// # Panics
    /// When `index` is not below [`ShardSet::len`].
    pub fn locate(&self, index: usize) -> (usize, usize) {
        assert!(index < self.len(), "sample {index} is outside the set of {}", self.len());
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        (shard, index - self.starts[shard])
    }

    /// The pixels of one view of a sample, `(H, W, 3)` RGB, in place.
    ///
    /// # Errors
    /// As [`Shard::view`].
    ///
    /// # Panics
    /// When `index` or `view` is out of range.
    pub fn pixels(&self, index: usize, view: usize) -> Result<&[u8]> {
        let (shard, row) = self.locate(index);
        self.shards[shard].view(row, view)
    }

    /// The identity of a sample.
    ///
    /// # Panics
    /// When `index` is out of range.
    pub fn sample_id(&self, index: usize) -> u64 {
        let (shard, row) = self.locate(index);
        self.shards[shard].sample_ids()[row]
    }

    /// The class of a sample, -1 for none.
    ///
    /// # Panics
    /// When `index` is out of range.
    pub fn label(&self, index: usize) -> i64 {
        let (shard, row) = self.locate(index);
        self.shards[shard].labels()[row]
    }
}
