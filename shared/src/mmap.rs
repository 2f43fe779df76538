//! Read-only memory maps behind a safe type.
#![expect(unsafe_code, reason = "mapping a file is unsafe; this module holds the whole argument")]

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file mapped into memory, read-only.
///
/// The files of this project are written under another name and renamed when whole, and no stage ever changes a
/// finished one, so a map stays valid while it lives. **Nobody else may truncate or rewrite a file in place while a stage
/// reads it**: the system would end the process (`SIGBUS`) or show changed bytes. Replacing a file by renaming is
/// harmless: the map keeps the old contents.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped, or is not a regular file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = File::open(&path).map_err(Error::io("read", &path))?;
        let metadata = file.metadata().map_err(Error::io("read", &path))?;
        if !metadata.is_file() {
            return Err(Error::invalid(format!("`{}` is not a regular file", path.display()), ""));
        }
        // SAFETY: the map is private to this value and read-only, and handed out only as `&[u8]` bound to its lifetime.
        // That nobody changes the file meanwhile is the documented condition of this type, which the project's own
        // writers keep by renaming finished files into place.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", &path))?;
        Ok(Self { path, map })
    }

    /// The file's path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks the system to read a range of the file ahead of its use. That is advice: nothing depends on it being taken.
    ///
    /// # Panics
    /// When the range does not lie inside the file.
    pub fn will_need(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.map.len(), "{range:?} lies outside the file");
        #[cfg(unix)]
        if !range.is_empty() {
            // A system that cannot take the advice reads the pages when they are touched.
            self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len()).ok();
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_contents_and_empty_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        crate::io::write_atomic(&path, b"abc").unwrap();
        assert_eq!(&*MappedFile::open(&path).unwrap(), b"abc");
        crate::io::write_atomic(&path, b"").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().len(), 0);
    }

    #[test]
    fn advice_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        crate::io::write_atomic(&path, &[7; 10_000]).unwrap();
        let map = MappedFile::open(&path).unwrap();
        for range in [0..0, 0..10_000, 5000..5001, 10_000..10_000] {
            map.will_need(range);
        }
        assert_eq!(&*map, [7; 10_000]);
    }

    #[test]
    fn directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(MappedFile::open(dir.path()).is_err());
    }
}
