//! Telling input formats apart by looking.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use shared::{Error, Result};

use super::builder::is_image;
use super::{InputFormat, cifar, ilsvrc, kaggle};

/// How `input` is laid out.
///
/// # Errors
/// [`Error::Invalid`] when it is nothing known, or could be two things; [`Error::Io`].
pub(super) fn detect(input: &Path) -> Result<InputFormat> {
    if input.is_dir() { detect_directory(input) } else { detect_file(input) }
}

fn detect_file(path: &Path) -> Result<InputFormat> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let extension = name.rsplit_once('.').map(|(_, extension)| extension).unwrap_or_default();
    if ilsvrc::is_archive(path) {
        return Ok(InputFormat::Ilsvrc2012);
    }
    if is_tar(&name) {
        return Ok(InputFormat::Webdataset);
    }
    match extension {
        "parquet" => return Ok(InputFormat::Parquet),
        "txt" | "csv" | "tsv" | "lst" | "list" => return Ok(InputFormat::List),
        _ => {}
    }
    if let Some(format) = path.parent().and_then(cifar::format_of).filter(|_| extension == "bin") {
        return Ok(format);
    }
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(512).read_to_end(&mut start)).map_err(Error::io("read", path))?;
    if start.starts_with(b"PAR1") {
        return Ok(InputFormat::Parquet);
    }
    if start.get(257..262) == Some(b"ustar") {
        return Ok(InputFormat::Webdataset);
    }
    Err(Error::invalid(
        format!("`{}` is not a folder, tar archive, Parquet file or list", path.display()),
        "give the folder that holds the images, or say what the file is by `--input-format`",
    ))
}

fn detect_directory(root: &Path) -> Result<InputFormat> {
    if ilsvrc::has_archives(root) {
        return Ok(InputFormat::Ilsvrc2012);
    }
    if kaggle::locate(root).is_some() {
        return Ok(InputFormat::Kaggle);
    }
    if let Some(format) = cifar::directory_of(root).and_then(|directory| cifar::format_of(&directory)) {
        return Ok(format);
    }
    let mut looked = Looked::default();
    looked.look(root, 2)?;
    match looked {
        Looked { parquet: Some(_), tar: None, image: None } => Ok(InputFormat::Parquet),
        Looked { tar: Some(_), parquet: None, image: None } => Ok(InputFormat::Webdataset),
        Looked { tar: None, parquet: None, .. } => Ok(InputFormat::ClassFolders),
        Looked { tar, parquet, image } => {
            let mut found = [image, tar, parquet].into_iter().flatten();
            let two: Vec<String> = found.by_ref().take(2).map(|path| format!("`{}`", path.display())).collect();
            Err(Error::invalid(
                format!("`{}` could be read in two ways: it holds {}", root.display(), two.join(" and ")),
                "say which is meant by `--input-format`",
            ))
        }
    }
}

/// Whether a file is a tar archive by its name, compressed or not.
pub(super) fn is_tar(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".tar.bz2"].iter().any(|end| name.ends_with(end))
}

/// The first file of each kind.
#[derive(Debug, Default)]
struct Looked {
    image: Option<PathBuf>,
    tar: Option<PathBuf>,
    parquet: Option<PathBuf>,
}

impl Looked {
    /// Looks at a directory and `depth` levels below it, without reading on once a directory of images is found.
    fn look(&mut self, directory: &Path, depth: usize) -> Result<()> {
        let mut below = Vec::new();
        for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
            let path = entry.map_err(Error::io("list", directory))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            if is_image(&name) {
                self.image.get_or_insert(path);
                // below the top a directory of images holds nothing else of interest
                if depth < 2 {
                    return Ok(());
                }
            } else if path.is_dir() {
                below.push(path);
            } else if is_tar(&name) {
                self.tar.get_or_insert(path);
            } else if name.to_ascii_lowercase().ends_with(".parquet") {
                self.parquet.get_or_insert(path);
            }
        }
        below.sort_unstable();
        for path in below {
            let settled = self.image.is_some() && depth < 2;
            if depth > 0 && !settled {
                self.look(&path, depth - 1)?;
            }
        }
        Ok(())
    }
}
