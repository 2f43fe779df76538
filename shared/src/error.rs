//! The one error type of the workspace: every variant says what is wrong, where, and what to do about it.
//!
//! Messages are lowercase sentences without a full stop, paths and names in backticks, what was expected before what was
//! found; the advice, where there is one, is [`Error::hint`], which the binaries print on a line of its own.

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in the library and the stages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read, write, lock or rename.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// A verb in its plain form: "read", "create", "rename".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or directory that a stage needs is not there.
    #[error("{what} `{}` does not exist", path.display())]
    Missing {
        /// What it would be: "shard set", "checkpoint".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// A file is not what its format demands.
    #[error("`{}` is damaged: {fault}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The broken rule.
        fault: Fault,
    },
    /// Two artefacts do not belong together.
    #[error("{what} of `{}` does not match: expected {expected}, found {found}", path.display())]
    Chain {
        /// What was compared: "shard set fingerprint", "config key `views`".
        what: String,
        /// The artefact that was refused.
        path: PathBuf,
        /// What would have matched.
        expected: String,
        /// What is there.
        found: String,
        /// What to run.
        hint: String,
    },
    /// Another process is writing the same output.
    #[error("another process is writing `{}`", path.display())]
    Locked {
        /// The output directory.
        path: PathBuf,
    },
    /// The output directory holds something that no stage of this project wrote.
    #[error("`{}` is not empty and was not written by `{stage}`", path.display())]
    Foreign {
        /// The output directory.
        path: PathBuf,
        /// The stage that wanted to write there.
        stage: &'static str,
    },
    /// Tensors of the wrong shape reached an operation.
    #[error("{op}: expected shape {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The shape it takes, letters allowed.
        expected: String,
        /// The shape it got.
        got: String,
    },
    /// The request itself makes no sense: a flag, a config key, a combination. Exit status 2.
    #[error("{message}")]
    Usage {
        /// What is wrong with the request.
        message: String,
    },
    /// The inputs are readable but cannot be used as asked.
    #[error("{message}")]
    Invalid {
        /// What is wrong.
        message: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// One of several processes that work together failed, and the others did not.
    #[error("rank {rank} on `{node}`: {source}")]
    OnRank {
        /// Its number, counted from 0.
        rank: usize,
        /// The machine that it runs on.
        node: String,
        /// What went wrong there.
        source: Box<Self>,
    },
    /// Another of several processes that work together failed and tells why.
    #[error("rank {rank} failed")]
    Elsewhere {
        /// Its number, counted from 0.
        rank: usize,
        /// The exit status that all end with.
        status: u8,
    },
    /// A tensor operation of candle failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// The rule that a damaged file breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file ends before its contents do, or goes on after them.
    #[error("{expected} bytes expected, {found} found")]
    Length {
        /// Bytes the header promises.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The header or the text cannot be parsed.
    #[error("{0}")]
    Syntax(String),
    /// A tensor that must be there is not.
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    /// A tensor has another element type.
    #[error("tensor `{name}` holds {found}, expected {expected}")]
    Dtype {
        /// The tensor.
        name: String,
        /// The element type of the format.
        expected: String,
        /// The element type in the file.
        found: String,
    },
    /// A tensor has another shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected}")]
    Shape {
        /// The tensor.
        name: String,
        /// The shape of the format, letters allowed.
        expected: String,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The contents differ from the hash that was recorded when the file was written.
    #[error("blake3 {expected} recorded, {found} computed")]
    Hash {
        /// Recorded when written.
        expected: String,
        /// Of what is there.
        found: String,
    },
    /// A value that the format rules out.
    #[error("{0}")]
    Value(String),
    /// The file is of a format version that this program does not read.
    #[error("format version {found} is not supported, this program reads version {expected}")]
    Version {
        /// The version this program writes.
        expected: u32,
        /// The version in the file.
        found: u32,
    },
}

impl Error {
    /// An [`Error::Io`] for `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// An [`Error::Damaged`] for a file.
    pub fn damaged(path: impl AsRef<Path>, fault: Fault) -> Self {
        Self::Damaged { path: path.as_ref().to_path_buf(), fault }
    }

    /// An [`Error::Usage`] from a sentence.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage { message: message.into() }
    }

    /// An [`Error::Invalid`] from a sentence and advice.
    pub fn invalid(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), hint: hint.into() }
    }

    /// What the user can do about it, if anything is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { hint, .. } | Self::Chain { hint, .. } | Self::Invalid { hint, .. } => {
                (!hint.is_empty()).then(|| hint.clone())
            }
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free some disk space and run the same command again: finished files are kept".into())
            }
            Self::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge) =>
            {
                let advice =
                    "raise the limit (`quota`, `ulimit -f`) and run the same command again: finished files are kept";
                Some(advice.into())
            }
            Self::OnRank { source, .. } => source.hint(),
            Self::Locked { .. } => Some("wait for it to end, or choose another `--output`".into()),
            Self::Foreign { .. } => Some("choose an empty or new directory as `--output`".into()),
            _ => None,
        }
    }

    /// The exit status of a binary that ends with this error: 2 for wrong usage, 1 for everything else; that of the rank that failed.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            Self::OnRank { source, .. } => source.exit_status(),
            Self::Elsewhere { status, .. } => *status,
            _ => 1,
        }
    }
}
