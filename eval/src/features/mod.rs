//! Feature sets: the pooled backbone features of every view of a shard set, row for row, cached for all probes.
//!
//! ```text
//! manifest.json                    names the shard set and the weights by their fingerprints
//! features-00000.safetensors …     one per shard:
//!     sample_ids  [n]        u64, the same as the shard's
//!     labels      [n]        i64, the same as the shard's
//!     features    [n, V, F]  f32, starts on a 4096-byte boundary
//! ```
//!
//! A set lies in `RUN/features/` in a directory named after the beginning of the shard set's fingerprint, so that each shard
//! set has one place.

mod extract;

pub use extract::{Extractor, extract};

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shared::feature_rows::FeatureRows;
use shared::manifest::{MANIFEST_FILE, Manifest, Stage, short};
use shared::shard::{Shard, ShardSet};
use shared::tensor_file::TensorFile;
use shared::transforms::normalize::Normalization;
use shared::{Error, Fault, Result};

/// The role under which a feature set records its shard set.
pub const SHARDS_ROLE: &str = "shards";
/// The role under which a feature set records the weights.
pub const WEIGHTS_ROLE: &str = "weights";

/// Where an identity keeps how pixels were normalised; ImageNet's way is not named there.
const PIXEL_NORMALIZATION_KEY: &str = "pixel-normalization";

/// What a reader must know of a feature set, kept as the manifest's `details`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSetDetails {
    /// The backbone's architecture.
    pub arch: String,
    /// V: views per sample.
    pub views: usize,
    /// F: width of a feature.
    pub feature_width: usize,
    /// Class names; a label is an index into them.
    pub classes: Vec<String>,
}

/// Where the features of a shard set lie under `home`, a run directory.
pub fn directory_for(home: &Path, shards_fingerprint: &str) -> PathBuf {
    home.join("features").join(short(shards_fingerprint))
}

/// File name of a shard's features.
pub fn feature_file_name(index: usize) -> String {
    format!("features-{index:05}.safetensors")
}

/// A finished feature set.
#[derive(Debug)]
pub struct FeatureSet {
    directory: PathBuf,
    manifest: Manifest,
    details: FeatureSetDetails,
    files: Vec<TensorFile>,
    labels: Vec<i64>,
    sample_ids: Vec<u64>,
}

impl FeatureSet {
    /// Opens a set: reads the manifest, maps the files and checks their layout.
    ///
    /// # Errors
    /// As [`Manifest::read`] and [`Manifest::check_lengths`]; [`Error::Damaged`] when a file breaks the layout.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref().to_path_buf();
        let manifest = Manifest::read(&directory, Stage::StudentEval)?;
        manifest.check_lengths(&directory)?;
        let fault = |fault| Error::damaged(directory.join(MANIFEST_FILE), fault);
        let details: FeatureSetDetails = serde_json::from_value(manifest.details.clone())
            .map_err(|e| fault(Fault::Syntax(format!("not the details of a feature set: {e}"))))?;
        let (mut files, mut labels, mut sample_ids) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..manifest.files.len() {
            let file = open_file(&directory.join(feature_file_name(index)), &details)?;
            labels.extend_from_slice(&file.read::<i64>("labels")?);
            sample_ids.extend_from_slice(&file.read::<u64>("sample_ids")?);
            files.push(file);
        }
        let recorded = manifest.count("samples");
        if labels.len() as u64 != recorded {
            let what = format!("{recorded} samples are recorded, the files hold {}", labels.len());
            return Err(fault(Fault::Value(what)));
        }
        Ok(Self { directory, manifest, details, files, labels, sample_ids })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its record.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Architecture, dimensions, classes.
    pub fn details(&self) -> &FeatureSetDetails {
        &self.details
    }

    /// How pixels became the network's input.
    ///
    /// # Errors
    /// [`Error::Usage`] when it names a way that is not known here.
    pub fn pixel_normalization(&self) -> Result<Normalization> {
        let named = self.manifest.identity.config.get(PIXEL_NORMALIZATION_KEY).and_then(|value| value.as_str());
        named.map_or(Ok(Normalization::default()), str::parse)
    }

    /// The features, in place.
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a set that was opened.
    pub fn rows(&self) -> Result<FeatureRows<'_>> {
        let parts = self.files.iter().map(|file| file.view::<f32>("features")).collect::<Result<Vec<_>>>()?;
        FeatureRows::new(parts, self.details.views, self.details.feature_width, &self.labels, &self.sample_ids)
    }
}

/// Opens the features of one shard and checks them against the layout.
fn open_file(path: &Path, details: &FeatureSetDetails) -> Result<TensorFile> {
    let file = TensorFile::open(path)?;
    let samples = file.shape("sample_ids")?.first().copied().unwrap_or(0);
    file.expect_shape("sample_ids", &[samples], "[n]")?;
    file.expect_shape("labels", &[samples], "[n]")?;
    file.read::<u64>("sample_ids")?;
    let labels = file.read::<i64>("labels")?;
    let known = -1..i64::try_from(details.classes.len()).unwrap_or(i64::MAX);
    if let Some(label) = labels.iter().find(|label| !known.contains(label)) {
        let what = format!("label {label} is outside the {} classes of the set", details.classes.len());
        return Err(file.fault(Fault::Value(what)));
    }
    file.view_shaped::<f32>("features", &[samples, details.views, details.feature_width], "[n, V, F]")?;
    Ok(file)
}

/// Whether the features of one shard are already there, whole and of the right samples.
fn is_complete(path: &Path, details: &FeatureSetDetails, shard: &Shard) -> bool {
    let matches = || -> Result<bool> {
        let file = open_file(path, details)?;
        Ok(*file.read::<u64>("sample_ids")? == *shard.sample_ids() && *file.read::<i64>("labels")? == *shard.labels())
    };
    path.exists() && matches().unwrap_or(false)
}

/// The details of the set that a shard set gives.
fn details_of(shards: &ShardSet, arch: &str, feature_width: usize) -> FeatureSetDetails {
    FeatureSetDetails { arch: arch.into(), views: shards.views(), feature_width, classes: shards.classes().to_vec() }
}
