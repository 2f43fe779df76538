//! JPEG files through libjpeg-turbo, with the bytes of Pillow, which uses it as well.

use turbojpeg::{Colorspace, Decompressor, Image, PixelFormat};

/// Decodes a JPEG file of `height` x `width` pixels into `pixels`, red, green and blue by turns, whose memory is used again.
///
/// Whether it did: a file that libjpeg-turbo complains about in any way, even by a mere warning, is not decoded, and neither is one of
/// another size. `pixels` is then of no use.
///
/// # Source
/// CMYK and YCCK are decoded to CMYK and become RGB as in Pillow 13.0.0: `JpegImagePlugin.py` takes them to be inverted, `Convert.c`
/// multiplies with rounding.
pub(super) fn decode(bytes: &[u8], height: usize, width: usize, pixels: &mut Vec<u8>) -> bool {
    decompress(bytes, height, width, pixels).is_some()
}

fn decompress(bytes: &[u8], height: usize, width: usize, pixels: &mut Vec<u8>) -> Option<()> {
    let mut decompressor = Decompressor::new().ok()?;
    let header = decompressor.read_header(bytes).ok()?;
    if (header.height, header.width) != (height, width) {
        return None;
    }
    let is_cmyk = matches!(header.colorspace, Colorspace::CMYK | Colorspace::YCCK);
    let format = if is_cmyk { PixelFormat::CMYK } else { PixelFormat::RGB };
    let pitch = width * format.size();
    pixels.resize(height * pitch, 0);
    let output = Image { pixels: pixels.as_mut_slice(), width, pitch, height, format };
    decompressor.decompress(bytes, output).ok()?;
    if is_cmyk {
        for i in 0..height * width {
            let rgb = rgb_of([pixels[4 * i], pixels[4 * i + 1], pixels[4 * i + 2], pixels[4 * i + 3]]);
            pixels[3 * i..3 * i + 3].copy_from_slice(&rgb);
        }
        pixels.truncate(height * width * 3);
    }
    Some(())
}

/// The colour of an inverted CMYK pixel.
fn rgb_of([cyan, magenta, yellow, light]: [u8; 4]) -> [u8; 3] {
    [cyan, magenta, yellow].map(|inverted| {
        // the product of two shares of 255, rounded
        let product = u32::from(255 - inverted) * u32::from(light) + 128;
        light.saturating_sub(((product + (product >> 8)) >> 8) as u8)
    })
}
