//! Tensor files: safetensors, read through a memory map and checked against the file's real size, written in one pass.
//!
//! Any safetensors reader opens what is written here. One habit goes beyond the format, and is within it: the header is
//! padded with spaces so that the tensor which matters (pixels, embeddings) starts on a 4096-byte boundary.
#![warn(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use crate::error::{Error, Fault, Result};
use crate::io::{AtomicFile, FileEntry, HEADER_BYTES, HeaderLastFile, Spool};
use crate::mmap::MappedFile;

#[cfg(target_endian = "big")]
compile_error!("safetensors data is little-endian and read in place: big-endian machines are not supported");

/// Alignment of the tensor that matters in a written file: a page.
pub const DATA_ALIGNMENT: usize = HEADER_BYTES;

/// Bytes before the header: its length.
const HEADER_LENGTH_BYTES: usize = 8;

/// A number type that tensors hold.
pub trait Element: Pod + Send + Sync {
    /// Its name in the format.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($rust:ty => $name:ident),*) => {$(impl Element for $rust { const DTYPE: Dtype = Dtype::$name; })*};
}
elements!(u8 => U8, u32 => U32, i64 => I64, u64 => U64, f16 => F16, bf16 => BF16, f32 => F32, f64 => F64);

/// A tensor file open for reading.
#[derive(Debug)]
pub struct TensorFile {
    map: MappedFile,
    metadata: Metadata,
    data_start: usize,
}

impl TensorFile {
    /// Opens a file and checks its header: every tensor lies inside the file, without gaps or overlaps, and the file ends with
    /// the last one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when a rule of the format is broken.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map).map_err(|e| header_error(&map, &e))?;
        Ok(Self { data_start: HEADER_LENGTH_BYTES + header_bytes, metadata, map })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// Names in the order of the data.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The text entries of the header.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.metadata.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// A tensor's dimensions.
    ///
    /// # Errors
    /// [`Error::Damaged`] with [`Fault::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.info(name)?.shape)
    }

    /// A tensor's element type.
    ///
    /// # Errors
    /// [`Error::Damaged`] with [`Fault::MissingTensor`].
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.info(name)?.dtype)
    }

    /// A tensor's elements, in place.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the tensor is missing, of another type, or not aligned for it.
    pub fn view<T: Element>(&self, name: &str) -> Result<&[T]> {
        let info = self.info(name)?;
        if info.dtype != T::DTYPE {
            return Err(self.fault(Fault::Dtype {
                name: name.into(),
                expected: format!("{:?}", T::DTYPE),
                found: format!("{:?}", info.dtype),
            }));
        }
        bytemuck::try_cast_slice(self.bytes(name)?)
            .map_err(|e| self.fault(Fault::Value(format!("tensor `{name}` cannot be read in place: {e}"))))
    }

    /// A tensor's elements, in place where they are aligned for their type, copied otherwise.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the tensor is missing or of another type.
    pub fn read<T: Element>(&self, name: &str) -> Result<Cow<'_, [T]>> {
        match self.view(name) {
            Ok(elements) => Ok(Cow::Borrowed(elements)),
            Err(Error::Damaged { fault: Fault::Value(_), .. }) => {
                Ok(Cow::Owned(bytemuck::pod_collect_to_vec(self.bytes(name)?)))
            }
            Err(error) => Err(error),
        }
    }

    /// Checks a tensor's shape; `letters` names the dimensions in the message.
    ///
    /// # Errors
    /// [`Error::Damaged`] with [`Fault::MissingTensor`] or [`Fault::Shape`].
    pub fn expect_shape(&self, name: &str, shape: &[usize], letters: &str) -> Result<()> {
        let found = self.shape(name)?;
        if found == shape {
            return Ok(());
        }
        let expected = format!("{letters} = {shape:?}");
        Err(self.fault(Fault::Shape { name: name.into(), expected, found: found.to_vec() }))
    }

    /// Like [`TensorFile::view`], after comparing the shape; `letters` names the dimensions in the message.
    ///
    /// # Errors
    /// As [`TensorFile::view`], and [`Fault::Shape`].
    pub fn view_shaped<T: Element>(&self, name: &str, shape: &[usize], letters: &str) -> Result<&[T]> {
        self.expect_shape(name, shape, letters)?;
        self.view(name)
    }

    /// A tensor's bytes.
    ///
    /// # Errors
    /// [`Error::Damaged`] with [`Fault::MissingTensor`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (begin, end) = self.info(name)?.data_offsets;
        // The header was checked against the file's length when it was opened.
        Ok(&self.map[self.data_start + begin..self.data_start + end])
    }

    /// Asks the system to read a part of a tensor ahead of its use; `range` counts the tensor's bytes.
    ///
    /// # Errors
    /// [`Error::Damaged`] with [`Fault::MissingTensor`].
    ///
    /// # Panics
    /// When the range does not lie inside the file.
    pub fn will_need(&self, name: &str, range: std::ops::Range<usize>) -> Result<()> {
        let start = self.data_start + self.info(name)?.data_offsets.0;
        self.map.will_need(start + range.start..start + range.end);
        Ok(())
    }

    /// A copy of a tensor for computing, in its own element type.
    ///
    /// # Errors
    /// [`Error::Damaged`] when it is missing or of a type that candle does not know.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        let dtype =
            DType::try_from(info.dtype).map_err(|e| self.fault(Fault::Value(format!("tensor `{name}`: {e}"))))?;
        Ok(Tensor::from_raw_buffer(self.bytes(name)?, dtype, &info.shape, &Device::Cpu)?)
    }

    /// All tensors, by name.
    ///
    /// # Errors
    /// As [`TensorFile::tensor`].
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        self.names().into_iter().map(|name| Ok((name.clone(), self.tensor(&name)?))).collect()
    }

    /// An [`Error::Damaged`] about this file.
    pub fn fault(&self, fault: Fault) -> Error {
        Error::damaged(self.path(), fault)
    }

    fn info(&self, name: &str) -> Result<&safetensors::tensor::TensorInfo> {
        self.metadata.info(name).ok_or_else(|| self.fault(Fault::MissingTensor(name.into())))
    }
}

