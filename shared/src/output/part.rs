//! Which part of a work that several processes share: `2/4` on a command line, `part-00002-of-00004` in file names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The most parts that there may be.
pub(super) const LARGEST_NUMBER: usize = 99_999;

/// One of several parts of a work: part `number` of `of`, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    number: usize,
    of: usize,
}

impl Part {
    /// Part `number` of `of`.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such part.
    pub fn new(number: usize, of: usize) -> Result<Self> {
        if (1..=of).contains(&number) && of <= LARGEST_NUMBER {
            return Ok(Self { number, of });
        }
        Err(Error::usage(format!("`{number}/{of}` is no part: parts are numbered from 1/{of} to {of}/{of}")))
    }

    /// Which it is, from 1.
    pub fn number(self) -> usize {
        self.number
    }

    /// How many there are.
    pub fn of(self) -> usize {
        self.of
    }

    /// Whether the piece of work with this index, from 0, belongs to it. Pieces are dealt in turn.
    pub fn owns(self, index: usize) -> bool {
        index % self.of == self.number - 1
    }

    fn stem(self) -> String {
        format!("part-{:05}-of-{:05}", self.number, self.of)
    }

    pub(super) fn record_file(self) -> String {
        format!("{}.json", self.stem())
    }

    pub(super) fn claim_file(self) -> String {
        format!(".{}.owner", self.stem())
    }

    /// The part that a record or a claim belongs to.
    pub(super) fn of_file(name: &str) -> Option<Self> {
        let stem = name.strip_prefix('.').and_then(|name| name.strip_suffix(".owner")).or(name.strip_suffix(".json"))?;
        let (number, of) = stem.strip_prefix("part-")?.split_once("-of-")?;
        Self::new(number.parse().ok()?, of.parse().ok()?).ok().filter(|part| part.stem() == stem)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "part {} of {}", self.number, self.of)
    }
}

impl FromStr for Part {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_once('/').and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
        match numbers {
            Some((number, of)) => Self::new(number, of),
            None => Err(Error::usage(format!("`{text}` is not a part such as 2/4: part 2 of 4"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_from_the_command_line() {
        let part: Part = "2/4".parse().unwrap();
        assert_eq!((part.number(), part.of(), part.to_string()), (2, 4, "part 2 of 4".into()));
        for wrong in ["0/4", "5/4", "2", "2/", "a/b", "1/0", "-1/3", "1/100000"] {
            assert_eq!(wrong.parse::<Part>().unwrap_err().exit_status(), 2, "{wrong}");
        }
    }

    #[test]
    fn every_piece_belongs_to_one_part() {
        for of in [1, 3, 7, 20] {
            for index in 0..30 {
                assert_eq!((1..=of).filter(|&number| Part::new(number, of).unwrap().owns(index)).count(), 1);
            }
        }
    }

    #[test]
    fn file_names_tell_the_part() {
        let part = Part::new(2, 4).unwrap();
        for name in [part.record_file(), part.claim_file()] {
            assert_eq!(Part::of_file(&name), Some(part), "{name}");
        }
        for name in ["part-2-of-4.json", "part-00005-of-00004.json", "part-00002-of-00004", "shard-00002.json", ""] {
            assert_eq!(Part::of_file(name), None, "{name}");
        }
    }
}
