//! What is learnt from a teacher, and how much it weighs.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use shared::{Error, Result};

use super::distill_terms::{AskedTerm, DistillTerm, DistillTerms, DistillViews};
use super::within;
use crate::args::Options;

/// The official sum over 32 samples per GPU, as a weight of the mean.
const DEFAULT_DISTILL_WEIGHT: f64 = 32.0;
/// The temperatures of SEED's student and teacher, and the size of its queue (arXiv 2101.04731, section 4.1).
const DEFAULT_SEED: SeedConfig = SeedConfig { queue_size: 65536, temperature: 0.2, teacher_temperature: 0.01 };

/// A term of the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightedTerm {
    /// Its factor, per view.
    pub weight: f64,
    /// Where it acts.
    pub views: DistillViews,
}

/// Settings of SEED.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SeedConfig {
    /// Of the teacher's embeddings.
    #[serde(rename = "seed-queue-size")]
    pub queue_size: usize,
    /// Of the student's distribution.
    #[serde(rename = "seed-temperature")]
    pub temperature: f64,
    /// Of the teacher's distribution.
    #[serde(rename = "seed-teacher-temperature")]
    pub teacher_temperature: f64,
}

/// How several sets of embeddings become one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Ensemble {
    /// Their mean, at unit length
    #[default]
    Mean,
    /// Side by side, at unit length; the widths add up
    Concat,
    /// One of them at every step, by the seed
    Random,
}

/// The terms that a teacher adds to the loss.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "Written")]
pub struct DistillationConfig {
    /// Terms with weights and views.
    pub terms: BTreeMap<DistillTerm, WeightedTerm>,
    /// Of the term `seed`, if it is among them.
    pub seed: Option<SeedConfig>,
    /// Where there are several teachers.
    pub ensemble: Option<Ensemble>,
}

/// The settings in a file. A squared distance on both views is named by its weight alone.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Written {
    #[serde(skip_serializing_if = "Option::is_none")]
    distill_weight: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    distill: Option<DistillTerms>,
    #[serde(flatten)]
    seed: Option<SeedConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ensemble: Option<Ensemble>,
}

impl From<DistillationConfig> for Written {
    fn from(config: DistillationConfig) -> Self {
        let DistillationConfig { terms, seed, ensemble } = config;
        let alone = match terms.get(&DistillTerm::Mse) {
            Some(WeightedTerm { weight, views: DistillViews::Both }) if terms.len() == 1 => Some(*weight),
            _ => None,
        };
        let asked = |WeightedTerm { weight, views }| AskedTerm {
            weight,
            views: (views != DistillViews::default()).then_some(views),
        };
        let distill = alone.is_none().then(|| DistillTerms(terms.into_iter().map(|(t, w)| (t, asked(w))).collect()));
        Self { distill_weight: alone, distill, seed, ensemble }
    }
}

impl DistillationConfig {
    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the flag.
    pub fn new(options: &Options, batch_size: usize) -> Result<Self> {
        let mut asked = options.distill.clone().unwrap_or_default().0;
        if let Some(weight) = options.distill_weight {
            within("distill-weight", weight, weight >= 0.0, "at least 0")?;
            if asked.insert(DistillTerm::Mse, AskedTerm { weight, views: None }).is_some() {
                let message = "`--distill-weight` and `--distill mse=` say the same: give one of them";
                return Err(Error::usage(message));
            }
        }
        if asked.is_empty() {
            asked.insert(DistillTerm::Mse, AskedTerm { weight: DEFAULT_DISTILL_WEIGHT, views: None });
        }
        let usual = options.distill_views.unwrap_or_default();
        let terms: BTreeMap<_, _> = asked
            .into_iter()
            .map(|(term, AskedTerm { weight, views })| (term, WeightedTerm { weight, views: views.unwrap_or(usual) }))
            .collect();
        let seed = SeedConfig::new(options, terms.get(&DistillTerm::Seed), batch_size)?;
        let several = options.embeddings.as_ref().is_some_and(|sets| sets.len() > 1);
        if options.ensemble.is_some() && !several {
            return Err(Error::usage("`--ensemble` needs `--embeddings` twice at least, once for every teacher"));
        }
        Ok(Self { terms, seed, ensemble: several.then(|| options.ensemble.unwrap_or_default()) })
    }

