//! Checkpoints of a training: everything that the next step depends on, in two files that name each other.
//!
//! ```text
//! checkpoints/step-00000123.safetensors   the tensors
//! checkpoints/step-00000123.json          [`CheckpointRecord`]: written second, so that it vouches for the first
//! ```
//!
//! The record holds the hash of the tensors and the fingerprint of what is being trained. A pair that is damaged is
//! passed over for the one before it; a pair of another training is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Fault, Result};
use crate::io::{FileEntry, create_directory, hash_file, remove_temporaries, write_json};
use crate::manifest::{FORMAT_VERSION, Identity, short};
use crate::tensor_file::{TensorFile, write_tensors};

/// Directory of the checkpoints within a run.
pub const CHECKPOINT_DIRECTORY: &str = "checkpoints";

/// The JSON half of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRecord<S> {
    /// [`FORMAT_VERSION`] of the program that wrote it.
    pub format_version: u32,
    /// [`identity_fingerprint`] of what is being trained.
    pub fingerprint: String,
    /// Steps done.
    pub step: u64,
    /// What else the training needs to go on.
    pub state: S,
    /// The tensors.
    pub file: FileEntry,
}

/// A checkpoint read back.
#[derive(Debug)]
pub struct Checkpoint<S> {
    /// Its record.
    pub record: CheckpointRecord<S>,
    /// Its tensors, checked against the record.
    pub tensors: TensorFile,
}

/// The hash of an identity, without the paths of its inputs.
pub fn identity_fingerprint(identity: &Identity) -> String {
    let mut identity = identity.clone();
    for input in &mut identity.inputs {
        input.path.clear();
    }
    // JSON of this type cannot fail: all keys are strings; object keys are sorted by serde_json's map.
    blake3::hash(serde_json::json!(identity).to_string().as_bytes()).to_hex().to_string()
}

/// File name of the tensors after a number of steps.
pub fn tensors_file_name(step: u64) -> String {
    format!("step-{step:08}.safetensors")
}

/// File name of the record after a number of steps.
pub fn record_file_name(step: u64) -> String {
    format!("step-{step:08}.json")
}

/// The checkpoints of one training, in a directory that the caller has locked.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    directory: PathBuf,
    fingerprint: String,
    keep: usize,
}

