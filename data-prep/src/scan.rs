//! Which samples a folder holds: a sorted list, the same on every machine.

use std::fs;
use std::path::{Path, PathBuf};

use shared::cli::must_exist;
use shared::manifest::Input;
use shared::shard::sample_id;
use shared::{Error, Result};

/// Extensions that mark a file as an image, in lower case. Some cannot be decoded: those files are rejected by name, not overlooked.
const EXTENSIONS: [&str; 15] =
    ["avif", "bmp", "gif", "heic", "jfif", "jpe", "jpeg", "jpg", "jxl", "pgm", "png", "ppm", "tif", "tiff", "webp"];

/// One image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Path relative to the input folder, with `/` separators.
    pub path: String,
    /// Its identity: see [`sample_id`].
    pub id: u64,
    /// Class index, -1 without classes.
    pub label: i64,
    /// Size of the file.
    pub bytes: u64,
}

/// The samples of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The folder.
    pub root: PathBuf,
    /// Sorted by path.
    pub samples: Vec<Sample>,
    /// Class names in the order of their labels; empty for a flat folder.
    pub classes: Vec<String>,
}

impl Listing {
    /// Lists a class-folder tree or a flat folder.
    ///
    /// Classes are the top-level directories that hold an image at any depth, sorted by name. Hidden files and directories are
    /// skipped, symbolic links are followed.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Invalid`] when there is no such folder, it holds no image, images lie both beside and inside
    /// directories, a name is not UTF-8, links form a circle, or two paths have the same identity; [`Error::Io`].
    pub fn scan(root: &Path) -> Result<Self> {
        must_exist("input folder", root)?;
        if !root.is_dir() {
            return Err(Error::invalid(
                format!("`{}` is not a folder", root.display()),
                "give the folder that holds the images",
            ));
        }
        let mut samples = Vec::new();
        walk(root, "", &mut Vec::new(), &mut samples)?;
        if samples.is_empty() {
            let hint = "give a folder of images, or a folder with one directory of images per class";
            return Err(Error::invalid(format!("`{}` holds no image", root.display()), hint));
        }
        samples.sort_by(|a, b| a.path.cmp(&b.path));
        refuse_collisions(&samples)?;
        let classes = classify(root, &mut samples)?;
        Ok(Self { root: root.to_path_buf(), samples, classes })
    }

    /// Where a sample lies.
    pub fn path_of(&self, sample: &Sample) -> PathBuf {
        sample.path.split('/').fold(self.root.clone(), |path, part| path.join(part))
    }

    /// The folder as an input of the shard set; its fingerprint covers the names and sizes of the images.
    pub fn as_input(&self) -> Input {
        let mut hasher = blake3::Hasher::new();
        for sample in &self.samples {
            hasher.update(sample.path.as_bytes()).update(&[0]).update(&sample.bytes.to_le_bytes());
        }
        let fingerprint = hasher.finalize().to_hex().to_string();
        Input { role: "images".into(), path: self.root.display().to_string(), fingerprint }
    }
}

fn walk(directory: &Path, prefix: &str, above: &mut Vec<PathBuf>, samples: &mut Vec<Sample>) -> Result<()> {
    let real = fs::canonicalize(directory).map_err(Error::io("read", directory))?;
    if above.contains(&real) {
        return Err(Error::invalid(
            format!("`{}` links to a directory that holds it", directory.display()),
            "remove the link",
        ));
    }
    above.push(real);
    for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
        let path = entry.map_err(Error::io("list", directory))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return Err(Error::invalid(format!("the name of `{}` is not UTF-8", path.display()), "rename it"));
        };
        if name.starts_with('.') {
            continue;
        }
        let relative = if prefix.is_empty() { name.to_string() } else { format!("{prefix}/{name}") };
        // follows links; a broken link to an image becomes a sample that is rejected later, by name
        let metadata = fs::metadata(&path);
        if metadata.as_ref().is_ok_and(fs::Metadata::is_dir) {
            walk(&path, &relative, above, samples)?;
        } else if is_image(name) {
            let bytes = metadata.map_or(0, |metadata| metadata.len());
            samples.push(Sample { id: sample_id(&relative), path: relative, label: -1, bytes });
        }
    }
    above.pop();
    Ok(())
}

fn is_image(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(stem, extension)| {
        !stem.is_empty() && EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
    })
}

fn refuse_collisions(samples: &[Sample]) -> Result<()> {
    let mut by_id: Vec<&Sample> = samples.iter().collect();
    by_id.sort_by_key(|sample| sample.id);
    match by_id.windows(2).find(|pair| pair[0].id == pair[1].id) {
        None => Ok(()),
        Some(pair) => Err(Error::invalid(
            format!("`{}` and `{}` have the same identity {:016x}", pair[0].path, pair[1].path, pair[0].id),
            "rename one of the two",
        )),
    }
}

