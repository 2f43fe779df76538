//! Lists: text files that name an image, and its label, in each line.

use std::fs;
use std::path::Path;

use shared::{Error, Fault, Result};

use super::builder::{Builder, check_label, is_image, text_of};
use super::folders::no_parts;
use super::{Place, Split};

/// Lists the samples that a text file names.
///
/// A line is a path, or a path and a label after a tab, comma or space. Labels are all integers, or all names, which are sorted.
/// Paths are relative to `root`, or to the list's folder.
pub(super) fn list(input: &Path, root: Option<&Path>, split: Option<Split>) -> Result<Builder> {
    no_parts(input, split)?;
    let bytes = fs::read(input).map_err(Error::io("read", input))?;
    let mut builder = Builder::new(root.or(input.parent()).unwrap_or(Path::new("")));
    let mut labels: Vec<Option<String>> = Vec::new();
    let (mut number, mut word) = (None, None);
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let line = match text_of(line) {
            Ok(line) => line,
            Err((escaped, reason)) => {
                builder.refuse(&escaped, reason);
                labels.push(None);
                continue;
            }
        };
        let (path, label) = split_line(&line);
        if let Some(label) = label {
            let seen = if label.parse::<i64>().is_ok() { &mut number } else { &mut word };
            seen.get_or_insert_with(|| (index + 1, label.to_string()));
            if let (Some((a, number)), Some((b, word))) = (&number, &word) {
                let fault =
                    format!("line {a} has the label `{number}`, line {b} `{word}`: use either numbers or names");
                return Err(Error::damaged(input, Fault::Syntax(fault)));
            }
        }
        let name = relative_to(&builder.root, path);
        let metadata = fs::metadata(builder.root.join(name));
        let size = metadata.map_or(0, |metadata| metadata.len());
        builder.push(name, -1, size, Place::File);
        labels.push(label.map(Into::into));
    }
    if word.is_some() {
        builder.classes = labels.iter().flatten().cloned().collect();
        builder.classes.sort_unstable();
        builder.classes.dedup();
    }
    for (index, label) in labels.into_iter().enumerate() {
        let Some(label) = label else { continue };
        let found = if word.is_some() {
            Ok(builder.classes.binary_search(&label).ok().and_then(|at| i64::try_from(at).ok()).unwrap_or(-1))
        } else {
            label.parse().map_err(|e| format!("its label is no number: {e}")).and_then(check_label)
        };
        match found {
            Ok(label) => builder.samples[index].label = label,
            Err(reason) => builder.refuse_listed(index, reason),
        }
    }
    if word.is_none() {
        builder.number_classes();
    }
    Ok(builder)
}

/// The path and the label of a line. A line that ends like an image file is a path, whatever spaces it has.
fn split_line(line: &str) -> (&str, Option<&str>) {
    if is_image(line) {
        return (line, None);
    }
    let parts = ['\t', ',', ' '].iter().find_map(|separator| line.rsplit_once(*separator));
    parts.map_or((line, None), |(path, label)| (path.trim(), Some(label.trim()).filter(|label| !label.is_empty())))
}

/// The path below the root, so that a sample has the same name wherever the images lie.
fn relative_to<'a>(root: &Path, path: &'a str) -> &'a str {
    let below = Path::new(path).strip_prefix(root).ok().and_then(Path::to_str);
    let below = below.filter(|_| !root.as_os_str().is_empty() && Path::new(path).is_absolute()).unwrap_or(path);
    below.trim_start_matches("./")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_at_the_last_separator() {
        assert_eq!(split_line("a/1.jpg\t3"), ("a/1.jpg", Some("3")));
        assert_eq!(split_line("a b/my cat.jpg,tabby cat"), ("a b/my cat.jpg", Some("tabby cat")));
        assert_eq!(split_line("my cat.jpg 3"), ("my cat.jpg", Some("3")));
        assert_eq!(split_line("my cat.jpg"), ("my cat.jpg", None));
        assert_eq!(split_line("cat"), ("cat", None));
        assert_eq!(split_line("cat.jpg,"), ("cat.jpg", None));
    }

    #[test]
    fn paths_become_relative() {
        assert_eq!(relative_to(Path::new("/data"), "/data/a/1.jpg"), "a/1.jpg");
        assert_eq!(relative_to(Path::new("/data"), "/other/1.jpg"), "/other/1.jpg");
        assert_eq!(relative_to(Path::new("data"), "./a/1.jpg"), "a/1.jpg");
        assert_eq!(relative_to(Path::new(""), "a/1.jpg"), "a/1.jpg");
    }
}
