//! Learning rates over time: the cosine of pre-training and the steps of the linear probe.

use serde::{Deserialize, Serialize};

/// Half a cosine from `lr` down to 0, `0.5 * lr * (1 + cos(pi * t / total))`, without warm-up.
///
/// `t` counts epochs (the official way: the rate is constant within an epoch) or steps; `total` in the same unit.
///
/// # Source
/// Official DisCo code @ 1d732c8, `DisCo/main.py`, `adjust_learning_rate`.
///
/// # Examples
/// ```
/// let schedule = shared::schedule::Cosine { lr: 0.03, total: 200 };
/// assert_eq!(schedule.lr(0), 0.03);
/// assert!((schedule.lr(100) - 0.015).abs() < 1e-12);
/// assert!(schedule.lr(199) > 0.0 && schedule.lr(200) < 1e-12);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cosine {
    /// At the start.
    pub lr: f64,
    /// Epochs or steps until 0.
    pub total: u64,
}

impl Cosine {
    /// The rate of epoch or step `t`, counted from 0; 0 from `total` on.
    pub fn lr(&self, t: u64) -> f64 {
        if t >= self.total {
            return 0.0;
        }
        0.5 * self.lr * (1.0 + libm::cos(std::f64::consts::PI * t as f64 / self.total as f64))
    }
}

/// A rate that is multiplied by `factor` at the start of each epoch of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Steps {
    /// At the start.
    pub lr: f64,
    /// At each milestone.
    pub factor: f64,
    /// Epochs at whose start the rate changes, in order; an epoch that stands twice counts twice.
    pub milestones: Vec<u64>,
}

impl Steps {
    /// The milestones of the official linear probe over 100 epochs.
    pub const PROBE_MILESTONES: [u64; 11] = [5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80];
    /// The epochs those milestones were made for.
    pub const PROBE_EPOCHS: u64 = 100;

    /// The official linear probe: halved at each of [`Steps::PROBE_MILESTONES`], scaled from 100 to `epochs` and
    /// rounded up, so that the first epoch always has the whole rate.
    ///
    /// # Source
    /// Official DisCo code @ 1d732c8, the linear evaluation's command lines (`--schedule 5 10 15 ... 60 80`, factor 0.5).
    pub fn probe(lr: f64, epochs: u64) -> Self {
        let scaled = |milestone: u64| (milestone * epochs).div_ceil(Self::PROBE_EPOCHS);
        Self { lr, factor: 0.5, milestones: Self::PROBE_MILESTONES.into_iter().map(scaled).collect() }
    }

    /// The rate during an epoch, counted from 0.
    pub fn lr(&self, epoch: u64) -> f64 {
        let passed = self.milestones.iter().filter(|&&milestone| milestone <= epoch).count();
        self.lr * self.factor.powi(i32::try_from(passed).unwrap_or(i32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_falls_from_lr_to_nothing() {
        let schedule = Cosine { lr: 0.03, total: 10 };
        let rates: Vec<f64> = (0..12).map(|epoch| schedule.lr(epoch)).collect();
        assert_eq!(rates[0], 0.03);
        assert!((rates[5] - 0.015).abs() < 1e-15);
        assert!((rates[9] - 0.03 * 0.5 * (1.0 - (0.9 * std::f64::consts::PI).cos().abs())).abs() < 1e-12);
        assert!(rates.windows(2).all(|pair| pair[0] > pair[1] || pair[1] == 0.0));
        assert_eq!(rates[10..], [0.0, 0.0]);
    }

    #[test]
    fn probe_halves_at_the_official_epochs() {
        let schedule = Steps::probe(3.0, 100);
        assert_eq!(schedule.milestones, Steps::PROBE_MILESTONES);
        assert_eq!(schedule.lr(4), 3.0);
        assert_eq!(schedule.lr(5), 1.5);
        assert_eq!(schedule.lr(99), 3.0 / 2048.0);
    }

    #[test]
    fn probe_milestones_scale_with_the_epochs() {
        assert_eq!(Steps::probe(1.0, 200).milestones[..3], [10, 20, 30]);
        let short = Steps::probe(1.0, 10);
        assert_eq!(short.milestones, [1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8]);
        assert_eq!(short.lr(1), 0.25);
        assert_eq!(short.lr(9), 1.0 / 2048.0);
        assert_eq!(Steps::probe(1.0, 1).lr(0), 1.0);
    }
}
