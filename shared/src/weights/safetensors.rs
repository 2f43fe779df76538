//! Safetensors files as checkpoints: the header is parsed and checked by the `safetensors` library.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ::safetensors::{Dtype as FileDtype, SafeTensors};
use serde::de::{Deserializer as _, Error as _, IgnoredAny, MapAccess, Visitor};

use super::dtype::Dtype;
use super::layout::Layout;
use super::{Entry, Record};
use crate::error::Fault;

/// Tensors, metadata, and what is not read.
type Contents = (Vec<Entry>, BTreeMap<String, serde_json::Value>, Vec<(String, String)>);

/// Reads the header.
pub(super) fn open(bytes: &[u8]) -> Result<Contents, Fault> {
    let (header, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| Fault::Syntax(format!("safetensors: {error}")))?;
    check_names(bytes.get(8..8 + header).unwrap_or_default())?;
    let data = header as u64 + 8;
    let mut entries = Vec::new();
    let mut skipped = Vec::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        let Some(dtype) = element_type(info.dtype) else {
            skipped.push((name, format!("a tensor of {:?}, which is not read", info.dtype)));
            continue;
        };
        let shape: Vec<u64> = info.shape.iter().map(|size| *size as u64).collect();
        let strides = row_major(&shape);
        let length = (info.data_offsets.1 - info.data_offsets.0) as u64;
        let elements = length / dtype.size() as u64;
        let layout = Layout::new(&shape, &strides, 0, elements, elements)
            .map_err(|reason| Fault::Value(format!("tensor `{}`: {reason}", name.escape_debug())))?;
        let record = Record::Plain { start: data + info.data_offsets.0 as u64, length };
        entries.push(Entry { name, dtype, layout, record });
    }
    let texts = metadata.metadata().iter().flatten();
    let texts = texts.map(|(key, value)| (key.clone(), serde_json::Value::from(value.as_str()))).collect();
    Ok((entries, texts, skipped))
}

/// Refuses a name that is there twice, of which the library would keep one.
fn check_names(header: &[u8]) -> Result<(), Fault> {
    let mut json = serde_json::Deserializer::from_slice(header);
    let read = json.deserialize_map(DistinctNames);
    read.map_err(|error| Fault::Syntax(format!("safetensors: {error}")))
}

struct DistinctNames;

impl<'de> Visitor<'de> for DistinctNames {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("descriptions of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut names = BTreeSet::new();
        while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
            if let Some(name) = names.replace(name) {
                return Err(A::Error::custom(format!("`{}` is there twice", name.escape_debug())));
            }
        }
        Ok(())
    }
}

fn row_major(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

fn element_type(dtype: FileDtype) -> Option<Dtype> {
    Some(match dtype {
        FileDtype::F64 => Dtype::F64,
        FileDtype::F32 => Dtype::F32,
        FileDtype::F16 => Dtype::F16,
        FileDtype::BF16 => Dtype::Bf16,
        FileDtype::I64 => Dtype::I64,
        FileDtype::I32 => Dtype::I32,
        FileDtype::I16 => Dtype::I16,
        FileDtype::I8 => Dtype::I8,
        FileDtype::U8 => Dtype::U8,
        FileDtype::BOOL => Dtype::Bool,
        _ => return None,
    })
}
