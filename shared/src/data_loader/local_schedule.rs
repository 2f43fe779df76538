//! Which local views of a sample a step sees, beside its two global ones.

use crate::rng::KeyedRng;
use crate::{Error, Result};

/// Shares the local views of a sample out among its pairs of global views.
///
/// A set of `V` global and `W` local views has `W / ceil(V / 2)` local ones for every pair of global ones. They are dealt like
/// cards: shuffled, one hand each epoch, shuffled again when less than a hand is left. The draw is keyed by the seed, the sample's
/// identity and the round, as that of [`super::ViewSchedule`].
///
/// # Examples
/// ```
/// // Two global and six local views: all of them in every epoch.
/// let schedule = shared::data_loader::LocalSchedule::new(2, 6, 7)?;
/// let mut dealt = schedule.hand(99, 0);
/// dealt.sort();
/// assert_eq!(dealt, [0, 1, 2, 3, 4, 5]);
/// # Ok::<(), shared::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalSchedule {
    locals: usize,
    hand: usize,
    seed: u64,
}

impl LocalSchedule {
    /// A schedule over the local views of a set.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there are fewer local views than pairs of global ones, and not none.
    pub fn new(globals: usize, locals: usize, seed: u64) -> Result<Self> {
        let hand = locals / globals.div_ceil(2).max(1);
        if hand == 0 && locals > 0 {
            let message =
                format!("this shard set has {locals} local views beside {globals} global ones: too few for each pair");
            return Err(Error::invalid(
                message,
                "pack it again by a recipe with at least one local view for every two",
            ));
        }
        Ok(Self { locals, hand, seed })
    }

    /// How many local views a step sees of each sample.
    pub fn hand_size(&self) -> usize {
        self.hand
    }

    /// The local views of a sample for an epoch.
    pub fn hand(&self, sample_id: u64, epoch: u64) -> Vec<usize> {
        if self.hand == 0 {
            return Vec::new();
        }
        let hands = self.locals / self.hand;
        let (round, turn) = (epoch / hands as u64, (epoch % hands as u64) as usize);
        let mut deck: Vec<usize> = (0..self.locals).collect();
        KeyedRng::new("local view schedule", self.seed, &[sample_id, round]).shuffle(&mut deck);
        deck[turn * self.hand..(turn + 1) * self.hand].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_deals_every_view_once_and_rounds_differ() {
        let schedule = LocalSchedule::new(8, 24, 3).unwrap();
        assert_eq!(schedule.hand_size(), 6);
        let round = |first: u64| (first..first + 4).flat_map(|epoch| schedule.hand(5, epoch)).collect::<Vec<_>>();
        for first in [0, 4] {
            let mut dealt = round(first);
            dealt.sort_unstable();
            assert_eq!(dealt, (0..24).collect::<Vec<_>>());
        }
        assert_ne!(round(0), round(4));
        assert_ne!(schedule.hand(5, 0), schedule.hand(6, 0));
    }

    #[test]
    fn odd_numbers_leave_some_out_of_a_round() {
        let schedule = LocalSchedule::new(3, 5, 0).unwrap();
        assert_eq!(schedule.hand_size(), 2);
        let mut dealt = [schedule.hand(1, 0), schedule.hand(1, 1)].concat();
        dealt.sort_unstable();
        dealt.dedup();
        assert_eq!(dealt.len(), 4);
    }

    #[test]
    fn no_local_views_are_none_and_too_few_are_refused() {
        assert!(LocalSchedule::new(2, 0, 0).unwrap().hand(1, 9).is_empty());
        assert!(matches!(LocalSchedule::new(8, 3, 0), Err(Error::Invalid { .. })));
    }
}
