//! Files that are either whole or absent: written to a temporary sibling, synced, renamed.
//!
//! A crash or a full disk leaves at most files named `.tmp-…`, which [`crate::output::OutputDir`] clears away when the
//! stage runs again.
#![warn(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the name of an unfinished file begins.
pub const TEMPORARY_PREFIX: &str = ".tmp-";

/// What parts the name that an unfinished file is going to have from the random letters that follow.
const TEMPORARY_SEPARATOR: char = '~';

/// How much of the name of the finished file the temporary one bears: names have limits, of 255 bytes mostly.
const LONGEST_NAMED: usize = 50;

/// Name, length and hash of a finished file, as manifests record it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// File name relative to the directory of the manifest, `/` separators.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// BLAKE3 of the contents, 64 hexadecimal digits.
    pub blake3: String,
}

/// A file under construction, hashed as it is written; it appears under its name only by [`AtomicFile::commit`].
#[derive(Debug)]
pub struct AtomicFile {
    destination: PathBuf,
    writer: BufWriter<tempfile::NamedTempFile>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl AtomicFile {
    /// Starts a file that will be called `destination`.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory does not exist or cannot be written.
    pub fn create(destination: impl AsRef<Path>) -> Result<Self> {
        let destination = destination.as_ref().to_path_buf();
        let file = new_temporary(&destination).map_err(Error::io("create a temporary file for", &destination))?;
        Ok(Self {
            destination,
            writer: BufWriter::with_capacity(1 << 20, file),
            hasher: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(Error::io("write", &self.destination))?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Changes the name that the file will get.
    pub(crate) fn rename(&mut self, destination: &Path) {
        self.destination = destination.to_path_buf();
    }

    /// Syncs the contents to disk and gives the file its name, replacing a file of that name.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left under the name then, or what was there before.
    pub fn commit(self) -> Result<FileEntry> {
        let Self { destination, writer, hasher, bytes } = self;
        let file = synced(writer, &destination)?;
        file.persist(&destination)
            .map_err(|e| e.error)
            .map_err(Error::io("rename a temporary file to", &destination))?;
        sync_directory(parent_of(&destination))?;
        Ok(FileEntry { path: file_name(&destination), bytes, blake3: hasher.finalize().to_hex().to_string() })
    }

    /// As [`AtomicFile::commit`], but a file that has the name already stays what it is; says whether the name was free.
    fn commit_new(self) -> Result<bool> {
        let Self { destination, writer, .. } = self;
        match synced(writer, &destination)?.persist_noclobber(&destination) {
            Ok(_) => sync_directory(parent_of(&destination)).map(|()| true),
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(Error::io("rename a temporary file to", &destination)(e.error)),
        }
    }
}

fn synced(writer: BufWriter<tempfile::NamedTempFile>, destination: &Path) -> Result<tempfile::NamedTempFile> {
    let file = writer.into_inner().map_err(io::IntoInnerError::into_error).map_err(Error::io("write", destination))?;
    file.as_file().sync_all().map_err(Error::io("sync", destination))?;
    Ok(file)
}

/// Writes a whole file atomically.
///
/// # Errors
/// [`Error::Io`].
pub fn write_atomic(path: impl AsRef<Path>, contents: &[u8]) -> Result<FileEntry> {
    let mut file = AtomicFile::create(path)?;
    file.append(contents)?;
    file.commit()
}

/// Writes a value as indented JSON with a final newline, atomically.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] when the value has no JSON form.
pub fn write_json(path: impl AsRef<Path>, value: &impl Serialize) -> Result<FileEntry> {
    write_atomic(&path, json_text(path.as_ref(), value)?.as_bytes())
}

/// As [`write_json`], unless there is a file of that name; says whether it was written. Of several processes that do this at
/// once, one writes.
///
/// # Errors
/// As [`write_json`].
pub(crate) fn write_new_json(path: &Path, value: &impl Serialize) -> Result<bool> {
    let mut file = AtomicFile::create(path)?;
    file.append(json_text(path, value)?.as_bytes())?;
    file.commit_new()
}

fn json_text(path: &Path, value: &impl Serialize) -> Result<String> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::invalid(format!("cannot write `{}` as JSON: {e}", path.display()), ""))?;
    text.push('\n');
    Ok(text)
}

/// Length and hash of a file on disk.
///
/// # Errors
/// [`Error::Io`].
pub fn hash_file(path: impl AsRef<Path>) -> Result<FileEntry> {
    let path = path.as_ref();
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let bytes = io::copy(&mut file, &mut hasher).map_err(Error::io("read", path))?;
    Ok(FileEntry { path: file_name(path), bytes, blake3: hasher.finalize().to_hex().to_string() })
}

/// Creates a directory and its parents.
///
/// # Errors
/// [`Error::Io`].
pub fn create_directory(path: impl AsRef<Path>) -> Result<()> {
    fs::create_dir_all(&path).map_err(Error::io("create directory", &path))
}

/// Removes the temporary files that an interrupted run left in `directory`. The caller holds the directory's lock.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_temporaries(directory: &Path) -> Result<()> {
    remove_files(directory, |name| name.starts_with(TEMPORARY_PREFIX))
}

/// Removes the temporary files of the files that `is_mine` names, such as `shard-00003.safetensors`.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_temporaries_of(directory: &Path, is_mine: impl Fn(&str) -> bool) -> Result<()> {
    remove_files(directory, |name| {
        let rest = name.strip_prefix(TEMPORARY_PREFIX);
        rest.and_then(|rest| rest.rsplit_once(TEMPORARY_SEPARATOR)).is_some_and(|(of, _)| is_mine(of))
    })
}

