//! Writes what `torch.save` writes: a zip archive with a pickle, and the numbers of each tensor in a record of its own.
//!
//! The pickle holds dictionaries, texts, truth and tensors, and names only what `torch.load(weights_only=True)` allows. Records
//! are stored without compression and start at multiples of 64 bytes, so that they can be mapped.
//!
//! Source: `torch/serialization.py`, `_save`; Python's `pickletools.py` for the opcodes of protocol 2.

use std::io::{Cursor, Write as _};

use candle_core::{DType, Tensor};
use shared::{Error, Result};
use zip::write::{SimpleFileOptions, ZipWriter};
use zip::{CompressionMethod, result::ZipError};

/// The directory that all records share; readers take any name.
const ROOT: &str = "archive";
/// `torch.serialization` has written this version since 1.6.
const VERSION: &[u8] = b"3\n";
/// Where records may start, in bytes.
const ALIGNMENT: u16 = 64;

/// What the pickle can hold.
#[derive(Debug)]
pub(super) enum Object {
    /// A dictionary with texts as keys, in this order.
    Dict(Vec<(String, Self)>),
    /// A text.
    Text(String),
    /// `True`.
    True,
    /// A contiguous tensor of f32 or i64.
    Tensor(Tensor),
}

/// The bytes of the file; the same object gives the same bytes.
///
/// # Errors
/// [`Error::Invalid`] for a tensor of another type, or when the archive cannot be made.
pub(super) fn encode(object: &Object) -> Result<Vec<u8>> {
    let mut pickler = Pickler { bytes: vec![0x80, 2], storages: Vec::new() };
    pickler.object(object)?;
    pickler.bytes.push(b'.');
    archive(&pickler).map_err(|error| Error::invalid(format!("cannot make a zip archive: {error}"), ""))
}

fn archive(pickler: &Pickler) -> Result<Vec<u8>, ZipError> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .with_alignment(ALIGNMENT)
        .last_modified_time(zip::DateTime::default());
    let mut record = |name: &str, contents: &[u8]| -> Result<(), ZipError> {
        zip.start_file(format!("{ROOT}/{name}"), options)?;
        Ok(zip.write_all(contents)?)
    };
    record("data.pkl", &pickler.bytes)?;
    record("byteorder", b"little")?;
    for (key, storage) in pickler.storages.iter().enumerate() {
        record(&format!("data/{key}"), storage)?;
    }
    record("version", VERSION)?;
    Ok(zip.finish()?.into_inner())
}

struct Pickler {
    bytes: Vec<u8>,
    /// The numbers of each tensor; its key is its place.
    storages: Vec<Vec<u8>>,
}

impl Pickler {
    fn object(&mut self, object: &Object) -> Result<()> {
        match object {
            Object::Dict(entries) => {
                self.bytes.extend(b"}(");
                for (key, value) in entries {
                    self.text(key);
                    self.object(value)?;
                }
                self.bytes.push(b'u');
            }
            Object::Text(text) => self.text(text),
            Object::True => self.bytes.push(0x88),
            Object::Tensor(tensor) => self.tensor(tensor)?,
        }
        Ok(())
    }

    /// `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`.
    fn tensor(&mut self, tensor: &Tensor) -> Result<()> {
        let flat = tensor.flatten_all()?;
        let (storage_type, bytes) = match tensor.dtype() {
            DType::F32 => ("FloatStorage", bytemuck::cast_slice(&flat.to_vec1::<f32>()?).to_vec()),
            DType::I64 => ("LongStorage", bytemuck::cast_slice(&flat.to_vec1::<i64>()?).to_vec()),
            other => return Err(Error::invalid(format!("tensors of {} are not written", other.as_str()), "")),
        };
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.bytes.push(b'(');

        self.bytes.push(b'(');
        self.text("storage");
        self.global("torch", storage_type);
        self.text(&self.storages.len().to_string());
        self.text("cpu");
        self.integer(tensor.elem_count());
        self.bytes.extend(b"tQ");
        self.storages.push(bytes);

        self.integer(0);
        self.integers(tensor.dims());
        self.integers(tensor.layout().stride());
        self.bytes.push(0x89);
        self.global("collections", "OrderedDict");
        self.bytes.extend(b")R");
        self.bytes.extend(b"tR");
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.bytes.push(b'X');
        self.bytes.extend((text.len() as u32).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn global(&mut self, module: &str, name: &str) {
        self.bytes.extend(format!("c{module}\n{name}\n").into_bytes());
    }

    fn integers(&mut self, values: &[usize]) {
        self.bytes.push(b'(');
        for value in values {
            self.integer(*value);
        }
        self.bytes.push(b't');
    }

    /// A long integer of 8 bytes.
    fn integer(&mut self, value: usize) {
        self.bytes.extend([0x8a, 8]);
        self.bytes.extend((value as i64).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use shared::weights::{Checkpoint, Format};

    use super::*;

    #[test]
    fn our_reader_finds_names_shapes_and_numbers() {
        let floats = Tensor::from_vec(vec![1.5f32, -2.0, 3.25, 0.0, -0.5, 7.0], (2, 3), &Device::Cpu).unwrap();
        let counter = Tensor::from_vec(vec![5i64], (), &Device::Cpu).unwrap();
        let state = vec![("a.weight".into(), Object::Tensor(floats)), ("n".into(), Object::Tensor(counter))];
        let checkpoint = Object::Dict(vec![
            ("model".into(), Object::Dict(state)),
            ("author".into(), Object::Text("é".into())),
            ("flag".into(), Object::True),
        ]);
        let bytes = encode(&checkpoint).unwrap();
        assert_eq!(bytes, encode(&checkpoint).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.pth");
        shared::io::write_atomic(&path, &bytes).unwrap();

        let found = Checkpoint::open(&path).unwrap();
        assert_eq!(found.format(), Format::PytorchZip);
        assert!(found.unknown_globals().is_empty());
        let names: Vec<&str> = found.entries().iter().map(shared::weights::Entry::name).collect();
        assert_eq!((found.state_key(), names), ("model", vec!["a.weight", "n"]));
        let tensor = found.tensor("a.weight").unwrap();
        assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[1.5, -2.0, 3.25], [0.0, -0.5, 7.0]]);
    }

    #[test]
    fn records_start_at_multiples_of_64_bytes() {
        let tensor = Tensor::from_vec(vec![1f32; 5], 5, &Device::Cpu).unwrap();
        let state = ["a", "b", "c"].map(|name| (name.to_string(), Object::Tensor(tensor.clone())));
        let bytes = encode(&Object::Dict(state.into())).unwrap();
        let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).unwrap();
        for index in 0..archive.len() {
            let record = archive.by_index(index).unwrap();
            assert_eq!(record.data_start().unwrap() % 64, 0, "record {index}");
        }
    }

    #[test]
    fn other_types_are_refused() {
        let tensor = Tensor::zeros(3, DType::U8, &Device::Cpu).unwrap();
        assert!(matches!(encode(&Object::Tensor(tensor)).unwrap_err(), Error::Invalid { .. }));
    }
}
