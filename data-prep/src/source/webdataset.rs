//! WebDataset: tars in which members of one key make a sample, such as `0001.jpg` and `0001.cls`.
//!
//! # Source
//! <https://github.com/webdataset/webdataset>: the key of a member is its path up to the first dot of its base name, the field is
//! what follows, in lower case.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use shared::{Error, Result};

use super::builder::{Builder, IMAGE_EXTENSIONS, check_label, parse_label};
use super::detect::is_tar;
use super::folders::{no_parts, walk_files};
use super::reader::read_exact_at;
use super::tar_index::{Member, for_each_member, open};
use super::{Archive, Place, Split};

/// No label is longer than this, JSON records included.
const LONGEST_LABEL: u64 = 1 << 20;

/// Keys of a JSON record that may hold the label.
const LABEL_KEYS: [&str; 3] = ["label", "cls", "class"];

/// Lists the samples of a tar or of a directory of tars.
pub(super) fn list(input: &Path, split: Option<Split>) -> Result<Builder> {
    let files = files_of_split(input, split, is_tar)?;
    let mut builder = Builder::default();
    let mut fields = Vec::new();
    let mut ends = Vec::new();
    for (name, path) in &files {
        add_tar(&mut builder, (name, path), &mut fields)?;
        ends.push(builder.samples.len());
    }
    if builder.samples.is_empty() {
        fields.truncate(5);
        let what = format!("`{}` holds no image, only fields `{}`", input.display(), fields.join("`, `"));
        return Err(Error::invalid(what, "samples need a member such as `KEY.jpg` or `KEY.png`"));
    }
    make_unique(&mut builder, &files, &ends);
    builder.number_classes();
    Ok(builder)
}

/// Puts the archives' names before the members' when those are not unique.
fn make_unique(builder: &mut Builder, files: &[(String, PathBuf)], ends: &[usize]) {
    let mut ids: Vec<u64> = builder.samples.iter().map(|sample| sample.id).collect();
    ids.sort_unstable();
    if ids.windows(2).all(|pair| pair[0] != pair[1]) {
        return;
    }
    let mut start = 0;
    for ((archive, _), &end) in files.iter().zip(ends) {
        for sample in &mut builder.samples[start..end] {
            let name = format!("{archive}/{}", sample.name);
            sample.id = shared::shard::sample_id(&name);
            sample.name = name.into();
        }
        start = end;
    }
}

