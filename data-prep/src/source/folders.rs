//! Folders of image files: one directory per class, or flat.

use std::fs;
use std::path::{Path, PathBuf};

use shared::{Error, Result};

use super::builder::{Builder, is_image, text_of};
use super::{InputFormat, Place, Sample, Split};

/// Lists a class-folder tree or a flat folder.
///
/// Classes are the top-level directories that hold an image at any depth, sorted by name; directories `train` and `val` at the top
/// are parts instead. Hidden files and directories are skipped, symbolic links are followed.
pub(super) fn list(input: &Path, format: Option<InputFormat>, split: Option<Split>) -> Result<Builder> {
    if !input.is_dir() {
        return Err(Error::invalid(
            format!("`{}` is not a folder", input.display()),
            "give the folder that holds the images",
        ));
    }
    let mut builder = Builder::new(part_of(input, split)?);
    let root = builder.root.clone();
    add_tree(&root, &mut builder)?;
    if format != Some(InputFormat::Flat) {
        builder.samples.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        classify(&root, &mut builder, format.is_some())?;
    }
    Ok(builder)
}

/// The directory that holds the part asked for: one of `train`, `val`, ... where those are all there are, or the input itself.
fn part_of(input: &Path, split: Option<Split>) -> Result<PathBuf> {
    let mut parts = Vec::new();
    let mut others = false;
    for entry in fs::read_dir(input).map_err(Error::io("list", input))? {
        let path = entry.map_err(Error::io("list", input))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let part = Split::of_path(&name).filter(|_| name.chars().all(|c| c.is_ascii_alphabetic()));
        match part {
            _ if name.starts_with('.') => {}
            Some(part) if path.is_dir() => parts.push((part, path)),
            _ => others |= path.is_dir() || is_image(&name),
        }
    }
    parts.sort_unstable_by(|a, b| a.1.cmp(&b.1));
    let wanted = split.unwrap_or(Split::Train);
    match parts.iter().find(|(part, _)| *part == wanted) {
        Some((_, path)) if !others && (parts.len() > 1 || split.is_some()) => Ok(path.clone()),
        _ => no_parts(input, split).map(|()| input.to_path_buf()),
    }
}

/// Refuses a part of an input that has none.
pub(super) fn no_parts(input: &Path, split: Option<Split>) -> Result<()> {
    match split {
        None | Some(Split::Train) => Ok(()),
        Some(other) => Err(Error::usage(format!(
            "`{}` has no part `{}`: give the folder or files of that part as `--input`, or set samples aside by \
             `--split-fraction`",
            input.display(),
            other.name()
        ))),
    }
}

/// Adds all images below `root`, by their paths.
pub(super) fn add_tree(root: &Path, builder: &mut Builder) -> Result<()> {
    walk_files(root, &mut |name, path, metadata| {
        let label = -1;
        match name {
            Ok(name) if is_image(name) => {
                // a broken link to an image becomes a sample that is rejected later, by name
                let bytes = metadata.map_or(0, fs::Metadata::len);
                builder.push(name, label, bytes, Place::File);
            }
            Err((name, reason)) if is_image(&path.to_string_lossy()) => builder.refuse(name, reason.clone()),
            _ => {}
        }
    })
}

/// A path below the root; escaped and with a reason when it is not UTF-8.
type Name<'a> = Result<&'a str, (&'a str, &'a String)>;

/// Calls `each` for every file below `root` that is not hidden; links are followed.
pub(super) fn walk_files(root: &Path, each: &mut dyn FnMut(Name<'_>, &Path, Option<&fs::Metadata>)) -> Result<()> {
    walk(root, &(String::new(), None), &mut Vec::new(), each)
}

fn walk(
    directory: &Path,
    (prefix, fault): &(String, Option<String>),
    above: &mut Vec<PathBuf>,
    each: &mut dyn FnMut(Name<'_>, &Path, Option<&fs::Metadata>),
) -> Result<()> {
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
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.starts_with(b".") {
            continue;
        }
        let (name, fault) = match text_of(name) {
            Ok(name) => (name, fault.clone()),
            Err((name, reason)) => (name, Some(reason)),
        };
        let relative = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let metadata = fs::metadata(&path);
        if metadata.as_ref().is_ok_and(fs::Metadata::is_dir) {
            walk(&path, &(relative, fault), above, each)?;
        } else {
            let name = fault.as_ref().map_or(Ok(relative.as_str()), |fault| Err((relative.as_str(), fault)));
            each(name, &path, metadata.as_ref().ok());
        }
    }
    above.pop();
    Ok(())
}

/// Labels the samples of a class-folder tree; a flat folder has no classes.
fn classify(root: &Path, builder: &mut Builder, must_have_classes: bool) -> Result<()> {
    fn class_of(sample: &Sample) -> Option<&str> {
        sample.name.split_once('/').map(|(class, _)| class)
    }
    let beside = builder.samples.iter().find(|sample| class_of(sample).is_none());
    let inside = builder.samples.iter().find(|sample| class_of(sample).is_some());
    if let (Some(beside), true) = (beside, inside.is_some() || must_have_classes) {
        let and = inside.map(|inside| format!(" and `{}`", inside.name)).unwrap_or_default();
        let what =
            format!("`{}` is neither flat nor a folder of classes: it holds `{}`{and}", root.display(), beside.name);
        let hint = "move the images at the top into directories, one for each class, or add `--input-format flat`";
        return Err(Error::invalid(what, hint));
    }
    let mut classes: Vec<String> = Vec::new();
    // the samples are sorted, and with them all but the odd class: `a-b/` comes before `a/`
    for class in builder.samples.iter().filter_map(class_of) {
        if classes.last().is_none_or(|last| last != class) {
            classes.push(class.to_string());
        }
    }
    classes.sort_unstable();
    classes.dedup();
    builder.classes = classes;
    label_by_directory(builder);
    Ok(())
}

/// Labels every sample by the first directory of its name.
pub(super) fn label_by_directory(builder: &mut Builder) {
    for sample in &mut builder.samples {
        let class = sample.name.split('/').next().unwrap_or_default();
        let found = builder.classes.binary_search_by(|other| other.as_str().cmp(class));
        sample.label = found.ok().and_then(|index| i64::try_from(index).ok()).unwrap_or(-1);
    }
}
