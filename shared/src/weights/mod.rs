//! Reading checkpoints of other programs: PyTorch's two formats and safetensors, as named tensors.
//!
//! A [`Checkpoint`] is opened by looking at its first bytes, never at its name, and never runs anything that a pickle
//! asks for: a small interpreter builds plain values, recognises the handful of calls that rebuild tensors, and notes
//! every other one ([`Checkpoint::unknown_globals`]). The file is mapped, opening it reads descriptions only, and a
//! tensor's numbers are read when [`Checkpoint::tensor`] asks for them. Every size is checked against the file before
//! anything is allocated. Which network a checkpoint belongs to is told by [`names`].

mod dtype;
mod layout;
pub mod names;
mod object;
mod pickle;
mod pth_legacy;
mod pth_zip;
mod safetensors;
mod state_dict;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use candle_core::{Device, Tensor};

pub use self::dtype::Dtype;
use self::layout::Layout;
use self::object::{Arena, Node, TensorNode};
use crate::error::{Error, Fault, Result};
use crate::mmap::MappedFile;

/// How a checkpoint is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// `torch.save` since PyTorch 1.6.
    PytorchZip,
    /// `torch.save` before PyTorch 1.6, or with `_use_new_zipfile_serialization=False`.
    PytorchLegacy,
    /// A safetensors file.
    Safetensors,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PytorchZip => "PyTorch (zip)",
            Self::PytorchLegacy => "PyTorch (legacy)",
            Self::Safetensors => "safetensors",
        })
    }
}

/// One tensor of a checkpoint, as it is described; its numbers are not read.
#[derive(Debug)]
pub struct Entry {
    name: String,
    dtype: Dtype,
    layout: Layout,
    record: Record,
}

impl Entry {
    /// The name in the state dict.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The element type in the file.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }
}

/// Where the bytes of a storage lie.
#[derive(Debug, Clone)]
enum Record {
    /// As they are, from `start`; the range was checked against the file.
    Plain { start: u64, length: u64 },
    /// Compressed, entry `index` of the zip archive.
    Deflated { index: usize, length: u64 },
}

impl Record {
    fn length(&self) -> u64 {
        match self {
            Self::Plain { length, .. } | Self::Deflated { length, .. } => *length,
        }
    }
}

/// The storages of a checkpoint by key.
#[derive(Debug)]
struct Archive {
    records: BTreeMap<String, Record>,
    big_endian: bool,
}

/// A checkpoint that was opened and whose descriptions were checked.
#[derive(Debug)]
pub struct Checkpoint {
    file: MappedFile,
    format: Format,
    big_endian: bool,
    entries: Vec<Entry>,
    index: BTreeMap<String, usize>,
    metadata: BTreeMap<String, serde_json::Value>,
    state_key: String,
    other_state_keys: Vec<(String, usize)>,
    skipped: Vec<(String, String)>,
    unknown_globals: Vec<String>,
}

