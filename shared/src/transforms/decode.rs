//! Image files to RGB pixels: JPEG, PNG, WebP, BMP, GIF, TIFF and PNM (PPM, PGM, PBM), told by their first bytes, never by their name.
//!
//! What comes out is the picture that a person sees: grey is spread to three equal channels, palettes are resolved, transparency is
//! laid over white, 16 bits are scaled to 8, CMYK and YCCK (inverted, as Adobe writes them and Pillow assumes) become RGB. Of an
//! animation it is the first frame, of several pages the first page; what a first frame leaves open counts as transparent.
//!
//! The EXIF orientation is **not** applied, as in torchvision: pixels stay as the sensor wrote them.
//!
//! A file that is cut off or broken is an error that says why, never a half grey picture: JPEGs are decoded in strict mode and must
//! reach their end-of-image marker. Every allocation is bounded, and a decoder that panics on a hostile file is an error as well.
//!
//! With the feature `libjpeg`, JPEGs are decoded by libjpeg-turbo, with the bytes of Pillow; those that it complains about are left to
//! the decoder in Rust, which says what is wrong with them.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageFormat, Limits};

use super::RgbImage;
use super::view::MAX_SIDE;
use crate::error::{Error, Fault, Result};

/// Which decoders made the pixels; part of a shard set's identity, because JPEG decoders differ by a few levels.
#[cfg(not(feature = "libjpeg"))]
pub const DECODER: &str = "image 0.25.10, zune-jpeg 0.5.15 (strict)";

/// Which decoders made the pixels; part of a shard set's identity, because JPEG decoders differ by a few levels.
#[cfg(feature = "libjpeg")]
pub const DECODER: &str = "libjpeg-turbo 3.1.0 (turbojpeg 1.5.1), image 0.25.10, zune-jpeg 0.5.15 (strict)";

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
/// A [`Fault`] that says what is wrong: not an image of these formats, too large, cut off, or broken.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, Fault> {
    decode_into(bytes, Vec::new())
}

/// As [`decode`], with memory of an earlier picture ([`RgbImage::into_pixels`]) for the pixels.
///
/// # Errors
/// As [`decode`].
pub fn decode_into(bytes: &[u8], memory: Vec<u8>) -> Result<RgbImage, Fault> {
    let format = format_of(bytes)?;
    guarded(format, || match format {
        ImageFormat::Jpeg => super::jpeg::decode(bytes, memory),
        _ => decode_with_image(bytes, format),
    })
}

/// Height and width of the picture that [`decode`] would give, from the header alone: cheap, and nothing of the picture's size is
/// allocated. That it succeeds does not mean that the rest of the file is sound.
///
/// # Errors
/// A [`Fault`]: not an image of these formats, a broken header, or too large.
pub fn dimensions(bytes: &[u8]) -> Result<(usize, usize), Fault> {
    let format = format_of(bytes)?;
    guarded(format, || {
        if format == ImageFormat::Jpeg {
            return super::jpeg::dimensions(bytes);
        }
        let (width, height) = open(bytes, format)?.dimensions();
        Ok((height as usize, width as usize))
    })
}

fn format_of(bytes: &[u8]) -> Result<ImageFormat, Fault> {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Pnm, Tiff, WebP};
    match image::guess_format(bytes) {
        Ok(format @ (Jpeg | Png | WebP | Bmp | Gif | Tiff | Pnm)) => Ok(format),
        _ if bytes.is_empty() => Err(Fault::Syntax("the file is empty".into())),
        _ => Err(Fault::Syntax("not a JPEG, PNG, WebP, BMP, GIF, TIFF or PNM image".into())),
    }
}

/// Runs a decoder, whose panics become faults.
fn guarded<T>(format: ImageFormat, decoder: impl FnOnce() -> Result<T, String>) -> Result<T, Fault> {
    let reason = match catch_unwind(AssertUnwindSafe(decoder)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(reason)) => reason,
        Err(_panic) => "the decoder gave up on it".into(),
    };
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(Fault::Syntax(format!("broken {} image: {reason}", format!("{format:?}").to_uppercase())))
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

/// Refuses headers that announce more pixels than a file of `bytes` bytes can hold, for the formats where that is known.
fn check_share(format: ImageFormat, width: u64, height: u64, bytes: usize) -> Result<(), String> {
    let most = match format {
        // one bit a pixel; the best that deflate can do is 1032 bytes out of one
        ImageFormat::Png => 8 * 1032,
        ImageFormat::Pnm => 8,
        _ => return Ok(()),
    };
    if width * height <= most * bytes as u64 {
        return Ok(());
    }
    Err(format!("{width} x {height} pixels cannot be in {bytes} bytes"))
}

/// A decoder that has read the header, and whose allocations are limited.
fn open(bytes: &[u8], format: ImageFormat) -> Result<impl ImageDecoder + '_, String> {
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
    check_share(format, width.into(), height.into(), bytes.len())?;
    decoder.set_limits(limits).map_err(text)?;
    Ok(decoder)
}

fn decode_with_image(bytes: &[u8], format: ImageFormat) -> Result<RgbImage, String> {
    let decoder = open(bytes, format)?;
    let (width, height) = decoder.dimensions();
    let (height, width) = (height as usize, width as usize);
    let picture = DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?;
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
        let pure = format!("image {}, zune-jpeg {} (strict)", version("image"), version("zune-jpeg"));
        let libjpeg = format!("libjpeg-turbo 3.1.0 (turbojpeg {}), {pure}", version("turbojpeg"));
        assert_eq!(DECODER, if cfg!(feature = "libjpeg") { libjpeg } else { pure });
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
