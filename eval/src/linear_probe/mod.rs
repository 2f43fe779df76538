//! The linear probe: softmax regression on frozen features, by SGD, several learning rates in one pass.
//!
//! The backbone ran once, when the features were extracted; each epoch goes over one stored view of every training sample.
//! All learning rates start from the same weights and see the same batches, so they differ in nothing else.
//!
//! # Source
//! `main_lincls.py` of the official DisCo code (commit 1d732c8) and its command lines: weights from N(0, 0.01), bias 0, SGD with
//! momentum 0.9 and no weight decay, batch 256, 100 epochs, the learning rate halved at epochs 5, 10, 15, 20, 25, 30, 35, 40, 45,
//! 60 and 80, lr 3.0 (30 in one ResNet-18 line), the best validation epoch reported.
//!
//! # Deviation
//! The official code augments afresh in every epoch; here an epoch takes one of the V stored views of each sample, in turn. The
//! last epoch is reported beside the best one, which is chosen on the validation set and therefore flatters.

mod heads;
mod inputs;
mod softmax;

pub use heads::Heads;
pub use inputs::{Normalize, Scaling, epoch_order, view_of};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use shared::feature_rows::FeatureRows;
use shared::rng::KeyedRng;
use shared::schedule::Steps;
use shared::{Error, Result};

/// Validation rows per matrix product.
const VAL_BLOCK: usize = 1024;

/// What a probe run does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeConfig {
    /// Learning rates, all trained in one pass.
    pub lr: Vec<f64>,
    /// Passes over the training set.
    pub epochs: usize,
    /// Samples per update.
    pub batch_size: usize,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Weight decay on weights and bias.
    pub weight_decay: f64,
    /// Scaling of the features.
    pub normalize: Normalize,
    /// Seed of the first weights and of the order of samples.
    pub seed: u64,
}

impl Default for ProbeConfig {
    fn default() -> Self {
        Self {
            lr: vec![3.0],
            epochs: Steps::PROBE_EPOCHS as usize,
            batch_size: 256,
            momentum: 0.9,
            weight_decay: 0.0,
            normalize: Normalize::None,
            seed: 0,
        }
    }
}

/// Accuracy on the validation set after one epoch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochAccuracy {
    /// Epochs done, from 1.
    pub epoch: usize,
    /// Mean cross-entropy over the epoch's training samples; none once the head has diverged.
    pub train_loss: Option<f64>,
    /// Percent of validation samples whose class scores highest.
    pub top1: f64,
    /// Percent of validation samples whose class is among the five highest.
    pub top5: f64,
}

/// What one learning rate came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadResult {
    /// The learning rate of the first epoch.
    pub lr: f64,
    /// The learning rate of the last epoch.
    pub lr_last_epoch: f64,
    /// Whether the loss stopped being a number.
    pub diverged: bool,
    /// After the last epoch.
    #[serde(rename = "final")]
    pub last: EpochAccuracy,
    /// The epoch of the highest top-1, chosen on the validation set.
    pub best: EpochAccuracy,
    /// Top-1 of each class after the last epoch, in class order; none for a class without validation samples.
    pub per_class_top1: Vec<Option<f64>>,
    /// Every epoch.
    pub history: Vec<EpochAccuracy>,
}

/// What a probe run came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeResult {
    /// Training samples.
    pub train_samples: usize,
    /// Stored views per training sample.
    pub train_views: usize,
    /// Validation samples.
    pub val_samples: usize,
    /// Samples per update, at most the training set.
    pub effective_batch_size: usize,
    /// Updates per epoch; the last may be of a smaller batch.
    pub steps_per_epoch: usize,
    /// One result per learning rate, as asked.
    pub heads: Vec<HeadResult>,
}

impl ProbeResult {
    /// The learning rate with the highest top-1 after the last epoch; top-5, then the earlier one, decide a draw.
    pub fn best_head(&self) -> Option<&HeadResult> {
        self.heads.iter().reduce(|best, head| if ahead(&head.last, &best.last) { head } else { best })
    }
}

