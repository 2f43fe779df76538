//! Output directories: locked while written, resumable, never mixed.
//!
//! A stage begins its output with [`OutputDir::begin`], which takes the lock `.lock` and writes `unfinished.json`, the
//! [`Identity`] of what is being made. The stage then commits whole files. [`OutputDir::finish`] writes `manifest.json` and
//! removes `unfinished.json`. Beginning again compares identities: equal and finished is a no-op, equal and unfinished
//! resumes, anything else is refused unless the user says `--overwrite`.
//!
//! A directory that several processes or machines write in parts is begun with [`PartDir::begin`] and closed with [`PartSet`].

mod claim;
mod lock_file;
mod part;
mod parts;

pub use part::Part;
pub use parts::{BegunPart, PartDir, PartRecord, PartSet};

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde_json::Value;

use self::lock_file::LockFile;
use crate::error::{Error, Fault, Result};
use crate::io::{FileEntry, create_directory, remove_files, remove_temporaries, write_json};
use crate::manifest::{Identity, MANIFEST_FILE, Manifest, Stage};

/// Records what an unfinished directory is going to be.
pub const UNFINISHED_FILE: &str = "unfinished.json";
const LOCK_FILE: &str = ".lock";

/// How an output directory was found.
#[derive(Debug)]
pub enum Begun {
    /// It is complete and is what was asked for: nothing to do.
    Finished(Manifest),
    /// It is new, or the rest of it is to be written.
    Writing(OutputDir),
}

/// An output directory held by this process.
#[derive(Debug)]
pub struct OutputDir {
    path: PathBuf,
    identity: Identity,
    resumed: bool,
    /// Keeps the advisory lock until the value is dropped; the system drops it when the process ends, however it ends.
    _lock: LockFile,
}

impl OutputDir {
    /// Takes an output directory for writing, creating it when needed.
    ///
    /// # Errors
    /// [`Error::Locked`] when another process holds it, [`Error::Foreign`] when it holds other things, [`Error::Chain`] when it
    /// was made with other settings and `overwrite` is not set, [`Error::Io`].
    pub fn begin(path: impl AsRef<Path>, identity: &Identity, overwrite: bool) -> Result<Begun> {
        let path = path.as_ref().to_path_buf();
        let stage = identity.stage;
        refuse_foreign(&path, stage)?;
        create_directory(&path)?;
        let lock = take_lock(&path)?;
        parts::refuse_unfinished_parts(&path, overwrite)?;
        remove_temporaries(&path)?;

        let found = if path.join(MANIFEST_FILE).exists() {
            match Manifest::read(&path, stage) {
                Ok(manifest) if overwrite => Some(manifest.identity),
                Ok(manifest) => {
                    refuse_difference(&path, identity, &manifest.identity)?;
                    manifest.check_lengths(&path)?;
                    remove_records(&path)?;
                    return Ok(Begun::Finished(manifest));
                }
                // A damaged manifest of the same stage may be overwritten; another stage's directory never.
                Err(Error::Damaged { .. }) if overwrite => None,
                Err(error) => return Err(error),
            }
        } else {
            read_unfinished(&path)?
        };
        if let Some(found) = found.as_ref().filter(|found| found.stage != stage) {
            refuse_difference(&path, identity, found)?;
        }
        let resumed = found.is_some() && !overwrite;
        if overwrite {
            clear(&path)?;
        } else if let Some(found) = &found {
            refuse_difference(&path, identity, found)?;
        }
        if !resumed {
            write_json(path.join(UNFINISHED_FILE), identity)?;
        }
        Ok(Begun::Writing(Self { path, identity: identity.clone(), resumed, _lock: lock }))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether an earlier process began it: look for finished files.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Completes the directory: `manifest.json` is written last.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self, counts: BTreeMap<String, u64>, details: Value, files: Vec<FileEntry>) -> Result<Manifest> {
        let manifest = Manifest::new(self.identity, counts, details, files);
        manifest.write(&self.path)?;
        remove_records(&self.path)?;
        Ok(manifest)
    }
}

/// How an output directory would be found by [`OutputDir::begin`].
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// It is not there, or nothing was begun in it.
    New,
    /// It is unfinished and goes on.
    Unfinished,
    /// It is complete and is what is asked for.
    Finished(Manifest),
    /// It holds an output of the same stage that `overwrite` replaces.
    Replaced,
}

