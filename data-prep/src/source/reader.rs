//! Reading one sample, wherever it lies.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use shared::space::human;
use shared::transforms::RgbImage;

use super::cifar::{PLANES_BYTES, SIDE, interleave};
use super::parquet_rows::RowReader;
use super::{Archive, Listing, Place, Sample};

/// No encoded image is larger.
pub const LARGEST_IMAGE_BYTES: u64 = 1 << 30;

/// How many archives a reader keeps open.
const OPEN_ARCHIVES: usize = 8;

/// What a sample holds.
#[derive(Debug)]
pub enum Payload<'a> {
    /// An image file: JPEG, PNG, ...
    Encoded(&'a [u8]),
    /// Pixels that need no decoding.
    Pixels(RgbImage),
}

/// What a worker keeps from sample to sample: its buffer and the archives it has open, the last used first.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    open: Vec<(u32, File)>,
    rows: RowReader,
}

impl Reader {
    /// Reads a sample of `listing`, always the same one for a reader; the error is a reason for people, without the sample's name.
    ///
    /// # Errors
    /// Why the sample cannot be used.
    pub fn load(&mut self, listing: &Listing, sample: &Sample) -> Result<Payload<'_>, String> {
        check_size(sample.bytes)?;
        let last = || sample.name.rsplit('/').next().unwrap_or_default();
        match sample.place {
            Place::File => self.read_file(&listing.root.join(&*sample.name)).map(Payload::Encoded),
            Place::FileInRoot => self.read_file(&listing.root.join(last())).map(Payload::Encoded),
            Place::Range { archive, offset } => {
                self.read_range(listing, archive, offset, sample.bytes)?;
                Ok(Payload::Encoded(&self.bytes))
            }
            Place::Planes { archive, offset } => {
                self.read_range(listing, archive, offset, PLANES_BYTES)?;
                RgbImage::new(SIDE, SIDE, interleave(&self.bytes)).map(Payload::Pixels).map_err(|e| e.to_string())
            }
            Place::Row { archive, row } => match listing.archives.get(archive as usize) {
                Some(Archive::Parquet(file)) => {
                    self.rows.read((archive, file), row, &mut self.bytes)?;
                    Ok(Payload::Encoded(&self.bytes))
                }
                _ => Err("its archive is not listed".into()),
            },
            Place::Refused(reason) => {
                Err(listing.refusals.get(reason as usize).cloned().unwrap_or_else(|| "it cannot be used".into()))
            }
        }
    }

    fn read_file(&mut self, path: &Path) -> Result<&[u8], String> {
        let unreadable = |e: io::Error| format!("cannot read it: {e}");
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if metadata.is_dir() {
            return Err("it is a directory".into());
        }
        check_size(metadata.len())?;
        self.bytes.clear();
        self.bytes.reserve(metadata.len() as usize);
        // a file that grows meanwhile does not go beyond the limit
        file.take(LARGEST_IMAGE_BYTES).read_to_end(&mut self.bytes).map_err(unreadable)?;
        Ok(&self.bytes)
    }

    /// Fills the buffer; the listing made sure that the range lies within the archive.
    fn read_range(&mut self, listing: &Listing, archive: u32, offset: u64, bytes: u64) -> Result<(), String> {
        let Some(Archive::Plain(path)) = listing.archives.get(archive as usize) else {
            return Err("its archive is not listed".into());
        };
        let unreadable = |e: io::Error| format!("cannot read `{}`: {e}", path.display());
        let at = match self.open.iter().position(|(open, _)| *open == archive) {
            Some(at) => at,
            None => {
                self.open.truncate(OPEN_ARCHIVES - 1);
                self.open.push((archive, File::open(path).map_err(unreadable)?));
                self.open.len() - 1
            }
        };
        self.open[..=at].rotate_right(1);
        self.bytes.resize(bytes as usize, 0);
        read_exact_at(&self.open[0].1, &mut self.bytes, offset).map_err(unreadable)
    }
}

fn check_size(bytes: u64) -> Result<(), String> {
    if bytes <= LARGEST_IMAGE_BYTES {
        return Ok(());
    }
    Err(format!("the file has {}, the limit is {}", human(bytes), human(LARGEST_IMAGE_BYTES)))
}

/// Fills `bytes` from a place in a file, whatever its cursor.
#[cfg(unix)]
pub(super) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Fills `bytes` from a place in a file; moves its cursor, which nothing else here relies on.
#[cfg(not(unix))]
pub(super) fn read_exact_at(mut file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    use std::io::{Seek as _, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(bytes)
}
