//! What the linear probe is fed: normalised rows, one stored view of each training sample per epoch, in a seeded order.

use candle_core::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use shared::Result;
use shared::feature_rows::FeatureRows;
use shared::matrix;
use shared::rng::KeyedRng;

/// Rows per partial sum of the training statistics: fixed, so that the sums are the same for any thread count.
const STATISTICS_BLOCK: usize = 1024;

/// How features are scaled before the linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Normalize {
    /// As the backbone gives them, as in the official protocol
    None,
    /// Zero mean and unit variance per feature, over all stored views of the training set
    Standardize,
    /// Every row to unit length
    L2,
}

/// A fitted scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct Scaling {
    kind: Normalize,
    mean: Vec<f32>,
    inverse_deviation: Vec<f32>,
}

impl Scaling {
    /// Fits `kind` to the training features; only [`Normalize::Standardize`] looks at them.
    ///
    /// The variance is the population's; a feature that never varies is only centred.
    pub fn fit(kind: Normalize, train: &FeatureRows<'_>) -> Self {
        if kind != Normalize::Standardize {
            return Self { kind, mean: Vec::new(), inverse_deviation: Vec::new() };
        }
        let rows = (train.len() * train.views()).max(1) as f64;
        let sum_over = |term: &(dyn Fn(usize, f64) -> f64 + Sync)| -> Vec<f64> {
            let starts: Vec<usize> = (0..train.len()).step_by(STATISTICS_BLOCK).collect();
            let partial: Vec<Vec<f64>> = starts
                .into_par_iter()
                .map(|start| {
                    let mut sums = vec![0.0; train.width()];
                    for sample in start..train.len().min(start + STATISTICS_BLOCK) {
                        for view in 0..train.views() {
                            for (column, (sum, &x)) in sums.iter_mut().zip(train.row(sample, view)).enumerate() {
                                *sum += term(column, f64::from(x));
                            }
                        }
                    }
                    sums
                })
                .collect();
            let mut total = vec![0.0; train.width()];
            for sums in partial {
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total += sum;
                }
            }
            total.iter().map(|sum| sum / rows).collect()
        };
        let mean = sum_over(&|_, x| x);
        let variance = sum_over(&|column, x| (x - mean[column]).powi(2));
        Self {
            kind,
            mean: mean.iter().map(|&mean| mean as f32).collect(),
            inverse_deviation: variance.iter().map(|&v| if v > 0.0 { v.sqrt().recip() as f32 } else { 1.0 }).collect(),
        }
    }

    /// Scales one row in place.
    pub fn apply(&self, row: &mut [f32]) {
        match self.kind {
            Normalize::None => {}
            Normalize::L2 => matrix::normalize_row(row),
            Normalize::Standardize => {
                for (x, (mean, factor)) in row.iter_mut().zip(self.mean.iter().zip(&self.inverse_deviation)) {
                    *x = (*x - mean) * factor;
                }
            }
        }
    }

    /// Scaled rows of the given `(sample, view)` pairs, `(B, F)`.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn batch(&self, rows: &FeatureRows<'_>, picks: &[(usize, usize)]) -> Result<Tensor> {
        let data = matrix::gather(picks.len(), rows.width(), |i, out| {
            let (sample, view) = picks[i];
            out.copy_from_slice(rows.row(sample, view));
            self.apply(out);
        });
        matrix::tensor(data, picks.len(), rows.width())
    }
}

/// The order in which an epoch visits the samples: a permutation keyed by `(seed, epoch)`.
pub fn epoch_order(samples: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..samples).collect();
    KeyedRng::new("linear-probe-order", seed, &[epoch as u64]).shuffle(&mut order);
    order
}

/// The stored view of a sample that an epoch uses: each sample goes round its views, and a batch mixes all of them.
pub fn view_of(sample: usize, epoch: usize, views: usize) -> usize {
    (sample + epoch) % views
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standardised_columns_have_zero_mean_and_unit_variance() {
        let data: Vec<f32> = (0..2500).flat_map(|i| [i as f32, 7.0, (i % 2) as f32 * 4.0]).collect();
        let (labels, ids) = (vec![0; 1250], vec![0; 1250]);
        let rows = FeatureRows::new(vec![&data], 2, 3, &labels, &ids).unwrap();
        let scaling = Scaling::fit(Normalize::Standardize, &rows);
        let mut row = [1249.5 + 721.6878, 8.0, 4.0];
        scaling.apply(&mut row);
        assert!((row[0] - 1.0).abs() < 1e-4 && row[1] == 1.0 && (row[2] - 1.0).abs() < 1e-6, "{row:?}");
    }

    #[test]
    fn order_is_a_permutation_that_differs_by_epoch_and_seed() {
        let order = epoch_order(100, 1, 0);
        assert_eq!(order, epoch_order(100, 1, 0));
        assert_ne!(order, epoch_order(100, 1, 1));
        assert_ne!(order, epoch_order(100, 2, 0));
        let mut sorted = order;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn every_view_is_used_equally_often() {
        for sample in 0..5 {
            let mut used: Vec<usize> = (0..4).map(|epoch| view_of(sample, epoch, 4)).collect();
            used.sort_unstable();
            assert_eq!(used, [0, 1, 2, 3]);
        }
    }
}
