//! Reading the runs: what each is, how it was trained, and what was measured on it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use shared::cli::read_toml;
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};
use shared::output::UNFINISHED_FILE;
use shared::run::{CONFIG_FILE, Losses, Run};
use shared::{Error, Result};

use super::names::short_names;
use crate::plot::lines::Curve;
use crate::results::{Record, read_all};

/// Settings that change nothing, or are the run's place.
const IGNORED_SETTINGS: [&str; 7] = ["output", "threads", "json", "quiet", "overwrite", "config", "keep"];

/// Everything that is known of one run.
#[derive(Debug)]
pub(super) struct Entry {
    /// Different from all others.
    pub(super) name: String,
    /// As on the command line.
    pub(super) path: PathBuf,
    pub(super) state: State,
    pub(super) records: Vec<Record>,
}

/// How a run was found.
#[derive(Debug)]
pub(super) enum State {
    /// A finished run.
    Finished(Box<Training>),
    /// A run that is still being trained, or was interrupted.
    Unfinished,
    /// A directory with results of a weight file.
    WeightsOnly,
}

/// How a student was trained.
#[derive(Debug)]
pub(super) struct Training {
    pub(super) manifest: Manifest,
    /// `config.toml`, one line per key.
    pub(super) settings: BTreeMap<String, String>,
    pub(super) metrics: Vec<Metric>,
}

/// A logged quantity over training.
#[derive(Debug)]
pub(super) struct Metric {
    /// Its key in `metrics.jsonl`.
    pub(super) key: String,
    /// Means of epochs, by steps done.
    pub(super) epochs: Vec<(f64, f64)>,
    /// Every step.
    pub(super) steps: Vec<(f64, f64)>,
}

impl Metric {
    /// As a curve of run number `run`; single steps are shown where there is room for them.
    pub(super) fn curve(&self, run: usize, with_steps: bool) -> Curve {
        let enough_epochs = self.epochs.len() > 1;
        let points = if enough_epochs { self.epochs.clone() } else { self.steps.clone() };
        let pale = if enough_epochs && with_steps { thin(&self.steps) } else { Vec::new() };
        Curve { run, points, pale }
    }
}

/// Leaves at most about a thousand points, evenly.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().step_by(points.len().div_ceil(1000).max(1)).copied().collect()
}

impl Training {
    /// A key of the manifest's details, as text.
    pub(super) fn detail(&self, key: &str) -> String {
        self.manifest.details.get(key).map_or_else(|| "?".into(), plain)
    }

    /// A metric by its key.
    pub(super) fn metric(&self, key: &str) -> Option<&Metric> {
        self.metrics.iter().find(|metric| metric.key == key)
    }
}

/// Reads all runs.
///
/// # Errors
/// [`Error::Usage`] for a run given twice; [`Error::Missing`] for a path that is no run; what is damaged is named.
pub(super) fn collect(paths: &[PathBuf]) -> Result<Vec<Entry>> {
    for path in paths {
        if !path.exists() {
            let hint = "check the path, or train it with `student-train`".into();
            return Err(Error::Missing { what: "run", path: path.clone(), hint });
        }
    }
    let names = short_names(paths)?;
    paths
        .iter()
        .zip(names)
        .map(|(path, name)| Ok(Entry { name, path: path.clone(), state: state_of(path)?, records: read_all(path)? }))
        .collect()
}

fn state_of(path: &Path) -> Result<State> {
    if path.join(MANIFEST_FILE).exists() {
        return Ok(State::Finished(Box::new(training_of(path)?)));
    }
    if path.join(UNFINISHED_FILE).exists() {
        return Ok(State::Unfinished);
    }
    if path.join("eval").is_dir() {
        return Ok(State::WeightsOnly);
    }
    // The usual error for a directory that is none of ours.
    Manifest::read(path, Stage::StudentTrain).map(|_| State::Unfinished)
}

fn training_of(path: &Path) -> Result<Training> {
    let run = Run::open(path)?;
    let config: Value = read_toml(&path.join(CONFIG_FILE))?;
    let mut settings = BTreeMap::new();
    flatten("", &config, &mut settings);
    settings.retain(|key, _| !IGNORED_SETTINGS.contains(&key.as_str()));
    let logged = run.metrics()?;
    let mut metrics = Vec::new();
    for epoch in &logged.epochs {
        log(&mut metrics, |metric| &mut metric.epochs, epoch.step, &epoch.losses);
    }
    for step in &logged.steps {
        log(&mut metrics, |metric| &mut metric.steps, step.step, &step.losses);
    }
    Ok(Training { manifest: run.manifest().clone(), settings, metrics })
}

/// Appends one line of `metrics.jsonl` to the series that `series` picks.
fn log(metrics: &mut Vec<Metric>, series: impl Fn(&mut Metric) -> &mut Vec<(f64, f64)>, step: u64, losses: &Losses) {
    let terms = losses.terms.iter().map(|(key, value)| (key.as_str(), *value));
    for (key, value) in std::iter::once(("loss", losses.loss)).chain(terms) {
        let place = metrics.iter().position(|metric| metric.key == key).unwrap_or_else(|| {
            metrics.push(Metric { key: key.into(), epochs: Vec::new(), steps: Vec::new() });
            metrics.len() - 1
        });
        series(&mut metrics[place]).push((step as f64, f64::from(value)));
    }
}

/// Nested tables become keys joined by dots.
fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    if let Value::Object(table) = value {
        for (key, value) in table {
            let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            flatten(&name, value, into);
        }
    } else {
        into.insert(prefix.into(), plain(value));
    }
}

/// Strings without their quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_settings_become_dotted_keys() {
        let mut settings = BTreeMap::new();
        flatten("", &serde_json::json!({"lr": 0.03, "a": {"b": "x", "c": [1, 2]}}), &mut settings);
        let want = [("a.b", "x"), ("a.c", "[1,2]"), ("lr", "0.03")];
        assert_eq!(settings, want.map(|(k, v)| (k.to_string(), v.to_string())).into());
    }

    #[test]
    fn long_records_are_thinned_and_one_epoch_shows_its_steps() {
        let steps: Vec<(f64, f64)> = (1..=5000).map(|step| (f64::from(step), 1.0)).collect();
        let metric =
            |epochs: usize| Metric { key: "loss".into(), epochs: vec![(1.0, 1.0); epochs], steps: steps.clone() };
        assert_eq!(metric(2).curve(0, true).pale.len(), 1000);
        assert!(metric(2).curve(0, false).pale.is_empty());
        assert_eq!(metric(1).curve(0, true).points.len(), 5000);
    }
}
