//! Dense f32 arithmetic on rows: the matrix product that k-NN, the linear probe and PCA rest on, and row normalisation.
//!
//! Products go through candle, whose kernel sums each output element in one order however many threads share the work, so
//! results are the same bits for any thread count.

use candle_core::{CpuStorage, Device, Storage, Tensor};
use rayon::prelude::*;

use crate::error::Result;

/// A `(rows, width)` tensor that takes over `data`.
///
/// # Errors
/// When the length of `data` is not `rows × width`.
pub fn tensor(data: Vec<f32>, rows: usize, width: usize) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, (rows, width), &Device::Cpu)?)
}

/// Lends the elements of a contiguous CPU tensor to `read`, without a copy.
///
/// # Errors
/// When the tensor is not f32, not contiguous or not on the CPU.
pub fn with_slice<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
        return Err(candle_core::Error::Msg("expected f32 values on the CPU".into()).into());
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::Msg("expected a contiguous tensor".into()).into());
    };
    Ok(read(&values[start..end]))
}

/// Scales `row` to unit length; a row of zeros stays as it is.
///
/// The squares are summed in f64, so that no length overflows or vanishes.
pub fn normalize_row(row: &mut [f32]) {
    let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if length > 0.0 {
        for x in row {
            *x = (f64::from(*x) / length) as f32;
        }
    }
}

/// Fills a `(count, width)` buffer by rows, in parallel.
pub fn gather(count: usize, width: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut rows = vec![0.0; count * width];
    if width > 0 {
        rows.par_chunks_mut(width).with_min_len(16).enumerate().for_each(|(i, row)| fill(i, row));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_rows_keep_their_direction_and_zeros_stay() {
        let mut row = [3.0, 4.0];
        normalize_row(&mut row);
        assert_eq!(row, [0.6, 0.8]);
        let mut tiny = [1e-30, 0.0];
        normalize_row(&mut tiny);
        assert_eq!(tiny, [1.0, 0.0]);
        let mut zeros = [0.0; 3];
        normalize_row(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }

    #[test]
    fn a_product_has_the_same_bits_in_pools_of_one_and_three_threads() {
        let data = |n: usize, salt: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + salt) % 1013) as f32 / 1013.0 - 0.5).collect()
        };
        let product = |threads: usize| -> Vec<u32> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let a = tensor(data(190 * 300, 1), 190, 300).unwrap();
                let b = tensor(data(170 * 300, 2), 170, 300).unwrap();
                let c = a.matmul(&b.t().unwrap()).unwrap();
                with_slice(&c, |c| c.iter().map(|x| x.to_bits()).collect()).unwrap()
            })
        };
        assert_eq!(product(1), product(3));
    }
}
