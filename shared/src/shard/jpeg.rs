//! JPEG inside a shard set: one encoder and one decoder, both in plain Rust, whatever decodes the source images.
//!
//! Chroma is stored at half the resolution (4:2:0), as nearly all photographs come: their own chroma had no more, and files are
//! about a third smaller than at 4:4:4. The standard Huffman tables keep the file in one scan: tables made for each picture would
//! save some percent, but the encoder then writes a scan for each channel, which the decoder gets wrong.

use std::panic::{AssertUnwindSafe, catch_unwind};

use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::error::{Error, Fault, Result};
use crate::transforms::RgbImage;

/// What writes JPEGs into shard sets; part of a set's identity.
pub const STORED_ENCODER: &str = "jpeg-encoder 0.7.1 (4:2:0)";

/// What reads JPEGs in shard sets: another decoder would give other pixels, so a set is refused by programs with another one.
pub const STORED_DECODER: &str = "zune-jpeg 0.5.15 (strict)";

/// The quality unless told otherwise: at 90, rounding is about as coarse as in the photographs themselves, which most data sets
/// hold at 75 to 95.
pub const DEFAULT_QUALITY: u8 = 90;

const END_OF_IMAGE: [u8; 2] = [0xff, 0xd9];

/// Appends the JPEG file of a picture to `out`.
///
/// # Shapes
/// - `rgb`: `(H, W, 3)` u8
///
/// # Errors
/// [`Error::Invalid`] when a side is longer than the format allows.
pub fn encode(rgb: &[u8], (height, width): (usize, usize), quality: u8, out: &mut Vec<u8>) -> Result<()> {
    let side = |side: usize| {
        u16::try_from(side)
            .map_err(|e| Error::invalid(format!("{width} x {height} pixels are too many for JPEG: {e}"), ""))
    };
    let (columns, rows) = (side(width)?, side(height)?);
    let mut encoder = Encoder::new(out, quality);
    encoder.set_sampling_factor(SamplingFactor::R_4_2_0);
    encoder
        .encode(rgb, columns, rows, ColorType::Rgb)
        .map_err(|e| Error::invalid(format!("a picture of {width} x {height} pixels cannot become a JPEG: {e}"), ""))
}

/// Decodes a JPEG of a shard, which must have `height` x `width` pixels, into memory that is used again.
///
/// # Errors
/// [`Fault::Value`] when the bytes are no such picture.
pub(super) fn decode(bytes: &[u8], (height, width): (usize, usize), memory: Vec<u8>) -> Result<RgbImage, Fault> {
    let attempt = catch_unwind(AssertUnwindSafe(|| decode_sized(bytes, (height, width), memory)));
    attempt.unwrap_or_else(|_panic| Err("the decoder gave up on it".into())).map_err(|reason| {
        let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
        Fault::Value(format!("a JPEG of {width} x {height} pixels cannot be decoded: {reason}"))
    })
}

