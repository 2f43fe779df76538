//! Exact k-nearest-neighbour classification by cosine similarity, weighted as in DINO.
//!
//! Every query is compared with every training sample (blocked matrix products, no index structure), so the numbers have no
//! search error. Neighbours are ordered by falling similarity, and by their position in the training set where similarities
//! are equal; a neighbour votes for its class with `exp(similarity / temperature)`.
//!
//! # Source
//! Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, the weighted k-NN classifier;
//! `eval_knn.py` of facebookresearch/dino.
//!
//! # Deviation
//! A class counts among the best five only if a neighbour voted for it: with fewer classes among the neighbours than five, the
//! rest would be drawn by their index.

use std::cmp::Ordering;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::feature_rows::FeatureRows;
use crate::matrix;

/// What similarities are usually divided by before neighbours vote, as in DINO's `eval_knn.py`.
pub const VOTE_TEMPERATURE: f64 = 0.07;

/// Training rows per matrix product.
const TRAIN_BLOCK: usize = 4096;
/// Queries per matrix product.
const QUERY_BLOCK: usize = 256;

/// What stands for a sample that has several stored views.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ViewChoice {
    /// The first stored view
    First,
    /// The mean of the unit-length features of all stored views
    Mean,
}

/// The nearest training samples of each query, nearest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Neighbours {
    /// Neighbours per query, `k`.
    pub k: usize,
    /// Positions in the training set, `(Q, k)` row-major.
    pub indices: Vec<u32>,
    /// Cosine similarities, `(Q, k)` row-major.
    pub similarities: Vec<f32>,
}

/// Accuracy of the vote among the `k` nearest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct KnnAccuracy {
    /// Neighbours that vote.
    pub k: usize,
    /// Percent of queries whose class has the most votes.
    pub top1: f64,
    /// Percent of queries whose class is among the five with the most votes.
    pub top5: f64,
}

/// Finds the `k` training samples nearest to each of `queries`.
///
/// `k` is capped at the number of candidates. With `leave_one_out`, the two sets are the same and a sample is not its own
/// neighbour.
///
/// # Errors
/// When a matrix product fails, which takes features of different widths.
pub fn nearest(
    train: &FeatureRows<'_>,
    queries: &FeatureRows<'_>,
    choice: ViewChoice,
    k: usize,
    leave_one_out: bool,
) -> Result<Neighbours> {
    let k = k.min(train.len() - usize::from(leave_one_out && !train.is_empty()));
    let width = train.width();
    let blocks = (0..queries.len())
        .step_by(QUERY_BLOCK)
        .map(|start| unit_rows(queries, choice, start, QUERY_BLOCK.min(queries.len() - start)))
        .collect::<Result<Vec<_>>>()?;
    let mut best: Vec<Nearest> = (0..queries.len()).map(|_| Nearest::new(k)).collect();
    for train_start in (0..train.len()).step_by(TRAIN_BLOCK) {
        let count = TRAIN_BLOCK.min(train.len() - train_start);
        let candidates = unit_rows(train, choice, train_start, count)?.t()?; // (F, T)
        for (block, xs) in blocks.iter().enumerate() {
            let similarities = xs.matmul(&candidates)?; // (Q, T)
            let first_query = block * QUERY_BLOCK;
            let kept = &mut best[first_query..first_query + xs.dims()[0]];
            matrix::with_slice(&similarities, |similarities| {
                kept.par_iter_mut().zip(similarities.par_chunks(count)).enumerate().for_each(
                    |(row, (kept, row_values))| {
                        let itself = if leave_one_out { (first_query + row).checked_sub(train_start) } else { None };
                        kept.offer(train_start, row_values, itself);
                    },
                );
            })?;
        }
    }
    debug_assert_eq!(width, queries.width());
    let mut neighbours = Neighbours {
        k,
        indices: Vec::with_capacity(k * queries.len()),
        similarities: Vec::with_capacity(k * queries.len()),
    };
    for query in &mut best {
        for &Candidate { similarity, index } in query.sorted() {
            neighbours.indices.push(index);
            neighbours.similarities.push(similarity);
        }
    }
    Ok(neighbours)
}

