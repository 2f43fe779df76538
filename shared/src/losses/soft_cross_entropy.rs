//! Cross entropy against a distribution instead of a class: how `SwAV` predicts the assignments of one view from another.

use candle_core::Tensor;

use crate::ops::{self, Engine};
use crate::{Error, Result};

/// `-sum_p targets_p log softmax(logits / temperature)_p`, mean over the rows.
///
/// A row of targets need not sum to 1: the sum of several distributions gives the sum of their losses. Only `logits` gets a
/// gradient.
///
/// # Shapes
/// - `logits`: `(B, P)` f32
/// - `targets`: `(B, P)` f32, not negative
/// - returns: scalar
///
/// # Errors
/// `Error::Shape` when the two do not fit together or are empty; `Error::Invalid` for a temperature that is not positive.
///
/// # Source
/// Caron et al., `SwAV`, arXiv 2006.09882, equation 2; official `main_swav.py` @ 04b8f43, `train`.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// let logits = Tensor::new(&[[0.5f32, 0.5]], &Device::Cpu)?;
/// let targets = Tensor::new(&[[0.25f32, 0.75]], &Device::Cpu)?;
/// let loss = shared::losses::soft_cross_entropy(&logits, &targets, 0.1)?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), shared::Error>(())
/// ```
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor, temperature: f64) -> Result<Tensor> {
    if temperature.is_nan() || temperature <= 0.0 {
        return Err(Error::invalid(format!("the temperature must be positive, got {temperature}"), ""));
    }
    ops::soft_cross_entropy(logits, targets, temperature, Engine::for_device(logits.device()))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor, Var};

    use super::*;

    fn values(rows: usize, classes: usize, phase: f64) -> Vec<f64> {
        (0..rows * classes).map(|i| (i as f64 * 1.7 + phase).sin()).collect()
    }

    fn tensor(values: &[f64], rows: usize) -> Tensor {
        let tensor = Tensor::from_slice(values, (rows, values.len() / rows), &Device::Cpu).unwrap();
        tensor.to_dtype(DType::F32).unwrap()
    }

    /// The loss as the formula reads, in f64.
    fn formula(logits: &[f64], targets: &[f64], classes: usize, temperature: f64) -> f64 {
        let rows = logits.chunks_exact(classes).zip(targets.chunks_exact(classes));
        let losses = rows.map(|(logits, targets)| {
            let sum: f64 = logits.iter().map(|x| (x / temperature).exp()).sum();
            targets.iter().zip(logits).map(|(t, x)| -t * (x / temperature - sum.ln())).sum::<f64>()
        });
        losses.sum::<f64>() / (logits.len() / classes) as f64
    }

    #[test]
    fn loss_and_gradient_agree_with_the_formula_and_its_finite_differences() {
        // 37 rows of 131 classes: neither is a multiple of a vector.
        let (rows, classes, temperature) = (37, 131, 0.1);
        let (logits, phases) = (values(rows, classes, 0.2), values(rows, classes, 0.9));
        let targets: Vec<f64> = phases.iter().map(|x| x * x / 30.0).collect();
        let expected = formula(&logits, &targets, classes, temperature);
        for engine in [Engine::Reference, Engine::Cpu] {
            let var = Var::from_tensor(&tensor(&logits, rows)).unwrap();
            let loss = ops::soft_cross_entropy(&var, &tensor(&targets, rows), temperature, engine).unwrap();
            assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - expected).abs() < 1e-5 * expected);
            let gradient = (loss * 3.0).unwrap().backward().unwrap();
            let gradient = gradient.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for index in [0, 1, 500, 1310, 2000, rows * classes - 1] {
                let moved = |step: f64| {
                    let mut logits = logits.clone();
                    logits[index] += step;
                    formula(&logits, &targets, classes, temperature)
                };
                let difference = 3.0 * (moved(1e-5) - moved(-1e-5)) / 2e-5;
                let found = f64::from(gradient[index]);
                assert!(
                    (found - difference).abs() < 1e-5 * difference.abs().max(0.01),
                    "{index}: {found} {difference}"
                );
            }
        }
    }

    #[test]
    fn misfits_are_refused() {
        let a = tensor(&values(2, 3, 0.0), 2);
        let b = tensor(&values(2, 4, 0.0), 2);
        assert!(matches!(soft_cross_entropy(&a, &b, 0.1), Err(Error::Shape { .. })));
        assert!(matches!(soft_cross_entropy(&a, &a, 0.0), Err(Error::Invalid { .. })));
        let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(matches!(soft_cross_entropy(&empty, &empty, 0.1), Err(Error::Shape { .. })));
    }
}
