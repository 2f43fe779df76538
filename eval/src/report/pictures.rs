//! Drawing the report's pictures from the runs and their cached features.

use std::path::Path;

use image::RgbImage;
use shared::Result;
use shared::knn::{ViewChoice, nearest};
use shared::manifest::Input;
use shared::shard::{ShardSet, ViewReader};
use shared::transforms::View;

use super::collect::{Entry, State};
use super::summary::{Picture, RunSummary, Summary, is_of};
use super::terms::{Term, terms};
use crate::features::{FeatureSet, directory_for};
use crate::pca;
use crate::plot::bars::{self, Bars};
use crate::plot::gallery;
use crate::plot::lines::{self, Curve, Panel};
use crate::plot::scatter::{self, Scatter};
use crate::results::{Measurement, Record, SetRecord};

/// Single steps are drawn behind the epochs for at most so many runs.
const MAX_RUNS_WITH_STEPS: usize = 4;
/// A scatter of more samples is a blot.
const MAX_POINTS: usize = 4000;
/// Features and neighbours are drawn for so many runs, the best ones.
const MAX_PICTURED_RUNS: usize = 12;
/// Neighbours shown for each query.
const NEIGHBOURS: usize = 5;

/// A finished picture.
pub(super) struct Drawn {
    pub(super) picture: Picture,
    pub(super) png: Vec<u8>,
}

