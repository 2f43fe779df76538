//! Reasons to stop before a run is finished.

use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};
use shared::signals;

/// Why a call stopped before its run was finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// A signal of this name asked for it.
    Signal(&'static str),
    /// The time of `--time-limit` is over.
    TimeLimit,
    /// Another rank has a reason.
    OtherRank,
    /// `--stop-after-steps`, which leaves the run as if it had been killed.
    Steps,
}

impl StopReason {
    /// The signal's name, or that of the flag.
    pub fn name(self) -> &'static str {
        match self {
            Self::Signal(name) => name,
            Self::TimeLimit => "time-limit",
            Self::OtherRank => "other-rank",
            Self::Steps => "stop-after-steps",
        }
    }

    /// As the end of a sentence: why it stopped.
    pub fn phrase(self) -> String {
        match self {
            Self::Signal(name) => format!("because of {name}"),
            Self::OtherRank => "because another rank was asked to".into(),
            Self::TimeLimit | Self::Steps => format!("because of `--{}`", self.name()),
        }
    }
}

impl Serialize for StopReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What is left of the time of this call, and whether somebody asked to stop.
#[derive(Debug, Clone, Copy)]
pub struct StopWatch {
    began: Instant,
    limit: Option<Duration>,
}

impl StopWatch {
    /// Time runs from now.
    pub fn start(limit: Option<Duration>) -> Self {
        Self { began: Instant::now(), limit }
    }

    /// A reason to stop now rather than make another step, which may take as long as the last.
    pub fn reason(&self, last_step: Duration) -> Option<StopReason> {
        if let Some(signal) = signals::received() {
            return Some(StopReason::Signal(signal));
        }
        let after_next = self.began.elapsed() + last_step;
        self.limit.is_some_and(|limit| after_next > limit).then_some(StopReason::TimeLimit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_would_end_after_the_limit_is_not_begun() {
        let watch = StopWatch::start(Some(Duration::from_hours(1)));
        assert_eq!(watch.reason(Duration::from_secs(10)), None);
        assert_eq!(watch.reason(Duration::from_hours(1)), Some(StopReason::TimeLimit));
        assert_eq!(StopWatch::start(None).reason(Duration::MAX / 2), None);
    }
}