    /// The flags of a teacher that are given, which a training without one does not take.
    pub(super) fn given(options: &Options) -> Option<&'static str> {
        let flags = [
            (options.embeddings.is_some(), "embeddings"),
            (options.ensemble.is_some(), "ensemble"),
            (options.distill.is_some(), "distill"),
            (options.distill_views.is_some(), "distill-views"),
            (options.distill_weight.is_some(), "distill-weight"),
            (options.seed_queue_size.is_some(), "seed-queue-size"),
            (options.seed_temperature.is_some(), "seed-temperature"),
            (options.seed_teacher_temperature.is_some(), "seed-teacher-temperature"),
        ];
        flags.into_iter().find_map(|(given, flag)| given.then_some(flag))
    }
}

impl SeedConfig {
    fn new(options: &Options, term: Option<&WeightedTerm>, batch_size: usize) -> Result<Option<Self>> {
        let Some(WeightedTerm { views, .. }) = term else {
            let given = [
                (options.seed_queue_size.is_some(), "seed-queue-size"),
                (options.seed_temperature.is_some(), "seed-temperature"),
                (options.seed_teacher_temperature.is_some(), "seed-teacher-temperature"),
            ];
            return match given.into_iter().find(|(given, _)| *given) {
                Some((_, flag)) => Err(Error::usage(format!("`--{flag}` needs `seed` among the terms of `--distill`"))),
                None => Ok(None),
            };
        };
        let config = Self {
            queue_size: options.seed_queue_size.unwrap_or(DEFAULT_SEED.queue_size),
            temperature: options.seed_temperature.unwrap_or(DEFAULT_SEED.temperature),
            teacher_temperature: options.seed_teacher_temperature.unwrap_or(DEFAULT_SEED.teacher_temperature),
        };
        let views = if *views == DistillViews::Both { 2 } else { 1 };
        if config.queue_size < views * batch_size {
            return Err(Error::usage(format!(
                "`--seed-queue-size` {} must hold the {} teacher embeddings of a step at least",
                config.queue_size,
                views * batch_size
            )));
        }
        for (flag, value) in
            [("seed-temperature", config.temperature), ("seed-teacher-temperature", config.teacher_temperature)]
        {
            within(flag, value, value > 0.0, "positive")?;
        }
        Ok(Some(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<DistillationConfig> {
        let options: Options = toml::from_str(text).map_err(|e| Error::usage(e.to_string()))?;
        DistillationConfig::new(&options, 4)
    }

    #[test]
    fn settings_are_written_as_briefly_as_they_can_be() {
        for (text, written) in [
            ("", "distill-weight = 32.0\n"),
            ("distill = \"mse=3\"", "distill-weight = 3.0\n"),
            ("distill-weight = 0", "distill-weight = 0.0\n"),
            ("distill = \"mse=3@query\"", "distill = \"mse=3@query\"\n"),
            ("distill = \"mse=3\"\ndistill-views = \"query\"", "distill = \"mse=3@query\"\n"),
            ("distill-weight = 8\ndistill = \"simreg=1@query\"", "distill = \"mse=8,simreg=1@query\"\n"),
            (
                "distill = \"seed=1\"\nseed-queue-size = 8",
                "distill = \"seed=1\"\nseed-queue-size = 8\nseed-temperature = 0.2\nseed-teacher-temperature = 0.01\n",
            ),
            ("embeddings = [\"a\", \"b\"]", "distill-weight = 32.0\nensemble = \"mean\"\n"),
        ] {
            let config = config(text).unwrap();
            assert_eq!(toml::to_string(&config).unwrap(), written, "{text}");
        }
    }

    #[test]
    fn flags_that_do_not_fit_together_are_named() {
        for (text, words) in [
            ("distill = \"mse=1\"\ndistill-weight = 1", "give one of them"),
            ("distill-weight = -1", "`--distill-weight`"),
            ("seed-queue-size = 64", "`--seed-queue-size` needs `seed`"),
            ("distill = \"seed=1\"\nseed-queue-size = 7", "must hold the 8 teacher embeddings"),
            ("distill = \"seed=1\"\nseed-temperature = 0", "`--seed-temperature` must be positive"),
            ("embeddings = \"a\"\nensemble = \"mean\"", "`--ensemble` needs `--embeddings` twice"),
        ] {
            let error = config(text).unwrap_err();
            assert!(error.exit_status() == 2 && error.to_string().contains(words), "{text}: {error}");
        }
    }
}