/// Accuracy of the weighted vote for each of `ks`, in percent.
///
/// Values of `ks` above the neighbours there are mean all of them; the returned `k` says so.
///
/// # Panics
/// When the label slices are not of the sets that `neighbours` was made from.
pub fn vote(
    neighbours: &Neighbours,
    train_classes: &[u32],
    query_classes: &[u32],
    num_classes: usize,
    ks: &[usize],
    temperature: f64,
) -> Vec<KnnAccuracy> {
    let mut ks: Vec<usize> = ks.iter().map(|&k| k.min(neighbours.k)).collect();
    ks.sort_unstable();
    ks.dedup();
    let mut hits = vec![(0_usize, 0_usize); ks.len()];
    let mut votes = vec![0.0; num_classes];
    for (query, &truth) in query_classes.iter().enumerate() {
        let row = query * neighbours.k..(query + 1) * neighbours.k;
        let (indices, similarities) = (&neighbours.indices[row.clone()], &neighbours.similarities[row]);
        let nearest = similarities.first().copied().unwrap_or_default();
        votes.fill(0.0);
        let mut counted = 0;
        for (&k, hits) in ks.iter().zip(&mut hits) {
            for (&index, &similarity) in indices.iter().zip(similarities).take(k).skip(counted) {
                // Relative to the nearest: the same ranking for any temperature, without overflow.
                let weight = (f64::from(similarity - nearest) / temperature).exp();
                votes[train_classes[index as usize] as usize] += weight;
            }
            counted = k;
            let rank = rank_of(&votes, truth as usize);
            hits.0 += usize::from(rank.is_some_and(|rank| rank < 1));
            hits.1 += usize::from(rank.is_some_and(|rank| rank < 5));
        }
    }
    let percent = |hits: usize| 100.0 * hits as f64 / query_classes.len().max(1) as f64;
    ks.iter().zip(hits).map(|(&k, (top1, top5))| KnnAccuracy { k, top1: percent(top1), top5: percent(top5) }).collect()
}

/// How many classes have more votes than `class`, the lower index winning a draw; nothing if it has no vote.
fn rank_of(votes: &[f64], class: usize) -> Option<usize> {
    let own = votes[class];
    (own > 0.0).then(|| votes.iter().enumerate().filter(|&(c, &v)| v > own || (v == own && c < class)).count())
}

/// Unit-length rows of `count` samples from `start`, `(count, F)`.
fn unit_rows(rows: &FeatureRows<'_>, choice: ViewChoice, start: usize, count: usize) -> Result<candle_core::Tensor> {
    let data = matrix::gather(count, rows.width(), |i, out| unit_feature(rows, choice, start + i, out));
    matrix::tensor(data, count, rows.width())
}

/// The unit-length feature that stands for one sample.
fn unit_feature(rows: &FeatureRows<'_>, choice: ViewChoice, sample: usize, out: &mut [f32]) {
    out.copy_from_slice(rows.row(sample, 0));
    matrix::normalize_row(out);
    if choice == ViewChoice::Mean && rows.views() > 1 {
        let mut view_row = vec![0.0; out.len()];
        for view in 1..rows.views() {
            view_row.copy_from_slice(rows.row(sample, view));
            matrix::normalize_row(&mut view_row);
            for (sum, x) in out.iter_mut().zip(&view_row) {
                *sum += x;
            }
        }
        matrix::normalize_row(out);
    }
}

/// The best `k` of the candidates offered to one query.
///
/// Candidates above the worst kept one are appended and thinned out when there are twice too many.
#[derive(Debug)]
struct Nearest {
    k: usize,
    kept: Vec<Candidate>,
    /// A candidate must be more similar than this: later ones lose draws.
    floor: f32,
}

impl Nearest {
    fn new(k: usize) -> Self {
        Self { k, kept: Vec::new(), floor: f32::NEG_INFINITY }
    }

    /// Takes in the similarities of the candidates from `first` on, but for the one at `skip`.
    fn offer(&mut self, first: usize, similarities: &[f32], skip: Option<usize>) {
        if self.k == 0 {
            return;
        }
        for (i, &similarity) in similarities.iter().enumerate() {
            if similarity > self.floor && skip != Some(i) {
                self.kept.push(Candidate { similarity, index: (first + i) as u32 });
                if self.kept.len() == 2 * self.k + 32 {
                    self.thin();
                }
            }
        }
    }

    fn thin(&mut self) {
        if self.kept.len() > self.k {
            self.kept.select_nth_unstable(self.k - 1);
            self.kept.truncate(self.k);
            self.floor = self.kept[self.k - 1].similarity;
        }
    }

    fn sorted(&mut self) -> &[Candidate] {
        if self.k > 0 {
            self.thin();
        }
        self.kept.sort_unstable();
        &self.kept
    }
}

