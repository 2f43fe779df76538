//! Reading one shard: every stored picture is a slice of the mapped file.

use std::ops::Range;
use std::path::Path;

use super::{Codec, LocalDetails, SampleViews, ShardSetDetails, Store, VIEW_PARAMETERS};
use crate::error::{Error, Fault, Result};
use crate::tensor_file::TensorFile;
use crate::transforms::View;
use crate::transforms::decode::MAX_PIXELS;

/// One shard file.
#[derive(Debug)]
pub struct Shard {
    file: TensorFile,
    sample_ids: Vec<u64>,
    labels: Vec<i64>,
    layout: Layout,
}

/// What the set's details say about the tensors of a shard.
#[derive(Debug, Clone, Copy)]
struct Layout {
    store: Store,
    codec: Codec,
    global: Pictures,
    local: Option<Pictures>,
}

/// The stored pictures of one kind.
#[derive(Debug, Clone, Copy)]
struct Pictures {
    /// Pictures of a sample.
    count: usize,
    height: usize,
    width: usize,
    names: &'static Names,
}

/// What the tensors of one kind of pictures are called.
#[derive(Debug)]
struct Names {
    pixels: &'static str,
    bytes: &'static str,
    offsets: &'static str,
    params: &'static str,
}

const GLOBAL: Names = Names { pixels: "pixels", bytes: "bytes", offsets: "offsets", params: "view_params" };
const LOCAL: Names =
    Names { pixels: "local_pixels", bytes: "local_bytes", offsets: "local_offsets", params: "local_view_params" };

impl Layout {
    fn new(details: &ShardSetDetails) -> Self {
        let ShardSetDetails { views, height, width, store, codec, local, .. } = *details;
        let (count, local) = match store {
            Store::Views => (views, local),
            Store::Source => (1, None),
        };
        let local = local.map(|LocalDetails { views, size }| Pictures {
            count: views,
            height: size,
            width: size,
            names: &LOCAL,
        });
        Self { store, codec, global: Pictures { count, height, width, names: &GLOBAL }, local }
    }

    fn kinds(&self) -> impl Iterator<Item = &Pictures> {
        std::iter::once(&self.global).chain(&self.local)
    }
}

