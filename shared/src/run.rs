//! Finished runs of `student-train`, for the stages that read them: what was trained, its weights, how the losses went.
//!
//! ```text
//! manifest.json           details: [`RunDetails`]
//! config.toml             the resolved options
//! metrics.jsonl           [`StepMetrics`] after every step, [`EpochMetrics`] after every epoch, [`ProbeMetrics`] after every probe
//! timing.jsonl            how fast it went and on what: `seconds`, `images_per_second`, `data_wait_percent`, `peak_memory_bytes` of the
//!                         process so far (Linux), `isa`, `threads`, and how far the embeddings spread: `embedding_spread`,
//!                         `queue_similarity`; differs from run to run, so the manifest does not list it
//! tensorboard/            the same numbers for `TensorBoard`, see [`crate::tensorboard`]; not listed for the same reason
//! checkpoints/            see [`crate::checkpoint`]; tensors `query.*`, `key.*`, `queue`, `ema.*` of the averaged student, and the
//!                         optimiser's behind its name (`sgd.*`); of `SwAV` `prototypes.weight` and `swav_queue.*` in
//!                         place of key encoder and queue; of the teacher's term `seed` `seed_queue`, of its term `simreg` `simreg.*`
//! student.safetensors     the backbone of the query encoder or of its average, names of torchvision and timm
//! student-best.safetensors  the same when the probe was best: [`BestStudent`]
//! head.safetensors        of a run with the teacher's own head, that head: see [`crate::models::MlpHead`]
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::embedding::HEAD_FILE;
use crate::error::{Error, Fault, Result};
use crate::io::{FileEntry, hash_file};
use crate::knn::KnnAccuracy;
use crate::logging::read_json_lines;
use crate::manifest::{MANIFEST_FILE, Manifest, Stage};
use crate::models::{Arch, Encoder, HeadConfig, HeadKind, MlpHead};
use crate::tensor_file::TensorFile;

/// File name of the exported backbone.
pub const STUDENT_FILE: &str = "student.safetensors";
/// File name of the backbone that the probe found best.
pub const BEST_STUDENT_FILE: &str = "student-best.safetensors";
/// Directory of the event files for `TensorBoard`.
pub const TENSORBOARD_DIRECTORY: &str = "tensorboard";
/// File name of the losses.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// File name of the speeds and the memory.
pub const TIMING_FILE: &str = "timing.jsonl";
/// File name of the resolved options.
pub const CONFIG_FILE: &str = "config.toml";
/// What the names of the query encoder's tensors begin with in a checkpoint.
pub const QUERY_PREFIX: &str = "query.";
/// What the names of the averaged student's tensors begin with in a checkpoint.
pub const AVERAGE_PREFIX: &str = "ema.";

/// What a run trains for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// A self-supervised method alone.
    Pretrain,
    /// Agreement with a teacher, beside a self-supervised method or alone.
    Distill,
}

impl Objective {
    /// The subcommand's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pretrain => "pretrain",
            Self::Distill => "distill",
        }
    }
}

/// The losses of a step, or their means over an epoch.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Losses {
    /// The weighted sum that is minimised.
    pub loss: f32,
    /// Its terms by name, unweighted, and accuracies in percent: `info_nce`, `top1`, `distill_q`, `distill_k`, ...
    #[serde(flatten)]
    pub terms: BTreeMap<String, f32>,
}

impl Losses {
    /// The contrastive loss.
    pub const INFO_NCE: &'static str = "info_nce";
    /// Percentage of queries that are closer to their own key than to all of the queue.
    pub const TOP1: &'static str = "top1";
    /// Mean squared distance of student and teacher on the query's view.
    pub const DISTILL_Q: &'static str = "distill_q";
    /// As `distill_q`, on the key's view.
    pub const DISTILL_K: &'static str = "distill_k";
    /// The norm of all gradients together, before it was clipped.
    pub const GRADIENT_NORM: &'static str = "grad_norm";

    /// The cross entropy of predicted cluster assignments, mean over pairs of crops.
    pub const SWAPPED_PREDICTION: &'static str = "swapped_prediction";

    /// A term by its name.
    pub fn term(&self, name: &str) -> Option<f32> {
        self.terms.get(name).copied()
    }
}

/// A step's line in `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// The epoch it belongs to, counted from 0.
    pub epoch: u64,
    /// The learning rate of the step.
    pub lr: f64,
    /// Its losses, before the step changed the parameters.
    #[serde(flatten)]
    pub losses: Losses,
}

/// Tells an epoch's line from a step's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EpochEvent {
    /// The only kind there is.
    Epoch,
}

