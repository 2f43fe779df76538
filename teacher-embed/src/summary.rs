//! What a set of embeddings looks like, from a sample of it: whether a teacher has collapsed shows here, before any
//! student is trained on it.

use std::fmt;

use serde::Serialize;
use shared::Result;
use shared::embedding::EmbeddingSet;
use shared::shard::ShardSet;

/// From this cosine to the mean on, a warning is given: a student that learns nothing but the mean has then learnt a quarter
/// of every embedding's squared length.
const DOMINANT_MEAN_COSINE: f64 = 0.5;

/// Samples that are looked at, spread evenly over the set.
const MOST_SAMPLES: usize = 512;

/// Figures over at most 512 samples, all with both or more of their views.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Statistics {
    /// Samples looked at.
    pub samples: usize,
    /// Mean cosine similarity between two views of one sample; none when there is one view only.
    pub view_agreement: Option<f64>,
    /// Mean cosine similarity between the first views of two different samples; none when there is one sample only.
    pub sample_similarity: Option<f64>,
    /// Mean cosine similarity between an embedding and the mean of all: 0 when they point everywhere, 1 when they are all the
    /// same. Of rows of unit length it is the length of their mean, and its square the part of a row's squared length that
    /// the mean accounts for.
    pub mean_cosine: f64,
    /// Number of directions in use: the squared trace of the covariance matrix over its squared Frobenius norm,
    /// between 1 and D; 0 when all rows are the same.
    pub effective_rank: f64,
}

impl Statistics {
    /// A sentence for a person when the mean dominates the embeddings; none for a single sample, which is its own mean.
    pub(crate) fn warning(&self) -> Option<String> {
        (self.samples > 1 && self.mean_cosine > DOMINANT_MEAN_COSINE).then(|| {
            format!(
                "warning: the embeddings have a cosine of {:.2} to their mean, so a student first learns a constant: \
                 consider `--center`, or `--pca D` to keep the D main directions only",
                self.mean_cosine
            )
        })
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_dash = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        writeln!(f, "over {} samples:", self.samples)?;
        writeln!(f, "  cosine between views of one sample   {}", or_dash(self.view_agreement))?;
        writeln!(f, "  cosine between different samples     {}", or_dash(self.sample_similarity))?;
        writeln!(f, "  cosine to the mean embedding         {:.4}", self.mean_cosine)?;
        write!(f, "  effective rank                       {:.1}", self.effective_rank)
    }
}

/// Reads a sample of the set and computes its figures.
pub(crate) fn statistics(set: &EmbeddingSet, shards: &ShardSet) -> Result<Statistics> {
    let samples = shards.len().min(MOST_SAMPLES);
    let (views, dim) = (shards.views(), set.embedding_dim());
    let mut rows = vec![0.0; samples * views * dim];
    for (row, out) in rows.chunks_exact_mut(dim).enumerate() {
        set.read((row / views) * shards.len() / samples, row % views, out)?;
    }
    Ok(figures(&rows, views, dim))
}

fn figures(rows: &[f32], views: usize, dim: usize) -> Statistics {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let count = rows.len() / dim;
    let samples = count / views;
    let row = |index: usize| &rows[index * dim..(index + 1) * dim];
    let mean_of = |(total, pairs): (f64, usize)| (pairs > 0).then(|| total / pairs as f64);

    let mut agreement = (0.0, 0);
    for sample in 0..samples {
        for first in 0..views {
            for second in first + 1..views {
                agreement.0 += dot(row(sample * views + first), row(sample * views + second));
                agreement.1 += 1;
            }
        }
    }
    let mut similarity = (0.0, 0);
    for first in 0..samples {
        for second in first + 1..samples {
            similarity.0 += dot(row(first * views), row(second * views));
            similarity.1 += 1;
        }
    }
    let mut mean = vec![0.0; dim];
    for values in rows.chunks_exact(dim) {
        mean.iter_mut().zip(values).for_each(|(mean, value)| *mean += f64::from(*value) / count as f64);
    }
    // The covariance of the first views and their Gram matrix have the same eigenvalues but zeros: either Frobenius norm will do.
    let first_views: Vec<usize> = (0..samples).map(|sample| sample * views).collect();
    Statistics {
        samples,
        view_agreement: mean_of(agreement),
        sample_similarity: mean_of(similarity),
        mean_cosine: mean.iter().map(|value| value * value).sum::<f64>().sqrt(),
        effective_rank: effective_rank(&first_views.iter().map(|index| row(*index)).collect::<Vec<_>>(), dim),
    }
}