impl Shard {
    /// Opens a shard and checks it against the layout of its set.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when a tensor is missing, of another type or shape, a label is outside the classes, or
    /// the offsets and sizes of pictures do not fit their bytes.
    pub fn open(path: impl AsRef<Path>, details: &ShardSetDetails) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let samples = file.shape("sample_ids")?.first().copied().unwrap_or(0);
        file.expect_shape("sample_ids", &[samples], "[n]")?;
        file.expect_shape("labels", &[samples], "[n]")?;
        let sample_ids = file.read::<u64>("sample_ids")?.into_owned();
        let labels = file.read::<i64>("labels")?.into_owned();
        let known = -1..i64::try_from(details.classes.len()).unwrap_or(i64::MAX);
        if let Some(label) = labels.iter().find(|label| !known.contains(label)) {
            let what = format!("label {label} is outside the {} classes of the set", details.classes.len());
            return Err(file.fault(Fault::Value(what)));
        }
        let layout = Layout::new(details);
        let shard = Self { file, sample_ids, labels, layout };
        for pictures in layout.kinds() {
            shard.check(pictures)?;
        }
        if layout.store == Store::Source {
            shard.check_sizes()?;
        }
        Ok(shard)
    }

    fn check(&self, pictures: &Pictures) -> Result<()> {
        let (file, samples) = (&self.file, self.len());
        let Pictures { count, height, width, names } = *pictures;
        if self.layout.store == Store::Views {
            file.expect_shape(names.params, &[samples, count, VIEW_PARAMETERS.len()], "[n, V, P]")?;
            file.read::<f32>(names.params)?;
            if self.layout.codec == Codec::Raw {
                let shape = [samples, count, height, width, 3];
                return file.view_shaped::<u8>(names.pixels, &shape, "[n, V, H, W, 3]").map(drop);
            }
        }
        let total = file.view::<u8>(names.bytes)?.len();
        let pieces = samples.saturating_mul(count);
        file.expect_shape(names.offsets, &[pieces.saturating_add(1)], "[n * V + 1]")?;
        let offsets = file.read::<u64>(names.offsets)?;
        let fault = |what: String| Err(file.fault(Fault::Value(format!("`{}` {what}", names.offsets))));
        match (offsets.first(), offsets.last()) {
            (Some(0), Some(&end)) if end == total as u64 => {}
            (first, last) => {
                let (first, last) = (first.copied().unwrap_or(0), last.copied().unwrap_or(0));
                return fault(format!("go from {first} to {last}, there are {total} bytes"));
            }
        }
        if let Some(at) = offsets.windows(2).position(|pair| pair[0] >= pair[1]) {
            return fault(format!("must rise, number {} is {} after {}", at + 1, offsets[at + 1], offsets[at]));
        }
        Ok(())
    }

    /// Source images have pixels, not too many, and as many bytes as pixels when they are plain.
    fn check_sizes(&self) -> Result<()> {
        self.file.expect_shape("sizes", &[self.len(), 2], "[n, 2]")?;
        self.file.read::<u32>("sizes")?;
        for row in 0..self.len() {
            let (height, width) = self.source_size(row)?;
            let pixels = height as u64 * width as u64;
            let bytes = self.place(row, View::Global(0))?.1.len() as u64;
            let what = if !(1..=MAX_PIXELS).contains(&pixels) {
                format!("image {row} cannot have {height} x {width} pixels")
            } else if self.layout.codec == Codec::Raw && bytes != pixels * 3 {
                format!("image {row} of {height} x {width} pixels cannot have {bytes} bytes")
            } else {
                continue;
            };
            return Err(self.file.fault(Fault::Value(what)));
        }
        Ok(())
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.sample_ids.len()
    }

    /// Whether it holds no sample.
    pub fn is_empty(&self) -> bool {
        self.sample_ids.is_empty()
    }

    /// `(n,)`: who the samples are.
    pub fn sample_ids(&self) -> &[u64] {
        &self.sample_ids
    }

    /// `(n,)`: class indices, -1 for none.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// The pixels of one global view, `(H, W, 3)` RGB, in place.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the shard does not hold views as plain pixels: [`super::ViewReader`] reads any view.
    ///
    /// # Panics
    /// When `row` or `view` is out of range.
    pub fn view(&self, row: usize, view: usize) -> Result<&[u8]> {
        self.plain_view(row, View::Global(view))?.ok_or_else(|| {
            let path = self.file.path().display();
            Error::invalid(format!("`{path}` does not hold views as plain pixels"), "read them through a `ViewReader`")
        })
    }

    /// The pixels of a view in place, if that is how it is stored.
    pub(super) fn plain_view(&self, row: usize, view: View) -> Result<Option<&[u8]>> {
        let plain = self.layout.store == Store::Views && self.layout.codec == Codec::Raw;
        if plain { self.stored(row, view).map(Some) } else { Ok(None) }
    }

    /// The stored bytes of a view; for any view of a source image, those of the image.
    pub(super) fn stored(&self, row: usize, view: View) -> Result<&[u8]> {
        let (name, range) = self.place(row, view)?;
        Ok(&self.file.bytes(name)?[range])
    }

    /// Height and width of a stored source image.
    pub(super) fn source_size(&self, row: usize) -> Result<(usize, usize)> {
        let sizes: [u8; 8] = self.file.bytes("sizes")?.as_chunks().0[row];
        let [height, width] = [0, 4].map(|i| u32::from_le_bytes([sizes[i], sizes[i + 1], sizes[i + 2], sizes[i + 3]]));
        Ok((height as usize, width as usize))
    }

    /// What was drawn for one global view: a row of P numbers, named by [`VIEW_PARAMETERS`].
    ///
    /// # Errors
    /// [`Error::Invalid`] when the shard holds source images: [`super::ShardSet::view_params`] knows what is drawn.
    ///
    /// # Panics
    /// When `row` or `view` is out of range.
    pub fn view_params(&self, row: usize, view: usize) -> Result<[f32; VIEW_PARAMETERS.len()]> {
        self.stored_params(row, View::Global(view))
    }

    /// As [`Shard::view_params`], of any view.
    pub(super) fn stored_params(&self, row: usize, view: View) -> Result<[f32; VIEW_PARAMETERS.len()]> {
        if self.layout.store == Store::Source {
            let path = self.file.path().display();
            return Err(Error::invalid(format!("`{path}` stores source images, not views"), "ask the set"));
        }
        let (pictures, index) = self.pictures(row, view);
        let bytes = self.file.bytes(pictures.names.params)?.as_chunks::<4>().0;
        let start = (row * pictures.count + index) * VIEW_PARAMETERS.len();
        Ok(std::array::from_fn(|i| f32::from_le_bytes(bytes[start + i])))
    }

    /// Whether a row is exactly this sample.
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a shard that was opened.
    ///
    /// # Panics
    /// When `row` is out of range.
    pub fn holds(&self, row: usize, sample: &SampleViews) -> Result<bool> {
        Ok(self.difference(row, sample)?.is_none())
    }

    /// What of a sample is not as it is stored; none when all is.
    ///
    /// # Errors
    /// [`Error::Damaged`] cannot happen for a shard that was opened.
    ///
    /// # Panics
    /// When `row` is out of range.
    pub fn difference(&self, row: usize, sample: &SampleViews) -> Result<Option<String>> {
        if self.layout.store == Store::Source {
            let size = self.source_size(row)?;
            let same = sample.source_size.map(|side| side as usize) == [size.0, size.1]
                && self.stored(row, View::Global(0))? == sample.global.bytes;
            return Ok((!same).then(|| "source image".into()));
        }
        let views: [Kind; 2] = [("view", View::Global), ("local view", View::Local)];
        for (pictures, ((name, of), pieces)) in
            self.layout.kinds().zip(views.into_iter().zip([&sample.global, &sample.local]))
        {
            let mut start = 0;
            for index in 0..pictures.count {
                let end = start + pieces.lengths.get(index).copied().unwrap_or(0);
                let params = pieces.params.get(index * VIEW_PARAMETERS.len()..(index + 1) * VIEW_PARAMETERS.len());
                let same = pieces.bytes.get(start..end) == Some(self.stored(row, of(index))?)
                    && params == Some(&self.stored_params(row, of(index))?[..]);
                if !same {
                    return Ok(Some(format!("{name} {index}")));
                }
                start = end;
            }
        }
        Ok(None)
    }

    /// Asks the system to read the stored bytes of a view ahead of their use.
    pub(super) fn will_need(&self, tensor: &'static str, range: Range<usize>) -> Result<()> {
        self.file.will_need(tensor, range)
    }

    /// An [`Error::Damaged`] about this shard.
    pub(super) fn fault(&self, fault: Fault) -> Error {
        self.file.fault(fault)
    }

    /// The tensor and the bytes in it where a view, or the source image of any view, is stored.
    pub(super) fn place(&self, row: usize, view: View) -> Result<(&'static str, Range<usize>)> {
        let (pictures, index) = self.pictures(row, view);
        let Pictures { count, height, width, names } = *pictures;
        let piece = row * count + index;
        if self.layout.store == Store::Views && self.layout.codec == Codec::Raw {
            let bytes = height * width * 3;
            return Ok((names.pixels, piece * bytes..(piece + 1) * bytes));
        }
        // Behind a tensor of bytes, numbers need not lie where a machine reads them best.
        let offsets = self.file.bytes(names.offsets)?.as_chunks::<8>().0;
        Ok((names.bytes, u64::from_le_bytes(offsets[piece]) as usize..u64::from_le_bytes(offsets[piece + 1]) as usize))
    }

    fn pictures(&self, row: usize, view: View) -> (&Pictures, usize) {
        let found = match (self.layout.store, view) {
            (Store::Source, _) => Some((&self.layout.global, 0)),
            (Store::Views, View::Global(index)) => Some((&self.layout.global, index)),
            (Store::Views, View::Local(index)) => self.layout.local.as_ref().map(|local| (local, index)),
        };
        let inside = found.filter(|&(pictures, index)| row < self.len() && index < pictures.count);
        let Some(found) = inside else { outside(row, view) };
        found
    }
}

/// A kind of view, for people and for programs.
type Kind = (&'static str, fn(usize) -> View);

#[expect(clippy::panic, reason = "an index out of range, as of a slice")]
fn outside(row: usize, view: View) -> ! {
    panic!("{view:?} of row {row} is outside the shard")
}
