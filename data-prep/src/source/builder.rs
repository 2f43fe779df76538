//! What the listing of an input is put together with.

use std::path::{Path, PathBuf};

use shared::shard::sample_id;
use shared::{Error, Result};

use super::{Archive, InputFormat, Listing, Place, Sample};

/// Extensions that mark a file as an image, in lower case. Some cannot be decoded: those files are rejected by name, not overlooked.
pub(super) const IMAGE_EXTENSIONS: [&str; 15] =
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "jxl", "pgm", "ppm"];

/// The largest label of a source that has numbers instead of class names.
const LARGEST_LABEL: i64 = 999_999;

/// Whether a file name has the extension of an image.
pub(super) fn is_image(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(stem, extension)| {
        !stem.is_empty() && IMAGE_EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
    })
}

/// A name as text; one that is not UTF-8 has its odd bytes escaped, and comes with the reason why it cannot be used.
pub(super) fn text_of(name: &[u8]) -> Result<String, (String, String)> {
    match std::str::from_utf8(name) {
        Ok(name) => Ok(name.to_string()),
        Err(error) => {
            let escaped = name.escape_ascii().to_string();
            Err((escaped, format!("its name is not UTF-8 from byte {} on: rename it", error.valid_up_to())))
        }
    }
}

/// A label as a number; -1 stands for none.
pub(super) fn parse_label(text: &str) -> Result<i64, String> {
    let label = text.trim();
    let number: i64 = label.parse().map_err(|e| {
        let start: String = label.chars().take(40).collect();
        format!("its label `{}` is no number: {e}", start.escape_debug())
    })?;
    check_label(number)
}

/// Refuses a number that cannot be a label.
pub(super) fn check_label(label: i64) -> Result<i64, String> {
    if (-1..=LARGEST_LABEL).contains(&label) {
        return Ok(label);
    }
    Err(format!("its label {label} is out of range, labels are 0 to {LARGEST_LABEL}, or -1 for none"))
}

/// A listing that is being made.
#[derive(Debug, Default)]
pub(super) struct Builder {
    pub(super) root: PathBuf,
    pub(super) samples: Vec<Sample>,
    pub(super) classes: Vec<String>,
    pub(super) archives: Vec<Archive>,
    refusals: Vec<String>,
}

impl Builder {
    pub(super) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), ..Self::default() }
    }

    /// Lists a sample.
    pub(super) fn push(&mut self, name: &str, label: i64, bytes: u64, place: Place) {
        self.samples.push(Sample { id: sample_id(name), name: name.into(), label, bytes, place });
    }

    /// Lists a sample that cannot be used.
    pub(super) fn refuse(&mut self, name: &str, reason: String) {
        self.push(name, -1, 0, Place::File);
        self.refuse_listed(self.samples.len() - 1, reason);
    }

    /// Makes a sample that was listed one that cannot be used.
    pub(super) fn refuse_listed(&mut self, index: usize, reason: String) {
        let place = Place::Refused(u32::try_from(self.refusals.len()).unwrap_or(u32::MAX));
        self.refusals.push(reason);
        let sample = &mut self.samples[index];
        (sample.label, sample.bytes, sample.place) = (-1, 0, place);
    }

    /// Adds a file that holds samples and gives its index.
    pub(super) fn add_archive(&mut self, archive: Archive) -> u32 {
        self.archives.push(archive);
        u32::try_from(self.archives.len() - 1).unwrap_or(u32::MAX)
    }

    /// Names the classes by the numbers up to the largest label.
    pub(super) fn number_classes(&mut self) {
        let most = self.samples.iter().map(|sample| sample.label).max().unwrap_or(-1);
        self.classes = (0..=most).map(|label| label.to_string()).collect();
    }

    /// Sorts and checks what was found.
    pub(super) fn finish(mut self, input: &Path, format: InputFormat) -> Result<Listing> {
        if self.samples.is_empty() {
            let hint = "give a folder of images, a folder with one directory of images per class, or another of the formats that \
                        `data-prep pack --help` tells under `--input-format`";
            return Err(Error::invalid(format!("`{}` holds no image", input.display()), hint));
        }
        self.samples.shrink_to_fit();
        self.samples.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        refuse_collisions(&self.samples)?;
        let Self { root, samples, classes, archives, refusals } = self;
        Ok(Listing { input: input.to_path_buf(), format, samples, classes, root, archives, refusals })
    }
}

fn refuse_collisions(samples: &[Sample]) -> Result<()> {
    let mut by_id: Vec<&Sample> = samples.iter().collect();
    by_id.sort_unstable_by_key(|sample| sample.id);
    match by_id.windows(2).find(|pair| pair[0].id == pair[1].id) {
        None => Ok(()),
        Some(pair) if pair[0].name == pair[1].name => Err(Error::invalid(
            format!("two samples have the name `{}`", pair[0].name),
            "remove or rename one of the two",
        )),
        Some(pair) => Err(Error::invalid(
            format!("`{}` and `{}` have the same identity {:016x}", pair[0].name, pair[1].name, pair[0].id),
            "rename one of the two",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_identities_are_refused() {
        let two = |name: &str| Sample { name: name.into(), id: 7, label: 0, bytes: 0, place: Place::File };
        let sentence = |a, b| refuse_collisions(&[two(a), two(b)]).unwrap_err().to_string();
        assert!(sentence("a", "b").contains("same identity") && sentence("a", "a").contains("have the name `a`"));
    }

    #[test]
    fn labels_are_small_numbers() {
        assert_eq!((parse_label(" 7\n"), parse_label("-1")), (Ok(7), Ok(-1)));
        for text in ["", "cat", "1.5", "-2", "1000000", "99999999999999999999"] {
            assert!(parse_label(text).unwrap_err().starts_with("its label"), "{text}");
        }
    }

    #[test]
    fn sample_is_small() {
        assert!(size_of::<Sample>() <= 56, "{}", size_of::<Sample>());
    }
}
