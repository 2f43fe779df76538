//! How the parameters move.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use shared::optim::{NoDecay, OptimizerConfig, Rule};
use shared::schedule::{Curve, Schedule};
use shared::{Error, Result};

use super::within;
use crate::args::{LrUnit, Options};

/// Names of optimisers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Gradient descent with momentum
    #[default]
    Sgd,
    /// The same with a rate for every tensor, relative to its length; biases and norms keep the plain rate
    Lars,
    /// The same as in NVIDIA's apex: on all tensors, relative to gradient and decay
    Larc,
    /// Adam with decoupled weight decay
    #[value(name = "adamw")]
    AdamW,
}

/// Names of learning rates over time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CurveName {
    /// Half a cosine down to `--final-lr`
    #[default]
    Cosine,
    /// Multiplied by `--lr-factor` at each of `--milestones`
    Steps,
    /// One rate
    Constant,
}

/// Settings of the optimiser and of the learning rate over time; what is not named has no part in it, or its usual value.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct OptimisationConfig {
    /// Not named when it is SGD.
    #[serde(skip_serializing_if = "is_default")]
    pub optimizer: OptimizerName,
    /// After the warm-up.
    pub lr: f64,
    /// Not named when it is the cosine.
    #[serde(skip_serializing_if = "is_default")]
    pub schedule: CurveName,
    /// What the cosine counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_unit: Option<LrUnit>,
    /// At the end of the cosine.
    #[serde(skip_serializing_if = "is_default")]
    pub final_lr: f64,
    /// Epochs at whose start the rate changes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub milestones: Vec<u64>,
    /// What it is multiplied by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_factor: Option<f64>,
    /// Epochs in which the rate grows.
    #[serde(skip_serializing_if = "is_default")]
    pub warmup_epochs: u64,
    /// In the first step.
    #[serde(skip_serializing_if = "is_default")]
    pub warmup_start_lr: f64,
    /// Of the gradient descent; none for `AdamW`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Of the gradient descent.
    #[serde(skip_serializing_if = "is_default")]
    pub nesterov: bool,
    /// Of LARS and LARC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust_coefficient: Option<f64>,
    /// Of `AdamW`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// Of `AdamW`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// Of `AdamW`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adam_epsilon: Option<f64>,
    /// Pull towards 0.
    pub weight_decay: f64,
    /// Not named when all parameters decay.
    #[serde(skip_serializing_if = "is_default")]
    pub no_decay: NoDecay,
    /// Longest gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// What the averaged student keeps of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl OptimisationConfig {
    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the flag.
    pub fn new(options: &Options, epochs: u64) -> Result<Self> {
        let (optimizer, schedule) = (options.optimizer.unwrap_or_default(), options.schedule.unwrap_or_default());
        check_flags(options, optimizer, schedule)?;
        let descends = optimizer != OptimizerName::AdamW;
        let adapts = matches!(optimizer, OptimizerName::Lars | OptimizerName::Larc);
        let spared = if optimizer == OptimizerName::Lars { NoDecay::NormAndBias } else { NoDecay::None };
        let config = Self {
            optimizer,
            lr: options.lr.unwrap_or(0.03),
            schedule,
            lr_unit: (schedule == CurveName::Cosine).then(|| options.lr_unit.unwrap_or_default()),
            final_lr: options.final_lr.unwrap_or(0.0),
            milestones: options.milestones.clone().unwrap_or_default(),
            lr_factor: (schedule == CurveName::Steps).then(|| options.lr_factor.unwrap_or(0.1)),
            warmup_epochs: options.warmup_epochs.unwrap_or(0),
            warmup_start_lr: options.warmup_start_lr.unwrap_or(0.0),
            momentum: descends.then(|| options.momentum.unwrap_or(0.9)),
            nesterov: options.nesterov.unwrap_or(false),
            trust_coefficient: adapts.then(|| options.trust_coefficient.unwrap_or(0.001)),
            beta1: (!descends).then(|| options.beta1.unwrap_or(0.9)),
            beta2: (!descends).then(|| options.beta2.unwrap_or(0.999)),
            adam_epsilon: (!descends).then(|| options.adam_epsilon.unwrap_or(1e-8)),
            weight_decay: options.weight_decay.unwrap_or(1e-4),
            no_decay: options.no_decay.unwrap_or(spared),
            clip_norm: options.clip_norm,
            ema_decay: options.ema_decay,
        };
        config.check(epochs)?;
        Ok(config)
    }

    /// The optimiser's constants.
    pub fn optimizer(&self) -> OptimizerConfig {
        let of = |value: Option<f64>| value.unwrap_or_default();
        let (momentum, trust_coefficient) = (of(self.momentum), of(self.trust_coefficient));
        let nesterov = self.nesterov;
        let rule = match self.optimizer {
            OptimizerName::Sgd => Rule::Sgd { momentum, nesterov },
            OptimizerName::Lars => Rule::Lars { momentum, trust_coefficient },
            OptimizerName::Larc => Rule::Larc { momentum, nesterov, trust_coefficient },
            OptimizerName::AdamW => {
                Rule::AdamW { beta1: of(self.beta1), beta2: of(self.beta2), epsilon: of(self.adam_epsilon) }
            }
        };
        OptimizerConfig { rule, weight_decay: self.weight_decay, no_decay: self.no_decay }
    }

    /// The learning rate over time.
    pub fn schedule(&self, epochs: u64, steps_per_epoch: u64) -> Schedule {
        let curve = match self.schedule {
            CurveName::Cosine => {
                Curve::Cosine { final_lr: self.final_lr, per_step: self.lr_unit == Some(LrUnit::Step) }
            }
            CurveName::Steps => {
                Curve::Steps { factor: self.lr_factor.unwrap_or(1.0), milestones: self.milestones.clone() }
            }
            CurveName::Constant => Curve::Constant,
        };
        let &Self { lr, warmup_epochs, warmup_start_lr, .. } = self;
        Schedule { lr, curve, warmup_epochs, warmup_start_lr, epochs, steps_per_epoch }
    }

    fn check(&self, epochs: u64) -> Result<()> {
        let share = |flag, value: Option<f64>| {
            value.map_or(Ok(()), |value| within(flag, value, (0.0..1.0).contains(&value), "at least 0 and below 1"))
        };
        let positive =
            |flag, value: Option<f64>| value.map_or(Ok(()), |value| within(flag, value, value > 0.0, "positive"));
        positive("lr", Some(self.lr))?;
        positive("lr-factor", self.lr_factor)?;
        positive("trust-coefficient", self.trust_coefficient)?;
        positive("adam-epsilon", self.adam_epsilon)?;
        positive("clip-norm", self.clip_norm)?;
        share("momentum", self.momentum)?;
        share("beta1", self.beta1)?;
        share("beta2", self.beta2)?;
        share("ema-decay", self.ema_decay)?;
        within("weight-decay", self.weight_decay, self.weight_decay >= 0.0, "at least 0")?;
        within("final-lr", self.final_lr, (0.0..=self.lr).contains(&self.final_lr), "from 0 to `--lr`")?;
        let start = self.warmup_start_lr;
        within("warmup-start-lr", start, (0.0..=self.lr).contains(&start), "from 0 to `--lr`")?;
        if self.nesterov && self.momentum == Some(0.0) {
            return Err(Error::usage("`--nesterov` needs a `--momentum` above 0"));
        }
        if self.warmup_epochs > epochs {
            let message = format!("`--warmup-epochs` {} are more than the {epochs} of `--epochs`", self.warmup_epochs);
            return Err(Error::usage(message));
        }
        let rising = self.milestones.is_sorted_by(|a, b| a < b);
        let inside = self.milestones.iter().all(|&milestone| (self.warmup_epochs.max(1)..epochs).contains(&milestone));
        if !rising || !inside {
            return Err(Error::usage(format!(
                "`--milestones` must rise, from {} to below the {epochs} of `--epochs`, got {}",
                self.warmup_epochs.max(1),
                self.milestones.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
            )));
        }
        Ok(())
    }
}

