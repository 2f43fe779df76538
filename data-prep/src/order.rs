//! The order in which samples are packed: a permutation that the seed fixes.

use shared::data_loader::quasi_order;
use shared::rng::KeyedRng;
use shared::shard::PackingOrder;

/// Neighbours in the listing that stay together in the quasi-random order. Files of one directory, or members of one archive, tend
/// to lie one after the other on a disk: this many pictures of 100 kB take one seek and 25 MB.
const RUN_SAMPLES: usize = 256;

/// Runs that are mixed with each other. A window of them, 400 MB of such pictures, fits the page cache of any machine.
const WINDOW_RUNS: usize = 16;

/// The positions in the listing of `samples` samples, in the order in which they are packed.
pub(crate) fn packing_order(samples: usize, seed: u64, order: PackingOrder) -> Vec<usize> {
    match order {
        PackingOrder::Random => {
            let mut positions: Vec<usize> = (0..samples).collect();
            KeyedRng::new("pack order", seed, &[]).shuffle(&mut positions);
            positions
        }
        PackingOrder::Quasi => {
            let mut rng = KeyedRng::new("quasi-random pack order", seed, &[]);
            quasi_order(samples, (RUN_SAMPLES, WINDOW_RUNS), &mut rng)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const ORDERS: [PackingOrder; 2] = [PackingOrder::Random, PackingOrder::Quasi];

    #[test]
    fn every_sample_is_packed_once_in_an_order_of_the_seed() {
        for order in ORDERS {
            for samples in [0, 1, 255, 256, 257, 5000, 20_000] {
                let positions = packing_order(samples, 3, order);
                assert_eq!(positions, packing_order(samples, 3, order));
                assert!(samples < 255 || positions != packing_order(samples, 4, order));
                let mut sorted = positions;
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..samples), "{order:?} of {samples}");
            }
        }
    }

    #[test]
    fn quasi_random_order_reads_few_runs_at_a_time_and_still_all_over_the_listing() {
        let samples = 1 << 17;
        let positions = packing_order(samples, 0, PackingOrder::Quasi);
        for window in positions.chunks(RUN_SAMPLES * WINDOW_RUNS) {
            let runs: BTreeSet<usize> = window.iter().map(|position| position / RUN_SAMPLES).collect();
            assert_eq!(runs.len(), WINDOW_RUNS);
            let classes: BTreeSet<usize> = window.iter().map(|position| position * 16 / samples).collect();
            assert!(classes.len() > 5, "the runs of a window lie together");
            let steps = window.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) < RUN_SAMPLES).count();
            assert!(steps < window.len() / 4, "neighbours stay neighbours");
        }
    }

    #[test]
    fn orders_are_pinned() {
        // A change here changes every shard set: it needs a new format version.
        let orders = ORDERS.map(|order| packing_order(6, 0, order));
        assert_eq!(orders, [[3, 4, 1, 5, 2, 0], [4, 3, 1, 5, 2, 0]]);
    }
}
