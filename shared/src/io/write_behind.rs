//! Syncing a large file while it is still written, so that little is left to wait for at its end.

use std::fs::File;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// After this many bytes what was written is sent to the disk.
const STRETCH_BYTES: usize = 64 << 20;

/// A thread that syncs a file whenever a stretch of it was written.
#[derive(Debug)]
pub(super) struct WriteBehind {
    /// Bytes since the last sync was asked for.
    waiting: usize,
    /// Started by the first stretch: small files go without.
    syncing: Option<(SyncSender<()>, JoinHandle<io::Result<()>>)>,
}

impl WriteBehind {
    pub(super) fn new() -> Self {
        Self { waiting: 0, syncing: None }
    }

    /// Tells that `bytes` were written to `file`. A sync that is under way is not waited for.
    pub(super) fn written(&mut self, file: &File, bytes: usize) -> io::Result<()> {
        self.waiting += bytes;
        if self.waiting < STRETCH_BYTES {
            return Ok(());
        }
        self.waiting = 0;
        if self.syncing.is_none() {
            let file = file.try_clone()?;
            let (wake, woken) = sync_channel(1);
            self.syncing = Some((wake, std::thread::spawn(move || woken.iter().try_for_each(|()| file.sync_data()))));
        }
        if let Some((wake, _)) = &self.syncing {
            // a thread that is busy will be asked again; one that failed tells why at the end
            wake.try_send(()).unwrap_or_default();
        }
        Ok(())
    }

    /// Waits for the thread. The system tells a failure to write only once, so that of a sync here must not be lost.
    pub(super) fn finish(self) -> io::Result<()> {
        let Some((wake, thread)) = self.syncing else { return Ok(()) };
        drop(wake);
        thread.join().unwrap_or_else(|_panic| Err(io::Error::other("the thread that syncs the file panicked")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_files_start_the_thread_and_small_ones_do_not() {
        let file = tempfile::tempfile().unwrap();
        let mut behind = WriteBehind::new();
        behind.written(&file, STRETCH_BYTES - 1).unwrap();
        assert!(behind.syncing.is_none());
        for _ in 0..5 {
            behind.written(&file, STRETCH_BYTES).unwrap();
            assert!(behind.syncing.is_some());
        }
        behind.finish().unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn failure_of_a_sync_is_told_at_the_end() {
        // a pipe cannot be synced
        let (_reader, writer) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(writer));
        let mut behind = WriteBehind::new();
        behind.written(&pipe, STRETCH_BYTES).unwrap();
        assert!(behind.finish().is_err());
    }
}