/// Removes the files of a directory that `chosen` names; one that another process removes at the same time is no error.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_files(directory: &Path, chosen: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
        let entry = entry.map_err(Error::io("list", directory))?;
        if chosen(&entry.file_name().to_string_lossy()) {
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", entry.path())(error));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// A temporary file beside `destination`; its name tells whose it is.
pub(crate) fn new_temporary(destination: &Path) -> io::Result<tempfile::NamedTempFile> {
    let directory = parent_of(destination);
    let name: String = file_name(destination).chars().take(LONGEST_NAMED).collect();
    let prefix = format!("{TEMPORARY_PREFIX}{name}{TEMPORARY_SEPARATOR}");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // Private by default; the finished file should have the mode that the user's umask gives.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(directory)
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn sync_directory(directory: &Path) -> Result<()> {
    // Only Unix lets a directory be opened and synced; elsewhere the rename is as durable as the system makes it.
    if cfg!(unix) {
        File::open(directory).and_then(|d| d.sync_all()).map_err(Error::io("sync", directory))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_appears_only_at_commit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        let mut file = AtomicFile::create(&path).unwrap();
        file.append(b"hello").unwrap();
        assert!(!path.exists());
        let entry = file.commit().unwrap();
        assert_eq!(entry, hash_file(&path).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"hello");
    }

    #[test]
    fn dropped_file_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::create(dir.path().join("a.txt")).unwrap();
        file.append(b"hello").unwrap();
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn of_two_new_files_the_first_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert!(write_new_json(&path, &1).unwrap());
        assert!(!write_new_json(&path, &2).unwrap());
        assert_eq!((fs::read(&path).unwrap(), fs::read_dir(dir.path()).unwrap().count()), (b"1\n".to_vec(), 1));
    }

    #[test]
    fn temporaries_tell_whose_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(250);
        for name in ["shard-00001.bin", "shard-00010.bin", &long] {
            new_temporary(&dir.path().join(name)).unwrap().keep().unwrap();
        }
        remove_temporaries_of(dir.path(), |name| name == "shard-00001.bin").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        remove_temporaries(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn missing_directory_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_atomic(dir.path().join("no/a.txt"), b"").unwrap_err().to_string();
        assert!(error.contains("a.txt"), "{error}");
    }
}
