//! One output directory written in parts, by any number of processes on any number of machines, in any order.
//!
//! ```text
//! unfinished.json               what is being made: equal for all parts
//! parts.json                    in how many parts
//! .part-00002-of-00004.owner    who is writing a part
//! part-00002-of-00004.json      a finished part: its files and their hashes, written last
//! ```
//!
//! Nothing is shared but the directory. Closing it ([`PartSet`]) reads the records, writes the manifest and removes all of the
//! above, so that the directory is what one process would have written.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::claim::{Asked, Claim, LEASE, lock_is_free};
use super::lock_file::LockFile;
use super::part::{LARGEST_NUMBER, Part};
use super::{UNFINISHED_FILE, open_lock, read_unfinished, refuse_difference, refuse_foreign, remove_records};
use crate::error::{Error, Fault, Result};
use crate::io::{FileEntry, create_directory, remove_temporaries, remove_temporaries_of, write_json, write_new_json};
use crate::manifest::{Identity, MANIFEST_FILE, Manifest, PARTS_FILE, Stage};

/// What a finished part made; `T` is what the stage needs to close the directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartRecord<T> {
    /// Which part.
    pub part: Part,
    /// What the directory is going to be.
    pub identity: Identity,
    /// The part's files.
    pub files: Vec<FileEntry>,
    /// What else there is to tell.
    pub outcome: T,
}

impl<T: DeserializeOwned> PartRecord<T> {
    fn read(directory: &Path, part: Part) -> Result<Option<Self>> {
        let path = directory.join(part.record_file());
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let record: Self =
            serde_json::from_str(&text).map_err(|e| Error::damaged(&path, Fault::Syntax(e.to_string())))?;
        if record.part != part {
            return Err(Error::damaged(&path, Fault::Value(format!("it is the record of {}", record.part))));
        }
        Ok(Some(record))
    }
}

impl<T> PartRecord<T> {
    fn has_its_files(&self, directory: &Path) -> bool {
        let has =
            |file: &FileEntry| fs::metadata(directory.join(&file.path)).is_ok_and(|found| found.len() == file.bytes);
        self.files.iter().all(has)
    }
}

/// How a part was found.
#[derive(Debug)]
pub enum BegunPart<T> {
    /// The directory was closed: nothing to do.
    SetFinished(Manifest),
    /// The part is complete: nothing to do.
    Finished(PartRecord<T>),
    /// The part is new, or the rest of it is to be written.
    Writing(PartDir),
}

/// An output directory in which this process writes one part.
#[derive(Debug)]
pub struct PartDir {
    path: PathBuf,
    identity: Identity,
    part: Part,
    claim: Claim,
    /// Shared with the other parts; who writes or closes the whole directory takes it alone.
    _lock: LockFile,
}