/// The files of a part, with their paths below the input, or their names alone where those are unique.
///
/// Files belong to a part by the words `train`, `validation` and `test` in their paths; without such words there are no parts.
pub(super) fn files_of_split(
    input: &Path,
    split: Option<Split>,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<(String, PathBuf)>> {
    if !input.is_dir() {
        let name = input.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if Split::of_path(&name).is_none_or(|own| split.is_some_and(|split| split != own)) {
            no_parts(input, split)?;
        }
        return Ok(vec![(name, input.to_path_buf())]);
    }
    let mut files = Vec::new();
    walk_files(input, &mut |name, path, _| {
        let name = name.unwrap_or_else(|(escaped, _)| escaped);
        if wanted(name) {
            files.push((Split::of_path(name), name.to_string(), path.to_path_buf()));
        }
    })?;
    let parts: Vec<Split> = [Split::Train, Split::Val, Split::Test]
        .into_iter()
        .filter(|part| files.iter().any(|f| f.0 == Some(*part)))
        .collect();
    match parts.as_slice() {
        [] => no_parts(input, split)?,
        [only] if split.is_none() => files.retain(|file| file.0 == Some(*only)),
        _ => {
            let split = split.unwrap_or(Split::Train);
            if !parts.contains(&split) {
                let there: Vec<&str> = parts.iter().map(|part| part.name()).collect();
                let message = format!("no file of `{}` is of part `{}`", input.display(), split.name());
                return Err(Error::usage(format!("{message}: choose `--split {}`", there.join("` or `--split "))));
            }
            files.retain(|file| file.0 == Some(split));
        }
    }
    files.sort_unstable_by(|a, b| a.1.cmp(&b.1));
    let base = |name: &str| name.rsplit('/').next().unwrap_or_default().to_string();
    let mut bases: Vec<String> = files.iter().map(|file| base(&file.1)).collect();
    bases.sort_unstable();
    let unique = bases.windows(2).all(|pair| pair[0] != pair[1]);
    Ok(files.into_iter().map(|(_, name, path)| (if unique { base(&name) } else { name }, path)).collect())
}

/// What the members of a key say.
#[derive(Debug, Default)]
struct Group {
    /// Its place in the archive, so that samples are listed in that order.
    first: usize,
    /// Rank of the image's extension, and the image.
    image: Option<(usize, Member)>,
    label: Option<(u64, u64, bool)>,
    fields: Vec<String>,
}

fn add_tar(builder: &mut Builder, (archive_name, path): (&str, &Path), all_fields: &mut Vec<String>) -> Result<()> {
    let (file, end) = open(path)?;
    let archive = builder.add_archive(Archive::Plain(path.to_path_buf()));
    let mut groups: HashMap<String, Group> = HashMap::new();
    let mut twice = Vec::new();
    let damage = for_each_member(&file, (0, end), |member| {
        let Some((key, field)) = key_and_field(&member.name) else { return };
        let count = groups.len();
        let group = groups.entry(key.to_string()).or_insert_with(|| Group { first: count, ..Group::default() });
        let rank = IMAGE_EXTENSIONS.iter().position(|extension| *extension == field);
        if group.fields.contains(&field) {
            twice.push(member.name);
            return;
        }
        group.fields.push(field.clone());
        match (rank, field.as_str()) {
            (Some(rank), _) => {
                if group.image.as_ref().is_none_or(|(other, _)| rank < *other) {
                    group.image = Some((rank, member));
                }
            }
            (None, "cls") => group.label = Some((member.offset, member.bytes, false)),
            (None, "json") if group.label.is_none() => group.label = Some((member.offset, member.bytes, true)),
            _ => {}
        }
    });
    if let Some(name) = twice.first() {
        let what = format!("`{}` holds `{name}` twice", path.display());
        return Err(Error::invalid(what, "make the archive again: a key must not occur twice"));
    }
    let mut groups: Vec<(String, Group)> = groups.into_iter().collect();
    groups.sort_unstable_by_key(|(_, group)| group.first);
    let any_image = groups.iter().any(|(_, group)| group.image.is_some());
    for (key, group) in groups {
        let Some((_, image)) = group.image else {
            if any_image {
                let reason = format!("no image among its fields `{}`", group.fields.join("`, `"));
                builder.refuse(&key, reason);
            } else {
                all_fields.extend(group.fields.into_iter().take(5 - all_fields.len().min(5)));
            }
            continue;
        };
        let label = match (&image.fault, group.label) {
            (Some(fault), _) => Err(fault.clone()),
            (None, None) => Ok(-1),
            (None, Some((offset, bytes, json))) => {
                let mut text = vec![0; bytes.min(LONGEST_LABEL) as usize];
                read_exact_at(&file, &mut text, offset).map_err(Error::io("read", path))?;
                let text = String::from_utf8_lossy(&text);
                if json { label_of_json(&text) } else { parse_label(&text) }
            }
        };
        match label {
            Ok(label) => {
                builder.push(&image.name, label, image.bytes, Place::Range { archive, offset: image.offset });
            }
            Err(reason) => builder.refuse(&image.name, reason),
        }
    }
    if let Err(reason) = damage {
        builder.refuse(archive_name, reason);
    }
    Ok(())
}

fn key_and_field(name: &str) -> Option<(&str, String)> {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + name[base..].find('.')?;
    // hidden files, such as those that macOS adds, are no samples
    (dot > base).then(|| (&name[..dot], name[dot + 1..].to_ascii_lowercase()))
}

/// The label in a JSON record; a record without one gives -1.
fn label_of_json(text: &str) -> Result<i64, String> {
    let record: Value = serde_json::from_str(text).map_err(|e| format!("its JSON is broken: {e}"))?;
    match LABEL_KEYS.iter().find_map(|key| record.get(key)) {
        None | Some(Value::Null) => Ok(-1),
        Some(label) => match label.as_i64() {
            Some(label) => check_label(label),
            None => Err(format!("its label {label} is no integer")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ends_at_the_first_dot_of_the_base_name() {
        let of = |name| key_and_field(name).map(|(key, field)| (key.to_string(), field));
        assert_eq!(of("a.b/0001.seg.PNG"), Some(("a.b/0001".into(), "seg.png".into())));
        assert_eq!(of("0001.jpg"), Some(("0001".into(), "jpg".into())));
        assert_eq!((of("a/.jpg"), of("README")), (None, None));
    }

    #[test]
    fn json_labels_are_integers() {
        assert_eq!(label_of_json(r#"{"label": 3, "cls": 4}"#), Ok(3));
        assert_eq!(label_of_json(r#"{"class": 4}"#), Ok(4));
        assert_eq!(label_of_json(r#"{"caption": "cat"}"#), Ok(-1));
        for text in ["{", r#"{"label": "cat"}"#, r#"{"label": 1.5}"#, r#"{"label": -7}"#] {
            assert!(label_of_json(text).is_err(), "{text}");
        }
    }
}