/// A training sample offered as a neighbour; the lesser of two is the nearer: more similar, then earlier.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    similarity: f32,
    index: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        other.similarity.total_cmp(&self.similarity).then(self.index.cmp(&other.index))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows<'a>(data: &'a [f32], labels: &'a [i64], ids: &'a [u64]) -> FeatureRows<'a> {
        FeatureRows::new(vec![data], 1, data.len() / labels.len(), labels, ids).unwrap()
    }

    #[test]
    fn neighbours_are_ordered_by_angle_whatever_their_length() {
        let train = [0.0, 2.0, 10.0, 10.0, 0.5, 0.0, -1.0, 0.0];
        let (labels, ids) = ([0; 4], [0; 4]);
        let query = [3.0, 1.0];
        let found =
            nearest(&rows(&train, &labels, &ids), &rows(&query, &[0], &[0]), ViewChoice::First, 9, false).unwrap();
        assert_eq!(found.k, 4);
        assert_eq!(found.indices, [2, 1, 0, 3]);
        for (got, want) in found.similarities.iter().zip([0.948_683_3, 0.894_427_2, 0.316_227_76, -0.948_683_3]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn equal_similarities_go_to_the_earlier_sample_also_across_blocks() {
        let n = TRAIN_BLOCK + 500;
        let train: Vec<f32> = (0..n).flat_map(|_| [1.0, 0.0]).collect();
        let (labels, ids) = (vec![0; n], vec![0; n]);
        let found = nearest(&rows(&train, &labels, &ids), &rows(&[1.0, 0.0], &[0], &[0]), ViewChoice::First, 40, false)
            .unwrap();
        assert_eq!(found.indices, (0..40).collect::<Vec<u32>>());
    }

    #[test]
    fn leave_one_out_never_finds_the_sample_itself() {
        let n = 300;
        let train: Vec<f32> = (0..n * 4).map(|i| ((i * 37 + 11) % 101) as f32 - 50.0).collect();
        let (labels, ids) = (vec![0; n], vec![0; n]);
        let set = rows(&train, &labels, &ids);
        let found = nearest(&set, &set, ViewChoice::First, n, true).unwrap();
        assert_eq!(found.k, n - 1);
        for (query, row) in found.indices.chunks(n - 1).enumerate() {
            assert!(row.iter().all(|&index| index as usize != query));
        }
    }

    #[test]
    fn blocked_search_equals_a_full_sort() {
        let (n, q, width) = (TRAIN_BLOCK + 77, QUERY_BLOCK + 3, 8);
        let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 2003) as f32 / 1001.5 - 1.0;
        let train: Vec<f32> = (0..n * width).map(value).collect();
        let query: Vec<f32> = (0..q * width).map(|i| value(i + 999_983)).collect();
        let (train_labels, query_labels) = (vec![0; n], vec![0; q]);
        let ids = vec![0; n];
        let train = rows(&train, &train_labels, &ids);
        let query = rows(&query, &query_labels, &ids[..q]);
        let few = nearest(&train, &query, ViewChoice::First, 10, false).unwrap();
        let all = nearest(&train, &query, ViewChoice::First, n, false).unwrap();
        for (few, all) in few.indices.chunks(10).zip(all.indices.chunks(n)) {
            assert_eq!(few, &all[..10]);
        }
    }

    #[test]
    fn votes_are_weighted_by_similarity_over_temperature() {
        // One near neighbour of class 0 against two farther ones of class 1: at T = 0.1 exp(9) beats 2 exp(6), at T = 1 it does not.
        let found = Neighbours { k: 3, indices: vec![0, 1, 2], similarities: vec![0.9, 0.6, 0.6] };
        let top1 = |temperature| vote(&found, &[0, 1, 1], &[0], 2, &[3], temperature)[0].top1;
        assert_eq!((top1(0.1), top1(1.0)), (100.0, 0.0));
        assert_eq!(top1(1e-4), 100.0);
    }

    #[test]
    fn top5_needs_a_vote_and_k_is_capped() {
        let found = Neighbours { k: 2, indices: vec![0, 1], similarities: vec![0.9, 0.6] };
        let accuracy = vote(&found, &[3, 2], &[2], 9, &[1, 2, 200], 0.07);
        assert_eq!(accuracy.len(), 2);
        assert_eq!(accuracy[0], KnnAccuracy { k: 1, top1: 0.0, top5: 0.0 });
        assert_eq!(accuracy[1], KnnAccuracy { k: 2, top1: 0.0, top5: 100.0 });
    }

    #[test]
    fn the_mean_of_views_is_taken_over_unit_rows() {
        let data = [4.0, 0.0, 0.0, 0.5];
        let set = FeatureRows::new(vec![&data], 2, 2, &[0], &[0]).unwrap();
        let mut out = [0.0; 2];
        unit_feature(&set, ViewChoice::Mean, 0, &mut out);
        assert!((out[0] - 0.5_f32.sqrt()).abs() < 1e-7 && out[0] == out[1], "{out:?}");
        unit_feature(&set, ViewChoice::First, 0, &mut out);
        assert_eq!(out, [1.0, 0.0]);
    }
}
