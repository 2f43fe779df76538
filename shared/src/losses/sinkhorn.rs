//! The Sinkhorn-Knopp algorithm: scores of samples against prototypes become assignments that use all prototypes alike.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::{Error, Result};

/// What a sample weighs at least before the first turn, so that none vanishes beside a much closer one.
const LEAST_WEIGHT: f64 = 1e-200;
/// Samples of a piece of a sum over samples.
const PIECE_SAMPLES: usize = 64;

/// Assigns samples to prototypes: `diag(a) exp(scores / epsilon) diag(b)`, with `a` and `b` such that every prototype gets the same
/// share of all samples, as far as `iterations` turns bring it, and every row sums to 1.
///
/// One turn divides by the sums over the samples, then by those over the prototypes. The matrix of exponentials is made once and the
/// two factors are found in f64. Each sample's largest exponential is taken out of its row, so nothing overflows, however
/// small `epsilon` is.
///
/// # Shapes
/// - `scores`: `(N, P)` f32: similarities of samples and prototypes
/// - returns: `(rows, P)` f32, the assignments of the last `rows` samples; no gradient flows through them
///
/// # Errors
/// `Error::Shape` when `scores` is not of rank 2, is empty, or has fewer rows; `Error::Invalid` when `epsilon` is not positive or
/// `iterations` is 0.
///
/// # Source
/// Cuturi, arXiv 1306.0895; Caron et al., `SwAV`, arXiv 2006.09882, section 3.1 and appendix A.1; official `main_swav.py` @ 04b8f43,
/// `distributed_sinkhorn`.
pub fn sinkhorn(scores: &Tensor, epsilon: f64, iterations: usize, rows: usize) -> Result<Tensor> {
    let (samples, prototypes) = match *scores.dims() {
        [samples, prototypes] if samples.min(prototypes) > 0 && rows <= samples => (samples, prototypes),
        _ => {
            let expected = format!("(N, P) with N at least {}", rows.max(1));
            return Err(Error::Shape { op: "sinkhorn", expected, got: format!("{:?}", scores.dims()) });
        }
    };
    if epsilon.is_nan() || epsilon <= 0.0 || iterations == 0 {
        let message = format!("Sinkhorn needs a positive epsilon and one iteration, got {epsilon} and {iterations}");
        return Err(Error::invalid(message, ""));
    }
    let mut kernel = scores.detach().flatten_all()?.to_vec1::<f32>()?;
    let tops = exponentials(&mut kernel, prototypes, epsilon);
    let top = tops.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |largest: f32| (f64::from(largest - top) / epsilon).exp().max(LEAST_WEIGHT);
    let weights: Vec<f64> = tops.into_iter().map(weight).collect();
    let mut sums = weighted_sums(&kernel, prototypes, |sample, _| weights[sample]);
    let mut factors = reciprocals(&sums);
    for _ in 1..iterations {
        // The factor of a sample, then what it adds to the sums of the next turn.
        sums = weighted_sums(&kernel, prototypes, |_, row| 1.0 / (samples as f64 * dot(row, &factors)));
        factors = reciprocals(&sums);
    }
    let wanted = &mut kernel[(samples - rows) * prototypes..];
    wanted.par_chunks_exact_mut(prototypes).for_each(|row| {
        let sum = dot(row, &factors);
        for (value, factor) in row.iter_mut().zip(&factors) {
            *value = (f64::from(*value) * factor / sum) as f32;
        }
    });
    Ok(Tensor::from_slice(wanted, (rows, prototypes), &Device::Cpu)?.to_device(scores.device())?)
}

/// Makes `exp((score - largest of the row) / epsilon)` of every score and returns the largest of each row.
fn exponentials(scores: &mut [f32], prototypes: usize, epsilon: f64) -> Vec<f32> {
    let sharpness = (1.0 / epsilon) as f32;
    let rows = scores.par_chunks_exact_mut(prototypes);
    rows.map(|row| {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for score in row {
            *score = ((*score - largest) * sharpness).exp();
        }
        largest
    })
    .collect()
}

/// For each prototype the sum over the samples of the kernel times the sample's weight; pieces of samples are added in their order.
fn weighted_sums(kernel: &[f32], prototypes: usize, weight: impl Fn(usize, &[f32]) -> f64 + Sync) -> Vec<f64> {
    let pieces: Vec<Vec<f64>> = kernel
        .par_chunks(PIECE_SAMPLES * prototypes)
        .enumerate()
        .map(|(piece, rows)| {
            let mut sums = vec![0f64; prototypes];
            for (index, row) in rows.chunks_exact(prototypes).enumerate() {
                let weight = weight(piece * PIECE_SAMPLES + index, row);
                for (sum, &value) in sums.iter_mut().zip(row) {
                    *sum += weight * f64::from(value);
                }
            }
            sums
        })
        .collect();
    let mut total = vec![0f64; prototypes];
    for piece in pieces {
        for (total, sum) in total.iter_mut().zip(piece) {
            *total += sum;
        }
    }
    total
}

