//! Which samples a step sees, and which of their stored views: pure functions of the seed, the epoch and the sample.
//!
//! Nothing here has a state, so a resumed run asks for step 1234 and gets what a straight run would have got.

use super::order::{Order, RUN_SAMPLES, WINDOW_RUNS, quasi_order};
use crate::error::{Error, Result};
use crate::rng::KeyedRng;

/// Cuts each epoch's order of the samples into batches of one size; an incomplete last batch is dropped.
///
/// # Examples
/// ```
/// let sampler = shared::data_loader::EpochSampler::new(10, 4, 7)?;
/// assert_eq!(sampler.steps_per_epoch(), 2);
/// assert_eq!(sampler.order(3), sampler.order(3));
/// assert_ne!(sampler.order(3), sampler.order(4));
/// # Ok::<(), shared::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochSampler {
    samples: usize,
    batch_size: usize,
    seed: u64,
    order: Order,
}

impl EpochSampler {
    /// A sampler of batches of `batch_size` out of `samples`, in [`Order::Random`].
    ///
    /// # Errors
    /// [`Error::Usage`] when not a single batch can be filled, or the batch size is 0.
    pub fn new(samples: usize, batch_size: usize, seed: u64) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::usage("`--batch-size` must be at least 1"));
        }
        if batch_size > samples {
            let message = format!("`--batch-size` {batch_size} is larger than the set of {samples} samples");
            return Err(Error::usage(message));
        }
        Ok(Self { samples, batch_size, seed, order: Order::Random })
    }

    /// The same sampler with another order of the samples.
    #[must_use]
    pub fn with_order(self, order: Order) -> Self {
        Self { order, ..self }
    }

    /// Samples in a batch.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// Whole batches in an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        (self.samples / self.batch_size) as u64
    }

    /// The samples of an epoch in their random order, those of the incomplete last batch included.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let mut rng = KeyedRng::new("epoch order", self.seed, &[epoch]);
        match self.order {
            Order::Random => {
                let mut order: Vec<usize> = (0..self.samples).collect();
                rng.shuffle(&mut order);
                order
            }
            Order::Quasi => quasi_order(self.samples, (RUN_SAMPLES, WINDOW_RUNS), &mut rng),
        }
    }

    /// The part of an epoch's [`EpochSampler::order`] that is its batch number `position`.
    ///
    /// # Panics
    /// When the epoch has no such batch.
    pub fn batch<'a>(&self, order: &'a [usize], position: u64) -> &'a [usize] {
        let start = position as usize * self.batch_size;
        &order[start..start + self.batch_size]
    }
}

/// Draws two different stored views of a sample for each epoch, all views equally often.
///
/// A sample's views are dealt like cards: they are shuffled, two are dealt each epoch, and when they run out they are
/// shuffled again. After `V / 2` epochs (`V` epochs when `V` is odd) every view was dealt equally often. The draw is keyed by
/// the seed, the sample's identity and the round, so it does not depend on where the sample lies.
///
/// # Examples
/// ```
/// let schedule = shared::data_loader::ViewSchedule::new(4, 7)?;
/// let mut dealt = [schedule.pair(99, 0), schedule.pair(99, 1)].concat();
/// dealt.sort();
/// assert_eq!(dealt, [0, 1, 2, 3]);
/// # Ok::<(), shared::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ViewSchedule {
    views: usize,
    seed: u64,
}

impl ViewSchedule {
    /// A schedule over `views` stored views.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there are fewer than two.
    pub fn new(views: usize, seed: u64) -> Result<Self> {
        if views < 2 {
            let message = format!("training compares two views of each sample, this shard set stores {views}");
            return Err(Error::invalid(message, "pack it again with `data-prep pack --views 2` or more"));
        }
        Ok(Self { views, seed })
    }

