//! Checking a finished embedding set: its hashes, its shards, and some of its rows computed again.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use shared::cli::note_cpu;
use shared::embedding::{EmbeddingSet, PROJECTION_FILE, SHARDS_ROLE};
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};
use shared::models::Arch;
use shared::progress::Progress;
use shared::rng::KeyedRng;
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

/// Rows that an error names.
const NAMED_ROWS: usize = 5;

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
    /// The median of these distances.
    pub median_cosine_distance: Option<f64>,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} files, {} bytes: every hash is as recorded", self.files, self.bytes)?;
        let shards =
            if self.shards_checked { "belong to this set, sample for sample" } else { "not checked: not found" };
        write!(f, "shards: {shards}")?;
        if let (Some(largest), Some(median)) = (self.max_cosine_distance, self.median_cosine_distance) {
            let rows = self.recomputed_rows;
            write!(f, "\n{rows} rows computed again: cosine distance at most {largest:.2e}, median {median:.2e}")?;
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
        median_cosine_distance: None,
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
    let rows = sampled_rows(&shards, config.sample, config.seed);
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
    let mut distances = Vec::new();
    let mut wrong = Vec::new();
    for (&(sample, view), row) in rows.iter().zip(computed.chunks_exact(set.embedding_dim())) {
        set.read(sample, view, &mut stored)?;
        let distance = cosine_distance(&stored, row);
        if distance.is_nan() || distance > TOLERANCE {
            wrong.push(format!("view {view} of sample {:016x} by {distance:.2e}", shards.sample_id(sample)));
        }
        distances.push(distance);
    }
    if !wrong.is_empty() {
        let more = if wrong.len() > NAMED_ROWS { ", ..." } else { "" };
        let named = wrong.iter().take(NAMED_ROWS).cloned().collect::<Vec<_>>().join(", ");
        let found = format!(
            "{} of {} rows are not what the teacher gives, by cosine distance: {named}{more}",
            wrong.len(),
            rows.len()
        );
        return Err(Error::damaged(directory.join(MANIFEST_FILE), Fault::Value(found)));
    }
    distances.sort_by(f64::total_cmp);
    verified.recomputed_rows = rows.len();
    verified.max_cosine_distance = distances.last().copied();
    verified.median_cosine_distance = distances.get(distances.len() / 2).copied();
    Ok(verified)
}

/// So many different `(sample, view)` pairs, drawn by a seed, in the order in which they are stored.
fn sampled_rows(shards: &ShardSet, count: usize, seed: u64) -> Vec<(usize, usize)> {
    let (views, all) = (shards.views(), shards.len() * shards.views());
    let mut rng = KeyedRng::new("verify embeddings", seed, &[]);
    let mut chosen = BTreeSet::new();
    // Floyd's sampling: one draw for each row, whatever the size of the set.
    for last in all - count.min(all)..all {
        let row = rng.below(last + 1);
        if !chosen.insert(row) {
            chosen.insert(last);
        }
    }
    chosen.into_iter().map(|row| (row / views, row % views)).collect()
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
