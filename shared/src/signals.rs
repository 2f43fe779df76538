//! Requests to stop from outside: Ctrl-C, `kill`, and the batch system before it takes the machine away.
//!
//! A program that watches is not ended by the first of them: it asks [`received`] between two pieces of work and ends in its own
//! way. The second ends it at once, with the exit status that shells give: 128 and the signal's number, 130 for Ctrl-C.

use std::sync::OnceLock;

use crate::error::Result;

/// What was received first; set once somebody watches.
static RECEIVED: OnceLock<watching::Received> = OnceLock::new();

/// From now on the first SIGINT, SIGTERM or SIGUSR1 only asks this process to stop.
///
/// Slurm sends SIGTERM before it pre-empts a job, and with `--signal=USR1@SECONDS` the other before the time is over.
///
/// # Errors
/// [`crate::Error::Io`] when the system refuses the handlers.
pub fn watch() -> Result<()> {
    if RECEIVED.get().is_none() {
        let received = watching::start()?;
        // Of two that watch at once the first counts; the other's handlers set a flag that nobody reads.
        drop(RECEIVED.set(received));
    }
    Ok(())
}

/// The signal that asked to stop, by its name; none so far, or nobody watches.
pub fn received() -> Option<&'static str> {
    RECEIVED.get().and_then(watching::Received::name)
}

#[cfg(unix)]
mod watching {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use signal_hook::flag::{register, register_conditional_shutdown, register_usize};

    use crate::error::{Error, Result};

    const SIGNALS: [(i32, &str); 3] =
        [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGUSR1, "SIGUSR1")];

    /// One more than an index into [`SIGNALS`], 0 for none.
    #[derive(Debug)]
    pub(super) struct Received(Arc<AtomicUsize>);

    impl Received {
        pub(super) fn name(&self) -> Option<&'static str> {
            SIGNALS.get(self.0.load(Ordering::Relaxed).checked_sub(1)?).map(|(_, name)| *name)
        }
    }

    pub(super) fn start() -> Result<Received> {
        let (first, any) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        for (index, &(signal, name)) in SIGNALS.iter().enumerate() {
            // In this order: the first signal finds the flag unset and sets it, the second finds it set.
            register_conditional_shutdown(signal, 128 + signal, Arc::clone(&any))
                .and_then(|_id| register(signal, Arc::clone(&any)))
                .and_then(|_id| register_usize(signal, Arc::clone(&first), index + 1))
                .map_err(Error::io("handle", name))?;
        }
        Ok(Received(first))
    }
}

#[cfg(not(unix))]
mod watching {
    use crate::error::Result;

    /// Elsewhere a request to stop ends the process; a run goes on from its last checkpoint.
    #[derive(Debug)]
    pub(super) struct Received;

    impl Received {
        #[expect(clippy::unused_self, reason = "as on Unix")]
        pub(super) fn name(&self) -> Option<&'static str> {
            None
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "as on Unix")]
    pub(super) fn start() -> Result<Received> {
        Ok(Received)
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_a_request_once_somebody_watches() {
        assert_eq!(received(), None);
        watch().unwrap();
        watch().unwrap();
        assert_eq!(received(), None);
        signal_hook::low_level::raise(libc::SIGUSR1).unwrap();
        assert_eq!(received(), Some("SIGUSR1"));
    }
}