fn decode_sized(bytes: &[u8], (height, width): (usize, usize), mut pixels: Vec<u8>) -> Result<RgbImage, String> {
    // The decoder lets a file pass that ends early; the encoder writes nothing after the end of the image.
    if !bytes.ends_with(&END_OF_IMAGE) {
        return Err("it is cut off".into());
    }
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(width)
        .set_max_height(height)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| e.to_string())?;
    let found = decoder.dimensions().ok_or("it has no frame header")?;
    if found != (width, height) {
        return Err(format!("it has {} x {} pixels", found.0, found.1));
    }
    pixels.resize(height * width * 3, 0);
    decoder.decode_into(&mut pixels).map_err(|e| e.to_string())?;
    RgbImage::new(height, width, pixels).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::KeyedRng;

    /// A smooth picture with some grain.
    fn picture(height: usize, width: usize) -> Vec<u8> {
        let mut rng = KeyedRng::new("stored jpeg", 0, &[]);
        let value = |i: usize| {
            let (y, x, c) = (i / 3 / width, i / 3 % width, i % 3);
            let wave = (x as f32 / 17.0 + c as f32).sin() * 60.0 + (y as f32 / 23.0).cos() * 50.0;
            (128.0 + wave) as u8
        };
        (0..height * width * 3).map(|i| value(i).saturating_add(rng.below(6) as u8)).collect()
    }

    fn rms(a: &[u8], b: &[u8]) -> f64 {
        let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
        (sum / a.len() as f64).sqrt()
    }

    #[test]
    fn pictures_of_all_sizes_come_back_nearly_the_same() {
        for (height, width) in [(1, 1), (7, 9), (16, 16), (50, 33), (224, 224)] {
            let pixels = picture(height, width);
            let mut file = b"before".to_vec();
            encode(&pixels, (height, width), DEFAULT_QUALITY, &mut file).unwrap();
            let image = decode(&file[6..], (height, width), Vec::new()).unwrap();
            let error = rms(&pixels, image.pixels());
            assert!(error < 3.0, "{height} x {width}: {error}");
        }
    }

    #[test]
    fn quality_decides_size_and_error() {
        let pixels = picture(96, 128);
        let made = [50, 90, 100].map(|quality| {
            let mut file = Vec::new();
            encode(&pixels, (96, 128), quality, &mut file).unwrap();
            (file.len(), rms(&pixels, decode(&file, (96, 128), Vec::new()).unwrap().pixels()))
        });
        assert!(made.is_sorted_by(|a, b| a.0 < b.0 && a.1 > b.1), "{made:?}");
    }

    #[test]
    fn bytes_and_pixels_are_pinned() {
        // A change here changes every JPEG set: it needs other names of encoder and decoder.
        let mut file = Vec::new();
        encode(&picture(40, 56), (40, 56), 90, &mut file).unwrap();
        let pixels = decode(&file, (40, 56), Vec::new()).unwrap().into_pixels();
        let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
        assert_eq!((hash(&file), hash(&pixels)), ("b9b76010fa6f62a0".into(), "8cb07235960a9897".into()));
    }

    #[test]
    fn pixels_do_not_depend_on_the_instruction_set() {
        for (height, width) in [(8, 8), (50, 33), (96, 128), (224, 224)] {
            let mut file = Vec::new();
            encode(&picture(height, width), (height, width), 90, &mut file).unwrap();
            let plain = DecoderOptions::default()
                .set_strict_mode(true)
                .set_use_unsafe(false)
                .jpeg_set_out_colorspace(ColorSpace::RGB);
            let mut decoder = JpegDecoder::new_with_options(ZCursor::new(&file[..]), plain);
            assert!(decoder.decode().unwrap() == decode(&file, (height, width), Vec::new()).unwrap().pixels());
        }
    }

    #[test]
    fn broken_and_other_pictures_are_faults() {
        let mut file = Vec::new();
        encode(&picture(24, 40), (24, 40), 90, &mut file).unwrap();
        assert!(decode(&file, (40, 24), Vec::new()).is_err());
        assert!(decode(&[], (24, 40), Vec::new()).is_err());
        for end in 0..file.len() - 2 {
            assert!(decode(&file[..end], (24, 40), Vec::new()).is_err(), "{end} of {}", file.len());
        }
        // Whatever single bytes become, there is a picture of that size or a fault.
        for at in 0..file.len() {
            let mut changed = file.clone();
            changed[at] ^= 0x55;
            if let Ok(image) = decode(&changed, (24, 40), Vec::new()) {
                assert_eq!((image.height(), image.width()), (24, 40));
            }
        }
        assert!(encode(&vec![0; 3 * 70_000], (1, 70_000), 90, &mut Vec::new()).is_err());
    }

    #[test]
    fn versions_are_those_of_the_lock_file() {
        let lock: toml::Table = include_str!("../../../Cargo.lock").parse().unwrap();
        let version = |name: &str| {
            let found =
                lock["package"].as_array().unwrap().iter().find(|package| package["name"].as_str() == Some(name));
            format!("{name} {}", found.unwrap()["version"].as_str().unwrap())
        };
        assert!(
            STORED_ENCODER.starts_with(&version("jpeg-encoder")) && STORED_DECODER.starts_with(&version("zune-jpeg"))
        );
    }
}
