//! The input: which samples there are, in the same order on every machine, and how one is read.
//!
//! Each format has a module that lists its samples; `detect` tells the formats apart, `select` takes splits and subsets, `reader`
//! reads a sample. What is troublesome about a single sample (a name that is not UTF-8, a label that is no number, a member that is
//! a link) does not stop the listing: the sample is listed as one that cannot be used, with the reason.

pub mod args;
mod builder;
mod cifar;
mod detect;
mod folders;
mod ilsvrc;
mod kaggle;
mod list;
mod matlab;
mod parquet;
mod parquet_rows;
mod reader;
mod select;
mod tar_index;
mod webdataset;

use std::path::{Path, PathBuf};

use shared::cli::must_exist;
use shared::manifest::Input;
use shared::{Error, Result};

pub use args::{InputFormat, SourceOptions, Split};
use parquet::ParquetFile;
pub use reader::{LARGEST_IMAGE_BYTES, Payload, Reader};

/// One image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Its name, which does not depend on how the images are packaged: a path with `/` separators.
    pub name: Box<str>,
    /// Its identity: the [`sample_id`](shared::shard::sample_id) of the name.
    pub id: u64,
    /// Class index, -1 without classes.
    pub label: i64,
    /// Size of the encoded image; of a Parquet row the mean of its row group.
    pub bytes: u64,
    /// Where it lies.
    pub place: Place,
}

/// Where a sample lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A file: the sample's name below the root.
    File,
    /// A file: the last part of the sample's name below the root.
    FileInRoot,
    /// A range of an archive, as long as the sample's `bytes`.
    Range {
        /// Index of the archive.
        archive: u32,
        /// Where it begins.
        offset: u64,
    },
    /// A row of a Parquet file.
    Row {
        /// Index of the archive.
        archive: u32,
        /// Index of the row in the file.
        row: u32,
    },
    /// 32 x 32 pixels in three planes.
    Planes {
        /// Index of the archive.
        archive: u32,
        /// Where the first plane begins.
        offset: u64,
    },
    /// A sample that cannot be used: the index of the reason.
    Refused(u32),
}

/// A file that holds many samples.
#[derive(Debug, Clone)]
enum Archive {
    Plain(PathBuf),
    Parquet(Box<ParquetFile>),
}

/// The samples of an input.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The input as the user named it.
    pub input: PathBuf,
    /// How it is laid out.
    pub format: InputFormat,
    /// Sorted by name.
    pub samples: Vec<Sample>,
    /// Class names in the order of their labels; empty without classes.
    pub classes: Vec<String>,
    /// What the names of files are relative to.
    root: PathBuf,
    archives: Vec<Archive>,
    refusals: Vec<String>,
}

impl Listing {
    /// Lists the samples of an input: those of the split, then those of the subset that are asked for.
    ///
    /// # Errors
    /// [`Error::Usage`] for options that make no sense for the input; [`Error::Missing`], [`Error::Damaged`] or
    /// [`Error::Invalid`] when there is no such input, it holds no image, it is not laid out as its format demands, or two samples
    /// have the same identity; [`Error::Io`].
    pub fn open(input: &Path, options: &SourceOptions) -> Result<Self> {
        options.check()?;
        must_exist("input", input)?;
        let format = options.input_format.map_or_else(|| detect::detect(input), Ok)?;
        if options.root.is_some() && format != InputFormat::List {
            return Err(Error::usage(format!("`--root` is for lists, the input is `{}`", format.name())));
        }
        let split = options.own_split();
        let builder = match format {
            InputFormat::ClassFolders | InputFormat::Flat => folders::list(input, options.input_format, split)?,
            InputFormat::Ilsvrc2012 => ilsvrc::list(input, split)?,
            InputFormat::Kaggle => kaggle::list(input, split)?,
            InputFormat::Webdataset => webdataset::list(input, split)?,
            InputFormat::Parquet => parquet::list(input, split)?,
            InputFormat::Cifar10 | InputFormat::Cifar100 => cifar::list(input, format, split)?,
            InputFormat::List => list::list(input, options.root.as_deref(), split)?,
        };
        let mut listing = builder.finish(input, format)?;
        select::select(&mut listing, options)?;
        Ok(listing)
    }

    /// The input of the shard set; its fingerprint covers the names, sizes and labels of the images, and the classes.
    pub fn as_input(&self) -> Input {
        let mut hasher = blake3::Hasher::new();
        for sample in &self.samples {
            hasher.update(sample.name.as_bytes()).update(&[0]);
            hasher.update(&sample.bytes.to_le_bytes()).update(&sample.label.to_le_bytes());
        }
        for class in &self.classes {
            hasher.update(&[0]).update(class.as_bytes());
        }
        let fingerprint = hasher.finalize().to_hex().to_string();
        Input { role: "images".into(), path: self.input.display().to_string(), fingerprint }
    }
}