fn header_error(map: &MappedFile, error: &safetensors::SafeTensorError) -> Error {
    // The commonest damage, a file cut short, deserves numbers; the crate only says that the lengths differ.
    let promised = (|| {
        let header_bytes =
            usize::try_from(u64::from_le_bytes(map.get(..HEADER_LENGTH_BYTES)?.try_into().ok()?)).ok()?;
        let header = map.get(HEADER_LENGTH_BYTES..header_bytes.checked_add(HEADER_LENGTH_BYTES)?)?;
        let header: serde_json::Value = serde_json::from_slice(header).ok()?;
        let ends = header.as_object()?.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64());
        Some(ends.max()?.saturating_add(u64::try_from(header_bytes + HEADER_LENGTH_BYTES).ok()?))
    })();
    let found = map.len() as u64;
    match promised {
        Some(expected) if expected != found => Error::damaged(map.path(), Fault::Length { expected, found }),
        _ => Error::damaged(map.path(), Fault::Syntax(format!("not a safetensors file: {error}"))),
    }
}

/// Name, type and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A spec from its parts.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes one tensor file from front to back, so that a file may be larger than memory.
#[derive(Debug)]
pub struct TensorFileWriter {
    file: AtomicFile,
    path: PathBuf,
    specs: Vec<TensorSpec>,
    /// Which tensor is being written, and how many of its bytes are.
    position: (usize, usize),
}

impl TensorFileWriter {
    /// Starts a file. `specs` come in the order in which their data will be written; `aligned` is the index of the tensor
    /// that starts on a page. Tensors that follow one of smaller elements may be unaligned: see [`TensorFile::read`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(
        path: impl AsRef<Path>,
        specs: Vec<TensorSpec>,
        aligned: usize,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let mut file = AtomicFile::create(&path)?;
        file.append(&header(&specs, aligned, metadata))?;
        Ok(Self { file, path, specs, position: (0, 0) })
    }

    /// Appends elements to the tensor being written; the next tensor begins when this one is full.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] when the elements do not fit the announced tensor.
    pub fn append<T: Element>(&mut self, elements: &[T]) -> Result<()> {
        let wrong = |what: String| Err(Error::invalid(format!("writing `{}`: {what}", self.path.display()), ""));
        let (mut index, mut written) = self.position;
        while index < self.specs.len() && written == self.specs[index].bytes() {
            (index, written) = (index + 1, 0);
        }
        if elements.is_empty() {
            return Ok(());
        }
        let Some(spec) = self.specs.get(index) else { return wrong("more data than was announced".into()) };
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        if spec.dtype != T::DTYPE || written + bytes.len() > spec.bytes() {
            return wrong(format!("{} elements of {:?} do not fit tensor `{}`", elements.len(), T::DTYPE, spec.name));
        }
        self.file.append(bytes)?;
        self.position = (index, written + bytes.len());
        Ok(())
    }

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] when data is missing.
    pub fn finish(self) -> Result<FileEntry> {
        let (index, written) = self.position;
        let missing = self.specs.get(index).map_or(0, |spec| spec.bytes() - written)
            + self.specs.iter().skip(index + 1).map(TensorSpec::bytes).sum::<usize>();
        if missing > 0 {
            return Err(Error::invalid(format!("writing `{}`: {missing} bytes are missing", self.path.display()), ""));
        }
        self.file.commit()
    }
}

