//! Folders of image files: one directory per class, or flat.

use std::fs;
use std::path::{Path, PathBuf};

use shared::shard::sample_id;
use shared::{Error, Result};

use super::{InputFormat, Listing, Place, Sample, SourceOptions};

/// Extensions that mark a file as an image, in lower case. Some cannot be decoded: those files are rejected by name, not overlooked.
const EXTENSIONS: [&str; 15] =
    ["avif", "bmp", "gif", "heic", "jfif", "jpe", "jpeg", "jpg", "jxl", "pgm", "png", "ppm", "tif", "tiff", "webp"];

/// Lists a class-folder tree or a flat folder.
///
/// Classes are the top-level directories that hold an image at any depth, sorted by name. Hidden files and directories are
/// skipped, symbolic links are followed.
pub(super) fn list(root: &Path, options: &SourceOptions) -> Result<Listing> {
    if !root.is_dir() {
        return Err(Error::invalid(
            format!("`{}` is not a folder", root.display()),
            "give the folder that holds the images",
        ));
    }
    let mut samples = Vec::new();
    walk(root, "", &mut Vec::new(), &mut samples)?;
    samples.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let classes = match options.input_format {
        Some(InputFormat::Flat) => Vec::new(),
        Some(InputFormat::ClassFolders) | None => classify(root, &mut samples)?,
    };
    Ok(Listing { root: root.to_path_buf(), samples, classes })
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
            samples.push(Sample {
                id: sample_id(&relative),
                name: relative.into(),
                label: -1,
                bytes,
                place: Place::File,
            });
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

/// Labels the samples of a class-folder tree; a flat folder has no classes.
fn classify(root: &Path, samples: &mut [Sample]) -> Result<Vec<String>> {
    let class_of = |sample: &Sample| sample.name.split_once('/').map(|(class, _)| class.to_string());
    let beside = samples.iter().find(|sample| class_of(sample).is_none());
    let inside = samples.iter().find(|sample| class_of(sample).is_some());
    if let (Some(beside), Some(inside)) = (beside, inside) {
        let what = format!(
            "`{}` is neither flat nor a folder of classes: it holds `{}` and `{}`",
            root.display(),
            beside.name,
            inside.name
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
    use super::super::refuse_collisions;
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

    fn scan(path: &Path) -> Result<Listing> {
        Listing::open(path, &SourceOptions::default())
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
        let listing = scan(root.path()).unwrap();
        assert_eq!(listing.classes, ["a b", "b"]);
        let found: Vec<(&str, i64)> = listing.samples.iter().map(|s| (&*s.name, s.label)).collect();
        assert_eq!(found, [("a b/deep/x.webp", 0), ("b/1.png", 1), ("b/2.JPG", 1)]);
        assert_eq!(listing.samples[0].id, sample_id("a b/deep/x.webp"));
        assert!(listing.path_of(&listing.samples[0]).is_file());
    }

    #[test]
    fn flat_folder_has_no_classes() {
        let listing = scan(tree(&["2.jpg", "1.jpg", "notes.txt"]).path()).unwrap();
        assert_eq!((listing.classes.len(), listing.samples[0].label), (0, -1));
        assert_eq!(&*listing.samples[0].name, "1.jpg");
    }

    #[test]
    fn wrong_inputs_get_a_sentence() {
        let sentence = |path: &Path| scan(path).unwrap_err().to_string();
        let root = tree(&["a/1.jpg", "2.jpg"]);
        assert!(sentence(root.path()).contains("`2.jpg` and `a/1.jpg`"));
        assert!(sentence(&root.path().join("no")).contains("does not exist"));
        assert!(sentence(&root.path().join("2.jpg")).contains("not a folder"));
        assert!(sentence(tree(&["x.txt"]).path()).contains("holds no image"));
        let two = |path: &str| Sample { name: path.into(), id: 7, label: 0, bytes: 0, place: Place::File };
        assert!(refuse_collisions(&[two("a"), two("b")]).unwrap_err().to_string().contains("same identity"));
    }

    #[test]
    fn fingerprint_covers_names_and_sizes() {
        let print = |files: &[&str]| scan(tree(files).path()).unwrap().as_input().fingerprint;
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
        let listing = scan(root.path()).unwrap();
        assert_eq!(listing.classes, ["a", "b", "far"]);
        assert_eq!(listing.samples.len(), 4);
        symlink(root.path(), root.path().join("a/up")).unwrap();
        assert!(scan(root.path()).unwrap_err().to_string().contains("links to a directory"));
    }
}
