//! Writing one shard, sample after sample, without holding its pixels in memory.

use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;

use super::{Codec, LocalDetails, Pieces, SampleViews, ShardSetDetails, Store, VIEW_PARAMETERS};
use crate::error::{Error, Result};
use crate::io::{FileEntry, Spool};
use crate::tensor_file::{GrowingTensorFile, TensorSpec};

/// A shard being written. Pixels go to the disk as they come, local views through a temporary file; everything else, some hundred
/// bytes for a view, waits in memory.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    file: GrowingTensorFile,
    capacity: usize,
    store: Store,
    codec: Codec,
    global: Stream,
    local: Option<(Stream, Spool)>,
    sample_ids: Vec<u64>,
    labels: Vec<i64>,
    sizes: Vec<u32>,
}

/// The pictures of one kind, and what is known of them.
#[derive(Debug)]
struct Stream {
    /// Pictures of a sample.
    count: usize,
    height: usize,
    width: usize,
    offsets: Vec<u64>,
    params: Vec<f32>,
}

impl Stream {
    fn new(count: usize, height: usize, width: usize) -> Self {
        Self { count, height, width, offsets: vec![0], params: Vec::new() }
    }

    fn total(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// Takes note of a sample's pictures, after checking that they are what the layout holds.
    fn record(&mut self, what: &'static str, codec: Codec, pieces: &Pieces) -> Result<()> {
        check_length(what, self.count, pieces.lengths.len())?;
        check_length(what, pieces.lengths.iter().sum(), pieces.bytes.len())?;
        if codec == Codec::Raw {
            let piece = self.height * self.width * 3;
            for &length in &pieces.lengths {
                check_length(what, piece, length)?;
            }
        }
        check_length("view parameters of a sample", self.count * VIEW_PARAMETERS.len(), pieces.params.len())?;
        self.extend(pieces);
        Ok(())
    }

    fn extend(&mut self, pieces: &Pieces) {
        let mut end = self.total();
        for &length in &pieces.lengths {
            end += length as u64;
            self.offsets.push(end);
        }
        self.params.extend_from_slice(&pieces.params);
    }

    fn picture_spec(&self, codec: Codec, samples: usize, [pixels, bytes]: [&str; 2]) -> TensorSpec {
        match codec {
            Codec::Raw => TensorSpec::new(pixels, Dtype::U8, &[samples, self.count, self.height, self.width, 3]),
            Codec::Jpeg => TensorSpec::new(bytes, Dtype::U8, &[self.total() as usize]),
        }
    }
}

impl ShardWriter {
    /// Starts a shard of at most `capacity` samples with `views` plain views of `height` x `width` pixels each.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl AsRef<Path>, capacity: usize, views: usize, height: usize, width: usize) -> Result<Self> {
        Self::with_layout(path, capacity, &ShardSetDetails { views, height, width, ..ShardSetDetails::default() })
    }