impl Checkpoint {
    /// Opens a checkpoint and chooses its state dict: under one of the usual keys, at the top, or wherever most tensors
    /// are.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Io`] when the file cannot be read, [`Error::Damaged`] when it breaks a rule of its
    /// format, [`Error::Invalid`] when it is no checkpoint at all or holds no state dict.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_at(path, None)
    }

    /// Opens a checkpoint and takes the state dict at `state_key`, a path of keys joined by dots.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; [`Error::Invalid`] also when nothing is at `state_key`, naming what there is.
    pub fn open_at(path: impl AsRef<Path>, state_key: Option<&str>) -> Result<Self> {
        let path = path.as_ref();
        if !path.exists() {
            let hint = "check the path of the checkpoint".to_owned();
            return Err(Error::Missing { what: "checkpoint", path: path.to_path_buf(), hint });
        }
        let file = MappedFile::open(path)?;
        let damaged = |fault| Error::damaged(path, fault);
        match sniff(&file)? {
            Format::Safetensors => {
                if let Some(key) = state_key.filter(|key| !key.is_empty()) {
                    return Err(Error::invalid(
                        format!("`{}` is a safetensors file and has no state dict at `{key}`", path.display()),
                        "a safetensors file is flat: leave the key out",
                    ));
                }
                let (entries, metadata, skipped) = safetensors::open(&file).map_err(damaged)?;
                Ok(Self::assemble(file, Format::Safetensors, entries, metadata, skipped))
            }
            format => {
                let open = if format == Format::PytorchZip { pth_zip::open } else { pth_legacy::open };
                let (pickle, archive) = open(&file).map_err(damaged)?;
                let arena = &pickle.arena;
                let state = state_dict::find(arena, pickle.root, state_key).map_err(|reason| {
                    Error::invalid(
                        format!("`{}` cannot be used: {reason}", path.display()),
                        "save a state dict: `torch.save(model.state_dict(), PATH)`",
                    )
                })?;
                let mut entries = Vec::with_capacity(state.tensors.len());
                let mut skipped: Vec<_> =
                    state.skipped.iter().map(|(name, what)| ((*name).to_owned(), what.clone())).collect();
                for (name, tensor) in state.tensors {
                    match entry(arena, name, tensor, &archive, file.len() as u64).map_err(damaged)? {
                        Ok(entry) => entries.push(entry),
                        Err(what) => skipped.push((name.to_owned(), what)),
                    }
                }
                let metadata = state_dict::metadata(arena, pickle.root);
                let (key, others) = (state.key, state.others);
                let mut checkpoint = Self::assemble(file, format, entries, metadata, skipped);
                checkpoint.big_endian = archive.big_endian;
                checkpoint.state_key = key;
                checkpoint.other_state_keys = others;
                checkpoint.unknown_globals = arena.unknown_globals.iter().cloned().collect();
                Ok(checkpoint)
            }
        }
    }

    fn assemble(
        file: MappedFile,
        format: Format,
        entries: Vec<Entry>,
        metadata: BTreeMap<String, serde_json::Value>,
        skipped: Vec<(String, String)>,
    ) -> Self {
        let index = entries.iter().enumerate().map(|(index, entry)| (entry.name.clone(), index)).collect();
        Self {
            file,
            format,
            big_endian: false,
            entries,
            index,
            metadata,
            state_key: String::new(),
            other_state_keys: Vec::new(),
            skipped,
            unknown_globals: Vec::new(),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// How it is written.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Its tensors, in the order of the file (safetensors: in the order of the data).
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Scalars beside the weights, such as `epoch` and `arch`, and settings as `args.NAME`.
    pub fn metadata(&self) -> &BTreeMap<String, serde_json::Value> {
        &self.metadata
    }

    /// Where the chosen state dict is: keys joined by dots, empty for the top.
    pub fn state_key(&self) -> &str {
        &self.state_key
    }

    /// Other places with tensors, and how many, the likelier first.
    pub fn other_state_keys(&self) -> &[(String, usize)] {
        &self.other_state_keys
    }

    /// Entries of the state dict that are not read, and what they are.
    pub fn skipped(&self) -> &[(String, String)] {
        &self.skipped
    }

    /// Functions and classes that the pickle asks Python for and that weights do not need. None of them was imported,
    /// called or made.
    pub fn unknown_globals(&self) -> &[String] {
        &self.unknown_globals
    }

    /// One tensor as `f32` on the CPU, contiguous, rounded to nearest where the file holds wider numbers.
    ///
    /// # Errors
    /// [`Error::Damaged`] when there is no such tensor, or its bytes cannot be decompressed.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        Ok(Tensor::from_vec(self.values(name)?, entry.shape(), &Device::Cpu)?)
    }

    /// The numbers of one tensor in row-major order.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        let storage = self.storage(&entry.record).map_err(|fault| Error::damaged(self.path(), fault))?;
        let values = entry.layout.gather(&storage, entry.dtype, self.big_endian);
        values.ok_or_else(|| {
            let fault = format!("tensor `{}` lies outside its storage", name.escape_debug());
            Error::damaged(self.path(), Fault::Value(fault))
        })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let found = self.index.get(name).and_then(|index| self.entries.get(*index));
        found.ok_or_else(|| Error::damaged(self.path(), Fault::MissingTensor(name.escape_debug().to_string())))
    }

    fn storage(&self, record: &Record) -> Result<Cow<'_, [u8]>, Fault> {
        match *record {
            Record::Plain { start, length } => {
                let (start, end) = (start as usize, start.saturating_add(length) as usize);
                let found = self.file.len() as u64;
                let bytes = self.file.get(start..end);
                bytes.map(Cow::Borrowed).ok_or(Fault::Length { expected: end as u64, found })
            }
            Record::Deflated { index, length } => pth_zip::inflate(&self.file, index, length).map(Cow::Owned),
        }
    }
}