/// An epoch's line in `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// Marks the line.
    pub event: EpochEvent,
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// Steps done, the epoch included.
    pub step: u64,
    /// The learning rate of the epoch's last step.
    pub lr: f64,
    /// Means over its steps.
    #[serde(flatten)]
    pub losses: Losses,
}

/// Tells a probe's line from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProbeEvent {
    /// The only kind there is.
    Probe,
}

/// A probe's line in `metrics.jsonl`: k-NN on features of the query encoder, in evaluation mode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeMetrics {
    /// Marks the line.
    pub event: ProbeEvent,
    /// The epoch that had ended, counted from 0.
    pub epoch: u64,
    /// Steps done.
    pub step: u64,
    /// Accuracy in percent.
    #[serde(flatten)]
    pub accuracy: KnnAccuracy,
}

/// The student that a probe during the training found best; the earliest of equally good ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BestStudent {
    /// The epoch that had ended, counted from 0.
    pub epoch: u64,
    /// Steps done.
    pub step: u64,
    /// Accuracy in percent.
    pub accuracy: KnnAccuracy,
    /// Its backbone.
    pub file: FileEntry,
}

/// How the losses of a run went.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// Step by step.
    pub steps: Vec<StepMetrics>,
    /// Epoch by epoch.
    pub epochs: Vec<EpochMetrics>,
    /// Probe by probe.
    pub probes: Vec<ProbeMetrics>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Epoch(EpochMetrics),
    Probe(ProbeMetrics),
    Step(StepMetrics),
}

impl Metrics {
    /// Reads a `metrics.jsonl`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] for a line that is no step, epoch or probe.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let mut metrics = Self::default();
        for line in read_json_lines(path)? {
            match line {
                Line::Epoch(epoch) => metrics.epochs.push(epoch),
                Line::Probe(probe) => metrics.probes.push(probe),
                Line::Step(step) => metrics.steps.push(step),
            }
        }
        Ok(metrics)
    }
}

/// What a reader must know of a run, kept as the manifest's `details`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunDetails {
    /// What it was trained for.
    pub objective: Objective,
    /// The backbone.
    pub arch: Arch,
    /// F: width of the pooled features.
    pub feature_width: usize,
    /// The layers of the projection head; not named when it is `MoCo` v2's.
    #[serde(default, skip_serializing_if = "HeadKind::is_default")]
    pub head: HeadKind,
    /// Hidden width of the projection head; 0 and not named when it has none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub head_hidden: usize,
    /// D: width of an embedding.
    pub embedding_dim: usize,
    /// Width of the rows that the head, then an adapter, gives to the teacher's own head, which the run holds as [`HEAD_FILE`]; not
    /// named without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_width: Option<usize>,
    /// H and W of the views it saw.
    pub image_size: [usize; 2],
    /// The tensors of the last checkpoint, relative to the run.
    pub checkpoint: String,
    /// Whether the student is a moving average of the query encoder, `ema.*` in the checkpoint. The exported backbone and
    /// [`Run::encoder`] are the average then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub averaged: bool,
    /// Means over the last epoch.
    #[serde(rename = "final")]
    pub final_losses: Losses,
    /// What the probe found best, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<BestStudent>,
}

