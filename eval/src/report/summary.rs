//! The report's numbers: what `report.json` holds, and what the Markdown is written from.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use shared::Result;
use shared::knn::KnnAccuracy;
use shared::manifest::FORMAT_VERSION;

use super::collect::{Entry, State};
use crate::features::{FeatureSet, directory_for};
use crate::linear_probe::{HeadResult, ProbeConfig};
use crate::results::{KnnConfig, Measurement, Record, SetRecord};

/// The number of neighbours whose accuracy is compared, or the nearest below that was measured.
const HEADLINE_K: usize = 20;

/// The setting that has a column of its own.
const STUDENT_KEY: &str = "student";

/// The whole report.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) format_version: u32,
    /// The k-NN measurement that runs are compared by.
    pub(crate) knn: Option<Protocol<KnnConfig>>,
    /// The linear probe that runs are compared by.
    pub(crate) linear: Option<Protocol<ProbeConfig>>,
    /// Class names of the compared measurements.
    pub(crate) classes: Vec<String>,
    /// Percent of the validation samples that are of the largest class, if the features are there.
    pub(crate) largest_class: Option<f64>,
    /// Settings that are not the same in all finished runs.
    pub(crate) differing_settings: Vec<String>,
    /// Best first; runs without a measurement last.
    pub(crate) runs: Vec<RunSummary>,
    /// What is missing, and the command that adds it.
    pub(crate) notes: Vec<String>,
    /// The pictures, in the order in which the report shows them.
    pub(crate) pictures: Vec<Picture>,
}

/// What was measured on what.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Protocol<C> {
    pub(crate) config: C,
    pub(crate) train: SetRecord,
    pub(crate) val: SetRecord,
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RunSummary {
    /// From 1; none for runs that were not measured.
    pub(crate) rank: Option<usize>,
    pub(crate) name: String,
    pub(crate) path: String,
    /// `finished`, `unfinished`, or `weights` for a weight file.
    pub(crate) state: &'static str,
    pub(crate) arch: String,
    /// `distill`, `pretrain`; none for a weight file.
    pub(crate) objective: Option<String>,
    pub(crate) steps: Option<u64>,
    pub(crate) seed: Option<u64>,
    /// Means over the last epoch.
    pub(crate) final_metrics: BTreeMap<String, f64>,
    pub(crate) settings: BTreeMap<String, String>,
    /// Accuracy by the compared k-NN measurement, for every k.
    pub(crate) knn: Vec<KnnAccuracy>,
    /// Accuracy by the compared linear probe, for every learning rate, best first.
    pub(crate) linear: Vec<HeadResult>,
    /// Fingerprint of the run's manifest.
    pub(crate) fingerprint: Option<String>,
    /// Hash of the measured weights.
    pub(crate) weights: Option<String>,
    /// Fingerprints of the run's inputs, by role.
    pub(crate) inputs: BTreeMap<String, String>,
    /// Place in the order of the command line, which gives the colour.
    #[serde(skip)]
    pub(crate) index: usize,
}

impl RunSummary {
    /// The k-NN accuracy that runs are compared by.
    pub(crate) fn headline_knn(&self) -> Option<&KnnAccuracy> {
        let below = self.knn.iter().filter(|accuracy| accuracy.k <= HEADLINE_K).max_by_key(|accuracy| accuracy.k);
        below.or(self.knn.first())
    }

    /// The learning rate with the highest accuracy after the last epoch.
    pub(crate) fn headline_linear(&self) -> Option<&HeadResult> {
        self.linear.first()
    }
}

/// A picture of the report.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Picture {
    /// File name in the report's directory.
    pub(crate) file: String,
    /// `losses`, `accuracy`, `probe`, `features` or `neighbours`.
    pub(crate) section: String,
    /// What it shows.
    pub(crate) caption: String,
}

