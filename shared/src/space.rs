//! Free disk space, asked before anything is written.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What is left for the file system's own records and for small files.
const HEADROOM_BYTES: u64 = 16 << 20;

/// Bytes that this user may still write where `path` is or will be; none when the system does not say.
#[cfg(unix)]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(existing_ancestor(path)?.as_path()).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

/// Bytes that this user may still write where `path` is or will be; none when the system does not say.
#[cfg(not(unix))]
pub fn free_bytes(_path: &Path) -> Option<u64> {
    None
}

#[cfg(unix)]
fn existing_ancestor(path: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.ancestors().find(|path| path.exists()).map(Path::to_path_buf)
}

/// Refuses to start when `needed` bytes do not fit into `free`; `work` is what needs them, and `advice` what would need fewer.
///
/// # Errors
/// [`Error::Invalid`] with both numbers.
pub fn must_fit(work: &str, output: &Path, needed: u64, free: Option<u64>, advice: &str) -> Result<()> {
    match free {
        Some(free) if needed > 0 && needed.saturating_add(HEADROOM_BYTES) > free => Err(Error::invalid(
            format!("{work} needs {}, only {} are free for `{}`", human(needed), human(free), output.display()),
            format!("free some disk space, choose another `--output`, or {advice}"),
        )),
        _ => Ok(()),
    }
}

/// A number of bytes for people.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_space_is_refused_with_both_numbers() {
        let fit = |needed, free| must_fit("packing", Path::new("out"), needed, free, "take fewer `--views`");
        let error = fit(3 << 30, Some(1 << 30)).unwrap_err().to_string();
        assert!(error.contains("3.0 GiB") && error.contains("1.0 GiB") && error.contains("`out`"), "{error}");
        assert!(fit(1 << 30, Some(3 << 30)).is_ok());
        assert!(fit(u64::MAX, None).is_ok());
        assert!(fit(0, Some(0)).is_ok(), "a finished set needs nothing");
    }

    #[cfg(unix)]
    #[test]
    fn free_space_is_known_for_a_directory_to_be_made() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(&dir.path().join("a/b/c")).is_some_and(|free| free > 0));
    }
}
