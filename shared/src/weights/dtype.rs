//! Element types that checkpoints hold, and their conversion to `f32`.

use std::fmt;

use half::{bf16, f16};

/// The element type of a tensor in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// Signed, 64 bits.
    I64,
    /// Signed, 32 bits.
    I32,
    /// Signed, 16 bits.
    I16,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 8 bits.
    U8,
    /// One byte, zero or not.
    Bool,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether the numbers are floating-point ones.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16)
    }

    /// The element type and its size for a storage class of PyTorch, such as `HalfStorage`.
    ///
    /// The element type is `None` where the size of an element is known but its numbers are not read here
    /// (complex and quantised ones).
    pub(super) fn from_storage_class(class: &str) -> Option<(Option<Self>, usize)> {
        let dtype = match class {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::I32,
            "ShortStorage" => Self::I16,
            "CharStorage" => Self::I8,
            "ByteStorage" | "UntypedStorage" => Self::U8,
            "BoolStorage" => Self::Bool,
            "ComplexDoubleStorage" => return Some((None, 16)),
            "ComplexFloatStorage" => return Some((None, 8)),
            "QInt32Storage" => return Some((None, 4)),
            "QInt8Storage" | "QUInt8Storage" | "QUInt4x2Storage" | "QUInt2x4Storage" => return Some((None, 1)),
            _ => return None,
        };
        Some((Some(dtype), dtype.size()))
    }

    /// The element type for a `torch.float16` and the like, as `_rebuild_tensor_v3` names them.
    pub(super) fn from_torch_name(name: &str) -> Option<Self> {
        Some(match name {
            "float64" | "double" => Self::F64,
            "float32" | "float" => Self::F32,
            "float16" | "half" => Self::F16,
            "bfloat16" => Self::Bf16,
            "int64" | "long" => Self::I64,
            "int32" | "int" => Self::I32,
            "int16" | "short" => Self::I16,
            "int8" => Self::I8,
            "uint8" => Self::U8,
            "bool" => Self::Bool,
            _ => return None,
        })
    }

    /// One element as `f32`, rounded to nearest; `bytes` holds exactly [`Dtype::size`] bytes in the file's byte order.
    fn element(self, bytes: &[u8], big_endian: bool) -> f32 {
        let mut word = [0; 8];
        let size = self.size().min(bytes.len());
        word[..size].copy_from_slice(&bytes[..size]);
        if big_endian {
            word[..size].reverse();
        }
        let [a, b, c, d, ..] = word;
        match self {
            Self::F64 => f64::from_le_bytes(word) as f32,
            Self::F32 => f32::from_le_bytes([a, b, c, d]),
            Self::F16 => f16::from_le_bytes([a, b]).to_f32(),
            Self::Bf16 => bf16::from_le_bytes([a, b]).to_f32(),
            Self::I64 => i64::from_le_bytes(word) as f32,
            Self::I32 => i32::from_le_bytes([a, b, c, d]) as f32,
            Self::I16 => f32::from(i16::from_le_bytes([a, b])),
            Self::I8 => f32::from(i8::from_le_bytes([a])),
            Self::U8 => f32::from(a),
            Self::Bool => f32::from(u8::from(a != 0)),
        }
    }

    /// Appends every element of `bytes`, a whole number of elements, as `f32`.
    pub(super) fn extend_f32(self, bytes: &[u8], big_endian: bool, values: &mut Vec<f32>) {
        if self == Self::F32 && !big_endian {
            let (words, _) = bytes.as_chunks::<4>();
            values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        } else {
            values.extend(bytes.chunks_exact(self.size()).map(|word| self.element(word, big_endian)));
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::I16 => "i16",
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::Bool => "bool",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(dtype: Dtype, bytes: &[u8], big_endian: bool) -> Vec<f32> {
        let mut values = Vec::new();
        dtype.extend_f32(bytes, big_endian, &mut values);
        values
    }

    #[test]
    fn every_element_type_is_read_in_both_byte_orders() {
        let cases: [(Dtype, Vec<u8>, f32); 10] = [
            (Dtype::F64, (-1.5f64).to_le_bytes().to_vec(), -1.5),
            (Dtype::F32, 0.1f32.to_le_bytes().to_vec(), 0.1),
            (Dtype::F16, f16::from_f32(-0.25).to_le_bytes().to_vec(), -0.25),
            (Dtype::Bf16, bf16::from_f32(3.0).to_le_bytes().to_vec(), 3.0),
            (Dtype::I64, (-7i64).to_le_bytes().to_vec(), -7.0),
            (Dtype::I32, 70_000i32.to_le_bytes().to_vec(), 70_000.0),
            (Dtype::I16, (-300i16).to_le_bytes().to_vec(), -300.0),
            (Dtype::I8, (-3i8).to_le_bytes().to_vec(), -3.0),
            (Dtype::U8, vec![200], 200.0),
            (Dtype::Bool, vec![2], 1.0),
        ];
        for (dtype, mut bytes, expected) in cases {
            assert_eq!(read(dtype, &bytes, false), [expected], "{dtype}");
            bytes.reverse();
            assert_eq!(read(dtype, &bytes, true), [expected], "{dtype}, big endian");
        }
    }
}