/// Puts the numbers of all runs together.
pub(super) fn summarize(entries: &[Entry]) -> Summary {
    let knn = most_common(entries, |record| match &record.measurement {
        Measurement::Knn { config, .. } => Some(config.clone()),
        Measurement::Linear { .. } => None,
    });
    let linear = most_common(entries, |record| match &record.measurement {
        Measurement::Linear { config, .. } => Some(config.clone()),
        Measurement::Knn { .. } => None,
    });
    let mut runs: Vec<RunSummary> = entries
        .iter()
        .enumerate()
        .map(|(index, entry)| run_summary(index, entry, knn.as_ref(), linear.as_ref()))
        .collect();
    rank(&mut runs);
    let classes = entries
        .iter()
        .flat_map(|entry| &entry.records)
        .find(|record| is_of(record, knn.as_ref(), linear.as_ref()))
        .map(|record| record.classes.clone())
        .unwrap_or_default();
    let largest_class = entries.iter().find_map(|entry| {
        let record = entry.records.iter().find(|record| is_of(record, knn.as_ref(), linear.as_ref()))?;
        largest_class(entry, record).ok()
    });
    let notes = notes(&runs, knn.as_ref(), linear.as_ref());
    let differing_settings = differing(&runs);
    Summary {
        format_version: FORMAT_VERSION,
        knn,
        linear,
        classes,
        largest_class,
        differing_settings,
        runs,
        notes,
        pictures: Vec::new(),
    }
}

/// The share of the largest class in the validation set, in percent: what naming it every time would score.
fn largest_class(entry: &Entry, record: &Record) -> Result<f64> {
    let val = FeatureSet::open(directory_for(&entry.path, &record.val.shards.fingerprint))?;
    let rows = val.rows()?;
    let largest = rows.class_counts().into_values().max().unwrap_or(0);
    Ok(100.0 * largest as f64 / rows.len().max(1) as f64)
}

/// The protocol shared by most runs; the larger validation set, then the text of the settings, decide a draw.
fn most_common<C: Clone + PartialEq + Serialize>(
    entries: &[Entry],
    config_of: impl Fn(&Record) -> Option<C>,
) -> Option<Protocol<C>> {
    let mut counted: BTreeMap<String, (usize, Protocol<C>)> = BTreeMap::new();
    for entry in entries {
        let mut seen = BTreeSet::new();
        for record in &entry.records {
            let Some(config) = config_of(record) else { continue };
            let key = serde_json::json!([config, record.train.shards.fingerprint, record.val.shards.fingerprint]);
            if seen.insert(key.to_string()) {
                let protocol = || Protocol { config, train: record.train.clone(), val: record.val.clone() };
                counted.entry(key.to_string()).or_insert_with(|| (0, protocol())).0 += 1;
            }
        }
    }
    let better = |(count, protocol): &(usize, Protocol<C>)| (*count, protocol.val.samples);
    counted.into_values().reduce(|best, next| if better(&next) > better(&best) { next } else { best }).map(|(_, p)| p)
}

/// Whether a record was measured by a protocol: same settings, same shards.
fn follows<C: PartialEq>(record: &Record, config: &C, protocol: Option<&Protocol<C>>) -> bool {
    protocol.is_some_and(|protocol| {
        protocol.config == *config
            && protocol.train.shards.fingerprint == record.train.shards.fingerprint
            && protocol.val.shards.fingerprint == record.val.shards.fingerprint
    })
}

/// Whether a record is one of the compared ones.
pub(super) fn is_of(
    record: &Record,
    knn: Option<&Protocol<KnnConfig>>,
    linear: Option<&Protocol<ProbeConfig>>,
) -> bool {
    match &record.measurement {
        Measurement::Knn { config, .. } => follows(record, config, knn),
        Measurement::Linear { config, .. } => follows(record, config, linear),
    }
}