/// Looks at an output directory without touching it.
///
/// # Errors
/// As [`OutputDir::begin`], but for a directory that another process holds.
pub fn look_at(path: impl AsRef<Path>, identity: &Identity, overwrite: bool) -> Result<Found> {
    let path = path.as_ref();
    refuse_foreign(path, identity.stage)?;
    let finished = path.join(MANIFEST_FILE).exists();
    let manifest = match Manifest::read(path, identity.stage) {
        Ok(manifest) if finished => Some(manifest),
        Err(error) if finished && !(overwrite && matches!(error, Error::Damaged { .. })) => return Err(error),
        Ok(_) | Err(_) => None,
    };
    let found = match &manifest {
        Some(manifest) => Some(manifest.identity.clone()),
        None => read_unfinished(path)?,
    };
    if overwrite && (finished || found.is_some()) {
        if let Some(found) = found.as_ref().filter(|found| found.stage != identity.stage) {
            refuse_difference(path, identity, found)?;
        }
        return Ok(Found::Replaced);
    }
    let Some(found) = found else { return Ok(Found::New) };
    refuse_difference(path, identity, &found)?;
    manifest.map_or(Ok(Found::Unfinished), |manifest| {
        manifest.check_lengths(path)?;
        Ok(Found::Finished(manifest))
    })
}

/// Removes what only an unfinished directory holds.
fn remove_records(path: &Path) -> Result<()> {
    remove_files(path, |name| name == UNFINISHED_FILE || parts::is_record(name))
}

fn refuse_foreign(path: &Path, stage: Stage) -> Result<()> {
    let ours = path.join(MANIFEST_FILE).exists() || path.join(UNFINISHED_FILE).exists();
    if path.exists() && !ours && (!path.is_dir() || !holds_only_traces(path)?) {
        return Err(Error::Foreign { path: path.into(), stage: stage.name() });
    }
    Ok(())
}

/// What a directory is or is going to be, as `stage` recorded it; none when there is no record.
///
/// # Errors
/// As [`Manifest::read`]; [`Error::Damaged`] when the record of an unfinished directory was changed.
pub fn recorded_identity(path: &Path, stage: Stage) -> Result<Option<Identity>> {
    if path.join(MANIFEST_FILE).exists() {
        return Manifest::read(path, stage).map(|manifest| Some(manifest.identity));
    }
    Ok(read_unfinished(path)?.filter(|identity| identity.stage == stage))
}

fn refuse_difference(path: &Path, wanted: &Identity, found: &Identity) -> Result<()> {
    match wanted.difference(found) {
        None => Ok(()),
        Some((what, expected, found)) => Err(Error::Chain {
            what,
            path: path.into(),
            expected,
            found,
            hint: "the directory was made with other settings: choose another `--output`, or start again with `--overwrite`"
                .into(),
        }),
    }
}

fn read_unfinished(path: &Path) -> Result<Option<Identity>> {
    let file = path.join(UNFINISHED_FILE);
    if !file.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    serde_json::from_str(&text).map(Some).map_err(|e| Error::damaged(file, Fault::Syntax(e.to_string())))
}

/// Whether a directory holds nothing but what a stage leaves when it dies before its first file.
fn holds_only_traces(path: &Path) -> Result<bool> {
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let name = entry.map_err(Error::io("list", path))?.file_name();
        let name = name.to_string_lossy();
        if name != LOCK_FILE && !name.starts_with(crate::io::TEMPORARY_PREFIX) && !parts::is_record(&name) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn take_lock(path: &Path) -> Result<LockFile> {
    let (file, lock_path) = open_lock(path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: path.into() }),
        Err(TryLockError::Error(source)) => Err(Error::io("lock", &lock_path)(source)),
    }
}

fn open_lock(path: &Path) -> Result<(LockFile, PathBuf)> {
    let lock_path = path.join(LOCK_FILE);
    let mut options = File::options();
    // Some network file systems give a shared lock only on what is open for reading.
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(&lock_path).map_err(Error::io("create", &lock_path))?;
    Ok((LockFile::new(file), lock_path))
}

