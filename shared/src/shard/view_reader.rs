//! Reading views of any shard set: mapped, decoded, or redrawn.

use super::{Codec, ShardSet, Store, jpeg};
use crate::error::{Fault, Result};
use crate::transforms::{RgbImage, Scratch, View};

/// What a thread needs to read views: its own memory, and the last source image, so that views of one sample that are read one
/// after the other decode it once.
///
/// # Examples
/// ```no_run
/// use shared::shard::{ShardSet, ViewReader};
/// use shared::transforms::View;
///
/// let set = ShardSet::open("shards")?;
/// let mut reader = ViewReader::default();
/// let pixels = reader.read(&set, 0, View::Global(0))?;
/// assert_eq!(pixels.len(), set.height() * set.width() * 3);
/// # Ok::<(), shared::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct ViewReader {
    scratch: Scratch,
    source: Option<Source>,
    /// Memory of an earlier source image.
    spare: Vec<u8>,
    /// The view that was decoded or redrawn.
    pixels: Vec<u8>,
}

/// A source image in memory.
#[derive(Debug)]
struct Source {
    /// Fingerprint of the set that holds the image, and the sample's index there.
    place: (String, usize),
    image: RgbImage,
}

impl ViewReader {
    /// The pixels of a view, `(H, W, 3)` or `(h, w, 3)` RGB.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] when a stored JPEG cannot be decoded.
    ///
    /// # Panics
    /// When the sample or the view is out of range.
    pub fn read<'a>(&'a mut self, set: &'a ShardSet, index: usize, view: View) -> Result<&'a [u8]> {
        set.assert_view(view);
        let (shard, row) = set.locate(index);
        let shard = &set.shards()[shard];
        if let Some(pixels) = shard.plain_view(row, view)? {
            return Ok(pixels);
        }
        let (height, width) = set.view_size(view);
        match set.recipe_of_source() {
            None => {
                let memory = std::mem::take(&mut self.pixels);
                let decoded = jpeg::decode(shard.stored(row, view)?, (height, width), memory);
                self.pixels = decoded.map_err(|fault| shard.fault(of_sample(set, index, fault)))?.into_pixels();
            }
            Some((recipe, seed)) => {
                self.load_source(set, index)?;
                let Self { scratch, source: Some(Source { image, .. }), pixels, .. } = self else { return Ok(&[]) };
                let params = recipe.draw(seed, set.sample_id(index), view, image.height(), image.width());
                pixels.resize(height * width * 3, 0);
                recipe.apply(view, image, &params, height, scratch, pixels)?;
            }
        }
        Ok(&self.pixels)
    }

    /// The stored image of a sample of a source set; none in a set that stores views.
    ///
    /// # Errors
    /// As [`ViewReader::read`].
    ///
    /// # Panics
    /// When the sample is out of range.
    pub fn source(&mut self, set: &ShardSet, index: usize) -> Result<Option<&RgbImage>> {
        if set.store() != Store::Source {
            return Ok(None);
        }
        self.load_source(set, index)?;
        Ok(self.source.as_ref().map(|source| &source.image))
    }

    /// Holds the source image of a sample, if it does not already.
    fn load_source(&mut self, set: &ShardSet, index: usize) -> Result<()> {
        let holder = &set.files_manifest().fingerprint;
        if self.source.as_ref().is_some_and(|source| source.place.1 == index && source.place.0 == *holder) {
            return Ok(());
        }
        if let Some(source) = self.source.take() {
            self.spare = source.image.into_pixels();
        }
        let (shard, row) = set.locate(index);
        let shard = &set.shards()[shard];
        let (size, bytes) = (shard.source_size(row)?, shard.stored(row, View::Global(0))?);
        let mut memory = std::mem::take(&mut self.spare);
        let image = match set.codec() {
            Codec::Raw => {
                memory.clear();
                memory.extend_from_slice(bytes);
                RgbImage::new(size.0, size.1, memory)?
            }
            Codec::Jpeg => {
                jpeg::decode(bytes, size, memory).map_err(|fault| shard.fault(of_sample(set, index, fault)))?
            }
        };
        debug_assert_eq!(set.store(), Store::Source);
        self.source = Some(Source { place: (holder.clone(), index), image });
        Ok(())
    }
}

fn of_sample(set: &ShardSet, index: usize, fault: Fault) -> Fault {
    Fault::Value(format!("sample {:016x}: {fault}", set.sample_id(index)))
}
