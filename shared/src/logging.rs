//! JSON lines that a resumed run continues exactly: one object a line, cut back to the checkpoint before going on.
//!
//! A checkpoint holds the [`LogPosition`] of its moment. Lines written after it are what the interrupted run had done for
//! nothing; they are cut off and will be written again, with the same bytes.
#![warn(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Fault, Result};
use crate::io::FileEntry;

/// How far a log had come, and what it held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogPosition {
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its contents.
    pub blake3: String,
}

/// A log file that grows line by line.
///
/// # Examples
/// ```
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("metrics.jsonl");
/// let mut log = shared::logging::JsonLines::create(&path)?;
/// log.append(&serde_json::json!({"step": 1}))?;
/// let position = log.sync()?;
/// log.append(&serde_json::json!({"step": 2}))?; // then the process dies
/// let log = shared::logging::JsonLines::resume(&path, &position)?;
/// assert_eq!(std::fs::read_to_string(&path)?, "{\"step\":1}\n");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl JsonLines {
    /// Starts an empty log, replacing one that is there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = open(&path, true)?;
        Ok(Self { path, file, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    /// Checks that a log still holds what it held at `position`, without changing it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when it is shorter or holds something else.
    pub fn check(path: impl AsRef<Path>, position: &LogPosition) -> Result<()> {
        let mut file = File::open(&path).map_err(Error::io("read", &path))?;
        read_to(path.as_ref(), &mut file, position).map(drop)
    }

    /// Goes on with a log from `position`; what came after it is cut off.
    ///
    /// # Errors
    /// As [`JsonLines::check`].
    pub fn resume(path: impl AsRef<Path>, position: &LogPosition) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let mut file = open(&path, false)?;
        let hasher = read_to(&path, &mut file, position)?;
        file.set_len(position.bytes).map_err(Error::io("truncate", &path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io("read", &path))?;
        Ok(Self { path, file, hasher, bytes: position.bytes })
    }

    /// Appends one line, at once visible to whoever follows the file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] when the value has no JSON form.
    pub fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line)
            .map_err(|e| Error::invalid(format!("cannot write a line of `{}`: {e}", self.path.display()), ""))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.hasher.update(text.as_bytes());
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// Makes what was written survive a crash of the machine and says how far the log has come.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<LogPosition> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        Ok(LogPosition { bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }

    /// Ends the log; returns its entry for a manifest.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<FileEntry> {
        let LogPosition { bytes, blake3 } = self.sync()?;
        let path = self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(FileEntry { path, bytes, blake3 })
    }
}

/// Reads all lines of a log.
///
/// # Errors
/// [`Error::Io`]; [`Error::Damaged`] that names the first line which is not a `T`.
pub fn read_json_lines<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Vec<T>> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    text.lines()
        .enumerate()
        .map(|(index, line)| {
            serde_json::from_str(line)
                .map_err(|e| Error::damaged(path, Fault::Syntax(format!("line {}: {e}", index + 1))))
        })
        .collect()
}

fn open(path: &Path, empty: bool) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(empty).truncate(empty);
    options.open(path).map_err(Error::io("open", path))
}

/// Reads the part of a log before `position` and compares it.
fn read_to(path: &Path, file: &mut File, position: &LogPosition) -> Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    let mut before = file.take(position.bytes);
    let found = std::io::copy(&mut before, &mut hasher).map_err(Error::io("read", path))?;
    if found < position.bytes {
        return Err(Error::damaged(path, Fault::Length { expected: position.bytes, found }));
    }
    let computed = hasher.finalize().to_hex().to_string();
    if computed != position.blake3 {
        return Err(Error::damaged(path, Fault::Hash { expected: position.blake3.clone(), found: computed }));
    }
    Ok(hasher)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn resumed_log_equals_a_straight_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let mut log = JsonLines::create(&path).unwrap();
        log.append(&json!({"step": 1, "loss": 0.5})).unwrap();
        let position = log.sync().unwrap();
        log.append(&json!({"step": 2})).unwrap();
        log.file.write_all(b"{\"half a li").unwrap();
        drop(log);
        let mut log = JsonLines::resume(&path, &position).unwrap();
        log.append(&json!({"step": 2})).unwrap();
        let entry = log.finish().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"loss\":0.5,\"step\":1}\n{\"step\":2}\n");
        assert_eq!(entry, crate::io::hash_file(&path).unwrap());
        let lines: Vec<serde_json::Value> = read_json_lines(&path).unwrap();
        assert_eq!(lines[1], json!({"step": 2}));
    }

    #[test]
    fn changed_or_shortened_log_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let mut log = JsonLines::create(&path).unwrap();
        log.append(&json!({"step": 1})).unwrap();
        let position = log.sync().unwrap();
        crate::io::write_atomic(&path, b"{\"step\":7}\n").unwrap();
        let error = JsonLines::resume(&path, &position).unwrap_err();
        assert!(matches!(error, Error::Damaged { fault: Fault::Hash { .. }, .. }), "{error}");
        crate::io::write_atomic(&path, b"{\"st").unwrap();
        let error = JsonLines::check(&path, &position).unwrap_err();
        assert!(matches!(error, Error::Damaged { fault: Fault::Length { expected: 11, found: 4 }, .. }), "{error}");
    }

    #[test]
    fn bad_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        crate::io::write_atomic(&path, b"{}\n{\n").unwrap();
        let error = read_json_lines::<serde_json::Value>(&path).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
