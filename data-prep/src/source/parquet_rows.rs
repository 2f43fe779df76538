//! Single rows of a Parquet column: pages before the row are passed over by their headers, without being read.

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

/// How many column readers a worker keeps, each with a page: reading in order stays in one of them.
const OPEN_GROUPS: usize = 2;
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
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.bytes
    }
}

impl ChunkReader for Pages {
    type T = io::BufReader<Tail>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
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

/// What a worker keeps open from row to row, the last used first.
#[derive(Default)]
pub(super) struct RowReader {
    file: Option<(u32, Arc<Pages>)>,
    open: Vec<OpenGroup>,
}

impl std::fmt::Debug for RowReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open: Vec<_> = self.open.iter().map(|open| (open.archive, open.group, open.next)).collect();
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
            self.open.clear();
        }
        result
    }

    fn read_row(&mut self, archive: u32, file: &ParquetFile, row: u32, bytes: &mut Vec<u8>) -> Result<(), String> {
        let text = |e: ParquetError| format!("`{}` is damaged: {}", file.path.display(), one_line(&e.to_string()));
        let group = file.starts.partition_point(|&start| start <= row).saturating_sub(1);
        let row = row - file.starts.get(group).copied().unwrap_or(0);
        let usable = |open: &OpenGroup| open.archive == archive && open.group == group && open.next <= row;
        let at = match self.open.iter().position(usable) {
            Some(at) => at,
            None => {
                let pages = self.pages(archive, file)?;
                let reader = column_reader(&pages, &file.metadata, group, file.image).map_err(text)?;
                self.open.truncate(OPEN_GROUPS - 1);
                self.open.push(OpenGroup { archive, group, next: 0, reader: get_typed_column_reader(reader) });
                self.open.len() - 1
            }
        };
        self.open[..=at].rotate_right(1);
        let open = &mut self.open[0];
        let skip = row - open.next;
        let skipped = open.reader.skip_records(skip as usize).map_err(text)?;
        let (mut values, mut levels) = (Vec::with_capacity(1), Vec::new());
        let (rows, _, _) = open.reader.read_records(1, Some(&mut levels), None, &mut values).map_err(text)?;
        open.next = row + 1;
        if skipped != skip as usize || rows != 1 {
            return Err(format!("`{}` is damaged: its column of images ends before this row", file.path.display()));
        }
        let Some(image) = values.first() else { return Err("the row holds no image".into()) };
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