/// Empties a directory of ours. The manifest goes first, so that an interruption leaves it unfinished, not wrong.
fn clear(path: &Path) -> Result<()> {
    let manifest = path.join(MANIFEST_FILE);
    if manifest.exists() {
        // Leave a mark that the directory is ours before the manifest goes.
        let mark = path.join(UNFINISHED_FILE);
        fs::rename(&manifest, &mark).map_err(Error::io("rename", &manifest))?;
    }
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?;
        let name = entry.file_name();
        if name == LOCK_FILE || name == UNFINISHED_FILE {
            continue;
        }
        let is_dir = entry.file_type().map_err(Error::io("read", entry.path()))?.is_dir();
        let removed = if is_dir { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
        removed.map_err(Error::io("remove", entry.path()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::write_atomic;

    fn identity(views: u32) -> Identity {
        Identity::new(Stage::DataPrep, &serde_json::json!({"views": views}), 0, Vec::new()).unwrap()
    }

    fn writing(path: &Path, views: u32, overwrite: bool) -> OutputDir {
        match OutputDir::begin(path, &identity(views), overwrite).unwrap() {
            Begun::Writing(dir) => dir,
            Begun::Finished(_) => panic!("finished"),
        }
    }

    fn finish(dir: OutputDir) {
        let file = write_atomic(dir.path().join("data"), b"abc").unwrap();
        dir.finish(BTreeMap::new(), Value::Null, vec![file]).unwrap();
    }

    #[test]
    fn finished_directory_is_recognised() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let dir = writing(&path, 2, false);
        assert!(!dir.resumed());
        finish(dir);
        assert!(matches!(OutputDir::begin(&path, &identity(2), false).unwrap(), Begun::Finished(_)));
        assert!(!path.join(UNFINISHED_FILE).exists());
    }

    #[test]
    fn unfinished_directory_resumes_and_loses_its_temporaries() {
        let root = tempfile::tempdir().unwrap();
        drop(writing(root.path(), 2, false));
        write_atomic(root.path().join(".tmp-x"), b"").unwrap();
        assert!(writing(root.path(), 2, false).resumed());
        assert!(!root.path().join(".tmp-x").exists());
    }

    #[test]
    fn the_record_tells_what_a_directory_is_finished_or_not() {
        let root = tempfile::tempdir().unwrap();
        let recorded = |stage| recorded_identity(root.path(), stage).unwrap();
        assert_eq!(recorded(Stage::DataPrep), None);
        let dir = writing(root.path(), 2, false);
        assert_eq!((recorded(Stage::DataPrep), recorded(Stage::StudentTrain)), (Some(identity(2)), None));
        finish(dir);
        assert_eq!(recorded(Stage::DataPrep), Some(identity(2)));
        assert!(matches!(recorded_identity(root.path(), Stage::StudentTrain), Err(Error::Chain { .. })));
    }

    #[test]
    fn death_before_the_first_file_is_no_obstacle() {
        let root = tempfile::tempdir().unwrap();
        write_atomic(root.path().join(LOCK_FILE), b"").unwrap();
        assert!(!writing(root.path(), 2, false).resumed());
    }

    #[test]
    fn other_settings_are_refused_finished_or_not() {
        let root = tempfile::tempdir().unwrap();
        drop(writing(root.path(), 2, false));
        for _ in 0..2 {
            let error = OutputDir::begin(root.path(), &identity(3), false).unwrap_err();
            assert!(matches!(&error, Error::Chain { what, .. } if what.contains("views")), "{error}");
            finish(writing_or_new(root.path()));
        }
    }

    fn writing_or_new(path: &Path) -> OutputDir {
        writing(path, 2, path.join(MANIFEST_FILE).exists())
    }

    #[test]
    fn overwrite_empties_the_directory() {
        let root = tempfile::tempdir().unwrap();
        finish(writing(root.path(), 2, false));
        let dir = writing(root.path(), 3, true);
        assert!(!dir.resumed());
        assert!(!root.path().join("data").exists());
        finish(dir);
    }

    #[test]
    fn foreign_directory_is_never_touched() {
        let root = tempfile::tempdir().unwrap();
        write_atomic(root.path().join("thesis.tex"), b"").unwrap();
        for overwrite in [false, true] {
            let error = OutputDir::begin(root.path(), &identity(2), overwrite).unwrap_err();
            assert!(matches!(error, Error::Foreign { .. }), "{error}");
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn another_stages_directory_is_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let other = Identity::new(Stage::StudentTrain, &serde_json::json!({}), 0, Vec::new()).unwrap();
        for finished in [false, true] {
            let Begun::Writing(dir) = OutputDir::begin(root.path(), &other, false).unwrap() else { panic!("finished") };
            if finished {
                finish(dir);
            } else {
                drop(dir);
            }
            for overwrite in [false, true] {
                let error = OutputDir::begin(root.path(), &identity(2), overwrite).unwrap_err();
                assert!(matches!(error, Error::Chain { .. }), "{error}");
            }
        }
        assert!(root.path().join("data").exists());
    }

    #[test]
    fn second_writer_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let first = writing(root.path(), 2, false);
        let error = OutputDir::begin(root.path(), &identity(2), false).unwrap_err();
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        drop(first);
        writing(root.path(), 2, false);
    }

    #[test]
    fn finished_directory_with_a_lost_file_is_refused() {
        let root = tempfile::tempdir().unwrap();
        finish(writing(root.path(), 2, false));
        fs::remove_file(root.path().join("data")).unwrap();
        assert!(matches!(OutputDir::begin(root.path(), &identity(2), false).unwrap_err(), Error::Missing { .. }));
    }
}