    /// Starts a shard of at most `capacity` samples of a set.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn with_layout(path: impl AsRef<Path>, capacity: usize, details: &ShardSetDetails) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = GrowingTensorFile::create(&path)?;
        let (store, codec) = (details.store, details.codec);
        let (global, local) = match store {
            Store::Views => (Stream::new(details.views, details.height, details.width), details.local),
            Store::Source => (Stream::new(1, 0, 0), None),
        };
        let local = match local {
            Some(LocalDetails { views, size }) => Some((Stream::new(views, size, size), Spool::beside(&path)?)),
            None => None,
        };
        let (sample_ids, labels, sizes) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { path, file, capacity, store, codec, global, local, sample_ids, labels, sizes })
    }

    /// Appends a sample of plain views.
    ///
    /// # Shapes
    /// - `pixels`: `(V, H, W, 3)` RGB, flattened
    /// - `view_params`: `(V, P)`, flattened
    ///
    /// # Errors
    /// As [`ShardWriter::push_sample`].
    pub fn push(&mut self, sample_id: u64, label: i64, pixels: &[u8], view_params: &[f32]) -> Result<()> {
        let Stream { count, height, width, .. } = self.global;
        let lengths = vec![height * width * 3; count];
        let global = Pieces { bytes: pixels.to_vec(), lengths, params: view_params.to_vec() };
        self.push_sample(sample_id, label, &SampleViews { global, ..SampleViews::default() })
    }

    /// Appends a sample of any layout.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not of the shard's layout, [`Error::Invalid`] when the shard is full, [`Error::Io`].
    pub fn push_sample(&mut self, sample_id: u64, label: i64, sample: &SampleViews) -> Result<()> {
        if self.sample_ids.len() == self.capacity {
            return Err(Error::invalid(format!("shard `{}` is full", self.path.display()), ""));
        }
        match self.store {
            Store::Views => self.global.record("pixels of a sample", self.codec, &sample.global)?,
            Store::Source => {
                let [height, width] = sample.source_size;
                check_length("images of a sample", 1, sample.global.lengths.len())?;
                check_length("pixels of an image", sample.global.lengths[0], sample.global.bytes.len())?;
                if self.codec == Codec::Raw {
                    check_length(
                        "pixels of an image",
                        height as usize * width as usize * 3,
                        sample.global.bytes.len(),
                    )?;
                }
                self.global.extend(&sample.global);
                self.sizes.extend([height, width]);
            }
        }
        self.file.append(&sample.global.bytes)?;
        if let Some((stream, spool)) = &mut self.local {
            stream.record("local pixels of a sample", self.codec, &sample.local)?;
            spool.append(&sample.local.bytes)?;
        } else {
            check_length("local views of a sample", 0, sample.local.lengths.len())?;
        }
        self.sample_ids.push(sample_id);
        self.labels.push(label);
        Ok(())
    }

    /// Completes the shard and gives it its name. It may hold fewer samples than were announced.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<FileEntry> {
        let Self { mut file, store, codec, global, local, sample_ids, labels, sizes, .. } = self;
        let n = sample_ids.len();
        let params =
            |name: &str, stream: &Stream| TensorSpec::new(name, Dtype::F32, &[n, stream.count, VIEW_PARAMETERS.len()]);
        let offsets = |name: &str, stream: &Stream| TensorSpec::new(name, Dtype::U64, &[stream.offsets.len()]);
        let (local, spool) = local.unzip();
        let mut specs = vec![match store {
            Store::Views => global.picture_spec(codec, n, ["pixels", "bytes"]),
            Store::Source => TensorSpec::new("bytes", Dtype::U8, &[global.total() as usize]),
        }];
        if let (Some(stream), Some(spool)) = (&local, spool) {
            specs.push(stream.picture_spec(codec, n, ["local_pixels", "local_bytes"]));
            file.append_spool(spool)?;
        }
        if store == Store::Views {
            specs.push(params("view_params", &global));
            file.append(&global.params)?;
        } else {
            specs.push(TensorSpec::new("sizes", Dtype::U32, &[n, 2]));
            file.append(&sizes)?;
        }
        if let Some(stream) = &local {
            specs.push(params("local_view_params", stream));
            file.append(&stream.params)?;
        }
        if store == Store::Source || codec == Codec::Jpeg {
            for (name, stream) in [("offsets", Some(&global)), ("local_offsets", local.as_ref())] {
                if let Some(stream) = stream {
                    specs.push(offsets(name, stream));
                    file.append(&stream.offsets)?;
                }
            }
        }
        specs.push(TensorSpec::new("sample_ids", Dtype::U64, &[n]));
        file.append(&sample_ids)?;
        specs.push(TensorSpec::new("labels", Dtype::I64, &[n]));
        file.append(&labels)?;
        file.finish(&specs)
    }
}

fn check_length(op: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} elements"), got: format!("{got} elements") })
}
