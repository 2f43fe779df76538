//! The little of MATLAB's file format (version 5) that `meta.mat` of ImageNet needs: the struct array `synsets`.
//!
//! # Source
//! "MAT-File Format", MathWorks, version 5. An element is a tag (type, number of bytes) and data padded to 8 bytes; up to 4 bytes of
//! data lie in the tag itself. Elements may be wrapped, each by itself, in a zlib stream.

use std::io::Read as _;

use flate2::read::ZlibDecoder;

const INT8: u32 = 1;
const UINT8: u32 = 2;
const INT16: u32 = 3;
const UINT16: u32 = 4;
const INT32: u32 = 5;
const UINT32: u32 = 6;
const DOUBLE: u32 = 9;
const MATRIX: u32 = 14;
const COMPRESSED: u32 = 15;
const UTF8: u32 = 16;
const STRUCT_CLASS: u8 = 2;
const HEADER: usize = 128;

/// The inflated variables together are at most this long; those of ImageNet have 1.3 MB.
const LARGEST: u64 = 64 << 20;

/// The numbers and names of the synsets: fields `ILSVRC2012_ID` and `WNID` of `synsets`.
pub(super) fn read_synsets(file: &[u8]) -> Result<Vec<(i64, String)>, String> {
    if file.len() < HEADER || &file[126..128] != b"IM" {
        return Err("`meta.mat` is not a MATLAB file of version 5, little-endian".into());
    }
    let mut rest = &file[HEADER..];
    while !rest.is_empty() {
        let element = next(&mut rest)?;
        let inflated;
        let mut matrix = element;
        if element.kind == COMPRESSED {
            let mut bytes = Vec::new();
            let read = ZlibDecoder::new(element.data).take(LARGEST).read_to_end(&mut bytes);
            read.map_err(|e| format!("`meta.mat` cannot be inflated: {e}"))?;
            inflated = bytes;
            matrix = next(&mut inflated.as_slice())?;
        }
        if matrix.kind == MATRIX
            && let Some(synsets) = synsets_of(matrix.data)?
        {
            return Ok(synsets);
        }
    }
    Err("`meta.mat` has no struct array `synsets`".into())
}

/// One element.
#[derive(Debug, Clone, Copy)]
struct Element<'a> {
    kind: u32,
    data: &'a [u8],
}

impl Element<'_> {
    fn ints(self) -> Vec<i64> {
        match self.kind {
            INT8 => self.data.iter().map(|v| i64::from(*v as i8)).collect(),
            UINT8 | UTF8 => self.data.iter().map(|v| i64::from(*v)).collect(),
            INT16 => self.data.as_chunks().0.iter().map(|v| i64::from(i16::from_le_bytes(*v))).collect(),
            UINT16 => self.data.as_chunks().0.iter().map(|v| i64::from(u16::from_le_bytes(*v))).collect(),
            INT32 => self.data.as_chunks().0.iter().map(|v| i64::from(i32::from_le_bytes(*v))).collect(),
            UINT32 => self.data.as_chunks().0.iter().map(|v| i64::from(u32::from_le_bytes(*v))).collect(),
            DOUBLE => self.data.as_chunks().0.iter().map(|v| f64::from_le_bytes(*v) as i64).collect(),
            _ => Vec::new(),
        }
    }

    fn text(self) -> String {
        let letters = self.ints().into_iter().map(|code| u32::try_from(code).ok().and_then(char::from_u32));
        letters.map(|letter| letter.unwrap_or('\u{fffd}')).collect()
    }
}

/// Takes an element off the front.
fn next<'a>(rest: &mut &'a [u8]) -> Result<Element<'a>, String> {
    const CUT: &str = "`meta.mat` is cut off";
    let (tag, after) = rest.split_first_chunk::<8>().ok_or(CUT)?;
    let [a, b, c, d, e, f, g, h] = *tag;
    let (kind, bytes) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    let small = (kind >> 16) as usize;
    if small > 0 {
        let data = rest[4..8].get(..small).ok_or("`meta.mat` has an element of a wrong size")?;
        *rest = after;
        return Ok(Element { kind: kind & 0xffff, data });
    }
    let data = after.get(..bytes as usize).ok_or(CUT)?;
    // a compressed element is not padded; the last one may lack its padding
    let padded = if kind == COMPRESSED { bytes as usize } else { (bytes as usize).next_multiple_of(8) };
    *rest = after.get(padded..).unwrap_or_default();
    Ok(Element { kind, data })
}

/// The synsets, when the matrix is a struct array of that name.
fn synsets_of(mut matrix: &[u8]) -> Result<Option<Vec<(i64, String)>>, String> {
    let flags = next(&mut matrix)?;
    let sizes = next(&mut matrix)?;
    let name = next(&mut matrix)?;
    if flags.data.first() != Some(&STRUCT_CLASS) || name.text() != "synsets" {
        return Ok(None);
    }
    let count = sizes.ints().into_iter().try_fold(1u64, |all, side| all.checked_mul(u64::try_from(side).ok()?));
    let width = next(&mut matrix)?.ints().first().and_then(|width| usize::try_from(*width).ok()).unwrap_or(0);
    let names = next(&mut matrix)?;
    if width == 0 || names.data.is_empty() {
        return Err("`synsets` of `meta.mat` has no fields".into());
    }
    let fields: Vec<String> = names
        .data
        .chunks(width)
        .map(|name| String::from_utf8_lossy(name.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned())
        .collect();
    let position = |name: &str| {
        let found = fields.iter().position(|field| field == name);
        found.ok_or_else(|| format!("`synsets` of `meta.mat` has no field `{name}`"))
    };
    let (id, wnid) = (position("ILSVRC2012_ID")?, position("WNID")?);
    let mut synsets = Vec::new();
    // every synset takes bytes of the file, so that a false count ends in an error
    for _ in 0..count.ok_or("`synsets` of `meta.mat` has a wrong size")? {
        let mut synset = (None, None);
        for field in 0..fields.len() {
            let element = next(&mut matrix)?;
            if field == id {
                synset.0 = contents(element)?.ints().first().copied();
            } else if field == wnid {
                synset.1 = Some(contents(element)?.text());
            }
        }
        let (Some(id), Some(wnid)) = synset else {
            return Err(format!("synset {} of `meta.mat` has no number or name", synsets.len() + 1));
        };
        synsets.push((id, wnid));
    }
    Ok(Some(synsets))
}

/// The values of a matrix of numbers or letters.
fn contents(element: Element<'_>) -> Result<Element<'_>, String> {
    let mut matrix = element.data;
    for _flags_sizes_name in 0..3 {
        next(&mut matrix)?;
    }
    next(&mut matrix)
}
