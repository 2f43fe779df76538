//! When checkpoints are written, and their writing behind the back of the training.
//!
//! A checkpoint is copied in memory, which takes some hundredths of a second, and hashed, written and synced by a thread while
//! the next steps run. What it costs is the memory of the copy while the thread is at it.

use std::collections::BTreeMap;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use serde::Serialize;
use shared::checkpoint::Checkpoints;
use shared::{Error, Result};

/// When a checkpoint is due; the end of a run always is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CheckpointPolicy {
    /// After so many steps of the run, and multiples of that.
    pub steps: Option<u64>,
    /// After so many epochs of the run, and multiples of that.
    pub epochs: Option<u64>,
    /// When the last one, or the start, is so long ago.
    pub interval: Duration,
}

impl CheckpointPolicy {
    /// Whether one is due after `step`, which ended the epoch of the number `epoch_end`, counted from 1, if any.
    fn due(&self, step: u64, epoch_end: Option<u64>, since_last: Duration) -> bool {
        self.steps.is_some_and(|steps| step.is_multiple_of(steps))
            || epoch_end.zip(self.epochs).is_some_and(|(epoch, epochs)| epoch.is_multiple_of(epochs))
            || since_last >= self.interval
    }
}

/// Writes the checkpoints of a training.
#[derive(Debug)]
pub struct Saver {
    checkpoints: Checkpoints,
    policy: CheckpointPolicy,
    /// When the last one was begun.
    last: Instant,
    /// The steps of the newest, also of one that is being written.
    newest: Option<u64>,
    writing: Option<JoinHandle<Result<()>>>,
}

impl Saver {
    /// Nothing is being written; `newest` is the checkpoint that the training goes on from.
    pub fn new(checkpoints: Checkpoints, policy: CheckpointPolicy, newest: Option<u64>) -> Self {
        Self { checkpoints, policy, last: Instant::now(), newest, writing: None }
    }

    /// The checkpoints.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }

    /// The steps of the newest checkpoint.
    pub fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// Whether a checkpoint is due after `step`, which ended the epoch of the number `epoch_end`, counted from 1, if any.
    pub fn due(&self, step: u64, epoch_end: Option<u64>) -> bool {
        self.policy.due(step, epoch_end, self.last.elapsed())
    }

    /// Begins to write a checkpoint, once the one before it is there.
    ///
    /// # Errors
    /// [`Error::Io`] of the one before; [`Error::Invalid`] when the system refuses a thread.
    pub fn save(
        &mut self,
        step: u64,
        state: impl Serialize + Send + 'static,
        tensors: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        self.wait()?;
        // Parameters and queue change in place while the thread writes.
        let tensors = tensors
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.copy()?)))
            .collect::<Result<BTreeMap<String, Tensor>>>()?;
        let checkpoints = self.checkpoints.clone();
        let thread = Builder::new()
            .name("checkpoint".into())
            .spawn(move || checkpoints.save(step, state, &tensors).map(drop))
            .map_err(|e| Error::invalid(format!("cannot start a thread that writes checkpoints: {e}"), ""))?;
        self.writing = Some(thread);
        self.last = Instant::now();
        self.newest = Some(step);
        Ok(())
    }

    /// Tells of a checkpoint that could not be written, as soon as that is known.
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    pub fn check(&mut self) -> Result<()> {
        if self.writing.as_ref().is_some_and(JoinHandle::is_finished) { self.wait() } else { Ok(()) }
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    /// As [`Saver::check`].
    pub fn wait(&mut self) -> Result<()> {
        let Some(thread) = self.writing.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|_panic| {
            Err(Error::invalid("the thread that writes checkpoints panicked", "please report this"))
        })
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // A training that ends by an error keeps the checkpoint that was on its way; the error itself is the one to tell.
        drop(self.wait());
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use shared::manifest::{Identity, Stage};

    use super::*;

    const POLICY: CheckpointPolicy =
        CheckpointPolicy { steps: Some(7), epochs: Some(2), interval: Duration::from_mins(1) };

    #[test]
    fn steps_epochs_and_time_each_make_one_due() {
        let (early, late) = (Duration::from_secs(59), Duration::from_mins(1));
        assert!(POLICY.due(14, None, early) && !POLICY.due(15, None, early));
        assert!(POLICY.due(15, Some(4), early) && !POLICY.due(15, Some(3), early));
        assert!(POLICY.due(15, None, late));
        let rare = CheckpointPolicy { steps: None, epochs: None, ..POLICY };
        assert!(!rare.due(14, Some(4), early) && rare.due(14, None, late));
    }

    #[test]
    fn what_changes_after_saving_is_not_in_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::new(Stage::StudentTrain, &serde_json::json!({}), 0, Vec::new()).unwrap();
        let mut saver = Saver::new(Checkpoints::open(dir.path(), &identity, 2).unwrap(), POLICY, None);
        // Large enough for the thread to be at it still.
        let tensor = Tensor::ones((1 << 22,), candle_core::DType::F32, &Device::Cpu).unwrap();
        saver.save(1, serde_json::json!({}), BTreeMap::from([("x".into(), tensor.clone())])).unwrap();
        tensor.slice_set(&Tensor::zeros((1 << 21,), candle_core::DType::F32, &Device::Cpu).unwrap(), 0, 0).unwrap();
        saver.wait().unwrap();
        let checkpoint = saver.checkpoints().load::<serde_json::Value>(1).unwrap();
        assert!(checkpoint.tensors.view::<f32>("x").unwrap().iter().all(|&x| x == 1.0));
        assert_eq!(saver.newest(), Some(1));
    }

    #[test]
    fn failure_to_write_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::new(Stage::StudentTrain, &serde_json::json!({}), 0, Vec::new()).unwrap();
        let directory = dir.path().join("checkpoints");
        let mut saver = Saver::new(Checkpoints::open(&directory, &identity, 2).unwrap(), POLICY, None);
        std::fs::remove_dir(&directory).unwrap();
        saver.save(1, serde_json::json!({}), BTreeMap::new()).unwrap();
        let error = saver.wait().unwrap_err();
        assert!(error.to_string().contains("step-00000001.safetensors"), "{error}");
        saver.check().unwrap();
    }
}
