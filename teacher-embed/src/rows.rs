//! What both ways of embedding share: the job, rows computed by the teacher, shard files, and the disk space they take.

use std::fs;
use std::path::Path;

use candle_core::Tensor;
use shared::Result;
use shared::data_loader::normalized_batch;
use shared::embedding::{
    EmbeddingDtype, EmbeddingSetDetails, PROJECTION_FILE, embedding_file_name, open_file, write_embeddings,
};
use shared::io::{FileEntry, hash_file};
use shared::manifest::MANIFEST_FILE;
use shared::progress::{Progress, note};
use shared::shard::ShardSet;
use shared::space::{free_bytes, human, must_fit};
use shared::transforms::normalize::Normalization;

use crate::config::{EmbedConfig, TEACHER_BATCH};
use crate::teacher::Teacher;

/// What a run of `embed` works on.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) config: &'a EmbedConfig,
    pub(crate) shards: &'a ShardSet,
    pub(crate) teacher: &'a Teacher,
    pub(crate) normalization: Normalization,
    /// Of the set: D after a projection.
    pub(crate) details: EmbeddingSetDetails,
    /// Of the working files: F, f32.
    pub(crate) outputs: EmbeddingSetDetails,
}

/// The files of a set, and how many shards an earlier run had finished.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) files: Vec<FileEntry>,
    pub(crate) resumed: usize,
}

/// File name of the outputs of a shard, a working file laid out as embeddings are, with rows that are not scaled.
pub(crate) fn output_file_name(index: usize) -> String {
    format!("outputs-{index:05}.safetensors")
}

impl<'a> Job<'a> {
    pub(crate) fn new(
        config: &'a EmbedConfig,
        shards: &'a ShardSet,
        teacher: &'a Teacher,
        normalization: Normalization,
    ) -> Self {
        let width = teacher.description().embedding_dim;
        let set = |embedding_dim, dtype| EmbeddingSetDetails { views: shards.views(), embedding_dim, dtype };
        let details = set(config.components().unwrap_or(width), config.dtype);
        Self { config, shards, teacher, normalization, details, outputs: set(width, EmbeddingDtype::F32) }
    }

    /// V.
    pub(crate) fn views(&self) -> usize {
        self.shards.views()
    }

    /// The index of a shard's first sample.
    pub(crate) fn first_sample(&self, shard: usize) -> usize {
        self.shards.shards()[..shard].iter().map(shared::shard::Shard::len).sum()
    }

    /// All views that are to be embedded.
    pub(crate) fn images(&self) -> u64 {
        (self.shards.len() * self.views()) as u64
    }

    /// Computes the rows of a shard and writes them to `path`; `compute` is told `(sample, view)` pairs.
    pub(crate) fn write_shard(
        &self,
        shard: usize,
        path: &Path,
        details: &EmbeddingSetDetails,
        progress: &Progress,
        mut compute: impl FnMut(&[(usize, usize)]) -> Result<Vec<f32>>,
    ) -> Result<FileEntry> {
        let sample_ids = self.shards.shards()[shard].sample_ids();
        let (first, rows) = (self.first_sample(shard), sample_ids.len() * self.views());
        let all: Vec<(usize, usize)> = (0..rows).map(|row| (first + row / self.views(), row % self.views())).collect();
        let mut values = Vec::with_capacity(rows * details.embedding_dim);
        for prepared in all.chunks(self.config.batch_size) {
            values.extend(compute(prepared)?);
            progress.inc(prepared.len() as u64);
        }
        write_embeddings(path, details, sample_ids, &values)
    }

    /// Whether the rows of a shard are there, whole and of the right samples.
    pub(crate) fn is_complete(&self, shard: usize, path: &Path, details: &EmbeddingSetDetails) -> bool {
        path.exists() && open_file(path, details, self.shards.shards()[shard].sample_ids()).is_ok()
    }

