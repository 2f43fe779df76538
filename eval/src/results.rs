//! Stored results of probes: one JSON file per run, kind and setting, in `RUN/eval/`, with everything needed to tell what was
//! measured on what.
//!
//! The file's name ends in the beginning of a hash of kind, weights, feature sets and settings: measuring the same thing again
//! finds the result, another setting gets a file of its own.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shared::io::{create_directory, write_json};
use shared::knn::{KnnAccuracy, ViewChoice};
use shared::manifest::{FORMAT_VERSION, Input, short};
use shared::{Error, Fault, Result};

use crate::features::{FeatureSet, SHARDS_ROLE};
use crate::linear_probe::{ProbeConfig, ProbeResult};

/// One side of a probe: the features that were trained or measured on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRecord {
    /// Samples.
    pub samples: usize,
    /// Stored views per sample.
    pub views: usize,
    /// The shard set: where it was then, and its fingerprint.
    pub shards: Input,
    /// Fingerprint of the feature set.
    pub features: String,
}

impl SetRecord {
    /// The record of a feature set.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the set names no shard set.
    pub fn new(set: &FeatureSet) -> Result<Self> {
        let manifest = set.manifest();
        let shards = manifest.input(SHARDS_ROLE).cloned().ok_or_else(|| {
            Error::damaged(set.directory(), Fault::Value("the feature set names no shard set".into()))
        })?;
        let samples = manifest.count("samples") as usize;
        Ok(Self { samples, views: set.details().views, shards, features: manifest.fingerprint.clone() })
    }
}

/// Settings of a k-NN measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnnConfig {
    /// Numbers of voting neighbours, as asked.
    pub k: Vec<usize>,
    /// Temperature of the votes.
    pub temperature: f64,
    /// What stands for a sample with several views.
    pub view: ViewChoice,
    /// Whether training and validation set are the same, each sample classified by the others.
    pub leave_one_out: bool,
}

/// What was measured how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Measurement {
    /// Nearest neighbours.
    Knn {
        /// Settings.
        config: KnnConfig,
        /// Accuracy for each k.
        result: Vec<KnnAccuracy>,
    },
    /// The linear probe.
    Linear {
        /// Settings.
        config: ProbeConfig,
        /// Accuracy for each learning rate.
        result: ProbeResult,
    },
}

/// A stored result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this layout.
    pub format_version: u32,
    /// The architecture of the backbone.
    pub arch: String,
    /// The weights: where they were then, and their hash.
    pub weights: Input,
    /// Trained on, or searched in.
    pub train: SetRecord,
    /// Measured on.
    pub val: SetRecord,
    /// Class names.
    pub classes: Vec<String>,
    /// Settings and numbers.
    #[serde(flatten)]
    pub measurement: Measurement,
}

/// What decides a result, hashed for its file name.
#[derive(Serialize)]
struct Key<'a, C: Serialize> {
    kind: &'a str,
    weights: &'a str,
    train: &'a str,
    val: &'a str,
    config: &'a C,
}

/// The file of a result.
///
/// # Errors
/// [`Error::Invalid`] when `config` has no JSON form.
pub fn path_for(
    home: &Path,
    kind: &str,
    weights: &Input,
    (train, val): (&SetRecord, &SetRecord),
    config: &impl Serialize,
) -> Result<PathBuf> {
    let key = Key { kind, weights: &weights.fingerprint, train: &train.features, val: &val.features, config };
    let text = serde_json::to_string(&key).map_err(|e| Error::invalid(format!("no JSON form: {e}"), ""))?;
    let hash = blake3::hash(text.as_bytes()).to_hex();
    Ok(home.join("eval").join(format!("{kind}-{}.json", short(&hash))))
}

impl Record {
    /// A record of the current layout.
    pub fn new(
        arch: String,
        weights: Input,
        (train, val): (SetRecord, SetRecord),
        classes: Vec<String>,
        measurement: Measurement,
    ) -> Self {
        Self { format_version: FORMAT_VERSION, arch, weights, train, val, classes, measurement }
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(directory) = path.parent() {
            create_directory(directory)?;
        }
        write_json(path, self).map(drop)
    }

    /// Reads one, if it is there.
    ///
    /// # Errors
    /// As [`Record::read`].
    pub fn read_if_exists(path: &Path) -> Result<Option<Self>> {
        if path.exists() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when it is no result, or one of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let syntax = |e: serde_json::Error| Error::damaged(path, Fault::Syntax(format!("not a stored result: {e}")));
        let version: Version = serde_json::from_str(&text).map_err(syntax)?;
        if version.format_version != FORMAT_VERSION {
            let fault = Fault::Version { expected: FORMAT_VERSION, found: version.format_version };
            return Err(Error::damaged(path, fault));
        }
        serde_json::from_str(&text).map_err(syntax)
    }
}

#[derive(Deserialize)]
struct Version {
    format_version: u32,
}

/// All results stored under `home`, in the order of their file names.
///
/// # Errors
/// As [`Record::read`].
pub fn read_all(home: &Path) -> Result<Vec<Record>> {
    let directory = home.join("eval");
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(&directory).map_err(Error::io("list", &directory))? {
        let path = entry.map_err(Error::io("list", &directory))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ours = ["knn-", "linear-"].iter().any(|kind| name.starts_with(kind));
        if ours && path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    paths.iter().map(|path| Record::read(path)).collect()
}
