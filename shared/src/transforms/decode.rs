//! Image files to RGB pixels: JPEG, PNG, WebP and BMP, told by their first bytes, never by their name.
//!
//! What comes out is the picture that a person sees: grey is spread to three equal channels, palettes are resolved, transparency is
//! laid over white, 16 bits are scaled to 8, CMYK and YCCK (inverted, as Adobe writes them and Pillow assumes) become RGB. Of an
//! animation it is the first frame.
//!
//! The EXIF orientation is **not** applied, as in torchvision: pixels stay as the sensor wrote them.
//!
//! A file that is cut off or broken is an error that says why, never a half grey picture: JPEGs are decoded in strict mode and must
//! reach their end-of-image marker. Every allocation is bounded, and a decoder that panics on a hostile file is an error as well.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::{DynamicImage, ImageDecoder as _, ImageFormat, Limits};

use super::RgbImage;
use super::view::MAX_SIDE;
use crate::error::{Error, Fault, Result};

/// Which decoders made the pixels; part of a shard set's identity, because JPEG decoders differ by a few levels.
pub const DECODER: &str = "image 0.25.10, zune-jpeg 0.5.15 (strict)";

/// The largest picture that is decoded: 2^28 pixels, 805 MB.
pub const MAX_PIXELS: u64 = 1 << 28;

/// Reads and decodes a file.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Damaged`] as for [`decode`].
pub fn read(path: &Path) -> Result<RgbImage> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    decode(&bytes).map_err(|fault| Error::damaged(path, fault))
}

/// Decodes the contents of a file.
///
/// # Errors
/// A [`Fault`] that says what is wrong: not an image of the four formats, too large, cut off, or broken.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, Fault> {
    decode_into(bytes, Vec::new())
}

/// As [`decode`], with memory of an earlier picture ([`RgbImage::into_pixels`]) for the pixels.
///
/// # Errors
/// As [`decode`].
pub fn decode_into(bytes: &[u8], memory: Vec<u8>) -> Result<RgbImage, Fault> {
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP | ImageFormat::Bmp)) => format,
        _ if bytes.is_empty() => return Err(Fault::Syntax("the file is empty".into())),
        _ => return Err(Fault::Syntax("not a JPEG, PNG, WebP or BMP image".into())),
    };
    let name = format!("{format:?}").to_uppercase();
    let decoded = catch_unwind(AssertUnwindSafe(|| match format {
        ImageFormat::Jpeg => super::jpeg::decode(bytes, memory),
        _ => decode_with_image(bytes, format),
    }));
    let reason = match decoded {
        Ok(Ok(image)) => return Ok(image),
        Ok(Err(reason)) => reason,
        Err(_panic) => "the decoder gave up on it".into(),
    };
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(Fault::Syntax(format!("broken {name} image: {reason}")))
}

/// Refuses sides that are 0 or make too many pixels.
pub(super) fn check_size(width: u64, height: u64) -> Result<(), String> {
    let side = MAX_SIDE as u64;
    match width.checked_mul(height) {
        Some(1..=MAX_PIXELS) if width <= side && height <= side => Ok(()),
        Some(0) => Err(format!("it has {width} x {height} pixels")),
        _ => Err(format!("{width} x {height} pixels are too many, the limit is {MAX_PIXELS}")),
    }
}

fn decode_with_image(bytes: &[u8], format: ImageFormat) -> Result<RgbImage, String> {
    let text = |e: image::ImageError| e.to_string();
    let mut reader = image::ImageReader::with_format(Cursor::new(bytes), format);
    // The side limits keep decoders from allocating for a size that `check_size` is going to refuse.
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE as u32);
    limits.max_image_height = Some(MAX_SIDE as u32);
    // up to four channels of 16 bits, and as much again for the decoder
    limits.max_alloc = Some(MAX_PIXELS * 16);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(text)?;
    let (width, height) = decoder.dimensions();
    check_size(width.into(), height.into())?;
    decoder.set_limits(limits).map_err(text)?;
    let (height, width) = (height as usize, width as usize);
    let picture = DynamicImage::from_decoder(decoder).map_err(text)?;
    let pixels = if picture.color().has_alpha() { over_white(picture) } else { picture.into_rgb8().into_raw() };
    RgbImage::new(height, width, pixels).map_err(|e| e.to_string())
}

/// Lays a transparent picture over white.
fn over_white(picture: DynamicImage) -> Vec<u8> {
    let rgba = picture.into_rgba8().into_raw();
    let mut rgb = Vec::with_capacity(rgba.len() / 4 * 3);
    for &[r, g, b, alpha] in rgba.as_chunks::<4>().0 {
        let alpha = u32::from(alpha);
        rgb.extend([r, g, b].map(|v| ((u32::from(v) * alpha + 255 * (255 - alpha) + 127) / 255) as u8));
    }
    rgb
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoder_versions_are_those_of_the_lock_file() {
        let lock: toml::Table = include_str!("../../../Cargo.lock").parse().unwrap();
        let version = |name: &str| {
            let packages = lock["package"].as_array().unwrap().iter();
            let found = packages.filter(|p| p["name"].as_str() == Some(name)).map(|p| p["version"].as_str().unwrap());
            found.filter(|v| name != "image" || v.starts_with("0.25")).collect::<Vec<_>>().join("+")
        };
        assert_eq!(DECODER, format!("image {}, zune-jpeg {} (strict)", version("image"), version("zune-jpeg")));
    }

    #[test]
    fn huge_and_empty_sides_are_refused() {
        assert!(check_size(0, 5).is_err() && check_size(1 << 15, 1 << 14).is_err() && check_size(u64::MAX, 2).is_err());
        assert!(check_size(1 << 14, 1 << 14).is_ok() && check_size((1 << 24) + 1, 1).is_err());
    }

    #[test]
    fn what_is_no_image_says_so() {
        for bytes in [&b""[..], b"GIF89a..", b"hello", b"\xff\xd8\xff", b"BM", b"\x89PNG\r\n\x1a\n"] {
            assert!(decode(bytes).is_err());
        }
    }
}