/// Checks one tensor of a pickle against its storage. The inner error says why it is passed over.
fn entry(
    arena: &Arena,
    name: &str,
    tensor: Result<&TensorNode, &str>,
    archive: &Archive,
    file_bytes: u64,
) -> Result<Result<Entry, String>, Fault> {
    let fault = |message: String| Fault::Value(format!("tensor `{}`: {message}", name.escape_debug()));
    let tensor = tensor.map_err(|reason| fault(reason.to_owned()))?;
    let storage = match arena.get(tensor.storage) {
        Node::Storage(storage) => storage,
        Node::Broken(reason) => return Err(fault(reason.clone())),
        _ => return Err(fault("it has no storage".to_owned())),
    };
    let Some(dtype) = tensor.dtype.or(storage.dtype) else {
        return Ok(Err(format!("a tensor of `{}`, which is not read", storage.class)));
    };
    let key = storage.key.escape_debug();
    let record = archive.records.get(&storage.key).ok_or_else(|| fault(format!("its storage `{key}` is missing")))?;
    let claimed = storage.elements.checked_mul(storage.element_size as u64);
    let start = storage.view_offset.checked_mul(storage.element_size as u64);
    let Some(record) = claimed.zip(start).and_then(|(claimed, start)| part(record, start, claimed)) else {
        let claim = claimed.map_or_else(|| "over 2^64".to_owned(), |claimed| claimed.to_string());
        return Err(fault(format!("its storage `{key}` claims {claim} bytes, the file holds {}", record.length())));
    };
    // Elements of the storage as the tensor sees them: `UntypedStorage` counts bytes.
    let elements = record.length() / dtype.size() as u64;
    let most = file_bytes.max(elements);
    let layout = Layout::new(&tensor.shape, &tensor.strides, tensor.offset, elements, most).map_err(fault)?;
    Ok(Ok(Entry { name: name.to_owned(), dtype, layout, record }))
}

/// The part of a record that a storage claims; `None` where it reaches beyond.
fn part(record: &Record, start: u64, claimed: u64) -> Option<Record> {
    let end = start.checked_add(claimed).filter(|end| *end <= record.length())?;
    match *record {
        Record::Plain { start: first, .. } => Some(Record::Plain { start: first.checked_add(start)?, length: claimed }),
        // Views of a storage exist in the legacy format only, which is never compressed.
        Record::Deflated { index, length } => {
            (start == 0 && end == length).then_some(Record::Deflated { index, length })
        }
    }
}

/// The format, by the first bytes.
fn sniff(file: &MappedFile) -> Result<Format> {
    let refuse = |what: &str, hint: &str| {
        Err(Error::invalid(format!("`{}` is not a checkpoint: it {what}", file.path().display()), hint))
    };
    let header = file.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length));
    if file.starts_with(b"PK\x03\x04") || file.starts_with(b"PK\x05\x06") {
        return Ok(Format::PytorchZip);
    }
    if file.get(8) == Some(&b'{') && header < 100_000_000 {
        return Ok(Format::Safetensors);
    }
    if file.starts_with(&[0x80]) {
        return Ok(Format::PytorchLegacy);
    }
    if file.get(257..262) == Some(b"ustar") {
        let what = "is a tar archive, the format of PyTorch before 0.1.12 or a plain archive";
        return refuse(what, "unpack it, or load it with PyTorch and save it again");
    }
    if file.is_empty() {
        return refuse("is empty", "download or save it again");
    }
    if file.starts_with(&[0x1f, 0x8b]) {
        return refuse("is compressed by gzip", "unpack it with `gunzip`");
    }
    if file.trim_ascii_start().starts_with(b"<") {
        return refuse("is a web page", "the download went wrong: fetch the file itself");
    }
    if file.starts_with(b"version https://git-lfs") {
        return refuse("is a pointer of Git LFS", "fetch the file itself with `git lfs pull`");
    }
    refuse(
        "starts like neither PyTorch's formats nor safetensors",
        "give a `.pth`, `.pth.tar`, `.pt` or `.safetensors` file",
    )
}
