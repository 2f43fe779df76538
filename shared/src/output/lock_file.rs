//! An open file whose advisory lock falls when the value does.

use std::fs::File;
use std::ops::Deref;

/// A file to be locked. Closing it would release the lock too, but late: a child process that is being started holds a copy of every
/// open file until its program begins.
#[derive(Debug)]
pub(super) struct LockFile(File);

impl LockFile {
    pub(super) fn new(file: File) -> Self {
        Self(file)
    }
}

impl Deref for LockFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // where there are no locks there is nothing to release
        drop(self.0.unlock());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_falls_though_a_copy_of_the_file_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        crate::io::write_atomic(&path, b"").unwrap();
        let open = || LockFile::new(File::open(&path).unwrap());
        let held = open();
        held.try_lock().unwrap();
        assert!(open().try_lock().is_err());
        let _copy = held.try_clone().unwrap();
        drop(held);
        assert!(open().try_lock().is_ok());
    }
}
