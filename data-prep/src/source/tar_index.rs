//! Where the members of a tar archive lie, found by reading its headers alone.
//!
//! Nothing in a header is trusted: a member must lie within the archive, and the text that headers bring along (long names, pax
//! records) is bounded.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use shared::{Error, Result};

use super::builder::text_of;
use super::reader::read_exact_at;

/// All the headers of one member together are at most this long.
const LONGEST_HEADERS: u64 = 1 << 20;

/// First bytes of compressed files, and what undoes them.
const COMPRESSIONS: [(&[u8], &str); 4] =
    [(b"\x1f\x8b", "gunzip"), (b"\x28\xb5\x2f\xfd", "unzstd"), (b"\xfd7zXZ\0", "unxz"), (b"BZh", "bunzip2")];

/// A member that is not a directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Its path without a leading `./` or `/`; escaped when it is not UTF-8.
    pub(super) name: String,
    /// Where its contents begin in the file.
    pub(super) offset: u64,
    /// Size of its contents.
    pub(super) bytes: u64,
    /// Why it cannot be used.
    pub(super) fault: Option<String>,
}

/// Opens an archive, refusing a compressed one; gives its size too.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let bytes = file.metadata().map_err(Error::io("read", path))?.len();
    let mut first = [0; 6];
    let read = (&file).read(&mut first).map_err(Error::io("read", path))?;
    match COMPRESSIONS.iter().find(|(magic, _)| first[..read].starts_with(magic)) {
        None => Ok((file, bytes)),
        Some((_, tool)) => Err(Error::invalid(
            format!("`{}` is compressed, and samples cannot be read in place", path.display()),
            format!("decompress it first, for example with `{tool} {}`", path.display()),
        )),
    }
}

/// Calls `each` for the members of the archive that lies at `start..end` of `file`.
///
/// # Errors
/// Where and how the archive is damaged; the members before that place have been given.
pub(super) fn for_each_member(
    file: &File,
    (start, end): (u64, u64),
    mut each: impl FnMut(Member),
) -> Result<(), String> {
    let read_in_header = Cell::new(0);
    let mut archive = tar::Archive::new(Window { file, start, end, at: start, read_in_header: &read_in_header });
    let mut last = start;
    let damaged = |at: u64, e: io::Error| format!("the archive is damaged after byte {at}: {e}");
    for entry in archive.entries_with_seek().map_err(|e| damaged(start, e))? {
        read_in_header.set(0);
        let mut entry = entry.map_err(|e| damaged(last, e))?;
        let sparse = entry.header().entry_type().is_gnu_sparse() || has_sparse_record(&mut entry);
        let kind = entry.header().entry_type();
        if kind.is_dir() || kind.is_pax_global_extensions() {
            continue;
        }
        let (mut name, mut fault) = match text_of(&entry.path_bytes()) {
            Ok(name) => (name, None),
            Err((name, reason)) => (name, Some(reason)),
        };
        let cut = name.trim_start_matches("./").trim_start_matches('/').len();
        name.drain(..name.len() - cut);
        let (offset, bytes) = (start.saturating_add(entry.raw_file_position()), entry.size());
        last = offset;
        if kind.is_symlink() || kind.is_hard_link() {
            let to = entry.link_name_bytes().unwrap_or_default().escape_ascii().to_string();
            fault = Some(format!(
                "it is a link to `{to}`: archive the file itself (`tar --dereference --hard-dereference`)"
            ));
        } else if sparse {
            fault = Some("it is stored sparsely: archive it again without `--sparse`".into());
        } else if !(kind.is_file() || kind.is_contiguous()) {
            fault = Some("it is not a file".into());
        } else if offset.checked_add(bytes).is_none_or(|until| until > end) {
            fault = Some(format!(
                "the archive ends inside it: {bytes} bytes expected, {} found",
                end.saturating_sub(offset)
            ));
        }
        each(Member { name, offset, bytes: if fault.is_some() { 0 } else { bytes }, fault });
    }
    Ok(())
}

/// Whether pax records say that the contents are not stored as they are.
fn has_sparse_record<R: Read>(entry: &mut tar::Entry<'_, R>) -> bool {
    let Ok(Some(records)) = entry.pax_extensions() else { return false };
    records.flatten().any(|record| record.key_bytes().starts_with(b"GNU.sparse"))
}

/// A part of a file as a file.
struct Window<'a> {
    file: &'a File,
    start: u64,
    end: u64,
    at: u64,
    read_in_header: &'a Cell<u64>,
}

impl Read for Window<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = (bytes.len() as u64).min(self.end.saturating_sub(self.at)) as usize;
        if self.read_in_header.replace(self.read_in_header.get() + count as u64) > LONGEST_HEADERS {
            return Err(io::Error::other("the header of a member is too long"));
        }
        read_exact_at(self.file, &mut bytes[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Window<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => self.start.checked_add(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        self.at = at.filter(|at| *at >= self.start).ok_or_else(|| io::Error::other("a size is out of range"))?;
        Ok(self.at - self.start)
    }
}