/// The first weights of every head, `(C, F)`: normal with standard deviation 0.01, from `seed` alone.
pub fn initial_weight(num_classes: usize, width: usize, seed: u64) -> Vec<f32> {
    let mut rng = KeyedRng::new("linear-probe-weight", seed, &[]);
    (0..num_classes * width).map(|_| (0.01 * rng.normal()) as f32).collect()
}

/// Trains on `train` and measures on the first view of `val` after every epoch, which `on_epoch` is told of.
///
/// # Errors
/// [`Error::Usage`] for a config that trains nothing; [`Error::Invalid`] for labels that are missing or not below
/// `num_classes`, or sets of different feature width.
pub fn train(
    train: &FeatureRows<'_>,
    val: &FeatureRows<'_>,
    num_classes: usize,
    config: &ProbeConfig,
    mut on_epoch: impl FnMut(&[EpochAccuracy]),
) -> Result<ProbeResult> {
    check(train, val, config)?;
    let train_classes = train.class_indices("the training set", num_classes)?;
    let scaling = Scaling::fit(config.normalize, train);
    let validation = Validation::new(val, num_classes, &scaling)?;
    let weight = initial_weight(num_classes, train.width(), config.seed);
    let mut heads = Heads::new(&weight, num_classes, train.width(), &config.lr, config.momentum, config.weight_decay)?;
    // The share of each head's first learning rate.
    let schedule = Steps::probe(1.0, config.epochs as u64);
    let mut history: Vec<Vec<EpochAccuracy>> = vec![Vec::new(); config.lr.len()];
    for epoch in 0..config.epochs {
        let picks: Vec<(usize, usize)> = epoch_order(train.len(), config.seed, epoch)
            .into_iter()
            .map(|sample| (sample, view_of(sample, epoch, train.views())))
            .collect();
        let factor = schedule.lr(epoch as u64);
        let mut losses = vec![0.0; heads.len()];
        for picks in picks.chunks(config.batch_size) {
            let xs = scaling.batch(train, picks)?;
            let classes: Vec<u32> = picks.iter().map(|&(sample, _)| train_classes[sample]).collect();
            for (sum, loss) in losses.iter_mut().zip(heads.step(&xs, &classes, factor)?) {
                *sum += loss;
            }
        }
        let hits = validation.hits(&heads)?;
        let accuracies: Vec<EpochAccuracy> = losses
            .iter()
            .zip(hits)
            .map(|(loss, hits)| {
                let loss = loss / train.len() as f64;
                EpochAccuracy {
                    epoch: epoch + 1,
                    train_loss: loss.is_finite().then_some(loss),
                    top1: percent(hits.top1, val.len()),
                    top5: percent(hits.top5, val.len()),
                }
            })
            .collect();
        on_epoch(&accuracies);
        for (history, accuracy) in history.iter_mut().zip(accuracies) {
            history.push(accuracy);
        }
    }
    let hits = validation.hits(&heads)?;
    let results = config.lr.iter().zip(history).zip(hits).filter_map(|((&lr, history), hits)| {
        let last = *history.last()?;
        let best = history.iter().copied().reduce(|best, next| if ahead(&next, &best) { next } else { best })?;
        Some(HeadResult {
            lr,
            lr_last_epoch: lr * schedule.lr(config.epochs as u64 - 1),
            diverged: history.iter().any(|epoch| epoch.train_loss.is_none()),
            last,
            best,
            per_class_top1: validation.per_class(&hits),
            history,
        })
    });
    Ok(ProbeResult {
        train_samples: train.len(),
        train_views: train.views(),
        val_samples: val.len(),
        effective_batch_size: config.batch_size.min(train.len()),
        steps_per_epoch: train.len().div_ceil(config.batch_size),
        heads: results.collect(),
    })
}

