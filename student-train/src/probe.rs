//! The probe: how well nearest neighbours classify by the features of a student that is still learning.
//!
//! It sees the encoder in evaluation mode and changes nothing of the training. Its accuracy is that of `student-eval knn` on the
//! first view of every sample.

use std::path::Path;

use shared::data_loader::normalized_batch;
use shared::feature_rows::{EXTRACTION_BATCH, FeatureRows};
use shared::knn::{KnnAccuracy, VOTE_TEMPERATURE, ViewChoice, nearest, vote};
use shared::manifest::Input;
use shared::matrix::with_slice;
use shared::models::Encoder;
use shared::ops::Mode;
use shared::shard::{ShardSet, check_classes, open_labelled};
use shared::transforms::normalize::Normalization;
use shared::{Error, Result};

use crate::config::{ProbeConfig, ProbePaths};

/// The roles under which a run records the sets.
pub const PROBE_ROLES: [&str; 2] = ["probe-train", "probe-val"];

/// A labelled set, or two.
#[derive(Debug)]
pub struct Probe {
    train: ShardSet,
    /// Each sample of `train` by the others, if none.
    val: Option<ShardSet>,
    config: ProbeConfig,
}

/// Features of a set.
struct Features {
    values: Vec<f32>,
    width: usize,
    labels: Vec<i64>,
    sample_ids: Vec<u64>,
}

impl Probe {
    /// Opens the sets; their images must have the size of the training's.
    ///
    /// # Errors
    /// [`Error::Invalid`] for sets without labels, of different classes, of another image size, or of one sample alone; as
    /// [`ShardSet::open`].
    pub fn open(paths: &ProbePaths, config: ProbeConfig, training: &ShardSet) -> Result<Self> {
        let train = open_labelled(&paths.train)?;
        let val = paths.val.as_deref().map(open_labelled).transpose()?;
        for set in [Some(&train), val.as_ref()].into_iter().flatten() {
            check_size(set, training)?;
        }
        if let Some(val) = &val {
            check_classes(&train, val)?;
        }
        // The same set twice means each sample by the others, as in `student-eval`.
        let val = val.filter(|val| val.manifest().fingerprint != train.manifest().fingerprint);
        let empty = |set: &ShardSet| set.is_empty();
        if train.len() < 1 + usize::from(val.is_none()) || val.as_ref().is_some_and(empty) {
            let message = format!("`{}` holds too few samples for a probe", paths.train.display());
            return Err(Error::invalid(message, "give larger sets by `--probe-train` and `--probe-val`"));
        }
        Ok(Self { train, val, config })
    }

    /// The sets as inputs of the run.
    pub fn inputs(&self) -> Vec<Input> {
        let sets = [Some(&self.train), self.val.as_ref()];
        let named = PROBE_ROLES.into_iter().zip(sets);
        named.filter_map(|(role, set)| set.map(|set| set.manifest().as_input(role, set.directory()))).collect()
    }

    /// Whether it is due after an epoch, counted from 1.
    pub fn due(&self, epoch: u64, epochs: u64) -> bool {
        epoch == epochs || epoch.is_multiple_of(self.config.probe_epochs)
    }

    /// Classifies by the `k` nearest neighbours.
    ///
    /// # Errors
    /// [`Error::Invalid`] for features that are not finite or a sample without a label; reading a set.
    pub fn accuracy(&self, encoder: &Encoder) -> Result<KnnAccuracy> {
        let train = Features::of(&self.train, encoder)?;
        let val = self.val.as_ref().map(|set| Features::of(set, encoder)).transpose()?;
        let classes = self.train.classes().len();
        let (train_rows, train_classes) = train.rows(&self.train, classes)?;
        let (rows, truth) = match (&val, &self.val) {
            (Some(features), Some(set)) => features.rows(set, classes)?,
            _ => (train_rows.clone(), train_classes.clone()),
        };
        let k = self.config.probe_k;
        let neighbours = nearest(&train_rows, &rows, ViewChoice::First, k, val.is_none())?;
        let accuracy = vote(&neighbours, &train_classes, &truth, classes, &[k], VOTE_TEMPERATURE).into_iter().next();
        accuracy.ok_or_else(|| Error::invalid("a probe without neighbours", ""))
    }
}

impl Features {
    fn of(set: &ShardSet, encoder: &Encoder) -> Result<Self> {
        let width = encoder.arch().feature_width();
        let mut values = Vec::with_capacity(set.len() * width);
        for start in (0..set.len()).step_by(EXTRACTION_BATCH) {
            let rows: Vec<(usize, usize)> =
                (start..set.len().min(start + EXTRACTION_BATCH)).map(|index| (index, 0)).collect();
            let pixels = normalized_batch(set, &rows, Normalization::Imagenet)?;
            let features = encoder.features(&pixels, Mode::Eval)?.contiguous()?;
            with_slice(&features, |features| values.extend_from_slice(features))?;
        }
        let labels = set.shards().iter().flat_map(shared::shard::Shard::labels).copied().collect();
        let sample_ids = (0..set.len()).map(|index| set.sample_id(index)).collect();
        Ok(Self { values, width, labels, sample_ids })
    }

    /// The rows and the class of each.
    fn rows(&self, set: &ShardSet, classes: usize) -> Result<(FeatureRows<'_>, Vec<u32>)> {
        let what = format!("`{}`", set.directory().display());
        let rows = FeatureRows::new(vec![&self.values], 1, self.width, &self.labels, &self.sample_ids)?;
        rows.check_finite(&what)?;
        let classes = rows.class_indices(&what, classes)?;
        Ok((rows, classes))
    }
}

fn check_size(set: &ShardSet, training: &ShardSet) -> Result<()> {
    let size = |set: &ShardSet| (set.height(), set.width());
    if size(set) == size(training) {
        return Ok(());
    }
    let shown = |path: &Path, (height, width): (usize, usize)| format!("`{}` has {height} x {width}", path.display());
    Err(Error::invalid(
        format!(
            "the probe's images must have the size of the training's: {}, {}",
            shown(set.directory(), size(set)),
            shown(training.directory(), size(training))
        ),
        "pack them with the training's `--size`",
    ))
}
