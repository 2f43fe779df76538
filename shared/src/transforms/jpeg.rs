//! JPEG files through zune-jpeg in strict mode, plus two things that strict mode lets pass: a file that ends early, and one whose
//! channels lie in separate scans. With the feature `libjpeg`, through libjpeg-turbo as long as it has nothing to complain about.

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::RgbImage;
use super::decode::check_size;

/// Decodes a JPEG file into `pixels`, whose memory is used again; the error says what is wrong with it.
pub(super) fn decode(bytes: &[u8], mut pixels: Vec<u8>) -> Result<RgbImage, String> {
    let scans = scans_to_the_end(bytes)?;
    #[cfg(feature = "libjpeg")]
    {
        let (height, width) = dimensions(bytes)?;
        if super::libjpeg::decode(bytes, height, width, &mut pixels) {
            return RgbImage::new(height, width, pixels).map_err(|e| e.to_string());
        }
    }
    if scans == Scans::Separate {
        // zune-jpeg 0.5.15 gives wrong pixels for them, without an error
        return Err("its channels lie in separate scans, which this decoder cannot read".into());
    }
    let Opened { mut decoder, height, width } = open(bytes)?;
    pixels.resize(decoder.output_buffer_size().ok_or("it has no frame header")?, 0);
    decoder.decode_into(&mut pixels).map_err(|e| e.to_string())?;
    RgbImage::new(height, width, pixels).map_err(|e| e.to_string())
}

/// Height and width from the header.
pub(super) fn dimensions(bytes: &[u8]) -> Result<(usize, usize), String> {
    let Opened { height, width, .. } = open(bytes)?;
    Ok((height, width))
}

/// A decoder that has read the header, and the height and width that it found.
struct Opened<'a> {
    decoder: JpegDecoder<ZCursor<&'a [u8]>>,
    height: usize,
    width: usize,
}

fn open(bytes: &[u8]) -> Result<Opened<'_>, String> {
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions().ok_or("it has no frame header")?;
    check_size(width as u64, height as u64)?;
    Ok(Opened { decoder, height, width })
}

const BASELINE_FRAME: u8 = 0xc0;
const SEQUENTIAL_FRAME: u8 = 0xc1;
const START_OF_IMAGE: u8 = 0xd8;
const END_OF_IMAGE: u8 = 0xd9;
const START_OF_SCAN: u8 = 0xda;

/// How the channels of a file are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scans {
    /// Together, or progressively.
    Usual,
    /// Each in a scan of its own, in a file that is not progressive.
    Separate,
}

/// Walks the markers of the file to the end of the image, which must come after a scan.
///
/// Inside a scan, 0xFF is followed by 0 (a stuffed byte), another 0xFF (filling) or a restart marker; anything else ends the
/// scan. Stray bytes between segments are skipped, as decoders do.
fn scans_to_the_end(bytes: &[u8]) -> Result<Scans, String> {
    let cut_off = || Err("the file is cut off: it ends before the image does".into());
    let (mut at, mut in_scan, mut scans) = (0, false, Scans::Usual);
    // channels of a sequential frame
    let mut channels = 0;
    loop {
        let Some(found) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xff)) else {
            return cut_off();
        };
        at += found + 1;
        let Some(&marker) = bytes.get(at) else { return cut_off() };
        match marker {
            // filling: this byte may start the next marker
            0xff => {}
            0 | 0x01 | 0xd0..=0xd7 | START_OF_IMAGE => at += 1,
            END_OF_IMAGE if in_scan => return Ok(scans),
            END_OF_IMAGE => return Err("it holds no image data".into()),
            _ => {
                let Some(&[high, low]) = bytes.get(at + 1..at + 3) else { return cut_off() };
                in_scan |= marker == START_OF_SCAN;
                match marker {
                    BASELINE_FRAME | SEQUENTIAL_FRAME => channels = bytes.get(at + 8).copied().unwrap_or(0),
                    START_OF_SCAN if bytes.get(at + 3).is_some_and(|&here| here < channels) => scans = Scans::Separate,
                    _ => {}
                }
                at += 1 + usize::from(u16::from_be_bytes([high, low])).max(2);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_marker_is_found_only_after_a_scan() {
        let head = [0xff, 0xd8, 0xff, 0xe0, 0, 4, 0xff, 0xd9];
        let scan = [0xff, 0xda, 0, 3, 0, 1, 2, 0xff, 0, 3, 0xff, 0xd0, 4, 0xff, 0xff];
        let whole = [&head[..], &scan, &[0xd9]].concat();
        assert!(scans_to_the_end(&whole).is_ok());
        for end in 0..whole.len() {
            assert!(scans_to_the_end(&whole[..end]).is_err(), "{end}");
        }
        assert!(scans_to_the_end(&[0xff, 0xd8, 0xff, 0xd9]).is_err());
        assert!(scans_to_the_end(&[&whole[..], b"trailing bytes"].concat()).is_ok());
    }

    #[test]
    fn separate_scans_are_refused_not_misread() {
        let picture: Vec<u8> = (0..32 * 48 * 3).map(|i| (i * 7 % 256) as u8).collect();
        for separate in [false, true] {
            let mut file = Vec::new();
            let mut encoder = jpeg_encoder::Encoder::new(&mut file, 90);
            encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_2_2);
            // this encoder writes a scan for each channel when it fits its tables to them
            encoder.set_optimized_huffman_tables(separate);
            encoder.encode(&picture, 48, 32, jpeg_encoder::ColorType::Rgb).unwrap();
            assert_eq!(scans_to_the_end(&file).unwrap() == Scans::Separate, separate);
            let decoded = decode(&file, Vec::new());
            assert_eq!(decoded.is_ok(), !separate || cfg!(feature = "libjpeg"), "{decoded:?}");
        }
    }
}