/// Draws everything there is to draw; what cannot be drawn because something is gone is said in a note.
pub(super) fn draw_all(
    entries: &[Entry],
    summary: &Summary,
    neighbours: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<Drawn>> {
    let mut drawn = Vec::new();
    drawn.extend(accuracy(summary)?);
    drawn.extend(losses(entries)?);
    drawn.extend(probe(entries, summary)?);
    let pictured = summary.runs.iter().take(MAX_PICTURED_RUNS);
    if summary.runs.iter().filter(|run| run.rank.is_some()).count() > MAX_PICTURED_RUNS {
        notes.push(format!("Features and neighbours are drawn for the best {MAX_PICTURED_RUNS} runs."));
    }
    for run in pictured {
        let entry = &entries[run.index];
        let compared = entry.records.iter().find(|record| is_of(record, summary.knn.as_ref(), summary.linear.as_ref()));
        if let Some(record) = compared {
            let mut keep = |what: &str, result: Result<Option<Drawn>>| match result {
                Ok(picture) => drawn.extend(picture),
                Err(reason) => notes.push(format!("The {what} of `{}` could not be drawn: {reason}.", run.name)),
            };
            keep("scatter of features", features(entry, run, record).map(Some));
            keep("nearest neighbours", nearest_pictures(entry, run, record, neighbours));
        }
    }
    Ok(drawn)
}

fn accuracy(summary: &Summary) -> Result<Option<Drawn>> {
    if summary.linear.is_none() && summary.knn.is_none() {
        return Ok(None);
    }
    let mut measures = Vec::new();
    if summary.linear.is_some() {
        measures.push("linear probe, last epoch".to_string());
    }
    if let Some(protocol) = &summary.knn {
        let k = summary.runs.iter().find_map(RunSummary::headline_knn).map_or(0, |accuracy| accuracy.k);
        measures.push(format!("k-NN, k = {k}, T = {}", protocol.config.temperature));
    }
    let rows = summary.runs.iter().filter(|run| run.state != "unfinished").map(|run| {
        let linear = summary.linear.iter().map(|_| run.headline_linear().map(|head| head.last.top1));
        let knn = summary.knn.iter().map(|_| run.headline_knn().map(|accuracy| accuracy.top1));
        (run.name.clone(), linear.chain(knn).collect())
    });
    let guessing = (!summary.classes.is_empty()).then(|| ("guessing", 100.0 / summary.classes.len() as f64));
    let baseline = summary.largest_class.map(|share| ("always the largest class", share)).or(guessing);
    let bars = Bars { title: "Accuracy of frozen features".into(), measures, rows: rows.collect(), baseline };
    let caption = "Top-1 accuracy of each run, best first".into();
    Ok(Some(Drawn { picture: picture("accuracy.png", "accuracy", caption), png: bars::draw(&bars)? }))
}

/// One panel per logged quantity, one curve per run.
fn losses(entries: &[Entry]) -> Result<Option<Drawn>> {
    let trained: Vec<(usize, &super::collect::Training)> = entries
        .iter()
        .enumerate()
        .filter_map(|(index, entry)| match &entry.state {
            State::Finished(training) => Some((index, &**training)),
            State::Unfinished | State::WeightsOnly => None,
        })
        .collect();
    let with_steps = trained.len() <= MAX_RUNS_WITH_STEPS;
    let keys = trained.iter().flat_map(|(_, training)| training.metrics.iter().map(|metric| metric.key.as_str()));
    let panels: Vec<Panel> = terms(keys)
        .into_iter()
        .map(|Term { key, title, unit, .. }| {
            let curve = |(index, training): &(usize, &super::collect::Training)| {
                training.metric(&key).map(|metric| metric.curve(*index, with_steps))
            };
            let curves: Vec<Curve> = trained.iter().filter_map(curve).collect();
            Panel { title, x_label: "step".into(), y_label: unit.into(), curves }
        })
        .filter(|panel| !panel.curves.is_empty())
        .collect();
    if panels.is_empty() {
        return Ok(None);
    }
    let caption = "Losses over training, means of epochs".into();
    Ok(Some(Drawn { picture: picture("losses.png", "losses", caption), png: lines::draw(&panels, &names(entries))? }))
}

/// Accuracy of the linear probe after every epoch.
fn probe(entries: &[Entry], summary: &Summary) -> Result<Option<Drawn>> {
    let best = || summary.runs.iter().filter_map(|run| run.headline_linear().map(|head| (run.index, head)));
    if best().all(|(_, head)| head.history.len() < 2) {
        return Ok(None);
    }
    let panel = |title: &str, unit: &str, value: fn(&crate::linear_probe::EpochAccuracy) -> f64| Panel {
        title: title.into(),
        x_label: "epoch".into(),
        y_label: unit.into(),
        curves: best()
            .map(|(run, head)| {
                let points = head.history.iter().map(|epoch| (epoch.epoch as f64, value(epoch))).collect();
                Curve { run, points, pale: Vec::new() }
            })
            .collect(),
    };
    let panels = [
        panel("Linear probe, validation accuracy", "top-1, %", |epoch| epoch.top1),
        panel("Linear probe, training loss", "cross-entropy", |epoch| epoch.train_loss.unwrap_or(f64::NAN)),
    ];
    let caption = "The linear probe after every epoch, best learning rate of each run".into();
    Ok(Some(Drawn { picture: picture("probe.png", "probe", caption), png: lines::draw(&panels, &names(entries))? }))
}

/// A run's validation features in the plane.
fn features(entry: &Entry, run: &RunSummary, record: &Record) -> Result<Drawn> {
    let val = FeatureSet::open(directory_for(&entry.path, &record.val.shards.fingerprint))?;
    let rows = val.rows()?;
    let step = rows.len().div_ceil(MAX_POINTS).max(1);
    let samples: Vec<usize> = (0..rows.len()).step_by(step).collect();
    let plane = pca::plane(&rows, &samples)?;
    let classes: Vec<Option<usize>> = samples.iter().map(|&i| usize::try_from(rows.labels()[i]).ok()).collect();
    let scatter = Scatter {
        title: format!("{}: {} validation samples", run.name, samples.len()),
        points: &plane.points,
        classes: &classes,
        class_names: &record.classes,
        explained: plane.explained,
    };
    let caption = format!("{}: validation features on their two leading principal components", run.name);
    Ok(Drawn { picture: picture(&file_name("features", run), "features", caption), png: scatter::draw(&scatter)? })
}

/// Validation pictures with the training pictures whose features are nearest.
fn nearest_pictures(entry: &Entry, run: &RunSummary, record: &Record, count: usize) -> Result<Option<Drawn>> {
    if count == 0 {
        return Ok(None);
    }
    let open = |set: &SetRecord| FeatureSet::open(directory_for(&entry.path, &set.shards.fingerprint));
    let rows = gallery_rows(&open(&record.train)?, &open(&record.val)?, record, count)?;
    let title = format!("{}: nearest neighbours of validation pictures", run.name);
    let caption = format!("{}: validation pictures and their nearest training pictures", run.name);
    let png = gallery::draw(&title, &rows)?;
    Ok(Some(Drawn { picture: picture(&file_name("neighbours", run), "neighbours", caption), png }))
}

fn file_name(kind: &str, run: &RunSummary) -> String {
    format!("{kind}-{:02}-{}.png", run.index + 1, file_part(&run.name))
}

fn gallery_rows(train: &FeatureSet, val: &FeatureSet, record: &Record, count: usize) -> Result<Vec<gallery::Row>> {
    let (train_rows, val_rows) = (train.rows()?, val.rows()?);
    let queries = queries(val_rows.labels(), count);
    let query_rows: Vec<&[f32]> = queries.iter().map(|&query| val_rows.row(query, 0)).collect();
    let labels: Vec<i64> = queries.iter().map(|&query| val_rows.labels()[query]).collect();
    let ids: Vec<u64> = queries.iter().map(|&query| val_rows.sample_ids()[query]).collect();
    let asked = shared::feature_rows::FeatureRows::new(query_rows, 1, val_rows.width(), &labels, &ids)?;
    // Where both sets are the same, the sample itself comes first and is dropped.
    let same = match &record.measurement {
        Measurement::Knn { config, .. } => config.leave_one_out,
        Measurement::Linear { .. } => false,
    };
    let found = nearest(&train_rows, &asked, ViewChoice::First, NEIGHBOURS + usize::from(same), false)?;
    let (train_shards, val_shards) = (open_shards(&record.train.shards)?, open_shards(&record.val.shards)?);
    let class = |label: i64| {
        usize::try_from(label).ok().and_then(|label| record.classes.get(label)).cloned().unwrap_or_default()
    };
    let picture = |shards: &ShardSet, sample: usize| -> Result<gallery::Picture> {
        Ok(gallery::Picture { image: image_of(shards, sample)?, class: class(shards.label(sample)) })
    };
    queries
        .iter()
        .zip(found.indices.chunks(found.k.max(1)).zip(found.similarities.chunks(found.k.max(1))))
        .map(|(&query, (indices, similarities))| {
            let neighbours = indices.iter().zip(similarities).filter(|&(&index, _)| !(same && index as usize == query));
            Ok(gallery::Row {
                query: picture(&val_shards, query)?,
                neighbours: neighbours
                    .take(NEIGHBOURS)
                    .map(|(&index, &similarity)| Ok((picture(&train_shards, index as usize)?, similarity)))
                    .collect::<Result<_>>()?,
            })
        })
        .collect()
}

/// The first samples of all classes in turn: the same for every run.
fn queries(labels: &[i64], count: usize) -> Vec<usize> {
    let mut by_class = std::collections::BTreeMap::<i64, Vec<usize>>::new();
    for (sample, &label) in labels.iter().enumerate() {
        by_class.entry(label).or_default().push(sample);
    }
    let deepest = by_class.values().map(Vec::len).max().unwrap_or(0);
    (0..deepest)
        .flat_map(|round| by_class.values().filter_map(move |samples| samples.get(round)).copied().collect::<Vec<_>>())
        .take(count)
        .collect()
}

/// A shard set where it was when the features were extracted, if it is still that one.
fn open_shards(input: &Input) -> Result<ShardSet> {
    let shards = ShardSet::open(Path::new(&input.path))?;
    if shards.manifest().fingerprint == input.fingerprint {
        return Ok(shards);
    }
    Err(shared::Error::invalid(format!("`{}` is another shard set now", input.path), ""))
}

fn image_of(shards: &ShardSet, sample: usize) -> Result<RgbImage> {
    let pixels = ViewReader::default().read(shards, sample, View::Global(0))?.to_vec();
    RgbImage::from_raw(shards.width() as u32, shards.height() as u32, pixels)
        .ok_or_else(|| shared::Error::invalid("a picture has the wrong size", ""))
}

fn picture(file: &str, section: &str, caption: String) -> Picture {
    Picture { file: file.into(), section: section.into(), caption }
}

fn names(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| entry.name.clone()).collect()
}

/// What of a name may stand in a file name and in a link.
fn file_part(name: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    name.chars().map(safe).take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_take_classes_in_turn() {
        assert_eq!(queries(&[2, 2, 0, 1, 0, 2], 5), [2, 3, 0, 4, 1]);
        assert_eq!(queries(&[2, 2], 5), [0, 1]);
        assert!(queries(&[], 5).is_empty());
    }

    #[test]
    fn names_become_plain_file_names() {
        assert_eq!(file_part("x/a b|ü.1"), "x-a-b--.1");
    }
}
