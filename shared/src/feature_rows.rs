//! Features in memory: a borrowed `(N, V, F)` block that may lie in several memory-mapped pieces, with labels and sample ids.
//!
//! k-NN, the linear probe, PCA and the neighbour pictures all read features through [`FeatureRows`], whether they come from
//! a feature set on disk or from a test.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Images per forward pass where features are extracted. Fixed, because the last bits of a matrix product may depend on its size:
/// the same shards give the same bytes.
pub const EXTRACTION_BATCH: usize = 32;

/// The features of `N` samples, `V` views each, `F` wide, in the order of the shards.
#[derive(Debug, Clone)]
pub struct FeatureRows<'a> {
    parts: Vec<&'a [f32]>,
    /// The first sample of each part, and `N` at the end.
    starts: Vec<usize>,
    views: usize,
    width: usize,
    labels: &'a [i64],
    sample_ids: &'a [u64],
}

impl<'a> FeatureRows<'a> {
    /// Joins `parts`, each `(n, views, width)` row-major, into one sequence of samples.
    ///
    /// # Errors
    /// [`Error::Shape`] when the parts do not hold whole samples, or their number is not that of `labels` or `sample_ids`.
    pub fn new(
        parts: Vec<&'a [f32]>,
        views: usize,
        width: usize,
        labels: &'a [i64],
        sample_ids: &'a [u64],
    ) -> Result<Self> {
        let per_sample = views * width;
        let wrong = |got: String| Error::Shape {
            op: "feature rows",
            expected: format!("({}, {views}, {width})", labels.len()),
            got,
        };
        if per_sample == 0 {
            return Err(wrong("no elements per sample".into()));
        }
        let mut starts = vec![0];
        for part in &parts {
            if part.len() % per_sample != 0 {
                return Err(wrong(format!("a part of {} elements", part.len())));
            }
            starts.push(starts[starts.len() - 1] + part.len() / per_sample);
        }
        let samples = starts[starts.len() - 1];
        if samples != labels.len() || samples != sample_ids.len() {
            return Err(wrong(format!("{samples} samples and {} sample ids", sample_ids.len())));
        }
        Ok(Self { parts, starts, views, width, labels, sample_ids })
    }

    /// Samples, `N`.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Views per sample, `V`.
    pub fn views(&self) -> usize {
        self.views
    }

    /// Feature width, `F`.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The class of each sample; -1 where there is none.
    pub fn labels(&self) -> &'a [i64] {
        self.labels
    }

    /// The id of each sample.
    pub fn sample_ids(&self) -> &'a [u64] {
        self.sample_ids
    }

    /// The feature of one view of one sample, `(F)`.
    ///
    /// # Panics
    /// When `sample` or `view` is out of range.
    pub fn row(&self, sample: usize, view: usize) -> &'a [f32] {
        assert!(view < self.views, "view {view} of {}", self.views);
        let part = self.starts.partition_point(|&start| start <= sample) - 1;
        let row = (sample - self.starts[part]) * self.views + view;
        &self.parts[part][row * self.width..(row + 1) * self.width]
    }

    /// Labels as class indices.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a sample has no label or one that is not below `num_classes`; `what` names the set.
    pub fn class_indices(&self, what: &str, num_classes: usize) -> Result<Vec<u32>> {
        let unlabelled = self.labels.iter().filter(|&&label| label < 0).count();
        if unlabelled > 0 {
            return Err(Error::invalid(
                format!("{unlabelled} of the {} samples of {what} have no label", self.len()),
                "pack images that lie in one folder per class, or run `student-eval features` alone, which needs no labels",
            ));
        }
        let class = |&label: &i64| u32::try_from(label).ok().filter(|&label| (label as usize) < num_classes);
        self.labels.iter().map(class).collect::<Option<_>>().ok_or_else(|| {
            Error::invalid(
                format!("{what} holds a label outside its {num_classes} classes"),
                "the shard set is damaged: run `data-prep verify` on it",
            )
        })
    }

    /// Refuses features that are not numbers, which a diverged student gives.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `what` and the first sample with such a feature.
    pub fn check_finite(&self, what: &str) -> Result<()> {
        for sample in 0..self.len() {
            for view in 0..self.views {
                if !self.row(sample, view).iter().all(|x| x.is_finite()) {
                    return Err(Error::invalid(
                        format!("the features of {what} hold values that are not finite, first in sample {sample}"),
                        "the student has diverged: train it again with a smaller `--lr`",
                    ));
                }
            }
        }
        Ok(())
    }

    /// How many samples each class has, for classes that occur.
    pub fn class_counts(&self) -> BTreeMap<i64, usize> {
        let mut counts = BTreeMap::new();
        for &label in self.labels {
            *counts.entry(label).or_default() += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_across_parts() {
        let (a, b): (Vec<f32>, Vec<f32>) = ((0..12).map(|i| i as f32).collect(), (12..18).map(|i| i as f32).collect());
        let rows = FeatureRows::new(vec![&a, &[], &b], 2, 3, &[0, 1, -1], &[7, 8, 9]).unwrap();
        assert_eq!(rows.row(0, 1), [3.0, 4.0, 5.0]);
        assert_eq!(rows.row(1, 0), [6.0, 7.0, 8.0]);
        assert_eq!(rows.row(2, 1), [15.0, 16.0, 17.0]);
    }

    #[test]
    fn counts_that_disagree_are_refused() {
        let a = [0.0; 12];
        assert!(FeatureRows::new(vec![&a], 2, 3, &[0], &[7]).is_err());
        assert!(FeatureRows::new(vec![&a], 2, 3, &[0, 1], &[7]).is_err());
        assert!(FeatureRows::new(vec![&a[..11]], 2, 3, &[0, 1], &[7, 8]).is_err());
        assert!(FeatureRows::new(vec![], 0, 3, &[], &[]).is_err());
    }

    #[test]
    fn missing_and_impossible_labels_are_named() {
        let a = [0.0; 4];
        let message = |labels: &[i64]| {
            FeatureRows::new(vec![&a], 1, 2, labels, &[1, 2])
                .unwrap()
                .class_indices("`val`", 3)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(message(&[0, -1]), "1 of the 2 samples of `val` have no label");
        assert_eq!(message(&[0, 3]), "`val` holds a label outside its 3 classes");
    }

    #[test]
    fn features_that_are_not_numbers_are_found() {
        let a = [0.0, 1.0, f32::NAN, 0.0];
        let rows = FeatureRows::new(vec![&a], 1, 2, &[0, 0], &[1, 2]).unwrap();
        assert!(rows.check_finite("`run`").unwrap_err().to_string().ends_with("first in sample 1"));
    }
}
