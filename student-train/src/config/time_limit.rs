//! How long a call may train: `11h30m`, `45m`, or plain minutes as batch systems count.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Seconds of the units that may be named, the longest first.
const UNITS: [(char, u64); 4] = [('d', 86400), ('h', 3600), ('m', 60), ('s', 1)];

/// A time after which to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct TimeLimit(Duration);

impl TimeLimit {
    /// The time.
    pub fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for TimeLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no time such as 11h30m, 2d, 45s or 90 (minutes)");
        let mut seconds: u64 = 0;
        let mut rest = text;
        let mut last = u64::MAX;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let amount: u64 = rest[..digits].parse().map_err(|e| format!("{}: {e}", wrong()))?;
            let unit = match rest[digits..].chars().next() {
                None if last == u64::MAX => 60,
                named => UNITS.iter().find(|(letter, _)| Some(*letter) == named).ok_or_else(wrong)?.1,
            };
            if unit >= last {
                return Err(wrong());
            }
            last = unit;
            seconds = amount.checked_mul(unit).and_then(|more| seconds.checked_add(more)).ok_or_else(wrong)?;
            rest = rest.get(digits + 1..).unwrap_or_default();
        }
        if seconds == 0 {
            return Err(wrong());
        }
        Ok(Self(Duration::from_secs(seconds)))
    }
}

impl TryFrom<String> for TimeLimit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<TimeLimit> for String {
    fn from(limit: TimeLimit) -> Self {
        limit.to_string()
    }
}

impl fmt::Display for TimeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_secs();
        for (letter, unit) in UNITS {
            if rest >= unit {
                write!(f, "{}{letter}", rest / unit)?;
                rest %= unit;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for (text, seconds, written) in [
            ("90", 5400, "1h30m"),
            ("11h30m", 41400, "11h30m"),
            ("2d", 172_800, "2d"),
            ("45s", 45, "45s"),
            ("1d1s", 86401, "1d1s"),
        ] {
            let limit: TimeLimit = text.parse().unwrap();
            assert_eq!(limit.duration().as_secs(), seconds, "{text}");
            assert_eq!(limit.to_string(), written);
            assert_eq!(written.parse(), Ok(limit));
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "0",
            "h",
            "1x",
            "1m1h",
            "1h1h",
            "1h30",
            "-5",
            "1.5h",
            "99999999999999999999",
            "1é",
            "9999999999999999d",
        ] {
            assert!(text.parse::<TimeLimit>().is_err(), "{text}");
        }
    }
}
