//! The input: which samples there are, in the same order on every machine, and how one is read.

pub mod args;
mod folders;
mod reader;

use std::path::{Path, PathBuf};

use shared::cli::must_exist;
use shared::manifest::Input;
use shared::{Error, Result};

pub use args::{InputFormat, SourceOptions};
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
    /// Size of the encoded image.
    pub bytes: u64,
    /// Where it lies.
    pub place: Place,
}

/// Where a sample lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A file: the sample's name below the root.
    File,
}

/// The samples of an input.
#[derive(Debug, Clone)]
pub struct Listing {
    /// What the names of files are relative to.
    pub root: PathBuf,
    /// Sorted by name.
    pub samples: Vec<Sample>,
    /// Class names in the order of their labels; empty without classes.
    pub classes: Vec<String>,
}

impl Listing {
    /// Lists the samples of an input.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Invalid`] when there is no such input, it holds no image, it is not laid out as its format
    /// demands, or two samples have the same identity; [`Error::Io`].
    pub fn open(input: &Path, options: &SourceOptions) -> Result<Self> {
        must_exist("input folder", input)?;
        let mut listing = folders::list(input, options)?;
        if listing.samples.is_empty() {
            let hint = "give a folder of images, or a folder with one directory of images per class";
            return Err(Error::invalid(format!("`{}` holds no image", input.display()), hint));
        }
        listing.samples.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        refuse_collisions(&listing.samples)?;
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
        Input { role: "images".into(), path: self.root.display().to_string(), fingerprint }
    }

    fn path_of(&self, sample: &Sample) -> PathBuf {
        sample.name.split('/').fold(self.root.clone(), |path, part| path.join(part))
    }
}

fn refuse_collisions(samples: &[Sample]) -> Result<()> {
    let mut by_id: Vec<&Sample> = samples.iter().collect();
    by_id.sort_by_key(|sample| sample.id);
    match by_id.windows(2).find(|pair| pair[0].id == pair[1].id) {
        None => Ok(()),
        Some(pair) => Err(Error::invalid(
            format!("`{}` and `{}` have the same identity {:016x}", pair[0].name, pair[1].name, pair[0].id),
            "rename one of the two",
        )),
    }
}
