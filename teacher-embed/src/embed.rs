//! Embedding a shard set: shard by shard, resumable, the same bytes however it is run.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::json;
use shared::cli::note_cpu;
use shared::embedding::{EmbeddingSet, HEAD_FILE, Projection, SHARDS_ROLE};
use shared::manifest::{Identity, Manifest, Stage};
use shared::models::Arch;
use shared::output::{Begun, OutputDir};
use shared::progress::note;
use shared::shard::ShardSet;
use shared::transforms::normalize::Normalization;
use shared::weights::Checkpoint;
use shared::{Error, Result};

use crate::config::{EmbedConfig, TEACHER_BATCH};
use crate::projected::write_projected;
use crate::rows::{Job, write_embedded};
use crate::summary::{Statistics, statistics};
use crate::teacher::{Teacher, TeacherDescription};

/// Where an identity keeps how pixels were normalised; ImageNet's way is not named there.
pub(crate) const PIXEL_NORMALIZATION_KEY: &str = "pixel-normalization";

/// What `embed` did.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Embedded {
    /// Whether there was nothing left to do.
    pub already_finished: bool,
    /// Shards that an earlier run had put through the teacher.
    pub resumed_shards: usize,
    /// The directory.
    pub output: String,
    /// Fingerprint of the set.
    pub fingerprint: String,
    /// The teacher.
    pub teacher: TeacherDescription,
    /// How pixels became its input.
    pub pixel_normalization: Normalization,
    /// N.
    pub samples: usize,
    /// V.
    pub views: usize,
    /// Shards.
    pub shards: usize,
    /// Bytes of all embedding files.
    pub bytes: u64,
    /// D: width of an embedding, after a projection.
    pub embedding_dim: usize,
    /// What was taken off the teacher's outputs, and what was kept; none for plain outputs.
    pub projection: Option<ProjectionSummary>,
    /// What the embeddings look like.
    pub statistics: Statistics,
}

/// A projection, in short.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProjectionSummary {
    /// F: width of the teacher's outputs.
    pub feature_width: usize,
    /// The part of the outputs' variance that `--pca` kept, between 0 and 1; none for centring alone.
    pub kept_variance: Option<f64>,
}

impl ProjectionSummary {
    fn new(projection: &Projection) -> Self {
        let kept_variance = projection.reduction.as_ref().map(shared::embedding::Reduction::kept);
        Self { feature_width: projection.feature_width(), kept_variance }
    }
}

impl fmt::Display for ProjectionSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "projection  {} outputs, centred", self.feature_width)?;
        match self.kept_variance {
            Some(kept) => write!(f, " and reduced to the main components: {:.1} % of the variance", kept * 100.0),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, views, shards, bytes, statistics, teacher, embedding_dim, .. } = self;
        let state = if self.already_finished { "is already finished" } else { "is finished" };
        writeln!(f, "`{}` {state}: {}", self.output, self.fingerprint)?;
        let (arch, method, pixels) = (teacher.arch, teacher.method, self.pixel_normalization);
        writeln!(f, "teacher     {arch} ({method}), embeddings of width {embedding_dim}, {pixels} pixels")?;
        if let Some(projection) = &self.projection {
            writeln!(f, "{projection}")?;
        }
        writeln!(f, "embeddings  {samples} samples x {views} views in {shards} shards, {bytes} bytes")?;
        write!(f, "{statistics}")
    }
}

/// Computes the embeddings of a shard set, or what is left of them.
///
/// # Errors
/// As [`ShardSet::open`], [`Teacher::load`] and [`OutputDir::begin`]; [`Error::Usage`] for a projection that these outputs do
/// not allow; [`Error::Invalid`] when the disk is too small, or an output has no direction; [`Error::Io`] when the disk is
/// full.
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
    let description = teacher.description();
    if let Some(kind) = config.projection {
        kind.check(description.embedding_dim, shards.len(), shards.views())?;
    }
    let inputs = vec![shards.manifest().as_input(SHARDS_ROLE, &config.shards), teacher.input().clone()];
    let normalization = pixel_normalization(config, description.arch)?;
    let named = (normalization != Normalization::default()).then_some(normalization);
    let resolved = json!({
        "arch": description.arch, "method": description.method, "dtype": config.dtype, "teacher-batch": TEACHER_BATCH,
        "state-key": config.state_key, PIXEL_NORMALIZATION_KEY: named, "center": config.projection.map(|_kind| true), "pca": config.components(),
    });
    let identity = Identity::new(Stage::TeacherEmbed, &resolved, 0, inputs)?;
    let job = Job::new(config, &shards, &teacher, normalization);
    job.must_fit_on_disk()?;
    match OutputDir::begin(&config.output, &identity, config.overwrite)? {
        Begun::Finished(manifest) => {
            note(&format!("`{}` is already finished: nothing to do", config.output.display()));
            summarise(&job, &manifest, None)
        }
        Begun::Writing(output) => {
            if !config.quiet {
                note_cpu();
            }
            let write = if config.projection.is_some() { write_projected } else { write_embedded };
            let mut written = write(&job, output.path(), output.resumed())?;
            if let (None, Some(head)) = (config.projection, teacher.head()) {
                written.files.push(head.write(output.path().join(HEAD_FILE))?);
            }
            if written.resumed > 0 && !config.quiet {
                note(&format!("{} of {} shards were computed before", written.resumed, shards.shards().len()));
            }
            let counts = BTreeMap::from([
                ("samples".to_owned(), shards.len() as u64),
                ("views".to_owned(), shards.views() as u64),
                ("shards".to_owned(), shards.shards().len() as u64),
            ]);
            let details = json!({
                "views": job.details.views, "embedding_dim": job.details.embedding_dim, "dtype": job.details.dtype,
                "teacher": description,
            });
            let manifest = output.finish(counts, details, written.files)?;
            summarise(&job, &manifest, Some(written.resumed))
        }
    }
}

/// How pixels become the teacher's input: as asked, as its weights say, or as its architecture was published.
fn pixel_normalization(config: &EmbedConfig, arch: Arch) -> Result<Normalization> {
    if let Some(asked) = config.pixel_normalization {
        return Ok(asked);
    }
    if config.weights.is_dir() {
        return Ok(Normalization::default());
    }
    let checkpoint = Checkpoint::open_at(&config.weights, config.state_key.as_deref())?;
    Ok(Normalization::recorded(checkpoint.metadata()).unwrap_or_else(|| arch.pixel_normalization()))
}

fn summarise(job: &Job<'_>, manifest: &Manifest, resumed: Option<usize>) -> Result<Embedded> {
    let (config, shards) = (job.config, job.shards);
    let set = EmbeddingSet::open(&config.output, shards)?;
    let statistics = statistics(&set, shards)?;
    if let Some(warning) = statistics.warning().filter(|_| config.projection.is_none()) {
        note(&warning);
    }
    Ok(Embedded {
        already_finished: resumed.is_none(),
        resumed_shards: resumed.unwrap_or(shards.shards().len()),
        output: config.output.display().to_string(),
        fingerprint: manifest.fingerprint.clone(),
        teacher: job.teacher.description().clone(),
        pixel_normalization: job.normalization,
        samples: shards.len(),
        views: shards.views(),
        shards: shards.shards().len(),
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        embedding_dim: set.embedding_dim(),
        projection: set.projection()?.as_ref().map(ProjectionSummary::new),
        statistics,
    })
}
