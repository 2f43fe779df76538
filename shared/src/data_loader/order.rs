//! Orders of the samples in an epoch: fully random, or random within what a disk can read in long stretches.

use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::rng::KeyedRng;

/// The order in which an epoch takes the samples. Either is another permutation in each epoch, and a function of the seed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Any sample at any time: for sets that fit the page cache, or fast disks
    #[default]
    Random,
    /// Runs of neighbouring samples in random order, shuffled among a few runs: for sets larger than memory
    Quasi,
}

/// Samples that lie one after the other in the shards and are read together.
pub const RUN_SAMPLES: usize = 64;
/// Runs whose samples are shuffled among each other: 1024 samples, some batches of the usual size.
pub const WINDOW_RUNS: usize = 16;

/// The numbers `0..samples` in a random order that a disk can follow: they are cut into runs of `run` neighbours, the runs are
/// shuffled, and then the numbers are shuffled within every `window` runs in turn.
///
/// Whoever reads in this order touches at most `window` stretches of `run` samples at a time, each of them once. Shards are packed in
/// a random order already, so neighbours have nothing in common.
pub fn quasi_order(samples: usize, (run, window): (usize, usize), rng: &mut KeyedRng) -> Vec<usize> {
    let mut order = Vec::with_capacity(samples);
    for runs in shuffled_runs(samples, run, rng).chunks(window.max(1)) {
        let start = order.len();
        order.extend(runs.iter().cloned().flatten());
        rng.shuffle(&mut order[start..]);
    }
    order
}

fn shuffled_runs(samples: usize, run: usize, rng: &mut KeyedRng) -> Vec<Range<usize>> {
    let run = run.max(1);
    let mut runs: Vec<_> = (0..samples).step_by(run).map(|start| start..(start + run).min(samples)).collect();
    rng.shuffle(&mut runs);
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn quasi_order_is_a_permutation(samples in 0usize..500, run in 0usize..40, window in 0usize..10, seed: u64) {
            let mut order = quasi_order(samples, (run, window), &mut KeyedRng::new("test", seed, &[]));
            order.sort_unstable();
            prop_assert_eq!(order, (0..samples).collect::<Vec<_>>());
        }

        #[test]
        fn few_runs_are_open_at_a_time(samples in 1usize..2000, run in 1usize..40, window in 1usize..10, seed: u64) {
            let order = quasi_order(samples, (run, window), &mut KeyedRng::new("test", seed, &[]));
            // Every run is used up within its window: the first and the last use of it are less than a window apart.
            let mut first = vec![None; samples.div_ceil(run)];
            for (at, sample) in order.iter().enumerate() {
                let first = *first[sample / run].get_or_insert(at);
                prop_assert!(at - first < run * window);
            }
        }
    }

    #[test]
    fn quasi_order_mixes_runs_and_samples() {
        let order = quasi_order(4096, (RUN_SAMPLES, WINDOW_RUNS), &mut KeyedRng::new("test", 1, &[]));
        let neighbours = order.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        assert!(neighbours < 40, "{neighbours}");
        let runs: std::collections::BTreeSet<_> = order[..256].iter().map(|sample| sample / RUN_SAMPLES).collect();
        assert_eq!(runs.len(), WINDOW_RUNS);
    }

    #[test]
    fn quasi_order_is_pinned() {
        // A change here changes what a resumed run sees: it needs a new format version.
        assert_eq!(quasi_order(8, (2, 2), &mut KeyedRng::new("test", 0, &[])), [2, 7, 6, 3, 4, 5, 0, 1]);
    }
}
