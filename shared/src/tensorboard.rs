//! Event files for `TensorBoard`: numbers over the steps of a training, appended while it runs.
//!
//! A file is a row of records: length (u64), masked CRC-32C of the length, the record, masked CRC-32C of the record, all
//! little-endian; a record is a message `Event`. Every process of a training writes a file of its own. It begins with
//! `SessionLog.START` at the step after the checkpoint that it goes on from, on which readers forget what an earlier file says
//! of that step and later ones: nothing is shown twice.
//!
//! # Source
//! `tensorboard/compat/proto/event.proto`, `summary.proto` and `compat/tensorflow_stub/pywrap_tensorflow.py` of tensorflow/tensorboard.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::error::{Error, Result};
use crate::io::create_directory;

/// The version of the format; from the second on a session's start makes readers forget.
const FILE_VERSION: &str = "brain.Event:2";

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// A member of a `oneof`, so that 0 is written too.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    /// 1: START.
    #[prost(int32, tag = "1")]
    status: i32,
}

/// A file of events that grows.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl EventFile {
    /// Starts a file in `directory`, which is created when needed, for a session whose first step is `first_step`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(directory: &Path, first_step: u64) -> Result<Self> {
        create_directory(directory)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Readers take the files of a directory in the order of their names.
        let name = format!("events.out.tfevents.{:010}.{:09}", now.as_secs(), now.subsec_nanos());
        let path = directory.join(name);
        let file = File::create_new(&path).map_err(Error::io("create", &path))?;
        let mut events = Self { path, writer: BufWriter::new(file) };
        let nothing = Event { wall_time: wall_time(), step: 0, file_version: None, summary: None, session_log: None };
        events.append(&Event { file_version: Some(FILE_VERSION.into()), ..nothing.clone() })?;
        let step = first_step.cast_signed();
        events.append(&Event { step, session_log: Some(SessionLog { status: 1 }), ..nothing })?;
        events.flush()?;
        Ok(events)
    }

    /// Adds the values that belong to a step, each under its tag, `train/loss` for example.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scalars(&mut self, step: u64, values: impl IntoIterator<Item = (String, f32)>) -> Result<()> {
        let value = values.into_iter().map(|(tag, value)| Value { tag, simple_value: Some(value) }).collect();
        let (wall_time, step, summary) = (wall_time(), step.cast_signed(), Some(Summary { value }));
        self.append(&Event { wall_time, step, file_version: None, summary, session_log: None })
    }

    /// Lets readers see what was added.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&mut self) -> Result<()> {
        self.writer.flush().map_err(Error::io("write", &self.path))
    }

    fn append(&mut self, event: &Event) -> Result<()> {
        let record = frame(&event.encode_to_vec());
        self.writer.write_all(&record).map_err(Error::io("write", &self.path))
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn frame(record: &[u8]) -> Vec<u8> {
    let length = (record.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), record, &masked_crc(record).to_le_bytes()].concat()
}

/// CRC-32C, rotated and shifted so that the sum of bytes with a sum in them is no special number.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The checksum of Castagnoli's polynomial, reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| TABLE[usize::from(crc.to_le_bytes()[0] ^ byte)] ^ (crc >> 8))
}

/// The checksums of single bytes.
const TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut byte = 0u32;
    while byte < 256 {
        let mut crc = byte;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { 0x82f6_3b78 ^ (crc >> 1) } else { crc >> 1 };
            bit += 1;
        }
        table[byte as usize] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a file, with their checksums compared.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(word(8), masked_crc(&rest[..8]));
            let record = &rest[12..12 + length];
            assert_eq!(word(12 + length), masked_crc(record));
            events.push(Event::decode(record).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn checksum_is_castagnolis() {
        // The check value of the catalogue, and the examples of RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(masked_crc(&[]), 0xa282_ead8);
    }

    #[test]
    fn file_holds_version_start_and_scalars() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("tensorboard");
        let mut events = EventFile::create(&directory, 5).unwrap();
        events.scalars(5, [("train/loss".to_string(), 0.0), ("train/lr".to_string(), 0.5)]).unwrap();
        events.flush().unwrap();
        let found = read(&events.path);
        assert_eq!(found[0].file_version.as_deref(), Some(FILE_VERSION));
        assert_eq!((found[1].step, found[1].session_log.as_ref().map(|log| log.status)), (5, Some(1)));
        let value = |tag: &str, value| Value { tag: tag.into(), simple_value: Some(value) };
        let summary = Summary { value: vec![value("train/loss", 0.0), value("train/lr", 0.5)] };
        assert_eq!((found.len(), found[2].step, found[2].summary.as_ref()), (3, 5, Some(&summary)));
        assert!(found[2].wall_time > 1e9);
        let later = EventFile::create(&directory, 7).unwrap();
        assert!(later.path > events.path);
    }
}