/// Writes a tensor file whose shapes are known only when its data was written. The first tensor starts on a page.
#[derive(Debug)]
pub struct GrowingTensorFile {
    file: HeaderLastFile,
    path: PathBuf,
    written: usize,
}

impl GrowingTensorFile {
    /// Starts a file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        Ok(Self { file: HeaderLastFile::create(&path)?, path, written: 0 })
    }

    /// Appends elements; the caller knows to which tensor they belong.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append<T: Element>(&mut self, elements: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        self.file.append(bytes)?;
        self.written += bytes.len();
        Ok(())
    }

    /// Appends all that was set aside.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append_spool(&mut self, spool: Spool) -> Result<()> {
        spool.replay(|bytes| self.append(bytes))
    }

    /// Writes the header, syncs the file and gives it its name. `specs` come in the order in which their data was written.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] when the data has another length than the specs, or they do not fit the header.
    pub fn finish(self, specs: &[TensorSpec]) -> Result<FileEntry> {
        let wrong = |what: String| Error::invalid(format!("writing `{}`: {what}", self.path.display()), "");
        let announced = specs.iter().map(TensorSpec::bytes).sum::<usize>();
        if announced != self.written {
            return Err(wrong(format!("{} bytes were written, {announced} belong to the tensors", self.written)));
        }
        let header = header(specs, 0, &BTreeMap::new());
        let header = <&[u8; HEADER_BYTES]>::try_from(&header[..])
            .map_err(|e| wrong(format!("{} tensors do not fit the header: {e}", specs.len())))?;
        self.file.commit(header)
    }
}