impl Checkpoints {
    /// Opens the directory, creating it when needed and clearing temporary files away; the newest `keep`, at least one, stay.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(directory: impl AsRef<Path>, identity: &Identity, keep: usize) -> Result<Self> {
        create_directory(directory.as_ref())?;
        remove_temporaries(directory.as_ref())?;
        Ok(Self::reading(directory, identity, keep))
    }

    /// As [`Checkpoints::open`], without touching the directory, which another process writes.
    pub fn reading(directory: impl AsRef<Path>, identity: &Identity, keep: usize) -> Self {
        let directory = directory.as_ref().to_path_buf();
        Self { directory, fingerprint: identity_fingerprint(identity), keep: keep.max(1) }
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a checkpoint, then removes the oldest beyond those to keep. Returns the entries of tensors and record.
    ///
    /// # Errors
    /// [`Error::Io`]; earlier checkpoints are untouched then.
    pub fn save<S: Serialize>(
        &self,
        step: u64,
        state: S,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<[FileEntry; 2]> {
        let file = write_tensors(self.directory.join(tensors_file_name(step)), &BTreeMap::new(), tensors)?;
        let fingerprint = self.fingerprint.clone();
        let record = CheckpointRecord { format_version: FORMAT_VERSION, fingerprint, step, state, file: file.clone() };
        let record = write_json(self.directory.join(record_file_name(step)), &record)?;
        let steps = self.steps()?;
        let oldest_kept = steps[steps.len().saturating_sub(self.keep)];
        self.remove_where(|old| old < oldest_kept)?;
        Ok([file, record])
    }

    /// The steps of which a record is there, in order.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn steps(&self) -> Result<Vec<u64>> {
        self.steps_of("json")
    }

    /// Resumes from the newest checkpoint that is whole and that `accept` can load.
    ///
    /// `accept` loads the training from a checkpoint. Damaged ones, and those that `accept` finds [`Error::Damaged`] or
    /// [`Error::Invalid`], are told to `passed_over` and removed when an older one is good. None means that there is none.
    ///
    /// # Errors
    /// [`Error::Chain`] when a checkpoint belongs to another training; [`Error::Invalid`] when there are checkpoints and none is
    /// good; [`Error::Io`].
    pub fn resume<S: DeserializeOwned, T>(
        &self,
        mut passed_over: impl FnMut(&Error),
        mut accept: impl FnMut(Checkpoint<S>) -> Result<T>,
    ) -> Result<Option<T>> {
        let steps = self.steps()?;
        for &step in steps.iter().rev() {
            match self.load(step).and_then(&mut accept) {
                Ok(accepted) => {
                    self.remove_where(|later| later > step)?;
                    return Ok(Some(accepted));
                }
                Err(error @ (Error::Damaged { .. } | Error::Invalid { .. } | Error::Missing { .. })) => {
                    passed_over(&error);
                }
                Err(error) => return Err(error),
            }
        }
        if steps.is_empty() {
            self.remove_where(|_| true)?;
            return Ok(None);
        }
        let message = format!("none of the checkpoints in `{}` can be used", self.directory.display());
        Err(Error::invalid(message, "restore one from a backup, or start again with `--overwrite`"))
    }

    /// Reads the checkpoint of a step.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Damaged`] when a half breaks its format or the two do not belong together; [`Error::Chain`] when it
    /// belongs to another training.
    pub fn load<S: DeserializeOwned>(&self, step: u64) -> Result<Checkpoint<S>> {
        let path = self.directory.join(record_file_name(step));
        let record: CheckpointRecord<S> = read_record(&path)?;
        if record.fingerprint != self.fingerprint {
            return Err(Error::Chain {
                what: "training".into(),
                path,
                expected: short(&self.fingerprint).into(),
                found: short(&record.fingerprint).into(),
                hint: "the checkpoint was written with other settings: remove it, or start again with `--overwrite`"
                    .into(),
            });
        }
        if record.step != step || record.file.path != tensors_file_name(step) {
            let what = format!("it records step {} and tensors `{}`", record.step, record.file.path);
            return Err(Error::damaged(path, Fault::Value(what)));
        }
        let tensors = open_tensors(&self.directory, &record.file)?;
        Ok(Checkpoint { record, tensors })
    }

    fn steps_of(&self, extension: &str) -> Result<Vec<u64>> {
        let mut steps = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(Error::io("list", &self.directory))? {
            let name = entry.map_err(Error::io("list", &self.directory))?.file_name();
            let step = name.to_str().and_then(|name| {
                let step = name.strip_prefix("step-")?.strip_suffix(extension)?.strip_suffix('.')?;
                step.parse::<u64>().ok()
            });
            steps.extend(step);
        }
        steps.sort_unstable();
        Ok(steps)
    }

    fn remove_where(&self, unwanted: impl Fn(u64) -> bool) -> Result<()> {
        for extension in ["json", "safetensors"] {
            for step in self.steps_of(extension)?.into_iter().filter(|&step| unwanted(step)) {
                self.remove(step)?;
            }
        }
        Ok(())
    }

    /// The record goes first, so that an interruption leaves no record without tensors.
    fn remove(&self, step: u64) -> Result<()> {
        for name in [record_file_name(step), tensors_file_name(step)] {
            let path = self.directory.join(name);
            if path.exists() {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }
}

fn open_tensors(directory: &Path, entry: &FileEntry) -> Result<TensorFile> {
    let path = directory.join(&entry.path);
    if !path.exists() {
        let hint = "restore the file, or start again with `--overwrite`".into();
        return Err(Error::Missing { what: "checkpoint", path, hint });
    }
    let found = hash_file(&path)?;
    if found.bytes != entry.bytes {
        return Err(Error::damaged(path, Fault::Length { expected: entry.bytes, found: found.bytes }));
    }
    if found.blake3 != entry.blake3 {
        let fault = Fault::Hash { expected: short(&entry.blake3).into(), found: short(&found.blake3).into() };
        return Err(Error::damaged(path, fault));
    }
    TensorFile::open(path)
}

fn read_record<S: DeserializeOwned>(path: &Path) -> Result<CheckpointRecord<S>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let syntax = |e: serde_json::Error| Error::damaged(path, Fault::Syntax(format!("not a checkpoint record: {e}")));
    let value: serde_json::Value = serde_json::from_str(&text).map_err(syntax)?;
    let version = value.get("format_version").and_then(serde_json::Value::as_u64);
    if let Some(found) = version.and_then(|v| u32::try_from(v).ok()).filter(|&v| v != FORMAT_VERSION) {
        return Err(Error::damaged(path, Fault::Version { expected: FORMAT_VERSION, found }));
    }
    serde_json::from_value(value).map_err(syntax)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::{Value, json};

    use super::*;
    use crate::io::write_atomic;
    use crate::manifest::Stage;

    fn checkpoints(directory: &Path, lr: f64, keep: usize) -> Checkpoints {
        let identity = Identity::new(Stage::StudentTrain, &json!({"lr": lr}), 0, Vec::new()).unwrap();
        Checkpoints::open(directory, &identity, keep).unwrap()
    }

    fn saved(directory: &Path, steps: &[u64]) -> Checkpoints {
        let checkpoints = checkpoints(directory, 0.1, 2);
        for &step in steps {
            let tensor = Tensor::new(&[step as f32, 0.5], &Device::Cpu).unwrap();
            checkpoints.save(step, json!({"epoch": step}), &BTreeMap::from([("w".to_string(), tensor)])).unwrap();
        }
        checkpoints
    }

    /// Damages the newer of two checkpoints, checks that the older one is taken, and returns what was wrong.
    fn fault_after(damage: impl FnOnce(&Path)) -> Fault {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = saved(dir.path(), &[1, 2]);
        damage(dir.path());
        let error = checkpoints.load::<Value>(2).unwrap_err();
        let mut reasons = Vec::new();
        let resumed = checkpoints
            .resume(|error| reasons.push(error.to_string()), |c: Checkpoint<Value>| Ok(c.record.step))
            .unwrap();
        assert_eq!(resumed, Some(1));
        assert_eq!(reasons, [error.to_string()]);
        // What was passed over is gone, so that it cannot come back later.
        assert_eq!(checkpoints.steps().unwrap(), [1]);
        match error {
            Error::Damaged { fault, .. } => fault,
            error => panic!("{error}"),
        }
    }

    fn change_record(directory: &Path, change: impl FnOnce(&mut Value)) {
        let path = directory.join(record_file_name(2));
        let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut value);
        write_json(path, &value).unwrap();
    }

    fn change_tensors(directory: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let path = directory.join(tensors_file_name(2));
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        write_atomic(path, &bytes).unwrap();
    }

    #[test]
    fn newest_comes_back_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = saved(dir.path(), &[1, 2, 3]);
        assert_eq!(checkpoints.steps().unwrap(), [2, 3]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
        let resume = |checkpoint: Checkpoint<Value>| {
            Ok((checkpoint.record.state, checkpoint.tensors.tensor("w")?.to_vec1::<f32>()?))
        };
        let (state, w) = checkpoints.resume(|_| panic!("passed over"), resume).unwrap().unwrap();
        assert_eq!((state, w), (json!({"epoch": 3}), vec![3.0, 0.5]));
    }

    #[test]
    fn no_checkpoint_is_no_error_and_orphans_are_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = saved(dir.path(), &[1]);
        fs::remove_file(dir.path().join(record_file_name(1))).unwrap();
        assert_eq!(checkpoints.resume(|_| (), |_: Checkpoint<Value>| Ok(())).unwrap(), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn shortened_tensors_are_noticed() {
        let fault = fault_after(|dir| change_tensors(dir, |bytes| bytes.truncate(bytes.len() - 4)));
        assert!(matches!(fault, Fault::Length { .. }), "{fault}");
    }

    #[test]
    fn changed_tensors_are_noticed() {
        let fault = fault_after(|dir| change_tensors(dir, |bytes| *bytes.last_mut().unwrap() ^= 1));
        assert!(matches!(fault, Fault::Hash { .. }), "{fault}");
    }

    #[test]
    fn half_a_record_is_noticed() {
        let fault = fault_after(|dir| {
            let path = dir.join(record_file_name(2));
            let text = fs::read_to_string(&path).unwrap();
            write_atomic(&path, &text.as_bytes()[..text.len() / 2]).unwrap();
        });
        assert!(matches!(fault, Fault::Syntax(_)), "{fault}");
    }

    #[test]
    fn unknown_keys_of_a_record_are_noticed() {
        let fault = fault_after(|dir| change_record(dir, |record| record["more"] = json!(1)));
        assert!(matches!(fault, Fault::Syntax(_)), "{fault}");
    }

    #[test]
    fn other_versions_are_noticed() {
        let fault = fault_after(|dir| change_record(dir, |record| record["format_version"] = json!(99)));
        assert_eq!(fault, Fault::Version { expected: FORMAT_VERSION, found: 99 });
    }

    #[test]
    fn record_of_another_step_is_noticed() {
        let fault = fault_after(|dir| {
            fs::copy(dir.join(record_file_name(1)), dir.join(record_file_name(2))).unwrap();
        });
        assert!(matches!(fault, Fault::Value(_)), "{fault}");
    }

    #[test]
    fn missing_tensors_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = saved(dir.path(), &[1, 2]);
        fs::remove_file(dir.path().join(tensors_file_name(2))).unwrap();
        assert!(matches!(checkpoints.load::<Value>(2), Err(Error::Missing { .. })));
        let resumed = checkpoints.resume(|_| (), |c: Checkpoint<Value>| Ok(c.record.step)).unwrap();
        assert_eq!(resumed, Some(1));
    }

    #[test]
    fn nothing_usable_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = saved(dir.path(), &[1]);
        write_atomic(dir.path().join(record_file_name(1)), b"").unwrap();
        let error = checkpoints.resume(|_| (), |_: Checkpoint<Value>| Ok(())).unwrap_err();
        assert!(error.to_string().contains("none of the checkpoints"), "{error}");
    }

    #[test]
    fn checkpoint_of_other_settings_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        saved(dir.path(), &[1, 2]);
        let other = checkpoints(dir.path(), 0.2, 2);
        let error = other.resume(|_| (), |_: Checkpoint<Value>| Ok(())).unwrap_err();
        assert!(matches!(error, Error::Chain { .. }), "{error}");
        assert_eq!(other.steps().unwrap(), [1, 2]);
    }
}
