//! The zip format of `torch.save` (PyTorch 1.6 and later): `NAME/data.pkl` and one record `NAME/data/KEY` per storage.

use std::collections::BTreeMap;
use std::io::{Cursor, Read as _};

use zip::read::{ArchiveOffset, Config};
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, Pickle};
use super::{Archive, Record};
use crate::error::Fault;

/// Bytes that one byte of a deflate stream can stand for at most, rounded up.
const MAX_DEFLATE_RATIO: u64 = 1040;
/// Bytes that a compressed record may stand for, over those of the whole file. Weights hardly shrink when they are compressed, and
/// `torch.save` leaves them as they are; zeros would stand for a thousand times their bytes.
const MAX_EXPANSION: u64 = 16;
/// Bytes that a compressed record of a small file may stand for.
const SMALL_BYTES: u64 = 1 << 20;
/// The fixed part of an entry of the central directory, and how it begins.
const CENTRAL_HEADER_BYTES: usize = 46;
const CENTRAL_SIGNATURE: &[u8] = b"PK\x01\x02";

fn syntax(error: zip::result::ZipError) -> Fault {
    Fault::Syntax(format!("zip archive: {error}"))
}

/// The archive begins with the file, which was recognised by its first bytes. The `zip` crate would look for a beginning elsewhere,
/// and is mistaken when a header of the directory is as long as the records at its end.
fn archive(bytes: &[u8]) -> Result<ZipArchive<Cursor<&[u8]>>, Fault> {
    ZipArchive::with_config(Config { archive_offset: ArchiveOffset::Known(0) }, Cursor::new(bytes)).map_err(syntax)
}

/// Reads the pickle and finds the records, without touching what they hold.
pub(super) fn open(bytes: &[u8]) -> Result<(Pickle, Archive), Fault> {
    let mut archive = archive(bytes)?;
    let headers = central_headers(bytes, archive.central_directory_start());
    if headers != archive.len() {
        let message = format!("zip archive: {headers} entries have {} names, one is there twice", archive.len());
        return Err(Fault::Value(message));
    }
    let mut names = Vec::with_capacity(archive.len());
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index).map_err(syntax)?;
        names.push(String::from_utf8_lossy(file.name_raw()).into_owned());
    }
    let pickles = names.iter().filter_map(|name| name.strip_suffix("data.pkl"));
    let top = pickles.filter(|top| top.is_empty() || top.ends_with('/')).min_by_key(|top| top.len());
    let top = top.ok_or_else(|| Fault::Syntax("a zip archive without `data.pkl` is not of `torch.save`".to_owned()))?;
    if names.iter().any(|name| name.strip_prefix(top).is_some_and(|rest| rest.starts_with("code/"))) {
        let advice = "it is a TorchScript program, save `model.state_dict()` with `torch.save` instead";
        return Err(Fault::Syntax(advice.to_owned()));
    }
    let file_bytes = bytes.len() as u64;
    let mut records = BTreeMap::new();
    let mut description = None;
    let mut big_endian = false;
    for (index, name) in names.iter().enumerate() {
        let Some(rest) = name.strip_prefix(top) else { continue };
        if rest == "data.pkl" {
            description = Some(contents(&mut archive, index, file_bytes)?);
        } else if rest == "byteorder" {
            big_endian = match contents(&mut archive, index, file_bytes)?.as_slice() {
                b"little" => false,
                b"big" => true,
                _ => return Err(Fault::Value("its byte order is neither `little` nor `big`".to_owned())),
            };
        } else if let Some(key) = rest.strip_prefix("data/") {
            records.insert(key.to_owned(), record(&mut archive, index, file_bytes)?);
        }
    }
    let pickle = pickle::load(&description.unwrap_or_default())?;
    Ok((pickle, Archive { records, big_endian }))
}

/// Entries of the central directory: the library keeps one of each name, and would hide that there are two.
fn central_headers(bytes: &[u8], start: u64) -> usize {
    let mut rest = usize::try_from(start).ok().and_then(|start| bytes.get(start..)).unwrap_or_default();
    let mut count = 0;
    while let Some(header) = rest.first_chunk::<CENTRAL_HEADER_BYTES>().filter(|at| at.starts_with(CENTRAL_SIGNATURE)) {
        // The lengths of the name, the extra field and the comment.
        let lengths = [28, 30, 32].map(|at| usize::from(u16::from_le_bytes([header[at], header[at + 1]])));
        count += 1;
        rest = rest.get(CENTRAL_HEADER_BYTES + lengths.iter().sum::<usize>()..).unwrap_or_default();
    }
    count
}

/// Where a record lies; for a stored one, the range is checked against the file.
fn record(archive: &mut ZipArchive<Cursor<&[u8]>>, index: usize, file_bytes: u64) -> Result<Record, Fault> {
    let file = archive.by_index_raw(index).map_err(syntax)?;
    let (length, packed) = (file.size(), file.compressed_size());
    let name = String::from_utf8_lossy(file.name_raw()).into_owned();
    let start = file.data_start().ok_or_else(|| Fault::Syntax(format!("zip archive: `{name}` has no data")))?;
    let end = start.checked_add(packed).filter(|end| *end <= file_bytes);
    if end.is_none() {
        return Err(Fault::Length { expected: start.saturating_add(packed), found: file_bytes });
    }
    match file.compression() {
        CompressionMethod::Stored if length == packed => Ok(Record::Plain { start, length }),
        CompressionMethod::Stored => {
            Err(Fault::Value(format!("zip archive: `{name}` is stored in {packed} bytes but claims {length}")))
        }
        CompressionMethod::Deflated
            if length <= packed.saturating_mul(MAX_DEFLATE_RATIO).saturating_add(64)
                && length <= file_bytes.saturating_mul(MAX_EXPANSION).max(SMALL_BYTES) =>
        {
            Ok(Record::Deflated { index, length })
        }
        CompressionMethod::Deflated => {
            Err(Fault::Value(format!("zip archive: `{name}` claims {length} bytes in {packed} compressed ones")))
        }
        other => Err(Fault::Value(format!("zip archive: `{name}` is compressed by {other}, which is not read"))),
    }
}

/// All bytes of a small record: its claim is checked before anything is allocated.
fn contents(archive: &mut ZipArchive<Cursor<&[u8]>>, index: usize, file_bytes: u64) -> Result<Vec<u8>, Fault> {
    let length = record(archive, index, file_bytes)?.length();
    inflate_into(archive, index, length)
}

fn inflate_into(archive: &mut ZipArchive<Cursor<&[u8]>>, index: usize, length: u64) -> Result<Vec<u8>, Fault> {
    let file = archive.by_index(index).map_err(syntax)?;
    let mut contents = Vec::new();
    let read = file.take(length.saturating_add(1)).read_to_end(&mut contents);
    read.map_err(|error| Fault::Syntax(format!("zip archive: {error}")))?;
    if contents.len() as u64 != length {
        return Err(Fault::Length { expected: length, found: contents.len() as u64 });
    }
    Ok(contents)
}

/// The bytes of a compressed record.
pub(super) fn inflate(bytes: &[u8], index: usize, length: u64) -> Result<Vec<u8>, Fault> {
    let mut archive = archive(bytes)?;
    inflate_into(&mut archive, index, length)
}