/// Labels the samples of a class-folder tree; a flat folder has no classes.
fn classify(root: &Path, samples: &mut [Sample]) -> Result<Vec<String>> {
    let class_of = |sample: &Sample| sample.path.split_once('/').map(|(class, _)| class.to_string());
    let beside = samples.iter().find(|sample| class_of(sample).is_none());
    let inside = samples.iter().find(|sample| class_of(sample).is_some());
    if let (Some(beside), Some(inside)) = (beside, inside) {
        let what = format!(
            "`{}` is neither flat nor a folder of classes: it holds `{}` and `{}`",
            root.display(),
            beside.path,
            inside.path
        );
        return Err(Error::invalid(what, "move the images at the top into directories, one for each class"));
    }
    let mut classes: Vec<String> = samples.iter().filter_map(class_of).collect();
    classes.sort_unstable();
    classes.dedup();
    for sample in samples {
        if let Some(class) = class_of(sample) {
            let found = classes.binary_search(&class);
            sample.label = found.ok().and_then(|index| i64::try_from(index).ok()).unwrap_or(-1);
        }
    }
    Ok(classes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::io::{create_directory, write_atomic};

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            create_directory(path.parent().unwrap()).unwrap();
            write_atomic(&path, file.as_bytes()).unwrap();
        }
        root
    }

    #[test]
    fn classes_are_sorted_directories_that_hold_images() {
        let root = tree(&[
            "b/2.JPG",
            "b/1.png",
            "a b/deep/x.webp",
            "empty/readme.txt",
            ".git/x.png",
            "b/.hidden.png",
            "LICENSE",
        ]);
        let listing = Listing::scan(root.path()).unwrap();
        assert_eq!(listing.classes, ["a b", "b"]);
        let found: Vec<(&str, i64)> = listing.samples.iter().map(|s| (s.path.as_str(), s.label)).collect();
        assert_eq!(found, [("a b/deep/x.webp", 0), ("b/1.png", 1), ("b/2.JPG", 1)]);
        assert_eq!(listing.samples[0].id, sample_id("a b/deep/x.webp"));
        assert!(listing.path_of(&listing.samples[0]).is_file());
    }

    #[test]
    fn flat_folder_has_no_classes() {
        let listing = Listing::scan(tree(&["2.jpg", "1.jpg", "notes.txt"]).path()).unwrap();
        assert_eq!((listing.classes.len(), listing.samples[0].label), (0, -1));
        assert_eq!(listing.samples[0].path, "1.jpg");
    }

    #[test]
    fn wrong_inputs_get_a_sentence() {
        let sentence = |path: &Path| Listing::scan(path).unwrap_err().to_string();
        let root = tree(&["a/1.jpg", "2.jpg"]);
        assert!(sentence(root.path()).contains("`2.jpg` and `a/1.jpg`"));
        assert!(sentence(&root.path().join("no")).contains("does not exist"));
        assert!(sentence(&root.path().join("2.jpg")).contains("not a folder"));
        assert!(sentence(tree(&["x.txt"]).path()).contains("holds no image"));
        let two = |path: &str| Sample { path: path.into(), id: 7, label: 0, bytes: 0 };
        assert!(refuse_collisions(&[two("a"), two("b")]).unwrap_err().to_string().contains("same identity"));
    }

    #[test]
    fn fingerprint_covers_names_and_sizes() {
        let print = |files: &[&str]| Listing::scan(tree(files).path()).unwrap().as_input().fingerprint;
        assert_eq!(print(&["1.jpg", "2.jpg"]), print(&["2.jpg", "1.jpg"]));
        assert_ne!(print(&["1.jpg", "2.jpg"]), print(&["1.jpg", "3.jpg"]));
        assert_ne!(print(&["1.jpg"]), print(&["1.jpg", "2.jpg"]));
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_but_not_in_circles() {
        use std::os::unix::fs::symlink;
        let root = tree(&["a/1.jpg", "far/2.jpg"]);
        symlink(root.path().join("far"), root.path().join("b")).unwrap();
        symlink(root.path().join("no-such"), root.path().join("a/3.jpg")).unwrap();
        let listing = Listing::scan(root.path()).unwrap();
        assert_eq!(listing.classes, ["a", "b", "far"]);
        assert_eq!(listing.samples.len(), 4);
        symlink(root.path(), root.path().join("a/up")).unwrap();
        assert!(Listing::scan(root.path()).unwrap_err().to_string().contains("links to a directory"));
    }
}
