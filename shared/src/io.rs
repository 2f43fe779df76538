//! Files that are either whole or absent: written to a temporary sibling, synced, renamed.
//!
//! A crash or a full disk leaves at most files named `.tmp-…`, which [`crate::output::OutputDir`] clears away when the
//! stage runs again.
#![warn(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

mod write_behind;

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use blake3::hazmat::{ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use write_behind::WriteBehind;

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

    /// Syncs the contents to disk and gives the file its name, replacing a file of that name.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left under the name then, or what was there before.
    pub fn commit(self) -> Result<FileEntry> {
        let Self { destination, writer, hasher, bytes } = self;
        let file = synced(writer, &destination)?;
        persist(file, &destination)?;
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

/// Bytes that a [`HeaderLastFile`] keeps free at its beginning.
pub const HEADER_BYTES: usize = 4096;

/// As [`AtomicFile`], with a header of [`HEADER_BYTES`] that is known when everything after it was written.
#[derive(Debug)]
pub struct HeaderLastFile {
    destination: PathBuf,
    writer: BufWriter<tempfile::NamedTempFile>,
    behind: WriteBehind,
    hasher: HeaderLastHasher,
}

impl HeaderLastFile {
    /// Starts a file that will be called `destination`.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory does not exist or cannot be written.
    pub fn create(destination: impl AsRef<Path>) -> Result<Self> {
        let destination = destination.as_ref().to_path_buf();
        let file =
            new_temporary(parent_of(&destination)).map_err(Error::io("create a temporary file for", &destination))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        writer.write_all(&[0; HEADER_BYTES]).map_err(Error::io("write", &destination))?;
        Ok(Self { destination, writer, behind: WriteBehind::new(), hasher: HeaderLastHasher::new() })
    }

    /// Appends bytes behind the header.
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(Error::io("write", &self.destination))?;
        self.behind
            .written(self.writer.get_ref().as_file(), bytes.len())
            .map_err(Error::io("sync", &self.destination))?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Writes the header, syncs the contents to disk and gives the file its name, replacing a file of that name.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left under the name then, or what was there before.
    pub fn commit(self, header: &[u8; HEADER_BYTES]) -> Result<FileEntry> {
        let Self { destination, writer, behind, hasher } = self;
        let mut file =
            writer.into_inner().map_err(io::IntoInnerError::into_error).map_err(Error::io("write", &destination))?;
        file.seek(SeekFrom::Start(0))
            .and_then(|_start| file.write_all(header))
            .map_err(Error::io("write", &destination))?;
        behind.finish().and_then(|()| file.as_file().sync_all()).map_err(Error::io("sync", &destination))?;
        persist(file, &destination)?;
        let bytes = HEADER_BYTES as u64 + hasher.bytes;
        Ok(FileEntry { path: file_name(&destination), bytes, blake3: hasher.finalize(header).to_hex().to_string() })
    }
}

/// BLAKE3 of a header that comes last and of everything after it.
///
/// The hash is a binary tree over the contents. The header is its leftmost part, and what follows is cut where the tree is: into
/// parts of 4096, 8192, 16384 bytes and so on, each as long as everything before it.
#[derive(Debug)]
struct HeaderLastHasher {
    /// Of the parts that are full.
    parts: Vec<ChainingValue>,
    /// Of the part that is being filled.
    part: blake3::Hasher,
    /// Bytes after the header.
    bytes: u64,
}

impl HeaderLastHasher {
    fn new() -> Self {
        Self { parts: Vec::new(), part: Self::part_at(HEADER_BYTES as u64), bytes: 0 }
    }

    fn part_at(offset: u64) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(offset);
        hasher
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let start = (HEADER_BYTES as u64) << self.parts.len();
            let room = start - self.part.count();
            if room == 0 {
                self.parts.push(self.part.finalize_non_root());
                self.part = Self::part_at(2 * start);
                continue;
            }
            let (now, later) = bytes.split_at(usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len()));
            self.part.update(now);
            self.bytes += now.len() as u64;
            bytes = later;
        }
    }

    fn finalize(&self, header: &[u8; HEADER_BYTES]) -> blake3::Hash {
        if self.bytes == 0 {
            return blake3::hash(header);
        }
        let header = blake3::Hasher::new().update(header).finalize_non_root();
        let left = self.parts.iter().fold(header, |left, part| merge_subtrees_non_root(&left, part, Mode::Hash));
        merge_subtrees_root(&left, &self.part.finalize_non_root(), Mode::Hash)
    }
}

/// Bytes set aside in a temporary file without a name, for a place in a file that comes later.
#[derive(Debug)]
pub struct Spool {
    writer: BufWriter<File>,
    path: PathBuf,
}

impl Spool {
    /// An empty spool on the disk of `path`, the file that its contents are for.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory does not exist or cannot be written.
    pub fn beside(path: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(parent_of(path)).map_err(Error::io("create a temporary file for", path))?;
        Ok(Self { writer: BufWriter::with_capacity(1 << 20, file), path: path.to_path_buf() })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Hands all contents to `take`, piece by piece.
    ///
    /// # Errors
    /// [`Error::Io`], and what `take` gives.
    pub fn replay(self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Self { writer, path } = self;
        let mut file =
            writer.into_inner().map_err(io::IntoInnerError::into_error).map_err(Error::io("write", &path))?;
        file.seek(SeekFrom::Start(0)).map_err(Error::io("read", &path))?;
        let mut piece = vec![0; 1 << 20];
        loop {
            match file.read(&mut piece).map_err(Error::io("read", &path))? {
                0 => return Ok(()),
                read => take(&piece[..read])?,
            }
        }
    }
}

/// Gives a synced file its name.
fn persist(file: tempfile::NamedTempFile, destination: &Path) -> Result<()> {
    file.persist(destination).map_err(|e| e.error).map_err(Error::io("rename a temporary file to", destination))?;
    sync_directory(parent_of(destination))
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
    fn header_written_last_is_hashed_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let header: [u8; HEADER_BYTES] = std::array::from_fn(|i| u8::try_from(i % 251).unwrap());
        // around the parts' ends at 4096, 8192, 16384 and 32768, appended in pieces of several lengths
        for length in [0, 1, 1023, 4095, 4096, 4097, 8192, 12287, 12288, 12289, 28672, 28673, 100_000] {
            let body: Vec<u8> = (0..length).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
            for piece in [997, 4096, 1 << 20] {
                let mut file = HeaderLastFile::create(&path).unwrap();
                body.chunks(piece).for_each(|piece| file.append(piece).unwrap());
                assert_eq!(file.commit(&header).unwrap(), hash_file(&path).unwrap(), "{length} in {piece}");
                assert!(fs::read(&path).unwrap() == [&header[..], &body].concat());
            }
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn spool_gives_everything_back_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::beside(&dir.path().join("a")).unwrap();
        let contents: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        contents.chunks(70_001).for_each(|piece| spool.append(piece).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut found = Vec::new();
        spool
            .replay(|piece| {
                found.extend_from_slice(piece);
                Ok(())
            })
            .unwrap();
        assert!(found == contents);
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