fn effective_rank(rows: &[&[f32]], dim: usize) -> f64 {
    let count = rows.len() as f64;
    let mut mean = vec![0.0; dim];
    for row in rows {
        mean.iter_mut().zip(*row).for_each(|(mean, value)| *mean += f64::from(*value) / count);
    }
    let centred: Vec<Vec<f64>> =
        rows.iter().map(|row| row.iter().zip(&mean).map(|(value, mean)| f64::from(*value) - mean).collect()).collect();
    let mut trace = 0.0;
    let mut square = 0.0;
    for (index, first) in centred.iter().enumerate() {
        for (other, second) in centred.iter().enumerate().take(index + 1) {
            let product: f64 = first.iter().zip(second).map(|(a, b)| a * b).sum();
            square += if index == other { product * product } else { 2.0 * product * product };
            if index == other {
                trace += product;
            }
        }
    }
    if trace < 1e-9 * count { 0.0 } else { trace * trace / square }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthogonal_rows_use_every_direction() {
        // Four samples of two equal views, in the directions +x, -x, +y, -y of three dimensions.
        let directions = [[1., 0., 0.], [-1., 0., 0.], [0., 1., 0.], [0., -1., 0.]];
        let rows: Vec<f32> = directions.iter().flat_map(|row| [*row, *row]).flatten().collect();
        let figures = figures(&rows, 2, 3);
        assert_eq!(figures.view_agreement, Some(1.0));
        assert!((figures.sample_similarity.unwrap() + 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(figures.mean_cosine, 0.0);
        assert!((figures.effective_rank - 2.0).abs() < 1e-12);
    }

    #[test]
    fn cosine_to_the_mean_is_that_of_the_definition_and_warns_above_one_half() {
        // Unit rows at angles of 0, 90 and `last` degrees; two views each, the second the first.
        let at = |last: f64| {
            let angles = [0.0, std::f64::consts::FRAC_PI_2, last.to_radians()];
            let rows: Vec<[f64; 2]> = angles.iter().flat_map(|a| [[a.cos(), a.sin()]; 2]).collect();
            let mean = [0, 1].map(|axis| rows.iter().map(|row| row[axis]).sum::<f64>() / 6.0);
            let cosine = |row: &[f64; 2]| (row[0] * mean[0] + row[1] * mean[1]) / mean[0].hypot(mean[1]);
            let expected = rows.iter().map(cosine).sum::<f64>() / 6.0;
            let rows: Vec<f32> = rows.as_flattened().iter().map(|x| *x as f32).collect();
            let figures = figures(&rows, 2, 2);
            assert!((figures.mean_cosine - expected).abs() < 1e-6, "{figures:?} {expected}");
            figures
        };
        let warning = at(30.0).warning().unwrap();
        assert!(
            warning.contains("0.80") && warning.contains("`--center`") && warning.contains("`--pca D`"),
            "{warning}"
        );
        assert_eq!(at(210.0).warning(), None);
        assert_eq!(Statistics { samples: 1, ..at(30.0) }.warning(), None);
    }

    #[test]
    fn collapsed_rows_show() {
        let figures = figures(&[0.6, 0.8].repeat(6), 1, 2);
        assert_eq!(figures.view_agreement, None);
        assert!((figures.mean_cosine - 1.0).abs() < 1e-6);
        assert_eq!(figures.effective_rank, 0.0);
    }
}
