//! Checking a finished embedding set: its hashes, its shards, and some of its rows computed again.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use shared::cli::note_cpu;
use shared::embedding::{EmbeddingSet, PROJECTION_FILE, SHARDS_ROLE};
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};
use shared::models::Arch;
use shared::progress::Progress;
use shared::shard::ShardSet;
use shared::transforms::normalize::Normalization;
use shared::weights::names::Method;
use shared::{Error, Fault, Result};

use crate::config::VerifyConfig;
use crate::embed::PIXEL_NORMALIZATION_KEY;
use crate::projected::project;
use crate::rows::rows_of;
use crate::teacher::{Teacher, WEIGHTS_ROLE};

/// Cosine distance that storing and grouping may cause: rounding to bf16 causes up to 0.000004.
const TOLERANCE: f64 = 1e-4;

/// What `verify` found; a fault is an error instead.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verified {
    /// Files whose hash is as recorded.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Whether the shards were there and belong to the set.
    pub shards_checked: bool,
    /// Rows computed again.
    pub recomputed_rows: usize,
    /// The largest cosine distance between a stored row and the one computed again.
    pub max_cosine_distance: Option<f64>,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} files, {} bytes: every hash is as recorded", self.files, self.bytes)?;
        let shards =
            if self.shards_checked { "belong to this set, sample for sample" } else { "not checked: not found" };
        write!(f, "shards: {shards}")?;
        if let Some(distance) = self.max_cosine_distance {
            write!(f, "\n{} rows computed again: cosine distance at most {distance:.2e}", self.recomputed_rows)?;
        }
        Ok(())
    }
}

/// Verifies an embedding set.
///
/// # Errors
/// [`Error::Damaged`] for a changed file or a row that is not what the teacher gives, [`Error::Chain`] when the shards or
/// the weights are others, and as [`Manifest::read`].
pub fn verify(config: &VerifyConfig) -> Result<Verified> {
    let directory = &config.embeddings;
    let manifest = Manifest::read(directory, Stage::TeacherEmbed)?;
    let bytes = manifest.files.iter().map(|file| file.bytes).sum();
    let progress = Progress::new("verifying", "bytes", bytes, config.quiet);
    manifest.verify_files(directory, |read| progress.inc(read))?;
    progress.finish();

    let recorded = manifest.input(SHARDS_ROLE).map(|input| PathBuf::from(&input.path));
    let path = config.shards.clone().or_else(|| recorded.filter(|path| path.is_dir() || config.weights.is_some()));
    let mut verified = Verified {
        files: manifest.files.len(),
        bytes,
        shards_checked: false,
        recomputed_rows: 0,
        max_cosine_distance: None,
    };
    let Some(path) = path else { return Ok(verified) };
    let shards = ShardSet::open(path)?;
    let set = EmbeddingSet::open(directory, &shards)?;
    verified.shards_checked = true;
    let Some(weights) = &config.weights else { return Ok(verified) };

    let resolved = &manifest.identity.config;
    let setting = |key: &str| resolved.get(key).and_then(|value| value.as_str());
    let arch = setting("arch").map(str::parse::<Arch>).transpose()?;
    let method = setting("method").map(str::parse::<Method>).transpose()?;
    let teacher = Teacher::load(weights, arch, method, setting("state-key"))?;
    let expected = manifest.input(WEIGHTS_ROLE).map_or("none", |input| &input.fingerprint);
    if teacher.input().fingerprint != expected {
        return Err(Error::Chain {
            what: "fingerprint of the weights".into(),
            path: directory.clone(),
            expected: teacher.input().fingerprint.clone(),
            found: expected.to_owned(),
            hint: "give the weights that the set was made with".into(),
        });
    }
    if !config.quiet {
        note_cpu();
    }
    let samples = config.sample.min(shards.len());
    let rows: Vec<(usize, usize)> = (0..samples)
        .flat_map(|sample| (0..shards.views()).map(move |view| (sample, view)))
        .map(|(sample, view)| (sample * shards.len() / samples, view))
        .collect();
    let normalization = setting(PIXEL_NORMALIZATION_KEY).map_or(Ok(Normalization::default()), str::parse)?;
    let computed = match set.projection()? {
        None => rows_of(&shards, &rows, normalization, |xs| teacher.embeddings(xs))?,
        Some(projection) => {
            let width = teacher.description().embedding_dim;
            if projection.feature_width() != width {
                let found =
                    format!("it takes outputs of width {}, the teacher gives {width}", projection.feature_width());
                return Err(Error::damaged(directory.join(PROJECTION_FILE), Fault::Value(found)));
            }
            project(&projection, &rows_of(&shards, &rows, normalization, |xs| teacher.outputs(xs))?, &rows)?
        }
    };
    let mut stored = vec![0.0; set.embedding_dim()];
    let mut largest = 0.0f64;
    for (&(sample, view), row) in rows.iter().zip(computed.chunks_exact(set.embedding_dim())) {
        set.read(sample, view, &mut stored)?;
        let distance = cosine_distance(&stored, row);
        if distance.is_nan() || distance > TOLERANCE {
            let found =
                format!("sample {sample}, view {view}: cosine distance {distance:.2e} to what the teacher gives");
            return Err(Error::damaged(directory.join(MANIFEST_FILE), Fault::Value(found)));
        }
        largest = largest.max(distance);
    }
    verified.recomputed_rows = rows.len();
    verified.max_cosine_distance = Some(largest);
    Ok(verified)
}

/// One less the cosine similarity, in f64; not negative.
fn cosine_distance(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    if cosine.is_nan() { f64::NAN } else { (1.0 - cosine).max(0.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_at_the_ends() {
        assert_eq!(cosine_distance(&[0.6, 0.8], &[0.6, 0.8]), 0.0);
        assert_eq!(cosine_distance(&[1.0, 0.0], &[0.0, 2.0]), 1.0);
        assert!(cosine_distance(&[0.0, 0.0], &[0.0, 2.0]).is_nan());
    }
}