fn run_summary(
    index: usize,
    entry: &Entry,
    knn_protocol: Option<&Protocol<KnnConfig>>,
    linear_protocol: Option<&Protocol<ProbeConfig>>,
) -> RunSummary {
    let compared = || entry.records.iter().filter(|record| is_of(record, knn_protocol, linear_protocol));
    let (mut knn, mut linear) = (Vec::new(), Vec::new());
    for record in compared() {
        match &record.measurement {
            Measurement::Knn { result, .. } => knn.clone_from(result),
            Measurement::Linear { result, .. } => linear.clone_from(&result.heads),
        }
    }
    linear.sort_by(|a: &HeadResult, b: &HeadResult| {
        b.last.top1.total_cmp(&a.last.top1).then(b.last.top5.total_cmp(&a.last.top5))
    });
    let training = match &entry.state {
        State::Finished(training) => Some(training),
        State::Unfinished | State::WeightsOnly => None,
    };
    let measured_arch = || entry.records.first().map_or_else(|| "?".into(), |record| record.arch.clone());
    let final_metrics = training.map_or_else(BTreeMap::new, |training| {
        let last = |metric: &super::collect::Metric| {
            metric.epochs.last().or(metric.steps.last()).map(|&(_, value)| (metric.key.clone(), value))
        };
        training.metrics.iter().filter_map(last).collect()
    });
    let manifest = training.map(|training| &training.manifest);
    RunSummary {
        rank: None,
        name: entry.name.clone(),
        path: entry.path.display().to_string(),
        state: match &entry.state {
            State::Finished(_) => "finished",
            State::Unfinished => "unfinished",
            State::WeightsOnly => "weights",
        },
        arch: training.map_or_else(measured_arch, |training| training.detail("arch")),
        objective: training.map(|training| training.detail("objective")),
        steps: manifest.map(|manifest| manifest.count("steps")),
        seed: manifest.map(|manifest| manifest.identity.seed),
        final_metrics,
        settings: training.map(|training| training.settings.clone()).unwrap_or_default(),
        knn,
        linear,
        fingerprint: manifest.map(|manifest| manifest.fingerprint.clone()),
        weights: compared().next().map(|record| record.weights.fingerprint.clone()),
        inputs: manifest.map_or_else(BTreeMap::new, |manifest| {
            manifest.identity.inputs.iter().map(|input| (input.role.clone(), input.fingerprint.clone())).collect()
        }),
        index,
    }
}

/// Best first: linear probe, then k-NN, then the order of the command line. Equal accuracies share a rank.
fn rank(runs: &mut [RunSummary]) {
    let score = |run: &RunSummary| {
        let of = |accuracy: Option<f64>| accuracy.unwrap_or(-1.0);
        (of(run.headline_linear().map(|head| head.last.top1)), of(run.headline_knn().map(|accuracy| accuracy.top1)))
    };
    runs.sort_by(|a, b| score(b).0.total_cmp(&score(a).0).then(score(b).1.total_cmp(&score(a).1)));
    let mut previous: Option<((f64, f64), usize)> = None;
    for (position, run) in runs.iter_mut().enumerate() {
        let own = score(run);
        if own == (-1.0, -1.0) {
            continue;
        }
        let rank = previous.filter(|(other, _)| *other == own).map_or(position + 1, |(_, rank)| rank);
        run.rank = Some(rank);
        previous = Some((own, rank));
    }
}

/// Keys whose values are not the same in all trained runs.
fn differing(runs: &[RunSummary]) -> Vec<String> {
    let trained: Vec<&RunSummary> = runs.iter().filter(|run| run.state == "finished").collect();
    let keys: BTreeSet<&String> = trained.iter().flat_map(|run| run.settings.keys()).collect();
    let differs = |key: &&&String| {
        let values: BTreeSet<Option<&String>> = trained.iter().map(|run| run.settings.get(**key)).collect();
        values.len() > 1
    };
    keys.iter().filter(|key| key.as_str() != STUDENT_KEY).filter(differs).map(|key| (*key).clone()).collect()
}

/// What is missing, in sentences.
fn notes(
    runs: &[RunSummary],
    knn: Option<&Protocol<KnnConfig>>,
    linear: Option<&Protocol<ProbeConfig>>,
) -> Vec<String> {
    let mut notes = Vec::new();
    for run in runs {
        if run.state == "unfinished" {
            notes.push(format!(
                "`{}` is unfinished: run its `student-train` command again, which continues where it stopped.",
                run.name
            ));
            continue;
        }
        let missing = |what: &str, command: &str, sets: Option<(&SetRecord, &SetRecord)>| {
            let place = |pick: fn(&(&SetRecord, &SetRecord)) -> String, name: &str| {
                sets.as_ref().map_or_else(|| name.to_string(), pick)
            };
            let train = place(|sets| sets.0.shards.path.clone(), "SHARDS");
            let val = place(|sets| sets.1.shards.path.clone(), "SHARDS");
            let same = if sets.is_some() { " like the other runs" } else { "" };
            format!(
                "`{}` has no {what}{same}: run `student-eval {command} --train {train} --val {val} {}`.",
                run.name, run.path
            )
        };
        if run.linear.is_empty() {
            notes.push(missing("linear probe", "linear", linear.map(|p| (&p.train, &p.val))));
        }
        if run.knn.is_empty() {
            notes.push(missing("k-NN result", "knn", knn.map(|p| (&p.train, &p.val))));
        }
    }
    notes
}