impl RunDetails {
    /// The projection head that learnt: the adapter where the teacher's own head is behind it.
    pub fn head(&self) -> HeadConfig {
        let embedding_dim = self.adapter_width.unwrap_or(self.embedding_dim);
        HeadConfig { kind: self.head, hidden: self.head_hidden, embedding_dim }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// A finished run.
#[derive(Debug, Clone)]
pub struct Run {
    directory: PathBuf,
    manifest: Manifest,
    details: RunDetails,
}

impl Run {
    /// Whether a path is a directory that a finished `student-train` wrote, to tell it from a file of weights.
    pub fn is_run(path: impl AsRef<Path>) -> bool {
        Manifest::read(path, Stage::StudentTrain).is_ok()
    }

    /// Opens a finished run: reads its record and compares the lengths of its files.
    ///
    /// # Errors
    /// As [`Manifest::read`] and [`Manifest::check_lengths`]; [`Error::Damaged`] when the details are not a run's.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref().to_path_buf();
        let manifest = Manifest::read(&directory, Stage::StudentTrain)?;
        manifest.check_lengths(&directory)?;
        let fault = |what: String| Error::damaged(directory.join(MANIFEST_FILE), Fault::Value(what));
        let details: RunDetails = serde_json::from_value(manifest.details.clone())
            .map_err(|e| fault(format!("not the details of a run: {e}")))?;
        for name in [&details.checkpoint, STUDENT_FILE, METRICS_FILE] {
            if !manifest.files.iter().any(|file| file.path == *name) {
                return Err(fault(format!("`{name}` is not among the recorded files")));
            }
        }
        Ok(Self { directory, manifest, details })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its record.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What was trained.
    pub fn details(&self) -> &RunDetails {
        &self.details
    }

    /// The exported backbone.
    pub fn student_path(&self) -> PathBuf {
        self.directory.join(STUDENT_FILE)
    }

    /// Compares a file of the run with the hash that was recorded of it: the run's fingerprint stands for that.
    ///
    /// # Errors
    /// [`Error::Damaged`] when it was changed or was never recorded; [`Error::Io`].
    pub fn check_hash(&self, name: &str) -> Result<()> {
        let recorded = self.manifest.files.iter().find(|file| file.path == name);
        let expected = recorded.map(|file| file.blake3.clone()).unwrap_or_default();
        let path = self.directory.join(name);
        let found = hash_file(&path)?.blake3;
        if found == expected { Ok(()) } else { Err(Error::damaged(path, Fault::Hash { expected, found })) }
    }

    /// The trained student without its head: for evaluation.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::Invalid`] when the file does not hold the architecture's tensors.
    pub fn student(&self) -> Result<Encoder> {
        let encoder = Encoder::new(self.details.arch, None, 0)?;
        encoder.store().load(&TensorFile::open(self.student_path())?.tensors()?)?;
        Ok(encoder)
    }

    /// The trained encoder with its head, a teacher for others: the moving average where the run kept one.
    ///
    /// # Errors
    /// As [`Run::student`].
    pub fn encoder(&self) -> Result<Encoder> {
        self.encoder_behind(if self.details.averaged { AVERAGE_PREFIX } else { QUERY_PREFIX })
    }

    /// The query encoder with its head as the last step left it.
    ///
    /// # Errors
    /// As [`Run::student`].
    pub fn query_encoder(&self) -> Result<Encoder> {
        self.encoder_behind(QUERY_PREFIX)
    }

    fn encoder_behind(&self, prefix: &str) -> Result<Encoder> {
        let RunDetails { arch, checkpoint, .. } = &self.details;
        let mut encoder = Encoder::new(*arch, Some(self.details.head()), 0)?;
        if self.details.adapter_width.is_some() {
            self.check_hash(HEAD_FILE)?;
            encoder = encoder.with_reused_head(Arc::new(MlpHead::open(self.directory.join(HEAD_FILE))?))?;
        }
        encoder.store().load(&prefixed(&TensorFile::open(self.directory.join(checkpoint))?, prefix)?)?;
        Ok(encoder)
    }

    /// How the losses went.
    ///
    /// # Errors
    /// As [`Metrics::read`].
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::read(self.directory.join(METRICS_FILE))
    }
}

/// The tensors of a file whose names begin with `prefix`, without it.
///
/// # Errors
/// As [`TensorFile::tensor`].
pub fn prefixed(file: &TensorFile, prefix: &str) -> Result<BTreeMap<String, Tensor>> {
    let names = file.names();
    let named = names.iter().filter_map(|name| Some((name, name.strip_prefix(prefix)?)));
    named.map(|(name, short)| Ok((short.to_string(), file.tensor(name)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_steps_and_epochs_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let terms = [("info_nce", 0.2), ("distill_q", 1.5), ("top1", 50.0)];
        let losses = Losses { loss: 0.1, terms: terms.map(|(name, value)| (name.into(), value)).into() };
        let step = StepMetrics { step: 1, epoch: 0, lr: 0.03, losses: losses.clone() };
        let epoch = EpochMetrics { event: EpochEvent::Epoch, epoch: 0, step: 1, lr: 0.03, losses };
        let mut log = crate::logging::JsonLines::create(&path).unwrap();
        log.append(&step).unwrap();
        log.append(&epoch).unwrap();
        let accuracy = KnnAccuracy { k: 20, top1: 12.5, top5: 50.0 };
        let probe = ProbeMetrics { event: ProbeEvent::Probe, epoch: 0, step: 1, accuracy };
        log.append(&probe).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = r#"{"step":1,"epoch":0,"lr":0.03,"loss":0.1,"distill_q":1.5,"info_nce":0.2,"top1":50.0}"#;
        assert_eq!(text.lines().next(), Some(expected));
        assert_eq!(
            Metrics::read(&path).unwrap(),
            Metrics { steps: vec![step], epochs: vec![epoch], probes: vec![probe] }
        );
        let expected = r#"{"event":"probe","epoch":0,"step":1,"k":20,"top1":12.5,"top5":50.0}"#;
        assert_eq!(text.lines().nth(2), Some(expected));
    }
}
