//! Who is writing a part of a directory, so that two processes never write the same one, on one machine or on two.
//!
//! A claim is a small file with an advisory lock and a record of its holder. Where file locks work, the lock decides, and it falls
//! when its process ends, however it ends. Some network file systems have none, or none between machines: there the record
//! decides. A holder on this machine is asked for by process number and start time. A holder on another machine shows that it
//! is alive by writing its record again and again: one that was silent for [`LEASE`] is gone.
//!
//! A holder that was cut off for longer may find on its return that another one took over: [`Claim::is_lost`]. Both write the
//! same bytes under the same names, so that costs time and nothing else.

use std::fs::{self, File, TryLockError};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lock_file::LockFile;
use crate::error::{Error, Result};
use crate::io::new_temporary;

/// How often a holder shows that it is alive.
const BEAT: Duration = Duration::from_secs(10);
/// After this long without a sign, a holder on another machine is taken for gone.
pub(super) const LEASE: Duration = Duration::from_mins(1);

/// The process that holds a claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Holder {
    /// Host name, for people.
    pub host: String,
    /// What tells machines and their process numbers apart: host name, boot, name space of processes.
    pub machine: String,
    /// Process number.
    pub process: u32,
    /// When the process started, in the system's own units; none where the system does not say.
    pub started: Option<u64>,
}

impl Holder {
    /// This process.
    fn this() -> Self {
        let host = host_name();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let space = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let machine = format!("{host} {} {}", boot.trim(), space.display());
        let process = std::process::id();
        Self { host, machine, process, started: state_of(process).map(|(_, started)| started) }
    }

    /// How messages name it.
    pub(super) fn describe(&self) -> String {
        format!("process {} on `{}`", self.process, self.host)
    }

    /// Whether it is still at work. `locked`: whether this process got the lock of the claim; `silent`: for how long the record
    /// was not written.
    fn is_alive(&self, locked: bool, silent: Duration) -> bool {
        let this = Self::this();
        if self.machine != this.machine {
            return silent < LEASE;
        }
        match (self.started, this.started) {
            // what this process left behind itself
            _ if self.process == this.process => false,
            (Some(started), Some(_)) => state_of(self.process)
                .is_some_and(|(state, found)| found == started && !matches!(state, 'Z' | 'X' | 'x')),
            _ => !locked && silent < LEASE,
        }
    }
}

/// A part that this process writes; dropping the value gives it up.
#[derive(Debug)]
pub(super) struct Claim {
    file: LockFile,
    lost: Arc<AtomicBool>,
    /// Dropped to end the thread that shows signs of life.
    stop: Option<Sender<()>>,
    beat: Option<JoinHandle<()>>,
}

/// What asking for a claim came to.
#[derive(Debug)]
pub(super) enum Asked {
    /// It is this process's.
    Got(Claim),
    /// It is another one's; the record of that one where it could be read.
    Held(Option<Holder>),
}

impl Claim {
    /// Asks for the claim that the file at `path` stands for.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn ask(path: &Path) -> Result<Asked> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = LockFile::new(options.open(path).map_err(Error::io("create", path))?);
        if let Found::Held(holder) = judge(path, &file)? {
            return Ok(Asked::Held(holder));
        }
        let record = serde_json::to_string(&Holder::this()).unwrap_or_default();
        write_whole(&file, &record).map_err(Error::io("write", path))?;
        let lost = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = channel();
        let beating = Beating { path: path.into(), record, lost: Arc::clone(&lost) };
        let handle = file.try_clone().map_err(Error::io("read", path))?;
        let beat = std::thread::spawn(move || {
            while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) && beating.beat(&handle) {}
        });
        Ok(Asked::Got(Self { file, lost, stop: Some(stop), beat: Some(beat) }))
    }

    /// Who holds the claim at `path`, if anybody does.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn holder(path: &Path) -> Result<Option<Holder>> {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => match judge(path, &LockFile::new(file))? {
                Found::Held(holder) => Ok(holder),
                Found::Free => Ok(None),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Whether another process took over, because this one showed no sign of life for too long.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(beat) = self.beat.take() {
            drop(beat.join());
        }
        // An empty file is nobody's. The file stays: removing it would let two later processes lock two files of this name.
        if !self.is_lost() {
            drop(self.file.set_len(0));
        }
    }
}

/// What the thread of a claim needs.
struct Beating {
    path: PathBuf,
    record: String,
    lost: Arc<AtomicBool>,
}

impl Beating {
    /// Shows a sign of life; false when the claim is another one's.
    fn beat(&self, file: &File) -> bool {
        // A record that cannot be read now may be readable at the next beat.
        if fs::read_to_string(&self.path).is_ok_and(|found| found != self.record) {
            self.lost.store(true, Ordering::Relaxed);
            return false;
        }
        drop(write_whole(file, &self.record));
        true
    }
}

/// In what state a claim is.
enum Found {
    /// Nobody's; locked by this process now, where locks work.
    Free,
    /// Another one's; the record of that one where it could be read.
    Held(Option<Holder>),
}

