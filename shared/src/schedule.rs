//! Learning rates over time: the curves of pre-training with their warm-up, and the steps of the linear probe.

use serde::{Deserialize, Serialize};

/// Half a cosine from `lr` down to `final_lr`, `final_lr + 0.5 * (lr - final_lr) * (1 + cos(pi * t / total))`.
///
/// `t` counts epochs (the official way: the rate is constant within an epoch) or steps; `total` in the same unit.
///
/// # Source
/// Official DisCo code @ 1d732c8, `DisCo/main.py`, `adjust_learning_rate`; with a final rate facebookresearch/swav, `main_swav.py`,
/// and facebookresearch/dino, `utils.py`, `cosine_scheduler`.
///
/// # Examples
/// ```
/// let schedule = shared::schedule::Cosine { lr: 0.03, final_lr: 0.0, total: 200 };
/// assert_eq!(schedule.lr(0), 0.03);
/// assert!((schedule.lr(100) - 0.015).abs() < 1e-12);
/// assert!(schedule.lr(199) > 0.0 && schedule.lr(200) < 1e-12);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cosine {
    /// At the start.
    pub lr: f64,
    /// At the end.
    pub final_lr: f64,
    /// Epochs or steps until the end.
    pub total: u64,
}

impl Cosine {
    /// The rate of epoch or step `t`, counted from 0; the final one from `total` on.
    pub fn lr(&self, t: u64) -> f64 {
        if t >= self.total {
            return self.final_lr;
        }
        let fall = 0.5 * (self.lr - self.final_lr);
        self.final_lr + fall * (1.0 + libm::cos(std::f64::consts::PI * t as f64 / self.total as f64))
    }
}

/// The shape of a learning rate over time, after its warm-up.
#[derive(Debug, Clone, PartialEq)]
pub enum Curve {
    /// As [`Cosine`], from the end of the warm-up to the end of the training.
    Cosine {
        /// At the end.
        final_lr: f64,
        /// Whether every step has a rate of its own; otherwise every epoch.
        per_step: bool,
    },
    /// As [`Steps`]; milestones count from the start of the training.
    Steps {
        /// At each milestone.
        factor: f64,
        /// Epochs at whose start the rate changes.
        milestones: Vec<u64>,
    },
    /// One rate.
    Constant,
}

/// The learning rate of every step of a training.
///
/// During the warm-up the rate grows linearly from step to step, from `warmup_start_lr` in the first to `lr` in the last.
///
/// # Source
/// The warm-up is that of facebookresearch/swav, `main_swav.py`, and facebookresearch/dino, `utils.py`: `numpy.linspace`, whose ends
/// both count.
///
/// # Examples
/// ```
/// use shared::schedule::{Curve, Schedule};
/// let curve = Curve::Cosine { final_lr: 0.001, per_step: true };
/// let schedule = Schedule { lr: 0.5, curve, warmup_epochs: 1, warmup_start_lr: 0.1, epochs: 3, steps_per_epoch: 5 };
/// assert_eq!([schedule.lr(0), schedule.lr(4), schedule.lr(5)], [0.1, 0.5, 0.5]);
/// assert!((schedule.lr(2) - 0.3).abs() < 1e-12 && (schedule.lr(10) - 0.2505).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// After the warm-up.
    pub lr: f64,
    /// After the warm-up.
    pub curve: Curve,
    /// Epochs in which the rate grows; 0 without warm-up.
    pub warmup_epochs: u64,
    /// In the first step of the warm-up.
    pub warmup_start_lr: f64,
    /// Of the whole training.
    pub epochs: u64,
    /// Steps in an epoch.
    pub steps_per_epoch: u64,
}

impl Schedule {
    /// The rate of a step, counted from 0 over the whole training.
    pub fn lr(&self, step: u64) -> f64 {
        let warmup_steps = self.warmup_epochs * self.steps_per_epoch;
        if step < warmup_steps {
            let share = step as f64 / (warmup_steps - 1).max(1) as f64;
            return self.warmup_start_lr + (self.lr - self.warmup_start_lr) * share;
        }
        let epoch = step / self.steps_per_epoch.max(1);
        let left = self.epochs.saturating_sub(self.warmup_epochs);
        match self.curve {
            Curve::Constant => self.lr,
            Curve::Steps { factor, ref milestones } => multiplied(self.lr, factor, milestones, epoch),
            Curve::Cosine { final_lr, per_step: false } => {
                Cosine { lr: self.lr, final_lr, total: left }.lr(epoch - self.warmup_epochs)
            }
            Curve::Cosine { final_lr, per_step: true } => {
                Cosine { lr: self.lr, final_lr, total: left * self.steps_per_epoch }.lr(step - warmup_steps)
            }
        }
    }
}

/// `lr`, multiplied by `factor` for every milestone that an epoch has reached.
fn multiplied(lr: f64, factor: f64, milestones: &[u64], epoch: u64) -> f64 {
    let passed = milestones.iter().filter(|&&milestone| milestone <= epoch).count();
    lr * factor.powi(i32::try_from(passed).unwrap_or(i32::MAX))
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
        multiplied(self.lr, self.factor, &self.milestones, epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_falls_from_lr_to_nothing() {
        let schedule = Cosine { lr: 0.03, final_lr: 0.0, total: 10 };
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
