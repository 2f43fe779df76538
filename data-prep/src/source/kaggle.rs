//! ImageNet as Kaggle gives it: class folders for training, a flat folder and a table of solutions for validation.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use shared::{Error, Fault, Result};

use super::builder::{Builder, is_image};
use super::folders::{add_tree, label_by_directory, walk_files};
use super::{Place, Split};

const SOLUTION: &str = "LOC_val_solution.csv";
const MAPPING: &str = "LOC_synset_mapping.txt";

/// The directory `CLS-LOC`, when `input` is one of those that lead to it.
pub(super) fn locate(input: &Path) -> Option<PathBuf> {
    ["ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ""].into_iter().find_map(|below| {
        let directory = if below.is_empty() { input.to_path_buf() } else { input.join(below) };
        let is_it = ["train", "val"].iter().any(|part| directory.join(part).is_dir());
        // the directory itself must be told from class folders of other data
        let tables = !below.is_empty() || table(&directory, MAPPING).is_some() || table(&directory, SOLUTION).is_some();
        (is_it && tables).then_some(directory)
    })
}

/// A file beside the images: in `CLS-LOC` or one of the three directories above it.
fn table(directory: &Path, name: &str) -> Option<PathBuf> {
    // a relative path has no directories above it
    let directory = fs::canonicalize(directory).ok()?;
    directory.ancestors().take(4).map(|above| above.join(name)).find(|path| path.is_file())
}

/// Lists the samples of Kaggle's folders.
pub(super) fn list(input: &Path, split: Option<Split>) -> Result<Builder> {
    let directory = locate(input).ok_or_else(|| {
        let what = format!("`{}` holds no `ILSVRC/Data/CLS-LOC`", input.display());
        Error::invalid(what, "give the directory that Kaggle's archive was unpacked into")
    })?;
    let split = split.unwrap_or(Split::Train);
    let root = directory.join(split.name());
    if !root.is_dir() {
        let hint = "choose another part by `--split`".into();
        return Err(Error::Missing { what: "folder", path: root, hint });
    }
    let mut builder = Builder::new(&root);
    if split == Split::Test {
        add_tree(&root, &mut builder)?;
        return Ok(builder);
    }
    let mapping = required(&directory, MAPPING)?;
    let text = fs::read_to_string(&mapping).map_err(Error::io("read", &mapping))?;
    builder.classes = text.lines().filter_map(|line| line.split_whitespace().next()).map(Into::into).collect();
    builder.classes.sort_unstable();
    builder.classes.dedup();
    if split == Split::Train {
        add_tree(&root, &mut builder)?;
    } else {
        add_val(&root, &required(&directory, SOLUTION)?, &mut builder)?;
    }
    label_by_directory(&mut builder);
    if let Some(sample) = builder.samples.iter().find(|s| s.label < 0 && !matches!(s.place, Place::Refused(_))) {
        let what = format!("the class of `{}` is not in `{}`", sample.name, mapping.display());
        return Err(Error::invalid(what, "remove it, or read the images by `--input-format class-folders`"));
    }
    Ok(builder)
}

fn required(directory: &Path, name: &str) -> Result<PathBuf> {
    table(directory, name).ok_or_else(|| {
        let hint = "it comes with Kaggle's archive: put it where that puts it, beside `ILSVRC`".into();
        Error::Missing { what: "table", path: directory.join(name), hint }
    })
}

/// Images that the table names, whether or not they are there, and those that it does not name.
fn add_val(root: &Path, solution: &Path, builder: &mut Builder) -> Result<()> {
    let text = fs::read_to_string(solution).map_err(Error::io("read", solution))?;
    let mut classes = BTreeMap::new();
    for (number, line) in text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        // `ILSVRC2012_val_00048981,n03995372 85 1 499 272 `
        let parsed = line.split_once(',').and_then(|(id, boxes)| Some((id.trim(), boxes.split_whitespace().next()?)));
        let Some((id, class)) = parsed else {
            let fault = format!("line {} is not of the form `IMAGE,CLASS ...`", number + 1);
            return Err(Error::damaged(solution, Fault::Syntax(fault)));
        };
        classes.insert(id, class);
    }
    walk_files(root, &mut |name, _, metadata| match name {
        Ok(name) if is_image(name) => match name.rsplit_once('.').and_then(|(stem, _)| classes.remove(stem)) {
            Some(class) => {
                let bytes = metadata.map_or(0, fs::Metadata::len);
                builder.push(&format!("{class}/{name}"), -1, bytes, Place::FileInRoot);
            }
            None => builder.refuse(name, format!("`{SOLUTION}` does not name it")),
        },
        Err((name, reason)) => builder.refuse(name, reason.clone()),
        Ok(_) => {}
    })?;
    for (id, class) in classes {
        builder.refuse(&format!("{class}/{id}.JPEG"), format!("`{SOLUTION}` names it, but it is not there"));
    }
    Ok(())
}
