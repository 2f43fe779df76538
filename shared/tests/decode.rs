//! Decoding: every kind of file against what Pillow makes of it, and broken files of every kind.
//! `tests/golden/transforms.py` made the files.

#[cfg(feature = "libjpeg")]
#[path = "support/checksum.rs"]
mod checksum;

use std::path::{Path, PathBuf};

use shared::rng::KeyedRng;
use shared::transforms::decode::{decode, dimensions, read};
use shared::{Error, Fault};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

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
    assert!(names().len() >= 38);
    for name in names() {
        let found = read(&folder().join(&name)).expect(&name);
        let expected = read(&folder().join(format!("{name}.expected.png"))).expect(&name);
        assert_eq!((found.height(), found.width()), (expected.height(), expected.width()), "{name}");
        let differences: Vec<u8> = found.pixels().iter().zip(expected.pixels()).map(|(a, b)| a.abs_diff(*b)).collect();
        let largest = differences.iter().max().copied().unwrap_or(0);
        let mean = differences.iter().map(|d| f64::from(*d)).sum::<f64>() / differences.len() as f64;
        println!("{name}: largest {largest}, mean {mean:.3}");
        // Lossless formats are exact, and JPEG is by the feature `libjpeg`. Otherwise JPEG decoders differ in the inverse transform, in chroma upsampling and in colour conversion.
        let (limit, mean_limit) = match name.as_str() {
            _ if cfg!(feature = "libjpeg") => (0, 0.0),
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
        let (mut refused, of_size) = (0, (whole.height(), whole.width()));
        for end in 0..bytes.len() {
            // the header never lies about the size, unless it is text, of which the last digit may be cut off
            let size = dimensions(&bytes[..end]);
            assert!(size.is_err() || size == Ok(of_size) || bytes[0] == b'P', "{name} {end}");
            match decode(&bytes[..end]) {
                // what follows the last pixel (checksums, an end chunk) may be missing
                Ok(image) => assert!(image == whole, "{name} cut at {end} of {} gives another picture", bytes.len()),
                Err(_) => refused += 1,
            }
        }
        // of an animation, later pictures may be missing as well
        let enough = if name.starts_with("animated") { bytes.len() / 4 } else { bytes.len() - 24 };
        assert!(refused >= enough, "{name}: only {refused} of {} cuts are refused", bytes.len());
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
            drop(dimensions(&damaged));
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
fn headers_tell_the_size_without_the_rest() {
    for name in names() {
        let bytes = bytes_of(&name);
        let whole = decode(&bytes).expect(&name);
        let size = (whole.height(), whole.width());
        assert_eq!(dimensions(&bytes), Ok(size), "{name}");
        // a TIFF file may have its header at the end
        if !name.contains(".tif") {
            let head = &bytes[..bytes.len() * 7 / 8];
            assert_eq!(dimensions(head), Ok(size), "{name}");
        }
    }
    assert!(dimensions(b"").is_err() && dimensions(b"hello").is_err());
}

#[test]
fn kinds_that_cannot_be_decoded_are_refused_by_name() {
    let palette = std::fs::read(folder().join("../refused/palette.tif")).expect("a golden file");
    let fault = decode(&palette).expect_err("no palettes in TIFF").to_string();
    assert!(fault.contains("TIFF") && fault.lines().count() == 1, "{fault}");
    let fault = decode(b"II*\0").expect_err("no directory").to_string();
    assert!(fault.contains("TIFF"), "{fault}");
}

#[test]
fn deep_colours_are_scaled_and_not_cut() {
    // 16 bits: full white is white, half is half
    let ppm =
        [&b"P6 3 1 65535\n"[..], &[0xff; 6], &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80], &[0x00, 0x81, 0, 0x80, 0, 0x7f]]
            .concat();
    assert_eq!(decode(&ppm).expect("an image").pixels(), [255, 255, 255, 128, 128, 128, 1, 0, 0]);
    // and fewer levels than 256, in plain text
    assert_eq!(decode(b"P2 2 1 4\n4 2\n").expect("an image").pixels(), [255, 255, 255, 128, 128, 128]);
}

/// Paths of the example photos.
fn photos() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos");
    let mut photos = Vec::new();
    for class in std::fs::read_dir(root).expect("the photos") {
        let class = class.expect("an entry").path();
        if class.is_dir() {
            photos.extend(std::fs::read_dir(class).expect("a class").map(|file| file.expect("a file").path()));
        }
    }
    photos.sort();
    photos
}

#[test]
fn jpegs_have_the_same_bytes_with_and_without_vector_instructions() {
    let photos = photos();
    assert!(photos.len() >= 100);
    for path in photos.iter().step_by(9) {
        let bytes = std::fs::read(path).expect("a photo");
        let decoded = [true, false].map(|vectors| {
            let options = DecoderOptions::default().set_use_unsafe(vectors).jpeg_set_out_colorspace(ColorSpace::RGB);
            JpegDecoder::new_with_options(ZCursor::new(&bytes), options).decode().expect("a picture")
        });
        assert!(decoded[0] == decoded[1], "{}", path.display());
        if cfg!(not(feature = "libjpeg")) {
            assert!(decode(&bytes).expect("a picture").pixels() == decoded[0], "{}", path.display());
        }
    }
}

#[cfg(feature = "libjpeg")]
#[test]
fn photos_have_the_bytes_of_pillow() {
    #[derive(serde::Deserialize)]
    struct Golden {
        decoded: Vec<(String, String)>,
    }
    let golden: Golden =
        serde_json::from_str(include_str!("../../tests/golden/transforms.json")).expect("the golden file is JSON");
    assert!(golden.decoded.len() >= 10);
    for (file, crc) in golden.decoded {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos").join(&file);
        assert_eq!(checksum::crc32(read(&path).expect("a photo").pixels().iter().copied()), crc, "{file}");
    }
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