/// Refuses flags that the optimiser or the schedule would ignore.
fn check_flags(options: &Options, optimizer: OptimizerName, schedule: CurveName) -> Result<()> {
    use OptimizerName::{AdamW, Larc, Lars, Sgd};
    let of_optimizer: [(&str, bool, &[OptimizerName]); 6] = [
        ("momentum", options.momentum.is_some(), &[Sgd, Lars, Larc]),
        ("nesterov", options.nesterov == Some(true), &[Sgd, Larc]),
        ("trust-coefficient", options.trust_coefficient.is_some(), &[Lars, Larc]),
        ("beta1", options.beta1.is_some(), &[AdamW]),
        ("beta2", options.beta2.is_some(), &[AdamW]),
        ("adam-epsilon", options.adam_epsilon.is_some(), &[AdamW]),
    ];
    let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
        value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    };
    if let Some((flag, _, _)) = of_optimizer.iter().find(|(_, given, fit)| *given && !fit.contains(&optimizer)) {
        let optimizer = name(&|| optimizer.to_possible_value());
        return Err(Error::usage(format!("`--optimizer {optimizer}` takes no `--{flag}`")));
    }
    let of_schedule = [
        ("lr-unit", options.lr_unit.is_some(), CurveName::Cosine),
        ("final-lr", options.final_lr.is_some(), CurveName::Cosine),
        ("milestones", options.milestones.is_some(), CurveName::Steps),
        ("lr-factor", options.lr_factor.is_some(), CurveName::Steps),
    ];
    if let Some((flag, _, _)) = of_schedule.iter().find(|(_, given, fit)| *given && *fit != schedule) {
        let schedule = name(&|| schedule.to_possible_value());
        return Err(Error::usage(format!("`--schedule {schedule}` takes no `--{flag}`")));
    }
    if schedule == CurveName::Steps && options.milestones.as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::usage("`--schedule steps` needs `--milestones`, epochs separated by commas"));
    }
    if options.warmup_start_lr.is_some() && options.warmup_epochs.unwrap_or(0) == 0 {
        return Err(Error::usage("`--warmup-start-lr` needs `--warmup-epochs`"));
    }
    if optimizer != Sgd && options.lr.is_none() {
        let optimizer = name(&|| optimizer.to_possible_value());
        return Err(Error::usage(format!("`--optimizer {optimizer}` needs `--lr`: the default is meant for sgd")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_without_a_use_are_refused() {
        let base = Options { lr: Some(0.1), ..Options::default() };
        let adamw = || Options { optimizer: Some(OptimizerName::AdamW), ..base.clone() };
        let steps = || Options { schedule: Some(CurveName::Steps), milestones: Some(vec![3, 6]), ..base.clone() };
        let cases: [(Options, &str); 13] = [
            (Options { momentum: Some(0.9), ..adamw() }, "--momentum"),
            (Options { nesterov: Some(true), ..adamw() }, "--nesterov"),
            (Options { trust_coefficient: Some(0.1), ..base.clone() }, "--trust-coefficient"),
            (Options { beta1: Some(0.1), ..base.clone() }, "--beta1"),
            (Options { beta2: Some(1.0), ..adamw() }, "--beta2"),
            (Options { lr: None, ..adamw() }, "--lr"),
            (Options { milestones: None, ..steps() }, "--milestones"),
            (Options { milestones: Some(vec![6, 3]), ..steps() }, "--milestones"),
            (Options { milestones: Some(vec![10]), ..steps() }, "--milestones"),
            (Options { final_lr: Some(0.2), ..base.clone() }, "--final-lr"),
            (Options { warmup_epochs: Some(11), ..base.clone() }, "--warmup-epochs"),
            (Options { clip_norm: Some(0.0), ..base.clone() }, "--clip-norm"),
            (Options { ema_decay: Some(1.0), ..base.clone() }, "--ema-decay"),
        ];
        for (options, flag) in cases {
            let error = OptimisationConfig::new(&options, 10).unwrap_err();
            assert_eq!(error.exit_status(), 2, "{error}");
            assert!(error.to_string().contains(&format!("`{flag}`")), "{error}");
        }
    }

    #[test]
    fn only_what_was_chosen_is_named() {
        let text = |options: &Options| toml::to_string(&OptimisationConfig::new(options, 10).unwrap()).unwrap();
        let usual = "lr = 0.03\nlr-unit = \"epoch\"\nmomentum = 0.9\nweight-decay = 0.0001\n";
        assert_eq!(text(&Options::default()), usual);
        let options = Options {
            optimizer: Some(OptimizerName::AdamW),
            lr: Some(0.001),
            schedule: Some(CurveName::Steps),
            milestones: Some(vec![3, 6]),
            no_decay: Some(NoDecay::NormAndBias),
            ..Options::default()
        };
        let written = text(&options);
        let read: Options = toml::from_str(&written).unwrap();
        assert_eq!(text(&read), written);
        assert!(!written.contains("momentum") && written.contains("no-decay = \"norm-and-bias\""), "{written}");
    }

    #[test]
    fn lars_spares_norms_and_biases_unless_told_otherwise() {
        let options = Options { optimizer: Some(OptimizerName::Lars), lr: Some(1.0), ..Options::default() };
        let spared = |options: &Options| OptimisationConfig::new(options, 10).unwrap().optimizer().no_decay;
        assert_eq!(spared(&options), NoDecay::NormAndBias);
        assert_eq!(spared(&Options { no_decay: Some(NoDecay::None), ..options }), NoDecay::None);
    }
}
