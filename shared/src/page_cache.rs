//! The system's page cache: dropping files from it, so that the disk is measured and not the memory.

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};

/// Drops the pages of a finished, unmapped file from the page cache; no when this system has no way to.
///
/// # Errors
/// [`Error::Io`].
pub fn drop_file(path: &Path) -> Result<bool> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    #[cfg(target_os = "linux")]
    {
        // dirty pages stay: write them first
        file.sync_data().map_err(Error::io("sync", path))?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
            .map_err(|errno| Error::io("drop from the page cache", path)(errno.into()))?;
        Ok(true)
    }
    #[cfg(not(target_os = "linux"))]
    {
        drop(file);
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_file_keeps_its_contents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        crate::io::write_atomic(&path, &[7; 10_000]).unwrap();
        assert_eq!(drop_file(&path).unwrap(), cfg!(target_os = "linux"));
        assert_eq!(std::fs::read(&path).unwrap(), [7; 10_000]);
        assert!(drop_file(&dir.path().join("no")).is_err());
    }
}
