//! Values that Rust and Python (`tests/golden/formula.py`) draw alike, so that golden tests need no stored weights.
//!
//! A value depends on a tensor's name and the element's index (row-major, in `PyTorch`'s layout) and is exact in f32. A
//! [`fingerprint`] is what golden files store of a large tensor: its norm, three projections on random signs, some elements.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

const SIGNS: usize = 3;
const SAMPLES: usize = 16;

/// `count` numbers in `[0, 1)` with 24 random bits each: FNV-1a of the name, then `SplitMix64`.
pub fn unit(name: &str, count: usize) -> impl Iterator<Item = f64> + use<> {
    let key =
        name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |key, byte| (key ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
    (1..=count as u64).map(move |index| {
        let x = key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 40) as f64 / 16_777_216.0
    })
}

/// An f32 tensor, uniform in `[low, high)`.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn values(name: &str, shape: &[usize], low: f64, high: f64) -> Result<Tensor> {
    let count = shape.iter().product();
    let values: Vec<f32> = unit(name, count).map(|u| (low + (high - low) * u) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The value of a model's parameter or buffer, by its name and its shape in `PyTorch`'s layout.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn parameter(name: &str, shape: &[usize]) -> Result<Tensor> {
    if name.ends_with("num_batches_tracked") {
        return Ok(Tensor::zeros(shape, DType::I64, &Device::Cpu)?);
    }
    if shape.len() > 1 {
        let bound = (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
        return values(name, shape, -bound, bound);
    }
    if name.ends_with("running_var") || name.ends_with(".weight") {
        return values(name, shape, 0.5, 1.0);
    }
    values(name, shape, -0.2, 0.2)
}

/// All parameters and buffers of a model, from `ParameterStore::names_and_shapes`, to be given to `ParameterStore::load`.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn parameters(names_and_shapes: &[(String, Vec<usize>)]) -> Result<BTreeMap<String, Tensor>> {
    names_and_shapes.iter().map(|(name, shape)| Ok((name.clone(), parameter(name, shape)?))).collect()
}

/// f32 rows of unit length.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn unit_rows(name: &str, rows: usize, width: usize) -> Result<Tensor> {
    let xs = values(name, &[rows, width], -1.0, 1.0)?.to_dtype(DType::F64)?;
    let norms = xs.sqr()?.sum_keepdim(1)?.sqrt()?;
    Ok(xs.broadcast_div(&norms)?.to_dtype(DType::F32)?)
}

/// `[norm, three projections on random signs, up to 16 elements at even distances]`.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn fingerprint(name: &str, tensor: &Tensor) -> Result<Vec<f64>> {
    let flat: Vec<f64> = tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    let mut numbers = vec![flat.iter().map(|x| x * x).sum::<f64>().sqrt()];
    for sign in 0..SIGNS {
        let signs = unit(&format!("{name}#{sign}"), flat.len());
        numbers.push(flat.iter().zip(signs).map(|(x, sign)| if sign < 0.5 { -x } else { *x }).sum());
    }
    numbers.extend(flat.iter().step_by(flat.len().div_ceil(SAMPLES).max(1)));
    Ok(numbers)
}

/// How far a tensor is from the one that a golden file's fingerprint was made of, relative to its size: the largest of the
/// difference of the norms over the norm, of the projections over the norm, and of the elements over the root mean
/// square times ten.
///
/// For an error of independent elements each of these estimates `|error| / |tensor|` or less.
///
/// # Errors
/// When the two fingerprints differ in length.
pub fn fingerprint_distance(name: &str, tensor: &Tensor, golden: &[f64]) -> Result<f64> {
    let found = fingerprint(name, tensor)?;
    ensure!(found.len() == golden.len(), "{name}: {} numbers expected, {} found", golden.len(), found.len());
    let norm = golden[0].max(1e-30);
    let per_element = 10.0 * norm / (tensor.elem_count() as f64).sqrt();
    let mut worst = 0f64;
    for (index, (a, b)) in found.iter().zip(golden).enumerate() {
        let scale = if index <= SIGNS { norm } else { per_element };
        let distance = (a - b).abs() / scale;
        worst = if distance.is_nan() { f64::INFINITY } else { worst.max(distance) };
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_values_are_those_of_the_python_twin() {
        let found: Vec<f64> = unit("conv1.weight", 3).map(|u| u * 16_777_216.0).collect();
        assert_eq!(found, [9144840.0, 12501739.0, 384562.0]);
    }

    #[test]
    fn a_changed_element_shows_in_the_fingerprint() -> Result<()> {
        let tensor = values("x", &[40, 50], -1.0, 1.0)?;
        let golden = fingerprint("x", &tensor)?;
        assert!(fingerprint_distance("x", &tensor, &golden)? < 1e-12);
        let mut changed: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        changed[777] += 0.5;
        let changed = Tensor::from_vec(changed, &[40, 50], &Device::Cpu)?;
        assert!(fingerprint_distance("x", &changed, &golden)? > 1e-3);
        Ok(())
    }
}