/// The header's length and text, padded so that the tensor with index `aligned` starts on a page.
fn header(specs: &[TensorSpec], aligned: usize, metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut json = serde_json::Map::new();
    if !metadata.is_empty() {
        json.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut offset = 0;
    let mut aligned_start = 0;
    for (index, spec) in specs.iter().enumerate() {
        let end = offset + spec.bytes();
        json.insert(
            spec.name.clone(),
            serde_json::json!({"dtype": format!("{:?}", spec.dtype), "shape": spec.shape, "data_offsets": [offset, end]}),
        );
        if index == aligned {
            aligned_start = offset;
        }
        offset = end;
    }
    let mut text = serde_json::Value::Object(json).to_string().into_bytes();
    let unpadded = HEADER_LENGTH_BYTES + text.len() + aligned_start;
    text.resize(text.len() + unpadded.next_multiple_of(DATA_ALIGNMENT) - unpadded, b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}

/// Writes whole tensors (checkpoints, exported students); `u8`, `u32`, `i64`, `f16`, `bf16`, `f32` and `f64`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] for another element type.
pub fn write_tensors(
    path: impl AsRef<Path>,
    metadata: &BTreeMap<String, String>,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<FileEntry> {
    let mut ordered: Vec<(&String, &Tensor)> = tensors.iter().collect();
    ordered.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));
    let specs = ordered
        .iter()
        .map(|(name, tensor)| Ok(TensorSpec::new(*name, format_dtype(tensor.dtype())?, tensor.dims())))
        .collect::<Result<Vec<_>>>()?;
    let last = specs.len().saturating_sub(1);
    let mut writer = TensorFileWriter::create(path, specs, last, metadata)?;
    for (_, tensor) in ordered {
        let flat = tensor.flatten_all()?;
        match tensor.dtype() {
            DType::U8 => writer.append(&flat.to_vec1::<u8>()?)?,
            DType::U32 => writer.append(&flat.to_vec1::<u32>()?)?,
            DType::I64 => writer.append(&flat.to_vec1::<i64>()?)?,
            DType::F16 => writer.append(&flat.to_vec1::<f16>()?)?,
            DType::BF16 => writer.append(&flat.to_vec1::<bf16>()?)?,
            DType::F64 => writer.append(&flat.to_vec1::<f64>()?)?,
            _ => writer.append(&flat.to_vec1::<f32>()?)?,
        }
    }
    writer.finish()
}

fn format_dtype(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I64 => Dtype::I64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        other => return Err(Error::invalid(format!("tensors of {} are not written", other.as_str()), "")),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn written(dir: &Path) -> PathBuf {
        let path = dir.join("t.safetensors");
        let specs = vec![
            TensorSpec::new("ids", Dtype::U64, &[3]),
            TensorSpec::new("empty", Dtype::F32, &[0, 5]),
            TensorSpec::new("pixels", Dtype::U8, &[3, 5]),
        ];
        let metadata = BTreeMap::from([("kind".to_string(), "test".to_string())]);
        let mut writer = TensorFileWriter::create(&path, specs, 2, &metadata).unwrap();
        writer.append(&[1u64, 2]).unwrap();
        writer.append(&[3u64]).unwrap();
        writer.append::<u8>(&(0..15).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        path
    }

    fn fault_of(path: &Path) -> Fault {
        match TensorFile::open(path).unwrap_err() {
            Error::Damaged { fault, .. } => fault,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn round_trip_keeps_values_and_aligns_the_last_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.names(), ["ids", "empty", "pixels"]);
        assert_eq!(file.view::<u64>("ids").unwrap(), [1, 2, 3]);
        assert_eq!(file.view_shaped::<u8>("pixels", &[3, 5], "[n, 5]").unwrap().len(), 15);
        assert_eq!(file.metadata()["kind"], "test");
        assert_eq!(fs::metadata(&path).unwrap().len() % DATA_ALIGNMENT as u64, 15);
        assert_eq!(file.tensor("pixels").unwrap().dims(), [3, 5]);
    }

    #[test]
    fn cut_file_names_both_lengths() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let bytes = fs::read(&path).unwrap();
        for length in [bytes.len() - 1, bytes.len() + 1] {
            let mut changed = bytes.clone();
            changed.resize(length, 0);
            crate::io::write_atomic(&path, &changed).unwrap();
            assert_eq!(fault_of(&path), Fault::Length { expected: bytes.len() as u64, found: length as u64 });
        }
    }

    #[test]
    fn header_damage_is_a_syntax_fault() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let bytes = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes[8..400]).into_owned();
        let patched = |from: &str, to: &str| {
            assert_eq!(from.len(), to.len());
            let mut changed = bytes.clone();
            let at = 8 + text.find(from).unwrap();
            changed[at..at + to.len()].copy_from_slice(to.as_bytes());
            changed
        };
        let cases = [
            ("shorter than a header", bytes[..5].to_vec()),
            ("empty", Vec::new()),
            ("header longer than the file", [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat()),
            ("not JSON", patched("{", "(")),
            ("unknown type", patched("U64", "U65")),
            ("shape disagrees with the length", patched("[3,5]", "[4,5]")),
            ("overlapping tensors", patched("[24,39]", "[23,39]")),
            ("shape product overflows", patched("\"shape\":[3,5]", "\"shape\":[9e9]")),
        ];
        for (name, changed) in cases {
            crate::io::write_atomic(&path, &changed).unwrap();
            assert!(matches!(fault_of(&path), Fault::Syntax(_)), "{name}");
        }
    }

    #[test]
    fn a_file_that_grew_equals_one_of_announced_shapes() {
        let dir = tempfile::tempdir().unwrap();
        for rows in [0, 1, 3000] {
            let specs = [TensorSpec::new("bytes", Dtype::U8, &[rows, 3]), TensorSpec::new("ids", Dtype::U64, &[rows])];
            let (bytes, ids) = (vec![7u8; rows * 3], vec![9u64; rows]);
            let mut announced =
                TensorFileWriter::create(dir.path().join("a"), specs.to_vec(), 0, &BTreeMap::new()).unwrap();
            let mut grown = GrowingTensorFile::create(dir.path().join("b")).unwrap();
            let mut spool = Spool::beside(dir.path()).unwrap();
            announced.append(&bytes).unwrap();
            announced.append(&ids).unwrap();
            spool.append(bytemuck::cast_slice(&ids)).unwrap();
            grown.append(&bytes).unwrap();
            grown.append_spool(spool).unwrap();
            let (a, b) = (announced.finish().unwrap(), grown.finish(&specs).unwrap());
            assert_eq!((a.bytes, a.blake3), (b.bytes, b.blake3));
        }
        let mut short = GrowingTensorFile::create(dir.path().join("c")).unwrap();
        short.append(&[1u8]).unwrap();
        assert!(short.finish(&[TensorSpec::new("bytes", Dtype::U8, &[2])]).is_err());
        let many: Vec<_> = (0..200).map(|i| TensorSpec::new(format!("t{i}"), Dtype::U8, &[0])).collect();
        assert!(GrowingTensorFile::create(dir.path().join("c")).unwrap().finish(&many).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn wrong_requests_name_the_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let file = TensorFile::open(written(dir.path())).unwrap();
        for error in [
            file.view::<u8>("labels").unwrap_err(),
            file.view::<i64>("ids").unwrap_err(),
            file.view_shaped::<u64>("ids", &[4], "[n]").unwrap_err(),
        ] {
            assert!(error.to_string().contains("labels") || error.to_string().contains("ids"), "{error}");
        }
    }

    #[test]
    fn writer_refuses_wrong_amounts_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let create =
            || TensorFileWriter::create(&path, vec![TensorSpec::new("a", Dtype::F32, &[2])], 0, &BTreeMap::new());
        let mut writer = create().unwrap();
        assert!(writer.append(&[1u8]).is_err());
        assert!(writer.append(&[1f32, 2.0, 3.0]).is_err());
        writer.append(&[1f32]).unwrap();
        assert!(writer.finish().is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
