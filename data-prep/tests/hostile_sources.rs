//! Troublesome and hostile inputs: every one ends in a sentence or in a reject, never in a panic or in silence.

mod fixtures;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use data_prep::args::VerifyArgs;
use data_prep::pack::{Reject, pack};
use data_prep::source::{InputFormat, Listing, Payload, Reader, SourceOptions};
use data_prep::verify::verify;
use fixtures::{Outcome, config, photos};
use shared::io::{create_directory, write_atomic};
use shared::shard::sample_id;

fn made(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sources").join(name)
}

fn tree(files: &[&str]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a directory");
    for file in files {
        let path = root.path().join(file);
        create_directory(path.parent().expect("a directory")).expect("it can be made");
        write_atomic(&path, file.as_bytes()).expect("it can be written");
    }
    root
}

fn open(path: &Path) -> shared::Result<Listing> {
    Listing::open(path, &SourceOptions::default())
}

fn names(listing: &Listing) -> Vec<(&str, i64)> {
    listing.samples.iter().map(|sample| (&*sample.name, sample.label)).collect()
}

/// What reading each sample gives: its size, or why not.
fn read_all(listing: &Listing) -> Vec<(String, Result<usize, String>)> {
    let mut reader = Reader::default();
    let read = |sample| match reader.load(listing, sample)? {
        Payload::Encoded(bytes) => Ok(bytes.len()),
        Payload::Pixels(image) => Ok(image.pixels().len()),
    };
    let results: Vec<_> = listing.samples.iter().map(read).collect();
    listing.samples.iter().map(|sample| sample.name.to_string()).zip(results).collect()
}

fn reason(listing: &Listing, name: &str) -> String {
    let found = read_all(listing).into_iter().find(|(other, _)| other == name).expect("it is listed");
    found.1.expect_err("it cannot be used")
}

/// Gives every prefix of a file, and the file with single bytes changed, to `check`.
fn mutilate(bytes: &[u8], path: &Path, (cuts, flips): (usize, usize), check: impl Fn(&str)) -> Outcome {
    // thousands of files: not worth syncing each to the disk
    let write = |bytes: &[u8]| {
        fs::File::options().write(true).create(true).truncate(true).open(path).and_then(|mut f| f.write_all(bytes))
    };
    for length in (0..bytes.len()).step_by(cuts) {
        write(&bytes[..length])?;
        check(&format!("{length} bytes"));
    }
    for at in (0..bytes.len()).step_by(flips) {
        for flip in [0xff, 0x40] {
            let mut changed = bytes.to_vec();
            changed[at] ^= flip;
            write(&changed)?;
            check(&format!("byte {at} by {flip}"));
        }
    }
    Ok(())
}

fn tar_of(members: &[(&str, &[u8])]) -> Outcome<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        tar.append_data(&mut header, name, *bytes)?;
    }
    Ok(tar.into_inner()?)
}

#[test]
fn classes_are_sorted_directories_that_hold_images() -> Outcome {
    let root = tree(&[
        "b/2.JPG",
        "b/1.png",
        "a b/deep/x.webp",
        "a b-c/y.webp",
        "empty/readme.txt",
        ".git/x.png",
        "b/.hidden.png",
        "LICENSE",
    ]);
    let listing = open(root.path())?;
    assert_eq!(listing.classes, ["a b", "a b-c", "b"]);
    assert_eq!(names(&listing), [("a b-c/y.webp", 1), ("a b/deep/x.webp", 0), ("b/1.png", 2), ("b/2.JPG", 2)]);
    assert_eq!(listing.samples[1].id, sample_id("a b/deep/x.webp"));
    assert!(read_all(&listing).iter().all(|(name, read)| *read == Ok(name.len())));
    Ok(())
}