impl PartDir {
    /// Takes one part of an output directory for writing. `owns` tells which file names are those of the part: temporary ones that
    /// an interrupted run left of them are removed.
    ///
    /// # Errors
    /// [`Error::Locked`] when a process writes or closes the whole directory; [`Error::Invalid`] when another one writes this part,
    /// or the directory is being written whole or in another number of parts; [`Error::Foreign`]; [`Error::Chain`]; [`Error::Io`].
    pub fn begin<T: DeserializeOwned>(
        path: impl AsRef<Path>,
        identity: &Identity,
        part: Part,
        owns: impl Fn(&str) -> bool,
    ) -> Result<BegunPart<T>> {
        let path = path.as_ref().to_path_buf();
        refuse_foreign(&path, identity.stage)?;
        create_directory(&path)?;
        let (lock, lock_path) = open_lock(&path)?;
        if lock_is_free(lock.try_lock_shared()).map_err(Error::io("lock", lock_path))? == Some(false) {
            return Err(Error::Locked { path });
        }
        if path.join(MANIFEST_FILE).exists() {
            let manifest = Manifest::read(&path, identity.stage)?;
            refuse_difference(&path, identity, &manifest.identity)?;
            manifest.check_lengths(&path)?;
            return Ok(BegunPart::SetFinished(manifest));
        }
        announce(&path, identity, part)?;
        let claim = match Claim::ask(&path.join(part.claim_file()))? {
            Asked::Got(claim) => claim,
            Asked::Held(holder) => {
                let holder = holder.map_or_else(|| "another process".into(), |holder| holder.describe());
                return Err(Error::invalid(
                    format!("{part} of `{}` is being written by {holder}", path.display()),
                    format!(
                        "wait for it to end; when its machine is gone, the part is free {} s after its last sign of life",
                        LEASE.as_secs()
                    ),
                ));
            }
        };
        let record_file = part.record_file();
        remove_temporaries_of(&path, |name| owns(name) || name == record_file)?;
        if let Some(record) = PartRecord::read(&path, part)? {
            refuse_difference(&path, identity, &record.identity)?;
            if record.has_its_files(&path) {
                return Ok(BegunPart::Finished(record));
            }
            let file = path.join(&record_file);
            fs::remove_file(&file).map_err(Error::io("remove", &file))?;
        }
        Ok(BegunPart::Writing(Self { path, identity: identity.clone(), part, claim, _lock: lock }))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses to go on when another process took the part over; asked now and then, for example after each file.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn must_still_be_ours(&self) -> Result<()> {
        if !self.claim.is_lost() {
            return Ok(());
        }
        let message = format!("another process took over {} of `{}`", self.part, self.path.display());
        Err(Error::invalid(message, "this one gave no sign of life for too long: let the other one finish the part"))
    }

    /// Completes the part: its record is written last.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish<T: Serialize>(self, files: Vec<FileEntry>, outcome: T) -> Result<PartRecord<T>> {
        let record = PartRecord { part: self.part, identity: self.identity, files, outcome };
        write_json(self.path.join(self.part.record_file()), &record)?;
        Ok(record)
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Announced {
    parts: usize,
}

/// Says what a directory is going to be and in how many parts, or compares with what another part said.
fn announce(path: &Path, identity: &Identity, part: Part) -> Result<()> {
    let stage = identity.stage;
    if read_announced(path)?.is_none() {
        if let Some(found) = read_unfinished(path)? {
            refuse_difference(path, identity, &found)?;
            return Err(Error::invalid(
                format!("`{}` was begun as a whole, not in parts", path.display()),
                format!("run `{}` without `--part` to go on, or choose another `--output`", stage.name()),
            ));
        }
        write_new_json(&path.join(PARTS_FILE), &Announced { parts: part.of() })?;
    }
    // read again in any case: another part may have been faster
    let parts = read_announced(path)?.unwrap_or(part.of());
    if parts != part.of() {
        return Err(Error::invalid(
            format!("`{}` is being made in {parts} parts, not in {}", path.display(), part.of()),
            format!("give `--part i/{parts}`, or choose another `--output`"),
        ));
    }
    if !path.join(UNFINISHED_FILE).exists() {
        write_new_json(&path.join(UNFINISHED_FILE), identity)?;
    }
    read_unfinished(path)?.map_or(Ok(()), |found| refuse_difference(path, identity, &found))
}

fn read_announced(path: &Path) -> Result<Option<usize>> {
    let file = path.join(PARTS_FILE);
    if !file.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    let found: Announced =
        serde_json::from_str(&text).map_err(|e| Error::damaged(&file, Fault::Syntax(e.to_string())))?;
    if !(1..=LARGEST_NUMBER).contains(&found.parts) {
        return Err(Error::damaged(file, Fault::Value(format!("{} parts", found.parts))));
    }
    Ok(Some(found.parts))
}

/// Whether a file is one that only a directory written in parts holds, until it is closed.
pub(super) fn is_record(name: &str) -> bool {
    name == PARTS_FILE || Part::of_file(name).is_some()
}

/// Refuses to write a directory as a whole that is being written in parts, unless it is to be emptied and nobody writes.
pub(super) fn refuse_unfinished_parts(path: &Path, overwrite: bool) -> Result<()> {
    if path.join(MANIFEST_FILE).exists() {
        return Ok(());
    }
    let Some(parts) = read_announced(path).or_else(|error| if overwrite { Ok(Some(0)) } else { Err(error) })? else {
        return Ok(());
    };
    if !overwrite {
        return Err(Error::invalid(
            format!("`{}` is being made in {parts} parts", path.display()),
            format!(
                "run them with `--part 1/{parts}` and so on and close it with `finish`, or start again with `--overwrite`"
            ),
        ));
    }
    match (1..=parts).find_map(|number| holder_of(path, Part::new(number, parts).ok()?)) {
        Some(_) => Err(Error::Locked { path: path.into() }),
        None => Ok(()),
    }
}

fn holder_of(path: &Path, part: Part) -> Option<String> {
    // What cannot be asked for is taken for free: this only makes a message better, or follows the lock of the directory.
    Claim::holder(&path.join(part.claim_file())).ok().flatten().map(|holder| holder.describe())
}

/// A directory whose parts are all finished, held by this process alone until it is closed.
#[derive(Debug)]
pub struct PartSet<T> {
    path: PathBuf,
    records: Vec<PartRecord<T>>,
    _lock: LockFile,
}

impl<T: DeserializeOwned> PartSet<T> {
    /// Takes a directory whose parts were all written, with their records in order; the manifest when it was closed before.
    /// `command` is what writes a part, for messages: `data-prep pack`.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is no such directory; [`Error::Invalid`] when parts are missing or it was not written in parts;
    /// [`Error::Chain`] when parts were made with different settings; [`Error::Locked`]; [`Error::Io`].
    pub fn open(path: impl AsRef<Path>, stage: Stage, command: &str) -> Result<Result<Self, Manifest>> {
        let path = path.as_ref().to_path_buf();
        if !path.is_dir() || (!path.join(MANIFEST_FILE).exists() && !path.join(UNFINISHED_FILE).exists()) {
            let hint = format!("write its parts with `{command} ... --part i/n`, or check the path");
            return Err(Error::Missing { what: stage.output_name(), path, hint });
        }
        let (lock, lock_path) = open_lock(&path)?;
        let alone = lock_is_free(lock.try_lock()).map_err(Error::io("lock", lock_path))? != Some(false);
        if path.join(MANIFEST_FILE).exists() {
            let manifest = Manifest::read(&path, stage)?;
            manifest.check_lengths(&path)?;
            if alone {
                remove_records(&path)?;
            }
            return Ok(Err(manifest));
        }
        let Some(parts) = read_announced(&path)? else {
            return Err(if alone {
                let hint =
                    format!("run the same `{command}` command again: it goes on and finishes the directory itself");
                Error::invalid(format!("`{}` is unfinished, but not written in parts", path.display()), hint)
            } else {
                Error::Locked { path }
            });
        };
        refuse_records_of_others(&path, parts)?;
        let all: Vec<Part> = (1..=parts).map(|number| Part::new(number, parts)).collect::<Result<_>>()?;
        let found: Vec<(Part, Option<PartRecord<T>>)> =
            all.into_iter().map(|part| Ok((part, PartRecord::read(&path, part)?))).collect::<Result<_>>()?;
        let lost = found.iter().filter(|(_, record)| record.as_ref().is_none_or(|record| !record.has_its_files(&path)));
        let lost: Vec<Part> = lost.map(|(part, _)| *part).collect();
        if !lost.is_empty() {
            return Err(missing(&path, &lost, command));
        }
        if !alone {
            return Err(Error::Locked { path });
        }
        let records: Vec<PartRecord<T>> = found.into_iter().filter_map(|(_, record)| record).collect();
        for record in &records {
            let file = path.join(record.part.record_file());
            refuse_difference(&file, &records[0].identity, &record.identity)?;
            if record.identity.stage != stage {
                return Err(Error::damaged(file, Fault::Value(format!("made by `{}`", record.identity.stage.name()))));
            }
        }
        Ok(Ok(Self { path, records, _lock: lock }))
    }
}

impl<T> PartSet<T> {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The records of all parts, in order; there is at least one.
    pub fn records(&self) -> &[PartRecord<T>] {
        &self.records
    }

    /// What the directory is.
    pub fn identity(&self) -> &Identity {
        &self.records[0].identity
    }

    /// Closes the directory: `manifest.json` is written, then the records of the parts go. `more` are files that no part wrote.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self, counts: BTreeMap<String, u64>, details: Value, more: Vec<FileEntry>) -> Result<Manifest> {
        remove_temporaries(&self.path)?;
        let identity = self.identity().clone();
        let files = self.records.into_iter().flat_map(|record| record.files).chain(more).collect();
        let manifest = Manifest::new(identity, counts, details, files);
        manifest.write(&self.path)?;
        remove_records(&self.path)?;
        Ok(manifest)
    }
}

fn refuse_records_of_others(path: &Path, parts: usize) -> Result<()> {
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let name = entry.map_err(Error::io("list", path))?.file_name();
        if let Some(other) = Part::of_file(&name.to_string_lossy()).filter(|part| part.of() != parts) {
            return Err(Error::invalid(
                format!("`{}` is being made in {parts} parts, but holds a record of {other}", path.display()),
                "remove that file, or start again in an empty directory",
            ));
        }
    }
    Ok(())
}

