//! CIFAR-10 and CIFAR-100 in their binary versions: labels and 32 x 32 pixels in three planes, without any compression.
//!
//! # Source
//! <https://www.cs.toronto.edu/~kriz/cifar.html>

use std::fs;
use std::path::{Path, PathBuf};

use shared::{Error, Fault, Result};

use super::builder::Builder;
use super::reader::read_exact_at;
use super::{Archive, InputFormat, Place, Split};

/// Height and width.
pub(super) const SIDE: usize = 32;
/// Size of the pixels of a sample.
pub(super) const PLANES_BYTES: u64 = 3 * (SIDE * SIDE) as u64;

/// The directory of the binary files: the input, or the one that the official archive unpacks in it.
pub(super) fn directory_of(input: &Path) -> Option<PathBuf> {
    ["", "cifar-10-batches-bin", "cifar-100-binary"]
        .iter()
        .map(|name| if name.is_empty() { input.to_path_buf() } else { input.join(name) })
        .find(|directory| format_of(directory).is_some())
}

/// Which of the two a directory holds.
pub(super) fn format_of(directory: &Path) -> Option<InputFormat> {
    if directory.join("batches.meta.txt").is_file() {
        return Some(InputFormat::Cifar10);
    }
    directory.join("fine_label_names.txt").is_file().then_some(InputFormat::Cifar100)
}

/// Lists the samples of a directory of binary files, or of one file.
pub(super) fn list(input: &Path, format: InputFormat, split: Option<Split>) -> Result<Builder> {
    let directory = if input.is_dir() {
        directory_of(input).unwrap_or_else(|| input.to_path_buf())
    } else {
        input.parent().unwrap_or(Path::new(".")).to_path_buf()
    };
    // the label is the last byte before the pixels; in CIFAR-100 the coarse label comes before the fine one
    let (names, label_bytes, train, test) = match format {
        InputFormat::Cifar100 => ("fine_label_names.txt", 2, &["train.bin"][..], "test.bin"),
        _ => {
            let batches =
                &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"];
            ("batches.meta.txt", 1, &batches[..], "test_batch.bin")
        }
    };
    let names = directory.join(names);
    let text = fs::read_to_string(&names).map_err(Error::io("read", &names))?;
    let mut builder = Builder::default();
    builder.classes = text.lines().map(str::trim).filter(|name| !name.is_empty()).map(Into::into).collect();
    let files: Vec<PathBuf> = match split {
        _ if !input.is_dir() => vec![input.to_path_buf()],
        None | Some(Split::Train) => {
            // the fifth batch is often held out: those that are there are taken
            train.iter().map(|name| directory.join(name)).filter(|path| path.is_file()).collect()
        }
        Some(Split::Val | Split::Test) => vec![directory.join(test)],
    };
    if files.is_empty() {
        let hint = "choose another part by `--split`".into();
        return Err(Error::Missing { what: "file", path: directory.join(train[0]), hint });
    }
    for path in files {
        add_file(&mut builder, &path, label_bytes)?;
    }
    Ok(builder)
}

fn add_file(builder: &mut Builder, path: &Path, label_bytes: u64) -> Result<()> {
    let file = fs::File::open(path).map_err(Error::io("open", path))?;
    let bytes = file.metadata().map_err(Error::io("read", path))?.len();
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let archive = builder.add_archive(Archive::Plain(path.to_path_buf()));
    let record = label_bytes + PLANES_BYTES;
    if bytes < record {
        return Err(Error::damaged(path, Fault::Length { expected: record, found: bytes }));
    }
    for index in 0..bytes / record {
        let mut label = [0];
        read_exact_at(&file, &mut label, index * record + label_bytes - 1).map_err(Error::io("read", path))?;
        let (name, label) = (format!("{name}/{index}"), i64::from(label[0]));
        if label as usize >= builder.classes.len() {
            builder.refuse(&name, format!("its label {label} is outside the {} classes", builder.classes.len()));
        } else {
            let place = Place::Planes { archive, offset: index * record + label_bytes };
            builder.push(&name, label, PLANES_BYTES, place);
        }
    }
    if !bytes.is_multiple_of(record) {
        builder.refuse(&format!("{name}/{}", bytes / record), "the file ends inside it".into());
    }
    Ok(())
}

/// Three planes to pixels of three channels.
pub(super) fn interleave(planes: &[u8]) -> Vec<u8> {
    let plane = planes.len() / 3;
    let (red, rest) = planes.split_at(plane);
    let (green, blue) = rest.split_at(plane);
    red.iter().zip(green).zip(blue).flat_map(|((red, green), blue)| [*red, *green, *blue]).collect()
}