#[test]
fn directories_train_and_val_are_parts_not_classes() -> Outcome {
    let root = tree(&["train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "notes.txt"]);
    assert_eq!(names(&open(root.path())?), [("a/1.jpg", 0), ("b/2.jpg", 1)]);
    let val = SourceOptions { split: Some(data_prep::source::Split::Val), ..SourceOptions::default() };
    assert_eq!(names(&Listing::open(root.path(), &val)?), [("a/3.jpg", 0)]);
    // a class that happens to be called so
    let root = tree(&["train/1.jpg", "plane/2.jpg"]);
    assert_eq!(open(root.path())?.classes, ["plane", "train"]);
    Ok(())
}

#[test]
fn flat_folder_has_no_classes() -> Outcome {
    let root = tree(&["2.jpg", "1.jpg", "notes.txt"]);
    assert_eq!(names(&open(root.path())?), [("1.jpg", -1), ("2.jpg", -1)]);
    let options = SourceOptions { input_format: Some(InputFormat::ClassFolders), ..SourceOptions::default() };
    assert!(Listing::open(root.path(), &options).unwrap_err().to_string().contains("nor a folder of classes"));
    Ok(())
}

#[test]
fn wrong_inputs_get_a_sentence() {
    let sentence = |path: &Path| open(path).unwrap_err().to_string();
    let root = tree(&["a/1.jpg", "2.jpg", "empty.parquet", "empty.tar", "x.bin"]);
    assert!(sentence(&root.path().join("no")).contains("does not exist"));
    assert!(sentence(&root.path().join("2.jpg")).contains("is not a folder, tar archive"));
    assert!(sentence(&root.path().join("x.bin")).contains("is not a folder, tar archive"));
    assert!(sentence(&root.path().join("empty.parquet")).contains("damaged"));
    let root = tree(&["a/1.jpg", "2.jpg"]);
    assert!(sentence(root.path()).contains("`2.jpg` and `a/1.jpg`"));
    assert!(sentence(tree(&["x.txt"]).path()).contains("holds no image"));
    for format in [InputFormat::Ilsvrc2012, InputFormat::Kaggle, InputFormat::Cifar10, InputFormat::Parquet] {
        let options = SourceOptions { input_format: Some(format), ..SourceOptions::default() };
        let error = Listing::open(root.path(), &options).unwrap_err();
        assert_eq!(error.exit_status(), 1, "{format:?}: {error}");
    }
}

#[test]
fn fingerprint_covers_names_sizes_and_labels() -> Outcome {
    let print = |files: &[&str]| open(tree(files).path()).unwrap().as_input().fingerprint;
    assert_eq!(print(&["1.jpg", "2.jpg"]), print(&["2.jpg", "1.jpg"]));
    assert_ne!(print(&["1.jpg", "2.jpg"]), print(&["1.jpg", "3.jpg"]));
    assert_ne!(print(&["1.jpg"]), print(&["1.jpg", "2.jpg"]));
    let root = tree(&["1.jpg"]);
    let list = root.path().join("list.txt");
    write_atomic(&list, b"1.jpg 0\n")?;
    let zero = open(&list)?.as_input().fingerprint;
    write_atomic(&list, b"1.jpg 1\n")?;
    assert_ne!(open(&list)?.as_input().fingerprint, zero);
    Ok(())
}

#[cfg(unix)]
#[test]
fn links_are_followed_but_not_in_circles() -> Outcome {
    use std::os::unix::fs::symlink;
    let root = tree(&["a/1.jpg", "far/2.jpg"]);
    symlink(root.path().join("far"), root.path().join("b"))?;
    symlink(root.path().join("no-such"), root.path().join("a/3.jpg"))?;
    let listing = open(root.path())?;
    assert_eq!(listing.classes, ["a", "b", "far"]);
    assert_eq!(listing.samples.len(), 4);
    assert!(reason(&listing, "a/3.jpg").contains("cannot read it"));
    symlink(root.path(), root.path().join("a/up"))?;
    let error = open(root.path()).unwrap_err().to_string();
    assert!(error.contains("a/up` links to a directory that holds it"), "{error}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn every_odd_file_is_packed_or_named_with_a_reason() -> Outcome {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 3)])?;
    let bytes = fs::read(input.join("a/000.jpg"))?;
    let write = |path: PathBuf, bytes: &[u8]| -> Outcome {
        create_directory(path.parent().expect("a directory"))?;
        write_atomic(path, bytes)?;
        Ok(())
    };
    write(input.join("a").join(OsStr::from_bytes(b"caf\xe9.jpg")), &bytes)?;
    write(input.join(OsStr::from_bytes(b"\xff")).join("in.jpg"), &bytes)?;
    write(input.join("a/zero.png"), b"")?;
    write(input.join("a/page.jpeg"), b"<html>")?;
    create_directory(input.join("a/directory.jpg"))?;
    std::os::unix::fs::symlink("/no/such/file", input.join("a/broken.jpg"))?;
    // these are fine
    write(input.join("a/jpeg-called.png"), &bytes)?;
    write(input.join("a/IMAGE.jpg"), &bytes)?;
    write(input.join("a/image.jpg"), &bytes)?;
    let long = format!("a/{}/{}/x.jpg", "d".repeat(150), "e".repeat(150));
    write(input.join(&long), &bytes)?;
    let summary = pack(&config(&input, &output, |o| o.max_rejects = Some("9".parse().unwrap())))?;
    assert_eq!((summary.samples, summary.rejects), (7, 5));
    let text = fs::read_to_string(output.join("rejects.jsonl"))?;
    let rejects: Vec<Reject> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let expected = [
        ("\\xff/in.jpg", "not UTF-8"),
        ("a/broken.jpg", "cannot read it"),
        ("a/caf\\xe9.jpg", "not UTF-8"),
        ("a/page.jpeg", "not a JPEG"),
        ("a/zero.png", "empty"),
    ];
    assert_eq!(rejects.len(), expected.len());
    for (reject, (name, reason)) in rejects.iter().zip(expected) {
        assert!(reject.path == name && reject.reason.contains(reason), "{reject:?}");
    }
    assert!(open(&input)?.samples.iter().any(|sample| *sample.name == *long));
    Ok(())
}

#[test]
fn webdataset_labels_that_are_no_labels_are_rejects() -> Outcome {
    let root = tempfile::tempdir()?;
    let path = root.path().join("x.tar");
    let image: &[u8] = b"image";
    let tar = tar_of(&[
        ("0.jpg", image),
        ("0.cls", b"cat"),
        ("1.jpg", image),
        ("1.cls", b"4000000000"),
        ("2.json", b"{\"label\": \"cat\"}"),
        ("2.jpg", image),
        ("3.jpg", image),
        ("3.json", b"{\"label\": "),
        ("4.cls", b"3"),
        ("5.jpg", image),
        ("5.cls", b" 6\n"),
        ("6.png", b"the lesser one"),
        ("6.jpg", image),
        ("6.seg.png", image),
        ("7.jpg", image),
        ("7.cls", b"\xff\xfe"),
    ])?;
    write_atomic(&path, &tar)?;
    let listing = open(&path)?;
    let results = read_all(&listing);
    let reasons = [
        ("0.jpg", "its label `cat` is no number"),
        ("1.jpg", "out of range"),
        ("2.jpg", "its label \"cat\" is no integer"),
        ("3.jpg", "its JSON is broken"),
        ("4", "no image among its fields `cls`"),
        ("7.jpg", "is no number"),
    ];
    for (name, part) in reasons {
        assert!(reason(&listing, name).contains(part), "{name}: {}", reason(&listing, name));
    }
    let sound: Vec<&str> = results.iter().filter(|(_, read)| read.is_ok()).map(|(name, _)| name.as_str()).collect();
    assert_eq!(sound, ["5.jpg", "6.jpg"]);
    assert_eq!((names(&listing)[5].1, names(&listing)[6].1), (6, -1));
    write_atomic(&path, &tar_of(&[("0.jpg", image), ("0.jpg", image)])?)?;
    assert!(open(&path).unwrap_err().to_string().contains("holds `0.jpg` twice"));
    write_atomic(&path, &tar_of(&[("0.txt", image), ("0.cls", b"1")])?)?;
    assert!(open(&path).unwrap_err().to_string().contains("no image, only fields `txt`, `cls`"));
    Ok(())
}

#[test]
fn compressed_tar_is_refused_with_the_way_to_decompress_it() -> Outcome {
    let root = tempfile::tempdir()?;
    for (name, start, tool) in [
        ("a.tar.gz", &b"\x1f\x8b\x08\x00"[..], "gunzip"),
        ("a.tar", b"\x1f\x8b\x08\x00", "gunzip"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd", "unzstd"),
        ("a.tar.xz", b"\xfd7zXZ\0", "unxz"),
        ("a.tgz", b"\x1f\x8b\x08\x00", "gunzip"),
    ] {
        let path = root.path().join(name);
        write_atomic(&path, start)?;
        let error = open(&path).unwrap_err();
        assert!(error.to_string().contains("is compressed"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains(tool)), "{error}");
        fs::remove_file(path)?;
    }
    Ok(())
}

#[test]
fn cut_tar_gives_its_whole_members_and_names_the_others() -> Outcome {
    let root = tempfile::tempdir()?;
    let path = root.path().join("x.tar");
    let image = vec![7; 1500];
    let tar = tar_of(&[("0.jpg", &image), ("1.jpg", &image)])?;
    // 0: header to 512, data to 2012, padded to 2048; 1: header to 2560, data to 4060
    for (length, usable, part) in [
        (4060, 2, None),
        (4000, 1, Some(("1.jpg", "the archive ends inside it"))),
        (2560, 1, Some(("1.jpg", "the archive ends inside it"))),
        (2300, 1, Some(("x.tar", "damaged"))),
        (2048, 1, None),
        (1000, 0, Some(("0.jpg", "1500 bytes expected, 488 found"))),
    ] {
        write_atomic(&path, &tar[..length])?;
        let listing = open(&path)?;
        assert_eq!(read_all(&listing).iter().filter(|(_, read)| *read == Ok(1500)).count(), usable, "{length}");
        if let Some((name, part)) = part {
            assert!(reason(&listing, name).contains(part), "{length}: {}", reason(&listing, name));
        } else {
            assert_eq!(listing.samples.len(), usable);
        }
    }
    Ok(())
}

#[test]
fn tar_headers_are_not_trusted() -> Outcome {
    let root = tempfile::tempdir()?;
    let path = root.path().join("x.tar");
    let with_header = |change: &dyn Fn(&mut tar::Header)| -> Outcome<Listing> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_path("0.jpg")?;
        header.set_size(4);
        change(&mut header);
        header.set_cksum();
        tar.append(&header, &b"data"[..])?;
        let mut header = tar::Header::new_gnu();
        header.set_path("1.jpg")?;
        header.set_size(4);
        header.set_cksum();
        tar.append(&header, &b"data"[..])?;
        write_atomic(&path, &tar.into_inner()?)?;
        Ok(open(&path)?)
    };
    // 8 TB, more than a signed, and about all of an unsigned 64-bit number
    for size in [1u64 << 43, 1 << 63, u64::MAX, u64::MAX - 511] {
        let listing = with_header(&|header| header.set_size(size))?;
        assert!(read_all(&listing).iter().all(|(_, read)| read.is_err()), "{size}");
    }
    let listing = with_header(&|header| header.set_entry_type(tar::EntryType::GNUSparse))?;
    assert!(read_all(&listing).iter().any(|(_, read)| read.is_err()));
    for kind in [tar::EntryType::Fifo, tar::EntryType::Char, tar::EntryType::Block] {
        let listing = with_header(&|header| header.set_entry_type(kind))?;
        assert_eq!(reason(&listing, "0.jpg"), "it is not a file", "{kind:?}");
        assert!(read_all(&listing)[1].1.is_ok());
    }
    // a long name without end
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_path("././@LongLink")?;
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(3 << 20);
    header.set_cksum();
    tar.append(&header, &vec![b'n'; 3 << 20][..])?;
    write_atomic(&path, &tar.into_inner()?)?;
    let listing = open(&path)?;
    assert!(reason(&listing, "x.tar").contains("header of a member is too long"));
    Ok(())
}

#[test]
fn sparse_pax_members_are_rejects() -> Outcome {
    let root = tempfile::tempdir()?;
    let path = root.path().join("x.tar");
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_pax_extensions([("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.minor", b"0")])?;
    let mut header = tar::Header::new_ustar();
    header.set_path("0.jpg")?;
    header.set_size(4);
    header.set_cksum();
    tar.append(&header, &b"data"[..])?;
    write_atomic(&path, &tar.into_inner()?)?;
    assert!(reason(&open(&path)?, "0.jpg").contains("stored sparsely"));
    Ok(())
}

#[test]
fn mutilated_archives_never_panic() -> Outcome {
    let root = tempfile::tempdir()?;
    for name in ["pax.tar", "gnu.tar"] {
        let path = root.path().join(name);
        mutilate(&fs::read(made(name))?, &path, (97, 23), |_| {
            if let Ok(listing) = open(&path) {
                read_all(&listing);
            }
        })?;
    }
    Ok(())
}

#[test]
fn mutilated_parquet_never_panics() -> Outcome {
    let root = tempfile::tempdir()?;
    std::panic::set_hook(Box::new(|_| ()));
    for name in ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"] {
        let path = root.path().join("x.parquet");
        let bytes = fs::read(made(name))?;
        let sound = read_all(&open(&made(name))?).len();
        mutilate(&bytes, &path, (97, 11), |what| match open(&path) {
            Ok(listing) => assert!(read_all(&listing).len() <= sound * 4, "{what}"),
            Err(error) => assert_eq!(error.exit_status(), 1, "{what}"),
        })?;
    }
    drop(std::panic::take_hook());
    Ok(())
}

#[test]
fn parquet_of_other_data_is_refused_by_its_columns() -> Outcome {
    use parquet::data_type::Int64Type;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    let root = tempfile::tempdir()?;
    let schema = parquet::schema::parser::parse_message_type("message m { required int64 year; }")?;
    let mut writer = SerializedFileWriter::new(Vec::new(), schema.into(), WriterProperties::default().into())?;
    let mut group = writer.next_row_group()?;
    let mut column = group.next_column()?.ok_or("a column")?;
    column.typed::<Int64Type>().write_batch(&[1, 2], None, None)?;
    column.close()?;
    group.close()?;
    let path = root.path().join("x.parquet");
    write_atomic(&path, &writer.into_inner()?)?;
    let error = open(&path).unwrap_err().to_string();
    assert!(error.contains("no column `image`") && error.contains("`year`"), "{error}");
    Ok(())
}

#[test]
fn set_verifies_against_the_same_images_in_another_packaging() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 5)])?;
    let flat = input.join("a");
    pack(&config(&flat, &output, |_| ()))?;
    let mut files: Vec<PathBuf> =
        fs::read_dir(&flat)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    files.sort();
    let read: Vec<(String, Vec<u8>)> = files
        .iter()
        .map(|path| Ok((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), fs::read(path)?)))
        .collect::<std::io::Result<_>>()?;
    let members: Vec<(&str, &[u8])> = read.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let tar = root.path().join("x.tar");
    write_atomic(&tar, &tar_of(&members)?)?;
    let args = VerifyArgs {
        shards: output,
        source: Some(tar),
        options: SourceOptions::default(),
        samples: 10,
        quiet: true,
        json: false,
    };
    assert_eq!(verify(&args)?.compared_samples, 5);
    Ok(())
}
