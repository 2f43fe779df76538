//! Decoding: every kind of file against what Pillow makes of it, and broken files of every kind.
//! `tests/golden/transforms.py` made the files.

use std::path::{Path, PathBuf};

use shared::rng::KeyedRng;
use shared::transforms::decode::{decode, read};
use shared::{Error, Fault};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/images")
}

fn bytes_of(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).expect("a golden file")
}

/// All golden files that are to be decoded, by name.
fn names() -> Vec<String> {
    let files = std::fs::read_dir(folder()).expect("the golden folder");
    let mut names: Vec<String> =
        files.map(|file| file.expect("a file").file_name().into_string().expect("a name")).collect();
    names.retain(|name| !name.ends_with(".expected.png"));
    names.sort();
    names
}

#[test]
fn every_kind_of_file_looks_as_pillow_shows_it() {
    assert!(names().len() >= 20);
    for name in names() {
        let found = read(&folder().join(&name)).expect(&name);
        let expected = read(&folder().join(format!("{name}.expected.png"))).expect(&name);
        assert_eq!((found.height(), found.width()), (expected.height(), expected.width()), "{name}");
        let differences: Vec<u8> = found.pixels().iter().zip(expected.pixels()).map(|(a, b)| a.abs_diff(*b)).collect();
        let largest = differences.iter().max().copied().unwrap_or(0);
        let mean = differences.iter().map(|d| f64::from(*d)).sum::<f64>() / differences.len() as f64;
        println!("{name}: largest {largest}, mean {mean:.3}");
        // Lossless formats are exact. JPEG decoders differ in the inverse transform, in chroma upsampling and in colour conversion.
        let (limit, mean_limit) = match name.as_str() {
            "grey.jpg" => (1, 0.1),
            "rgb_444.jpg" | "cmyk.jpg" | "ycck.jpg" => (3, 0.1),
            "rgb_420.jpg" | "progressive.jpg" | "restart.jpg" | "exif_turned.jpg" => (5, 0.6),
            _ => (0, 0.0),
        };
        assert!(largest <= limit && mean <= mean_limit, "{name}: largest {largest}, mean {mean}");
    }
}

#[test]
fn exif_orientation_is_not_applied() {
    let image = decode(&bytes_of("exif_turned.jpg")).expect("an image");
    assert_eq!((image.height(), image.width()), (18, 23));
    assert_eq!(image.pixels(), decode(&bytes_of("rgb_420.jpg")).expect("an image").pixels());
}

#[test]
fn contents_decide_the_format_not_the_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("really_a.jpg");
    shared::io::write_atomic(&path, &bytes_of("rgb.png")).expect("a file");
    assert_eq!(read(&path).expect("an image"), read(&folder().join("rgb.png")).expect("an image"));
}

#[test]
fn every_cut_of_every_file_is_an_error_or_the_whole_picture() {
    for name in names() {
        let bytes = bytes_of(&name);
        let whole = decode(&bytes).expect(&name);
        let mut refused = 0;
        for end in 0..bytes.len() {
            match decode(&bytes[..end]) {
                // what follows the last pixel (checksums, an end chunk) may be missing
                Ok(image) => assert!(image == whole, "{name} cut at {end} of {} gives another picture", bytes.len()),
                Err(_) => refused += 1,
            }
        }
        assert!(refused + 24 >= bytes.len(), "{name}: only {refused} of {} cuts are refused", bytes.len());
    }
}

#[test]
fn damaged_bytes_never_panic() {
    let mut rng = KeyedRng::new("test", 0, &[]);
    for name in names() {
        let bytes = bytes_of(&name);
        for _ in 0..60 {
            let mut damaged = bytes.clone();
            for _ in 0..=rng.below(4) {
                let at = rng.below(damaged.len());
                damaged[at] = rng.next_u32() as u8;
            }
            drop(decode(&damaged));
        }
    }
}

#[test]
fn damaged_scan_of_a_jpeg_is_an_error_not_a_grey_half() {
    // From the middle of the scan on, a Huffman code that no table has: the picture cannot be completed.
    let mut bytes = bytes_of("rgb_444.jpg");
    let scan = bytes.windows(2).position(|pair| pair == [0xff, 0xda]).expect("a scan");
    let (from, to) = (scan + (bytes.len() - scan) / 2, bytes.len() - 2);
    for pair in bytes[from..to].chunks_mut(2) {
        let stuffed = [0xff, 0x00];
        pair.copy_from_slice(&stuffed[..pair.len()]);
    }
    assert!(matches!(decode(&bytes), Err(Fault::Syntax(_))));
}

#[test]
fn a_picture_larger_than_memory_is_refused_by_its_header() {
    // a PNG header that announces 2^31 - 1 squared pixels
    let mut png = bytes_of("rgb.png");
    png[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    assert!(decode(&png).is_err());
    let mut jpeg = bytes_of("rgb_420.jpg");
    let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).expect("a frame header");
    jpeg[frame + 5..frame + 9].fill(0xff);
    let fault = decode(&jpeg).expect_err("too large").to_string();
    assert!(fault.contains("65535 x 65535"), "{fault}");
}

#[test]
fn errors_name_the_file_and_the_reason() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("cut.jpg");
    let bytes = bytes_of("rgb_420.jpg");
    shared::io::write_atomic(&path, &bytes[..bytes.len() - 30]).expect("a file");
    let error = read(&path).expect_err("cut off");
    assert!(matches!(&error, Error::Damaged { .. }));
    let text = error.to_string();
    assert!(text.contains("cut.jpg") && text.contains("cut off") && text.lines().count() == 1, "{text}");
    assert!(matches!(read(&dir.path().join("no.jpg")), Err(Error::Io { .. })));
}