/// `1 / (P sum)`; a prototype that no sample can be assigned to gets nothing. NaN stays NaN.
fn reciprocals(sums: &[f64]) -> Vec<f64> {
    let count = sums.len() as f64;
    sums.iter().map(|&sum| if sum == 0.0 { 0.0 } else { 1.0 / (count * sum) }).collect()
}

fn dot(row: &[f32], factors: &[f64]) -> f64 {
    row.iter().zip(factors).map(|(&value, factor)| f64::from(value) * factor).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(samples: usize, prototypes: usize) -> Vec<f64> {
        (0..samples * prototypes)
            .map(|i| (i as f64 * 0.37).sin() * (1.0 - 0.3 * (i % prototypes) as f64 / 9.0))
            .collect()
    }

    fn tensor(values: &[f64], rows: usize) -> Tensor {
        let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        Tensor::from_slice(&values, (rows, values.len() / rows), &Device::Cpu).unwrap()
    }

    /// The iteration on the whole matrix, as the paper's listing reads: sums to 1, then rows to `1/P`, then columns to `1/N`.
    fn plain(scores: &[f64], prototypes: usize, epsilon: f64, iterations: usize) -> Vec<f64> {
        let samples = scores.len() / prototypes;
        let mut q: Vec<f64> = scores.iter().map(|x| (x / epsilon).exp()).collect();
        let total: f64 = q.iter().sum();
        for x in &mut q {
            *x /= total;
        }
        for _ in 0..iterations {
            for p in 0..prototypes {
                let sum: f64 = (0..samples).map(|s| q[s * prototypes + p]).sum();
                for s in 0..samples {
                    q[s * prototypes + p] /= sum * prototypes as f64;
                }
            }
            for row in q.chunks_exact_mut(prototypes) {
                let sum: f64 = row.iter().sum();
                for x in row {
                    *x /= sum * samples as f64;
                }
            }
        }
        q.iter().map(|x| x * samples as f64).collect()
    }

    #[test]
    fn assignments_are_those_of_the_plain_iteration() {
        let (samples, prototypes, rows) = (150, 9, 40);
        let scores = scores(samples, prototypes);
        for (epsilon, iterations) in [(0.05, 3), (0.05, 1), (0.5, 7)] {
            let found = sinkhorn(&tensor(&scores, samples), epsilon, iterations, rows).unwrap();
            assert_eq!(found.dims(), [rows, prototypes]);
            let found = found.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = plain(&scores, prototypes, epsilon, iterations);
            let expected = &expected[(samples - rows) * prototypes..];
            let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error = found.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum::<f64>().sqrt();
            assert!(error < 1e-5 * norm, "epsilon {epsilon}, {iterations} iterations: {}", error / norm);
        }
    }

    #[test]
    fn many_turns_use_every_prototype_alike() {
        let (samples, prototypes) = (120, 6);
        let found = sinkhorn(&tensor(&scores(samples, prototypes), samples), 0.2, 200, samples).unwrap();
        for sum in found.sum(0).unwrap().to_vec1::<f32>().unwrap() {
            assert!((sum - 20.0).abs() < 1e-3, "{sum}");
        }
        for sum in found.sum(1).unwrap().to_vec1::<f32>().unwrap() {
            assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        }
    }

    #[test]
    fn sharp_scores_stay_finite_and_equal_ones_are_shared_out() {
        let sharp = sinkhorn(&tensor(&scores(30, 9), 30), 1e-4, 3, 30).unwrap();
        assert!(sharp.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| x.is_finite()));
        let equal = sinkhorn(&tensor(&[0.3; 12], 3), 0.05, 3, 3).unwrap();
        for value in equal.flatten_all().unwrap().to_vec1::<f32>().unwrap() {
            assert!((value - 0.25).abs() < 1e-6);
        }
    }

    #[test]
    fn scores_that_are_no_numbers_stay_none() {
        let mut scores = scores(4, 9);
        scores[7] = f64::NAN;
        let found = sinkhorn(&tensor(&scores, 4), 0.05, 3, 4).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(found.iter().any(|x| x.is_nan()));
    }

    #[test]
    fn misfits_are_refused() {
        let scores = tensor(&scores(4, 9), 4);
        assert!(matches!(sinkhorn(&scores, 0.05, 3, 5), Err(Error::Shape { .. })));
        assert!(matches!(sinkhorn(&scores.flatten_all().unwrap(), 0.05, 3, 1), Err(Error::Shape { .. })));
        assert!(matches!(sinkhorn(&scores, 0.0, 3, 4), Err(Error::Invalid { .. })));
        assert!(matches!(sinkhorn(&scores, 0.05, 0, 4), Err(Error::Invalid { .. })));
    }
}
