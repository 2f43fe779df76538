//! Single rows of a Parquet column: pages before the row are passed over by their headers, without being read.
//!
//! A worker keeps one column open, with one page and, where the column has one, its dictionary: writers that use dictionaries for
//! images put all images of a row group into it, so that memory and time for a single row grow with the row group.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use bytes::Bytes;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_column_reader, get_typed_column_reader};
use parquet::data_type::ByteArrayType;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;

use super::parquet::{ParquetFile, caught, one_line};
use super::reader::{LARGEST_IMAGE_BYTES, read_exact_at};

/// A page that claims to be this many times as long as the whole file, once it is decompressed, is refused: that takes memory
/// before it turns out to be false. Snappy comes to 21 times at most, LZ4 to 255.
const LARGEST_RATIO: u64 = 256;
/// Headers of pages are read through a buffer of this size.
const HEADER_BUFFER: usize = 512;

/// A Parquet file from which nothing beyond its end is asked.
#[derive(Debug)]
pub(super) struct Pages {
    file: Arc<File>,
    bytes: u64,
}

impl Pages {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), bytes })
    }

    /// Refuses a page whose header claims an impossible size.
    ///
    /// A header is a Thrift struct (compact protocol) that begins with three i32 fields: the kind of page, its size, its compressed
    /// size.
    fn check_page(&self, start: u64) -> ParquetResult<()> {
        let mut head = [0; 12];
        let count = self.bytes.saturating_sub(start).min(head.len() as u64) as usize;
        read_exact_at(&self.file, &mut head[..count], start)?;
        let mut fields = &head[..count];
        let (kind, size) = (next_i32(&mut fields), next_i32(&mut fields));
        if kind.is_some() && size.is_some_and(|size| size > self.bytes.saturating_mul(LARGEST_RATIO)) {
            return Err(ParquetError::General("a page claims to be larger than it can be".into()));
        }
        Ok(())
    }
}

/// Takes a field of type i32 that follows its predecessor off the front of a Thrift struct; negative values count as large.
fn next_i32(bytes: &mut &[u8]) -> Option<u64> {
    const NEXT_FIELD_OF_I32: u8 = 0x15;
    let mut rest = bytes.strip_prefix(&[NEXT_FIELD_OF_I32])?.iter();
    let mut zigzag = 0;
    for shift in (0..35).step_by(7) {
        let byte = *rest.next()?;
        zigzag |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            *bytes = rest.as_slice();
            return Some(if zigzag % 2 == 0 { zigzag / 2 } else { u64::MAX });
        }
    }
    None
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.bytes
    }
}

impl ChunkReader for Pages {
    type T = io::BufReader<Tail>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        self.check_page(start)?;
        let tail = Tail { file: Arc::clone(&self.file), at: start, end: self.bytes };
        Ok(io::BufReader::with_capacity(HEADER_BUFFER, tail))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.bytes) {
            return Err(ParquetError::EOF("a page lies beyond the end of the file".into()));
        }
        let mut bytes = vec![0; length];
        read_exact_at(&self.file, &mut bytes, start)?;
        Ok(bytes.into())
    }
}

/// The file from a place on.
#[derive(Debug)]
pub(super) struct Tail {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Tail {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = (bytes.len() as u64).min(self.end.saturating_sub(self.at)) as usize;
        read_exact_at(&self.file, &mut bytes[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A reader of one column in one row group.
pub(super) fn column_reader(
    pages: &Arc<Pages>,
    metadata: &ParquetMetaData,
    group: usize,
    column: usize,
) -> ParquetResult<ColumnReader> {
    let group = metadata.row_group(group);
    let (start, length) = group.column(column).byte_range();
    if start.checked_add(length).is_none_or(|end| end > pages.bytes) {
        return Err(ParquetError::EOF("a column lies beyond the end of the file".into()));
    }
    let rows = usize::try_from(group.num_rows()).unwrap_or(0);
    let reader = SerializedPageReader::new(Arc::clone(pages), group.column(column), rows, None)?;
    Ok(get_column_reader(metadata.file_metadata().schema_descr().column(column), Box::new(reader)))
}

/// A row group that a worker has open.
struct OpenGroup {
    archive: u32,
    group: usize,
    /// The row, within the group, that is read next.
    next: u32,
    reader: ColumnReaderImpl<ByteArrayType>,
}

/// What a worker keeps open from row to row.
#[derive(Default)]
pub(super) struct RowReader {
    file: Option<(u32, Arc<Pages>)>,
    open: Option<OpenGroup>,
}

impl std::fmt::Debug for RowReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open = self.open.as_ref().map(|open| (open.archive, open.group, open.next));
        f.debug_struct("RowReader").field("open", &open).finish_non_exhaustive()
    }
}

impl RowReader {
    /// Reads the image of a row into `bytes`.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub(super) fn read(
        &mut self,
        (archive, file): (u32, &ParquetFile),
        row: u32,
        bytes: &mut Vec<u8>,
    ) -> Result<(), String> {
        let result = caught(|| self.read_row(archive, file, row, bytes));
        if result.is_err() {
            // what broke may be in any state
            self.open = None;
        }
        result
    }

