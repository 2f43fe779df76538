//! Reading one sample, wherever it lies.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use shared::space::human;
use shared::transforms::RgbImage;

use super::{Listing, Place, Sample};

/// No encoded image is larger.
pub const LARGEST_IMAGE_BYTES: u64 = 1 << 30;

/// What a sample holds.
#[derive(Debug)]
pub enum Payload<'a> {
    /// An image file: JPEG, PNG, ...
    Encoded(&'a [u8]),
    /// Pixels that need no decoding.
    Pixels(RgbImage),
}

/// What a worker keeps from sample to sample.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
}

impl Reader {
    /// Reads a sample of `listing`; the error is a reason for people, without the sample's name.
    ///
    /// # Errors
    /// Why the sample cannot be used.
    pub fn load(&mut self, listing: &Listing, sample: &Sample) -> Result<Payload<'_>, String> {
        match sample.place {
            Place::File => self.read_file(&listing.path_of(sample)).map(Payload::Encoded),
        }
    }

    fn read_file(&mut self, path: &Path) -> Result<&[u8], String> {
        let unreadable = |e: std::io::Error| format!("cannot read it: {e}");
        let file = File::open(path).map_err(unreadable)?;
        let bytes = file.metadata().map_err(unreadable)?.len();
        check_size(bytes)?;
        self.bytes.clear();
        self.bytes.reserve(bytes as usize);
        // a file that grows meanwhile does not go beyond the limit
        file.take(LARGEST_IMAGE_BYTES).read_to_end(&mut self.bytes).map_err(unreadable)?;
        Ok(&self.bytes)
    }
}

fn check_size(bytes: u64) -> Result<(), String> {
    if bytes <= LARGEST_IMAGE_BYTES {
        return Ok(());
    }
    Err(format!("the file has {}, the limit is {}", human(bytes), human(LARGEST_IMAGE_BYTES)))
}