fn missing(path: &Path, parts: &[Part], command: &str) -> Error {
    const NAMED: usize = 8;
    if let Some((part, holder)) = parts.iter().find_map(|part| Some((part, holder_of(path, *part)?))) {
        let message = format!("{part} of `{}` is still being written by {holder}", path.display());
        return Error::invalid(message, "wait for it to end");
    }
    let mut numbers: Vec<String> = parts.iter().take(NAMED).map(|part| part.number().to_string()).collect();
    if parts.len() > NAMED {
        numbers.push(format!("{} more", parts.len() - NAMED));
    }
    let (number, of) = (parts[0].number(), parts[0].of());
    let subject = match numbers.split_last() {
        Some((last, first)) if !first.is_empty() => {
            format!("parts {} and {last} of {of} are missing", first.join(", "))
        }
        _ => format!("part {number} of {of} is missing"),
    };
    Error::invalid(
        format!("{subject} or unfinished in `{}`", path.display()),
        format!("run `{command} ... --part {number}/{of}` with the options of the other parts, then `finish` again"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::{Begun, OutputDir};
    use super::*;
    use crate::io::write_atomic;

    fn identity(views: u32) -> Identity {
        Identity::new(Stage::DataPrep, &serde_json::json!({"views": views}), 0, Vec::new()).unwrap()
    }

    fn begin(path: &Path, number: usize, of: usize) -> Result<BegunPart<u32>> {
        let part = Part::new(number, of)?;
        PartDir::begin(path, &identity(2), part, |name| name == format!("data-{number}"))
    }

    fn writing(path: &Path, number: usize, of: usize) -> PartDir {
        match begin(path, number, of).unwrap() {
            BegunPart::Writing(dir) => dir,
            other => panic!("{other:?}"),
        }
    }

    fn write(path: &Path, number: usize, of: usize) {
        let dir = writing(path, number, of);
        let file = write_atomic(path.join(format!("data-{number}")), &[7; 5]).unwrap();
        dir.finish(vec![file], number as u32).unwrap();
    }

    fn open(path: &Path) -> Result<Result<PartSet<u32>, Manifest>> {
        PartSet::open(path, Stage::DataPrep, "data-prep pack")
    }

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn parts_in_any_order_close_to_what_one_process_writes() {
        let root = tempfile::tempdir().unwrap();
        let (parts, whole) = (root.path().join("parts"), root.path().join("whole"));
        for number in [3, 1, 2] {
            write(&parts, number, 3);
            write_atomic(parts.join(".tmp-left"), b"").unwrap();
        }
        let set = open(&parts).unwrap().unwrap();
        assert_eq!(set.records().iter().map(|record| record.outcome).collect::<Vec<_>>(), [1, 2, 3]);
        let closed = set.finish(BTreeMap::new(), Value::Null, Vec::new()).unwrap();
        let Begun::Writing(dir) = OutputDir::begin(&whole, &identity(2), false).unwrap() else { panic!("finished") };
        let files = (1..4).map(|number| write_atomic(whole.join(format!("data-{number}")), &[7; 5]).unwrap()).collect();
        assert_eq!(dir.finish(BTreeMap::new(), Value::Null, files).unwrap(), closed);
        assert_eq!(names(&parts), names(&whole));
        assert_eq!(open(&parts).unwrap().unwrap_err(), closed);
        assert!(matches!(begin(&parts, 2, 3).unwrap(), BegunPart::SetFinished(_)));
    }

    #[test]
    fn missing_parts_are_named_with_the_command() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(open(root.path()), Err(Error::Missing { .. })));
        write(root.path(), 2, 4);
        let unfinished = Manifest::read(root.path(), Stage::DataPrep).unwrap_err();
        assert!(unfinished.hint().unwrap().contains("`data-prep finish`"), "{unfinished}");
        let error = open(root.path()).unwrap_err();
        assert!(error.to_string().starts_with("parts 1, 3 and 4 of 4 are missing"), "{error}");
        write(root.path(), 1, 4);
        write(root.path(), 4, 4);
        let error = open(root.path()).unwrap_err();
        assert!(error.to_string().starts_with("part 3 of 4 is missing"), "{error}");
        assert!(error.hint().unwrap().contains("data-prep pack ... --part 3/4"));
        let held = writing(root.path(), 3, 4);
        let error = open(root.path()).unwrap_err().to_string();
        assert!(error.contains("part 3 of 4") && error.contains("still being written by process"), "{error}");
        drop(held);
        write(root.path(), 3, 4);
        // a part whose file was lost is not finished any more
        fs::remove_file(root.path().join("data-2")).unwrap();
        assert!(open(root.path()).unwrap_err().to_string().starts_with("part 2 of 4 is missing"));
        write(root.path(), 2, 4);
        assert!(open(root.path()).unwrap().is_ok());
    }

    #[test]
    fn part_that_is_finished_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), 1, 2);
        assert!(matches!(begin(root.path(), 1, 2).unwrap(), BegunPart::Finished(record) if record.outcome == 1));
    }

    #[test]
    fn two_parts_are_written_at_once_but_none_twice() {
        let root = tempfile::tempdir().unwrap();
        let (first, _second) = (writing(root.path(), 1, 2), writing(root.path(), 2, 2));
        let error = begin(root.path(), 1, 2).unwrap_err().to_string();
        assert!(error.contains("part 1 of 2") && error.contains("is being written by process"), "{error}");
        assert!(first.must_still_be_ours().is_ok());
        drop(first);
        writing(root.path(), 1, 2);
    }

    #[test]
    fn whole_runs_and_parts_do_not_mix() {
        let root = tempfile::tempdir().unwrap();
        let (parts, whole) = (root.path().join("parts"), root.path().join("whole"));
        let begin_whole = |path: &Path, overwrite| OutputDir::begin(path, &identity(2), overwrite);
        let held = writing(&parts, 1, 2);
        for overwrite in [false, true] {
            assert!(matches!(begin_whole(&parts, overwrite), Err(Error::Locked { .. })));
        }
        drop(held);
        let error = begin_whole(&parts, false).unwrap_err();
        assert!(error.to_string().contains("is being made in 2 parts"), "{error}");
        assert!(matches!(begin_whole(&parts, true).unwrap(), Begun::Writing(dir) if !dir.resumed()));
        assert!(begin(&parts, 1, 2).unwrap_err().to_string().contains("begun as a whole"));

        let held = begin_whole(&whole, false).unwrap();
        assert!(matches!(begin(&whole, 1, 2), Err(Error::Locked { .. })));
        assert!(matches!(open(&whole), Err(Error::Locked { .. })));
        drop(held);
        assert!(open(&whole).unwrap_err().to_string().contains("not written in parts"));
    }

    #[test]
    fn parts_of_other_numbers_and_settings_are_refused() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), 1, 2);
        let error = begin(root.path(), 1, 3).unwrap_err().to_string();
        assert!(error.contains("in 2 parts, not in 3"), "{error}");
        let other = PartDir::begin::<u32>(root.path(), &identity(3), Part::new(2, 2).unwrap(), |_| false).unwrap_err();
        assert!(matches!(&other, Error::Chain { what, .. } if what.contains("views")), "{other}");

        // and when the records were brought together by hand
        write(root.path(), 2, 2);
        let path = root.path().join("part-00002-of-00002.json");
        let mut record: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        record["identity"]["seed"] = 5.into();
        write_json(&path, &record).unwrap();
        assert!(matches!(open(root.path()).unwrap_err(), Error::Chain { what, .. } if what == "seed"));
        record["part"]["number"] = 1.into();
        write_json(&path, &record).unwrap();
        assert!(matches!(open(root.path()).unwrap_err(), Error::Damaged { .. }));
        write_json(root.path().join("part-00001-of-00003.json"), &1).unwrap();
        assert!(open(root.path()).unwrap_err().to_string().contains("holds a record of part 1 of 3"));
    }

    #[test]
    fn part_removes_its_own_temporaries_only() {
        let root = tempfile::tempdir().unwrap();
        let temporary = |name: &str| crate::io::new_temporary(&root.path().join(name)).unwrap().keep().unwrap();
        drop(writing(root.path(), 1, 2));
        drop((temporary("data-1"), temporary("data-2"), temporary("part-00001-of-00002.json")));
        drop(writing(root.path(), 1, 2));
        let left: Vec<String> = names(root.path()).into_iter().filter(|name| name.starts_with(".tmp-")).collect();
        assert!(left.len() == 1 && left[0].contains("data-2"), "{left:?}");
    }

    #[test]
    fn interrupted_closing_is_completed() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), 1, 1);
        let set = open(root.path()).unwrap().unwrap();
        let manifest =
            Manifest::new(set.identity().clone(), BTreeMap::new(), Value::Null, set.records()[0].files.clone());
        manifest.write(root.path()).unwrap();
        drop(set);
        assert_eq!(open(root.path()).unwrap().unwrap_err(), manifest);
        assert_eq!(names(root.path()), [".lock", "data-1", "manifest.json"]);
    }
}
