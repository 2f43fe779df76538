//! Writing one shard, sample after sample, without holding its pixels in memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;

use super::VIEW_PARAMETERS;
use crate::error::{Error, Result};
use crate::io::FileEntry;
use crate::tensor_file::{TensorFile, TensorFileWriter, TensorSpec};

/// Pixels are written first, so that they can stream; this is their place among the tensors.
const PIXELS_INDEX: usize = 0;

/// A shard being written.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    writer: TensorFileWriter,
    capacity: usize,
    /// V, H, W.
    dims: [usize; 3],
    sample_ids: Vec<u64>,
    labels: Vec<i64>,
    view_params: Vec<f32>,
}

impl ShardWriter {
    /// Starts a shard of at most `capacity` samples with `views` views of `height` x `width` pixels each.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl AsRef<Path>, capacity: usize, views: usize, height: usize, width: usize) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let dims = [views, height, width];
        let writer = TensorFileWriter::create(&path, specs(capacity, dims), PIXELS_INDEX, &BTreeMap::new())?;
        Ok(Self { path, writer, capacity, dims, sample_ids: Vec::new(), labels: Vec::new(), view_params: Vec::new() })
    }

    /// Appends a sample.
    ///
    /// # Shapes
    /// - `pixels`: `(V, H, W, 3)` RGB, flattened
    /// - `view_params`: `(V, P)`, flattened
    ///
    /// # Errors
    /// [`Error::Shape`] when a length is off, [`Error::Invalid`] when the shard is full, [`Error::Io`].
    pub fn push(&mut self, sample_id: u64, label: i64, pixels: &[u8], view_params: &[f32]) -> Result<()> {
        let [views, height, width] = self.dims;
        check_length("pixels of a sample", views * height * width * 3, pixels.len())?;
        check_length("view parameters of a sample", views * VIEW_PARAMETERS.len(), view_params.len())?;
        if self.sample_ids.len() == self.capacity {
            return Err(Error::invalid(format!("shard `{}` is full", self.path.display()), ""));
        }
        self.writer.append(pixels)?;
        self.sample_ids.push(sample_id);
        self.labels.push(label);
        self.view_params.extend_from_slice(view_params);
        Ok(())
    }

    /// Completes the shard and gives it its name.
    ///
    /// A shard with fewer samples than announced (some images were rejected) is copied once into a file of the right size.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(mut self) -> Result<FileEntry> {
        let samples = self.sample_ids.len();
        if samples == self.capacity {
            self.writer.append(&self.view_params)?;
            self.writer.append(&self.sample_ids)?;
            self.writer.append(&self.labels)?;
            return self.writer.finish();
        }
        // The header announces `capacity` samples. Fill the file up so that it can be read back, then copy what is real.
        let row = self.dims.iter().product::<usize>() * 3;
        let blank = vec![0u8; row];
        for _ in samples..self.capacity {
            self.writer.append(&blank)?;
        }
        let full = |used: usize, per_sample: usize| (self.capacity - used) * per_sample;
        self.writer.append(&self.view_params)?;
        self.writer.append(&vec![0f32; full(samples, self.dims[0] * VIEW_PARAMETERS.len())])?;
        self.writer.append(&self.sample_ids)?;
        self.writer.append(&vec![0u64; full(samples, 1)])?;
        self.writer.append(&self.labels)?;
        self.writer.append(&vec![0i64; full(samples, 1)])?;
        let spool = self.path.with_file_name(format!(
            "{}spool-{}",
            crate::io::TEMPORARY_PREFIX,
            self.path.file_name().unwrap_or_default().to_string_lossy()
        ));
        self.writer.finish_as(&spool)?;
        let copied = copy_first(&spool, &self.path, samples, self.dims, row);
        std::fs::remove_file(&spool).map_err(Error::io("remove", &spool))?;
        copied
    }
}

fn copy_first(spool: &Path, path: &Path, samples: usize, dims: [usize; 3], row: usize) -> Result<FileEntry> {
    let source = TensorFile::open(spool)?;
    let mut writer = TensorFileWriter::create(path, specs(samples, dims), PIXELS_INDEX, &BTreeMap::new())?;
    writer.append(&source.view::<u8>("pixels")?[..samples * row])?;
    writer.append(&source.read::<f32>("view_params")?[..samples * dims[0] * VIEW_PARAMETERS.len()])?;
    writer.append(&source.read::<u64>("sample_ids")?[..samples])?;
    writer.append(&source.read::<i64>("labels")?[..samples])?;
    writer.finish()
}

fn specs(samples: usize, [views, height, width]: [usize; 3]) -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("pixels", Dtype::U8, &[samples, views, height, width, 3]),
        TensorSpec::new("view_params", Dtype::F32, &[samples, views, VIEW_PARAMETERS.len()]),
        TensorSpec::new("sample_ids", Dtype::U64, &[samples]),
        TensorSpec::new("labels", Dtype::I64, &[samples]),
    ]
}

fn check_length(op: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} elements"), got: format!("{got} elements") })
}
