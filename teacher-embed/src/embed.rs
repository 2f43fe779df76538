//! Embedding a shard set: shard by shard, resumable, the same bytes however it is run.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::json;
use shared::cli::note_cpu;
use shared::data_loader::normalized_batch;
use shared::embedding::{
    EmbeddingSet, EmbeddingSetDetails, SHARDS_ROLE, embedding_file_name, open_file, write_embeddings,
};
use shared::io::{FileEntry, hash_file};
use shared::manifest::{Identity, Manifest, Stage};
use shared::output::{Begun, OutputDir};
use shared::progress::{Progress, note};
use shared::shard::ShardSet;
use shared::{Error, Result};

use crate::config::{EmbedConfig, TEACHER_BATCH};
use crate::summary::{Statistics, statistics};
use crate::teacher::{Teacher, TeacherDescription};

/// What `embed` did.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Embedded {
    /// Whether there was nothing left to do.
    pub already_finished: bool,
    /// Shards that an earlier run had finished.
    pub resumed_shards: usize,
    /// The directory.
    pub output: String,
    /// Fingerprint of the set.
    pub fingerprint: String,
    /// The teacher.
    pub teacher: TeacherDescription,
    /// N.
    pub samples: usize,
    /// V.
    pub views: usize,
    /// Shards.
    pub shards: usize,
    /// Bytes of all embedding files.
    pub bytes: u64,
    /// What the embeddings look like.
    pub statistics: Statistics,
}

impl fmt::Display for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, views, shards, bytes, statistics, teacher, .. } = self;
        let state = if self.already_finished { "is already finished" } else { "is finished" };
        writeln!(f, "`{}` {state}: {}", self.output, self.fingerprint)?;
        writeln!(
            f,
            "teacher     {} ({}), embeddings of width {}",
            teacher.arch, teacher.method, teacher.embedding_dim
        )?;
        writeln!(f, "embeddings  {samples} samples x {views} views in {shards} shards, {bytes} bytes")?;
        write!(f, "{statistics}")
    }
}

/// Computes the embeddings of a shard set, or what is left of them.
///
/// # Errors
/// As [`ShardSet::open`], [`Teacher::load`] and [`OutputDir::begin`]; [`Error::Io`] when the disk is full.
pub fn embed(config: &EmbedConfig) -> Result<Embedded> {
    let shards = ShardSet::open(&config.shards)?;
    if shards.is_empty() {
        return Err(Error::invalid(format!("the shard set `{}` holds no samples", config.shards.display()), ""));
    }
    let teacher = Teacher::load(&config.weights, config.arch, config.method, config.state_key.as_deref())?;
    if let Some(first) = teacher.unused().first().filter(|_| !config.quiet) {
        let count = teacher.unused().len();
        note(&format!("{count} tensors of the checkpoint are not used, `{}` the first", first.escape_debug()));
    }
    let inputs = vec![shards.manifest().as_input(SHARDS_ROLE, &config.shards), teacher.input().clone()];
    let description = teacher.description();
    let resolved = json!({
        "arch": description.arch, "method": description.method, "dtype": config.dtype, "teacher-batch": TEACHER_BATCH,
        "state-key": config.state_key,
    });
    let identity = Identity::new(Stage::TeacherEmbed, &resolved, 0, inputs)?;
    let details =
        EmbeddingSetDetails { views: shards.views(), embedding_dim: description.embedding_dim, dtype: config.dtype };
    match OutputDir::begin(&config.output, &identity, config.overwrite)? {
        Begun::Finished(manifest) => {
            note(&format!("`{}` is already finished: nothing to do", config.output.display()));
            summarise(config, &shards, &teacher, &manifest, None)
        }
        Begun::Writing(output) => {
            let (files, resumed) = write_shards(config, &shards, &teacher, &details, &output)?;
            let counts = BTreeMap::from([
                ("samples".to_owned(), shards.len() as u64),
                ("views".to_owned(), shards.views() as u64),
                ("shards".to_owned(), shards.shards().len() as u64),
            ]);
            let details = json!({
                "views": details.views, "embedding_dim": details.embedding_dim, "dtype": details.dtype,
                "teacher": description,
            });
            let manifest = output.finish(counts, details, files)?;
            summarise(config, &shards, &teacher, &manifest, Some(resumed))
        }
    }
}

/// Writes every file that is not there yet; returns all of them, and how many were there.
fn write_shards(
    config: &EmbedConfig,
    shards: &ShardSet,
    teacher: &Teacher,
    details: &EmbeddingSetDetails,
    output: &OutputDir,
) -> Result<(Vec<FileEntry>, usize)> {
    let mut files = Vec::new();
    let mut resumed = 0;
    let mut first = 0;
    if !config.quiet {
        note_cpu();
    }
    let images = (shards.len() * shards.views()) as u64;
    let progress = Progress::new("embedding", "images", images, config.quiet);
    for (index, shard) in shards.shards().iter().enumerate() {
        let path = output.path().join(embedding_file_name(index));
        let rows = shard.len() * shards.views();
        if output.resumed() && path.exists() && open_file(&path, details, shard.sample_ids()).is_ok() {
            files.push(hash_file(&path)?);
            resumed += 1;
            progress.start_at(((first + shard.len()) * shards.views()) as u64);
        } else {
            let mut values = Vec::with_capacity(rows * details.embedding_dim);
            let all: Vec<(usize, usize)> =
                (0..rows).map(|row| (first + row / shards.views(), row % shards.views())).collect();
            for prepared in all.chunks(config.batch_size) {
                values.extend(rows_of(shards, teacher, prepared)?);
                progress.inc(prepared.len() as u64);
            }
            files.push(write_embeddings(&path, details, shard.sample_ids(), &values)?);
        }
        first += shard.len();
    }
    progress.finish();
    if resumed > 0 && !config.quiet {
        note(&format!("{resumed} of {} shards were finished before", shards.shards().len()));
    }
    Ok((files, resumed))
}

/// Embeddings of the given `(sample, view)` pairs, [`TEACHER_BATCH`] at a time.
pub(crate) fn rows_of(shards: &ShardSet, teacher: &Teacher, rows: &[(usize, usize)]) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(rows.len() * teacher.description().embedding_dim);
    for batch in rows.chunks(TEACHER_BATCH) {
        values.extend(teacher.embeddings(&normalized_batch(shards, batch)?)?);
    }
    Ok(values)
}

fn summarise(
    config: &EmbedConfig,
    shards: &ShardSet,
    teacher: &Teacher,
    manifest: &Manifest,
    resumed: Option<usize>,
) -> Result<Embedded> {
    let set = EmbeddingSet::open(&config.output, shards)?;
    Ok(Embedded {
        already_finished: resumed.is_none(),
        resumed_shards: resumed.unwrap_or(shards.shards().len()),
        output: config.output.display().to_string(),
        fingerprint: manifest.fingerprint.clone(),
        teacher: teacher.description().clone(),
        samples: shards.len(),
        views: shards.views(),
        shards: shards.shards().len(),
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        statistics: statistics(&set, shards)?,
    })
}
