//! What a shard stores of one sample.

/// What a shard stores of one sample: its views, or one image to redraw them from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SampleViews {
    /// The global views, or the source image as a single piece without parameters.
    pub global: Pieces,
    /// The local views of a multi-crop recipe.
    pub local: Pieces,
    /// Height and width of the source image; 0 where views are stored.
    pub source_size: [u32; 2],
}

impl SampleViews {
    /// Bytes of all pixels or JPEGs.
    pub fn pixel_bytes(&self) -> usize {
        self.global.bytes.len() + self.local.bytes.len()
    }

    /// Forgets the contents and keeps the memory.
    pub fn clear(&mut self) {
        for pieces in [&mut self.global, &mut self.local] {
            pieces.bytes.clear();
            pieces.lengths.clear();
            pieces.params.clear();
        }
        self.source_size = [0; 2];
    }
}

/// Pictures one after the other.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pieces {
    /// RGB pixels or JPEG files.
    pub bytes: Vec<u8>,
    /// Bytes of each picture.
    pub lengths: Vec<usize>,
    /// `(V, P)`: what was drawn for each view, see [`super::VIEW_PARAMETERS`].
    pub params: Vec<f32>,
}