/// Refuses settings that train nothing.
///
/// # Errors
/// [`Error::Usage`].
pub fn check_config(config: &ProbeConfig) -> Result<()> {
    if config.epochs == 0 || config.batch_size == 0 {
        return Err(Error::usage("`--epochs` and `--batch-size` must be at least 1"));
    }
    if config.lr.is_empty() || config.lr.iter().any(|lr| !lr.is_finite() || *lr <= 0.0) {
        return Err(Error::usage("every `--lr` must be a positive number"));
    }
    let fractions = [("--momentum", config.momentum), ("--weight-decay", config.weight_decay)];
    match fractions.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
        Some((flag, value)) => Err(Error::usage(format!("`{flag}` must be at least 0 and below 1, got {value}"))),
        None => Ok(()),
    }
}

/// Refuses what cannot be trained, before anything is computed.
fn check(train: &FeatureRows<'_>, val: &FeatureRows<'_>, config: &ProbeConfig) -> Result<()> {
    check_config(config)?;
    if train.is_empty() || val.is_empty() {
        return Err(Error::invalid("the training or the validation set is empty", ""));
    }
    if train.width() != val.width() {
        return Err(Error::invalid(
            format!("training features are {} wide, validation features {}", train.width(), val.width()),
            "extract both from the same student",
        ));
    }
    Ok(())
}

/// Whether `a` is the better accuracy.
fn ahead(a: &EpochAccuracy, b: &EpochAccuracy) -> bool {
    (a.top1, a.top5) > (b.top1, b.top5)
}

fn percent(hits: usize, of: usize) -> f64 {
    100.0 * hits as f64 / of.max(1) as f64
}

/// Correct answers of one head on the validation set.
#[derive(Debug, Default)]
struct Hits {
    top1: usize,
    top5: usize,
    /// Top-1 hits by class.
    by_class: Vec<usize>,
}

/// The validation set, scaled once.
struct Validation {
    blocks: Vec<candle_core::Tensor>,
    classes: Vec<u32>,
    class_sizes: Vec<usize>,
}

impl Validation {
    fn new(val: &FeatureRows<'_>, num_classes: usize, scaling: &Scaling) -> Result<Self> {
        let classes = val.class_indices("the validation set", num_classes)?;
        let mut class_sizes = vec![0; num_classes];
        for &class in &classes {
            class_sizes[class as usize] += 1;
        }
        let samples: Vec<(usize, usize)> = (0..val.len()).map(|sample| (sample, 0)).collect();
        let blocks = samples.chunks(VAL_BLOCK).map(|picks| scaling.batch(val, picks)).collect::<Result<_>>()?;
        Ok(Self { blocks, classes, class_sizes })
    }

    fn hits(&self, heads: &Heads) -> Result<Vec<Hits>> {
        let num_classes = heads.num_classes();
        let mut hits: Vec<Hits> =
            (0..heads.len()).map(|_| Hits { by_class: vec![0; num_classes], ..Hits::default() }).collect();
        for (xs, classes) in self.blocks.iter().zip(self.classes.chunks(VAL_BLOCK)) {
            let logits = heads.logits(xs)?;
            let ranks: Vec<Option<usize>> = logits
                .par_chunks(num_classes)
                .with_min_len(16)
                .enumerate()
                .map(|(row, logits)| softmax::rank_of(logits, classes[row / heads.len()] as usize))
                .collect();
            for (ranks, &class) in ranks.chunks(heads.len()).zip(classes) {
                for (hits, rank) in hits.iter_mut().zip(ranks) {
                    let within = |k| rank.is_some_and(|rank| rank < k);
                    hits.top1 += usize::from(within(1));
                    hits.top5 += usize::from(within(5));
                    hits.by_class[class as usize] += usize::from(within(1));
                }
            }
        }
        Ok(hits)
    }

