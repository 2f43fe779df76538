//! Strided views of a storage, checked once against the storage they lie in.

use super::dtype::Dtype;

/// Where the elements of a tensor lie in its storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    shape: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
    elements: usize,
}

impl Layout {
    /// A view that was checked: every element lies within `storage_elements`, and there are at most `most_elements`,
    /// which keeps a tensor expanded by strides of 0 from claiming more than its file can be worth.
    pub(super) fn new(
        shape: &[u64],
        strides: &[u64],
        offset: u64,
        storage_elements: u64,
        most_elements: u64,
    ) -> Result<Self, String> {
        if shape.len() != strides.len() {
            return Err(format!("{} dimensions but {} strides", shape.len(), strides.len()));
        }
        let overflow = || format!("shape {shape:?} with strides {strides:?} from {offset} exceeds 64 bits");
        let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
        // Sizes of 0 make the product 0 whatever the others are, so an overflow before one is no fault by itself.
        let elements = if shape.contains(&0) { 0 } else { elements.ok_or_else(overflow)? };
        if elements > most_elements {
            return Err(format!("shape {shape:?} is {elements} elements, more than the file can hold"));
        }
        if elements > 0 {
            let last = shape
                .iter()
                .zip(strides)
                .try_fold(offset, |end, (size, stride)| end.checked_add((size - 1).checked_mul(*stride)?));
            let end = last.and_then(|last| last.checked_add(1)).ok_or_else(overflow)?;
            if end > storage_elements {
                return Err(format!(
                    "shape {shape:?} with strides {strides:?} from {offset} needs {end} elements, its storage has {storage_elements}"
                ));
            }
        }
        let narrow =
            |values: &[u64]| values.iter().map(|value| usize::try_from(*value).ok()).collect::<Option<Vec<_>>>();
        match (narrow(shape), narrow(strides), usize::try_from(offset), usize::try_from(elements)) {
            (Some(shape), Some(strides), Ok(offset), Ok(elements)) => Ok(Self { shape, strides, offset, elements }),
            _ => Err(overflow()),
        }
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Whether the elements follow each other without gaps, in order.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(size, stride)| {
            let fits = *size == 1 || *stride == expected;
            expected *= size;
            fits
        })
    }

    /// The elements in row-major order; `storage` is the one that the view was checked against.
    pub(super) fn gather(&self, storage: &[u8], dtype: Dtype, big_endian: bool) -> Option<Vec<f32>> {
        let mut values = Vec::with_capacity(self.elements);
        if self.elements == 0 {
            return Some(values);
        }
        let size = dtype.size();
        if self.is_contiguous() {
            let bytes = storage.get(self.offset * size..(self.offset + self.elements) * size)?;
            dtype.extend_f32(bytes, big_endian, &mut values);
            return Some(values);
        }
        let mut index = vec![0; self.shape.len()];
        let mut at = self.offset;
        loop {
            dtype.extend_f32(storage.get(at * size..(at + 1) * size)?, big_endian, &mut values);
            let mut axis = self.shape.len();
            loop {
                if axis == 0 {
                    return Some(values);
                }
                axis -= 1;
                index[axis] += 1;
                at += self.strides[axis];
                if index[axis] < self.shape[axis] {
                    break;
                }
                at -= self.strides[axis] * self.shape[axis];
                index[axis] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(shape: &[u64], strides: &[u64], offset: u64) -> Result<Vec<f32>, String> {
        let storage: Vec<u8> = (0..12).collect();
        Layout::new(shape, strides, offset, 12, 1000).map(|layout| layout.gather(&storage, Dtype::U8, false).unwrap())
    }

    #[test]
    fn views_gather_in_row_major_order() {
        assert_eq!(gather(&[2, 3], &[3, 1], 1).unwrap(), [1., 2., 3., 4., 5., 6.]);
        assert_eq!(gather(&[3, 2], &[1, 3], 0).unwrap(), [0., 3., 1., 4., 2., 5.]);
        assert_eq!(gather(&[2, 2, 2], &[0, 4, 2], 3).unwrap(), [3., 5., 7., 9., 3., 5., 7., 9.]);
        assert_eq!(gather(&[], &[], 11).unwrap(), [11.]);
        assert_eq!(gather(&[1, 4], &[99, 1], 8).unwrap(), [8., 9., 10., 11.]);
        assert_eq!(gather(&[0, u64::MAX, u64::MAX], &[1, 1, 1], 99).unwrap(), [0.; 0]);
    }

    #[test]
    fn views_beyond_their_storage_or_64_bits_are_refused() {
        assert!(gather(&[2, 3], &[3, 1], 7).unwrap_err().contains("needs 13 elements, its storage has 12"));
        assert!(gather(&[2], &[u64::MAX], 1).unwrap_err().contains("exceeds 64 bits"));
        assert!(gather(&[1 << 40, 1 << 40], &[1, 1], 0).unwrap_err().contains("exceeds 64 bits"));
        assert!(gather(&[1001], &[0], 0).unwrap_err().contains("more than the file can hold"));
    }
}