fn judge(path: &Path, file: &File) -> Result<Found> {
    let locked = lock_is_free(file.try_lock()).map_err(Error::io("lock", path))?;
    let record = fs::read(path).map_err(Error::io("read", path))?;
    let holder: Option<Holder> = serde_json::from_slice(&record).ok();
    let free = match (&holder, locked) {
        (_, Some(false)) => false,
        (Some(holder), locked) => !holder.is_alive(locked.is_some(), silent_for(path, file)?),
        // half a record: of a process that died, or, without locks, of one that is about to write the rest
        (None, None) if !record.is_empty() => silent_for(path, file)? >= LEASE,
        (None, _) => true,
    };
    Ok(if free { Found::Free } else { Found::Held(holder) })
}

/// Whether a lock was got; none where the file system has no locks.
pub(super) fn lock_is_free(tried: Result<(), TryLockError>) -> io::Result<Option<bool>> {
    match tried {
        Ok(()) => Ok(Some(true)),
        Err(TryLockError::WouldBlock) => Ok(Some(false)),
        Err(TryLockError::Error(error)) if has_no_locks(&error) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn has_no_locks(error: &io::Error) -> bool {
    #[cfg(unix)]
    if let Some(code) = error.raw_os_error() {
        return [libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOTSUP, libc::ENOLCK].contains(&code);
    }
    error.kind() == io::ErrorKind::Unsupported
}

fn write_whole(mut file: &File, record: &str) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    file.write_all(record.as_bytes())?;
    file.set_len(record.len() as u64)
}

/// For how long a file was not written, by the clock of the file system: the clocks of two machines differ.
fn silent_for(path: &Path, file: &File) -> Result<Duration> {
    let probe = new_temporary(path).and_then(|mut probe| {
        probe.write_all(b"now")?;
        probe.as_file().metadata()?.modified()
    });
    let now = probe.map_err(Error::io("create a temporary file for", path))?;
    let written = file.metadata().and_then(|metadata| metadata.modified()).map_err(Error::io("read", path))?;
    Ok(now.duration_since(written).unwrap_or_default())
}

/// State and start time of a process; none when there is none of that number, or the system does not say.
fn state_of(process: u32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // the name of the program, in brackets, may hold anything
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

fn host_name() -> String {
    #[cfg(unix)]
    return rustix::system::uname().nodename().to_string_lossy().into_owned();
    #[cfg(not(unix))]
    return std::env::var("COMPUTERNAME").unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::write_atomic;

    fn held_by(change: impl FnOnce(&mut Holder)) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claim");
        let mut holder = Holder::this();
        change(&mut holder);
        write_atomic(&path, serde_json::to_string(&holder).unwrap().as_bytes()).unwrap();
        (dir, path)
    }

    fn is_got(path: &Path) -> bool {
        matches!(Claim::ask(path).unwrap(), Asked::Got(_))
    }

    #[test]
    fn claim_is_had_once_and_again_after_it_was_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claim");
        let Asked::Got(claim) = Claim::ask(&path).unwrap() else { panic!("held") };
        assert!(!claim.is_lost());
        for _ in 0..2 {
            let Asked::Held(holder) = Claim::ask(&path).unwrap() else { panic!("had twice") };
            assert_eq!(holder.unwrap().process, std::process::id());
            assert_eq!(Claim::holder(&path).unwrap(), Some(Holder::this()));
        }
        drop(claim);
        assert_eq!(Claim::holder(&path).unwrap(), None);
        assert!(is_got(&path) && is_got(&path));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn dead_process_of_this_machine_holds_nothing() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let (_dir, path) =
            held_by(|holder| (holder.process, holder.started) = (child.id(), state_of(child.id()).map(|s| s.1)));
        child.wait().unwrap();
        assert!(is_got(&path));
        // and neither does one whose number was given to another process
        let (_dir, path) = held_by(|holder| (holder.process, holder.started) = (1, Some(u64::MAX)));
        assert!(is_got(&path));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn living_process_of_this_machine_holds_even_without_a_lock() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (_dir, path) =
            held_by(|holder| (holder.process, holder.started) = (child.id(), state_of(child.id()).map(|s| s.1)));
        assert!(!is_got(&path));
        child.kill().unwrap();
        // killed but not yet waited for: a zombie works no more
        while state_of(child.id()).is_some_and(|(state, _)| state != 'Z') {}
        assert!(is_got(&path));
        child.wait().unwrap();
    }

    #[test]
    fn process_of_another_machine_holds_until_it_was_silent_too_long() {
        let (_dir, path) = held_by(|holder| (holder.host, holder.machine) = ("node7".into(), "another".into()));
        let Asked::Held(Some(holder)) = Claim::ask(&path).unwrap() else { panic!("got") };
        assert!(holder.describe().ends_with("on `node7`"));
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::SystemTime::now() - LEASE - Duration::from_secs(1)).unwrap();
        assert!(is_got(&path));
    }

    #[test]
    fn holder_notices_that_another_one_took_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claim");
        write_atomic(&path, b"ours").unwrap();
        let lost = Arc::new(AtomicBool::new(false));
        let beating = Beating { path: path.clone(), record: "ours".into(), lost: Arc::clone(&lost) };
        let file = File::options().write(true).open(&path).unwrap();
        assert!(beating.beat(&file) && !lost.load(Ordering::Relaxed));
        write_atomic(&path, b"theirs").unwrap();
        assert!(!beating.beat(&file) && lost.load(Ordering::Relaxed));
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
    }

    #[test]
    fn half_a_record_of_a_dead_process_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("claim");
        for left in [&b"{\"host\": \"no"[..], b"\xff\xfe", b""] {
            write_atomic(&path, left).unwrap();
            assert!(is_got(&path));
        }
    }
}