    fn per_class(&self, hits: &Hits) -> Vec<Option<f64>> {
        let share = |(&hits, &size): (&usize, &usize)| (size > 0).then(|| percent(hits, size));
        hits.by_class.iter().zip(&self.class_sizes).map(share).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two views of `n` samples in three classes that lie in three directions of a 4-wide space, with some noise.
    fn toy(n: usize, salt: usize) -> (Vec<f32>, Vec<i64>, Vec<u64>) {
        let noise = |i: usize| ((i.wrapping_mul(7919) + salt * 31) % 499) as f32 / 499.0 - 0.5;
        let labels: Vec<i64> = (0..n as u32).map(|i| i64::from(i * i % 7 % 3)).collect();
        let data = (0..n * 8).map(|i| noise(i) + 1.5 * f32::from(labels[i / 8] as usize == i % 4)).collect();
        (data, labels, (0..n as u64).collect())
    }

    fn config() -> ProbeConfig {
        ProbeConfig { lr: vec![0.5, 3.0], epochs: 20, batch_size: 32, ..ProbeConfig::default() }
    }

    fn run(config: &ProbeConfig) -> Result<ProbeResult> {
        let (train_set, val_set) = (toy(150, 1), toy(60, 2));
        let train_rows = FeatureRows::new(vec![&train_set.0], 2, 4, &train_set.1, &train_set.2)?;
        let val_rows = FeatureRows::new(vec![&val_set.0], 2, 4, &val_set.1, &val_set.2)?;
        train(&train_rows, &val_rows, 3, config, |_| {})
    }

    #[test]
    fn separable_classes_are_learnt() {
        let result = run(&config()).unwrap();
        for head in &result.heads {
            assert!(head.last.top1 > 95.0 && head.best.top1 >= head.last.top1, "{head:?}");
            assert!(head.history[19].train_loss < head.history[0].train_loss);
            assert_eq!(head.history.len(), 20);
        }
        assert_eq!((result.steps_per_epoch, result.effective_batch_size), (5, 32));
    }

    #[test]
    fn per_class_accuracies_average_to_the_whole() {
        let result = run(&config()).unwrap();
        let (_, labels, _) = toy(60, 2);
        let head = &result.heads[0];
        let mean: f64 = labels.iter().map(|&label| head.per_class_top1[label as usize].unwrap()).sum::<f64>() / 60.0;
        assert!((mean - head.last.top1).abs() < 1e-9);
    }

    #[test]
    fn the_same_seed_gives_the_same_result_at_one_and_three_threads() {
        let in_pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| serde_json::to_string(&run(&config()).unwrap()).unwrap())
        };
        assert_eq!(in_pool(1), in_pool(3));
        let other = run(&ProbeConfig { seed: 1, ..config() }).unwrap();
        assert_ne!(in_pool(1), serde_json::to_string(&other).unwrap());
    }

    #[test]
    fn a_diverged_learning_rate_scores_nothing_and_spares_the_others() {
        let result = run(&ProbeConfig { lr: vec![1e38, 3.0], ..config() }).unwrap();
        let diverged = &result.heads[0];
        assert!(diverged.diverged && diverged.last.train_loss.is_none() && diverged.last.top1 == 0.0);
        assert!(!result.heads[1].diverged && result.heads[1].last.top1 > 95.0);
        assert_eq!(result.best_head().unwrap().lr, 3.0);
    }

    #[test]
    fn senseless_configs_are_usage_errors() {
        for config in [
            ProbeConfig { lr: vec![], ..config() },
            ProbeConfig { lr: vec![-1.0], ..config() },
            ProbeConfig { lr: vec![f64::NAN], ..config() },
            ProbeConfig { epochs: 0, ..config() },
            ProbeConfig { batch_size: 0, ..config() },
            ProbeConfig { momentum: 1.0, ..config() },
            ProbeConfig { weight_decay: -0.1, ..config() },
        ] {
            assert_eq!(run(&config).unwrap_err().exit_status(), 2);
        }
    }
}