    fn read_row(&mut self, archive: u32, file: &ParquetFile, row: u32, bytes: &mut Vec<u8>) -> Result<(), String> {
        let text = |e: ParquetError| format!("`{}` is damaged: {}", file.path.display(), one_line(&e.to_string()));
        let group = file.starts.partition_point(|&start| start <= row).saturating_sub(1);
        let row = row - file.starts.get(group).copied().unwrap_or(0);
        let usable = |open: &OpenGroup| open.archive == archive && open.group == group && open.next <= row;
        if !self.open.as_ref().is_some_and(usable) {
            // before another one takes its memory
            self.open = None;
            let pages = self.pages(archive, file)?;
            let reader = column_reader(&pages, &file.metadata, group, file.image).map_err(text)?;
            self.open = Some(OpenGroup { archive, group, next: 0, reader: get_typed_column_reader(reader) });
        }
        let Some(open) = &mut self.open else { return Err("it cannot be opened".into()) };
        let skip = row - open.next;
        let skipped = open.reader.skip_records(skip as usize).map_err(text)?;
        let (mut values, mut levels) = (Vec::with_capacity(1), Vec::new());
        let (rows, _, _) = open.reader.read_records(1, Some(&mut levels), None, &mut values).map_err(text)?;
        open.next = row + 1;
        if skipped != skip as usize || rows != 1 {
            return Err(format!("`{}` is damaged: its column of images ends before this row", file.path.display()));
        }
        let Some(image) = values.first() else {
            return Err("the row holds no image: the bytes must be in the file, a path is not followed".into());
        };
        if image.len() as u64 > LARGEST_IMAGE_BYTES {
            return Err("its image is too large".into());
        }
        bytes.clear();
        bytes.extend_from_slice(image.data());
        Ok(())
    }

    fn pages(&mut self, archive: u32, file: &ParquetFile) -> Result<Arc<Pages>, String> {
        if let Some((open, pages)) = &self.file
            && *open == archive
        {
            return Ok(Arc::clone(pages));
        }
        let unreadable = |e: io::Error| format!("cannot read `{}`: {e}", file.path.display());
        let pages = Arc::new(File::open(&file.path).and_then(Pages::new).map_err(unreadable)?);
        self.file = Some((archive, Arc::clone(&pages)));
        Ok(pages)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn page_that_claims_more_than_the_file_can_hold_is_refused() {
        let check = |header: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(header).unwrap();
            file.write_all(&[0; 100]).unwrap();
            Pages::new(file).unwrap().get_read(0).map(|_| ()).map_err(|e| e.to_string())
        };
        // a data page of 2^31 - 1, of 20000 and of -1 bytes
        let refused = "claims to be larger";
        assert!(check(&[0x15, 0, 0x15, 0xfe, 0xff, 0xff, 0xff, 0x0f, 0x15, 20]).unwrap_err().contains(refused));
        assert!(check(&[0x15, 0, 0x15, 0xc0, 0xb8, 0x02, 0x15, 20]).is_ok());
        assert!(check(&[0x15, 0, 0x15, 0x01, 0x15, 20]).unwrap_err().contains(refused));
    }

    #[test]
    fn nothing_beyond_the_end_is_read() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 10]).unwrap();
        let pages = Pages::new(file).unwrap();
        assert_eq!(pages.get_bytes(4, 6).unwrap().len(), 6);
        assert!(pages.get_bytes(5, 6).is_err() && pages.get_bytes(u64::MAX, 2).is_err());
        let mut rest = Vec::new();
        pages.get_read(7).unwrap().read_to_end(&mut rest).unwrap();
        assert_eq!(rest, [1; 3]);
    }
}