    /// Refuses to start without the disk space for what is left to write; says how much working files take.
    ///
    /// # Errors
    /// [`shared::Error::Invalid`] with both numbers.
    pub(crate) fn must_fit_on_disk(&self) -> Result<()> {
        let output = &self.config.output;
        if output.join(MANIFEST_FILE).exists() && !self.config.overwrite {
            return Ok(());
        }
        let (needed, working) = self.bytes_to_write();
        let advice =
            if self.config.projection.is_some() { "embed without `--center` and `--pca`" } else { "pack fewer views" };
        must_fit("embedding", output, needed, free_bytes(output), advice)?;
        if working > 0 && !self.config.quiet {
            let (needed, working) = (human(needed), human(working));
            note(&format!("needs {needed} of disk space, {working} of it for files that are removed at the end"));
        }
        Ok(())
    }

    /// The most bytes that the directory may grow by, and how many of them are working files.
    ///
    /// A shard's working file is removed once its embeddings are there, which take less: one shard has both.
    fn bytes_to_write(&self) -> (u64, u64) {
        let there = |name: String| {
            if self.config.overwrite {
                0
            } else {
                fs::metadata(self.config.output.join(name)).map_or(0, |file| file.len())
            }
        };
        let left = |name: fn(usize) -> String, details: &EmbeddingSetDetails| -> Vec<u64> {
            let row = (self.views() * details.embedding_dim * details.dtype.bytes()) as u64;
            let shards = self.shards.shards().iter().enumerate();
            shards.map(|(index, shard)| (shard.len() as u64 * row).saturating_sub(there(name(index)))).collect()
        };
        let embeddings = left(embedding_file_name, &self.details);
        if self.config.projection.is_none() {
            return (embeddings.iter().sum(), 0);
        }
        let outputs = left(output_file_name, &self.outputs).into_iter().zip(&embeddings);
        let working: u64 = outputs.map(|(outputs, embeddings)| if *embeddings == 0 { 0 } else { outputs }).sum();
        let width = self.outputs.embedding_dim as u64;
        let projection = 4 * width * (1 + self.config.components().map_or(0, |dim| dim as u64));
        let projection = projection.saturating_sub(there(PROJECTION_FILE.into()));
        (working + embeddings.iter().max().copied().unwrap_or(0) + projection, working)
    }
}

/// Writes every file of a set without a projection that is not there yet.
pub(crate) fn write_embedded(job: &Job<'_>, directory: &Path, resuming: bool) -> Result<Written> {
    let mut written = Written { files: Vec::new(), resumed: 0 };
    let progress = Progress::new("embedding", "images", job.images(), job.config.quiet);
    for (index, shard) in job.shards.shards().iter().enumerate() {
        let path = directory.join(embedding_file_name(index));
        if resuming && job.is_complete(index, &path, &job.details) {
            written.files.push(hash_file(&path)?);
            written.resumed += 1;
            progress.start_at(((job.first_sample(index) + shard.len()) * job.views()) as u64);
        } else {
            let compute =
                |rows: &[(usize, usize)]| rows_of(job.shards, rows, job.normalization, |xs| job.teacher.embeddings(xs));
            written.files.push(job.write_shard(index, &path, &job.details, &progress, compute)?);
        }
    }
    progress.finish();
    Ok(written)
}

/// What `compute` makes of the given `(sample, view)` pairs, [`TEACHER_BATCH`] at a time.
pub(crate) fn rows_of(
    shards: &ShardSet,
    rows: &[(usize, usize)],
    normalization: Normalization,
    compute: impl Fn(&Tensor) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    let mut ahead = rows.chunks(TEACHER_BATCH).skip(1);
    for batch in rows.chunks(TEACHER_BATCH) {
        if let Some(next) = ahead.next() {
            shards.will_need(next)?;
        }
        values.extend(compute(&normalized_batch(shards, batch, normalization)?)?);
    }
    Ok(values)
}