    /// The two views of a sample for an epoch: first the query's, then the key's.
    pub fn pair(&self, sample_id: u64, epoch: u64) -> [usize; 2] {
        // An odd number of cards is shuffled twice per round, so that rounds always hold whole pairs.
        let decks = 1 + self.views % 2;
        let pairs = self.views * decks / 2;
        let (round, turn) = (epoch / pairs as u64, (epoch % pairs as u64) as usize);
        let mut rng = KeyedRng::new("view schedule", self.seed, &[sample_id, round]);
        let mut dealt = Vec::with_capacity(self.views * decks);
        for _ in 0..decks {
            let start = dealt.len();
            dealt.extend(0..self.views);
            rng.shuffle(&mut dealt[start..]);
            // The pair that spans two decks must not show the same card twice.
            if start % 2 == 1 && dealt[start] == dealt[start - 1] {
                dealt.swap(start, start + 1);
            }
        }
        [dealt[2 * turn], dealt[2 * turn + 1]]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn epoch_order_is_a_permutation_that_repeats(samples in 1usize..200, seed: u64, epoch in 0u64..1000) {
            let sampler = EpochSampler::new(samples, 1, seed).unwrap();
            let order = sampler.order(epoch);
            prop_assert_eq!(&order, &sampler.order(epoch));
            let mut sorted = order;
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..samples).collect::<Vec<_>>());
        }

        #[test]
        fn batches_of_an_epoch_are_disjoint(samples in 1usize..100, batch in 1usize..20, seed: u64) {
            prop_assume!(batch <= samples);
            let sampler = EpochSampler::new(samples, batch, seed).unwrap();
            let order = sampler.order(0);
            let mut seen: Vec<usize> =
                (0..sampler.steps_per_epoch()).flat_map(|step| sampler.batch(&order, step).to_vec()).collect();
            prop_assert_eq!(seen.len(), samples / batch * batch);
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), samples / batch * batch);
        }

        #[test]
        fn every_view_is_dealt_equally_often(views in 2usize..40, sample_id: u64, seed: u64, rounds in 1u64..4) {
            let schedule = ViewSchedule::new(views, seed).unwrap();
            let epochs = rounds * if views.is_multiple_of(2) { views / 2 } else { views } as u64;
            let mut counts = vec![0u64; views];
            for epoch in 0..epochs {
                let [query, key] = schedule.pair(sample_id, epoch);
                prop_assert_ne!(query, key);
                counts[query] += 1;
                counts[key] += 1;
            }
            prop_assert!(counts.iter().all(|&count| count == 2 * epochs / views as u64), "{:?}", counts);
        }
    }

    #[test]
    fn roles_of_two_views_change_over_epochs_and_samples() {
        let schedule = ViewSchedule::new(2, 1).unwrap();
        let first = (0..400).filter(|&i| schedule.pair(i % 20, i / 20)[0] == 0).count();
        assert!((150..250).contains(&first), "{first}");
    }

    #[test]
    fn orders_of_epochs_and_seeds_differ() {
        for kind in [Order::Random, Order::Quasi] {
            let order = |seed, epoch| EpochSampler::new(50, 5, seed).unwrap().with_order(kind).order(epoch);
            assert_eq!(order(1, 0), order(1, 0));
            assert_ne!(order(1, 0), order(1, 1));
            assert_ne!(order(1, 0), order(2, 0));
        }
    }

    #[test]
    fn draws_are_pinned() {
        // A change here changes what a resumed run sees: it needs a new format version.
        assert_eq!(EpochSampler::new(6, 2, 0).unwrap().order(1), [2, 0, 1, 3, 4, 5]);
        assert_eq!(ViewSchedule::new(5, 0).unwrap().pair(3, 1), [1, 2]);
    }

    #[test]
    fn impossible_batches_and_single_views_are_refused() {
        assert_eq!(
            EpochSampler::new(10, 256, 0).unwrap_err().to_string(),
            "`--batch-size` 256 is larger than the set of 10 samples"
        );
        assert!(matches!(EpochSampler::new(10, 0, 0), Err(Error::Usage { .. })));
        assert!(matches!(ViewSchedule::new(1, 0), Err(Error::Invalid { .. })));
    }
}
