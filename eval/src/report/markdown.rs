//! `report.md`, written from the numbers of `report.json` alone.

use std::fmt::Write as _;

use shared::manifest::short;

use super::summary::{RunSummary, Summary};
use super::terms::terms;
use crate::linear_probe::EpochAccuracy;
use crate::table::Table;

/// More differing settings than these get a table of their own.
const MAX_SETTING_COLUMNS: usize = 4;
/// More runs than these make a table of classes unreadable.
const MAX_CLASS_COLUMNS: usize = 6;
/// More classes than these do too.
const MAX_CLASS_ROWS: usize = 30;

/// The report as Markdown.
pub(super) fn markdown(summary: &Summary) -> String {
    let mut text = String::new();
    let runs = &summary.runs;
    let title = if runs.len() == 1 {
        format!("Report on `{}`", runs[0].name)
    } else {
        format!("Report on {} runs", runs.len())
    };
    push(&mut text, &format!("# {title}\n"));
    push(&mut text, &protocols(summary));
    push(&mut text, &ranking(summary).markdown());
    if summary.differing_settings.len() > MAX_SETTING_COLUMNS {
        push(&mut text, "Settings that are not the same in all runs:\n");
        push(&mut text, &settings(summary).markdown());
    }
    pictures(&mut text, summary, "accuracy");
    if !summary.notes.is_empty() {
        push(&mut text, "## What is missing\n");
        push(&mut text, &format!("- {}\n", summary.notes.join("\n- ")));
    }
    let losses = losses(runs);
    if !losses.is_empty() {
        push(&mut text, "## Training\n");
        pictures(&mut text, summary, "losses");
        push(&mut text, "Means over the last epoch:\n");
        push(&mut text, &losses.markdown());
    }
    let (linear, knn) = (linear(runs), knn(runs));
    if !linear.is_empty() || !knn.is_empty() {
        push(&mut text, "## Probes\n");
    }
    if !linear.is_empty() {
        push(
            &mut text,
            "Linear probe, top-1 and top-5 in percent. The best epoch is chosen on the validation set and flatters.\n",
        );
        push(&mut text, &linear.markdown());
        pictures(&mut text, summary, "probe");
    }
    if !knn.is_empty() {
        push(&mut text, "k-NN, top-1 / top-5 in percent:\n");
        push(&mut text, &knn.markdown());
    }
    if let Some(classes) = classes(summary) {
        push(&mut text, "Linear probe by class, top-1 in percent after the last epoch:\n");
        push(&mut text, &classes.markdown());
    }
    for (section, title) in [("features", "Features in the plane"), ("neighbours", "Nearest neighbours")] {
        if summary.pictures.iter().any(|picture| picture.section == section) {
            push(&mut text, &format!("## {title}\n"));
            pictures(&mut text, summary, section);
        }
    }
    push(&mut text, "## Provenance\n");
    push(&mut text, &provenance(summary));
    text.trim_end().to_string() + "\n"
}

/// The table that the terminal shows.
pub(super) fn ranking(summary: &Summary) -> Table {
    let few = summary.differing_settings.len() <= MAX_SETTING_COLUMNS;
    let columns: Vec<&String> = summary.differing_settings.iter().filter(|_| few).collect();
    let mut head: Vec<String> =
        [">rank", "run", "student", "objective", ">linear top-1", ">at best epoch", ">k-NN top-1"]
            .map(String::from)
            .to_vec();
    head.extend(columns.iter().map(|column| (*column).clone()));
    let mut table = Table::new(&head);
    for run in &summary.runs {
        let mut cells = vec![
            run.rank.map_or_else(dash, |rank| rank.to_string()),
            run.name.clone(),
            run.arch.clone(),
            run.objective.clone().unwrap_or_else(dash),
            run.headline_linear().map_or_else(dash, |head| percent(head.last.top1)),
            run.headline_linear().map_or_else(dash, |head| percent(head.best.top1)),
            run.headline_knn().map_or_else(dash, |accuracy| percent(accuracy.top1)),
        ];
        cells.extend(columns.iter().map(|column| setting(run, column)));
        table.row(cells);
    }
    table
}

/// What the columns of the ranking mean, in sentences.
pub(super) fn protocols(summary: &Summary) -> String {
    let mut text = String::new();
    let classes = summary.classes.len();
    if let Some(protocol) = &summary.linear {
        let config = &protocol.config;
        let lrs = match config.lr.as_slice() {
            [lr] => format!("learning rate {lr}"),
            lrs => format!("best of {} learning rates", lrs.len()),
        };
        let _ = writeln!(
            text,
            "- Linear probe: {} epochs, {lrs}, {} training samples with {} stored {}, {} validation samples, {classes} classes; \
             percent after the last epoch, and at the best epoch.",
            config.epochs,
            protocol.train.samples,
            protocol.train.views,
            if protocol.train.views == 1 { "view" } else { "views" },
            protocol.val.samples,
        );
    }
    if let Some(protocol) = &summary.knn {
        let k = summary.runs.iter().find_map(RunSummary::headline_knn).map_or(0, |accuracy| accuracy.k);
        let whom = if protocol.config.leave_one_out {
            format!("each of {} samples by the others", protocol.val.samples)
        } else {
            format!("{} validation samples by {} training samples", protocol.val.samples, protocol.train.samples)
        };
        let _ = writeln!(
            text,
            "- k-NN: cosine similarity, k = {k}, T = {}, {whom}, {classes} classes.",
            protocol.config.temperature
        );
    }
    if text.is_empty() {
        text.push_str("No run has been probed.\n");
    } else {
        let guessing = percent(100.0 / classes.max(1) as f64);
        let largest =
            summary.largest_class.map(|share| format!("; naming the largest class every time, {} %", percent(share)));
        let _ = writeln!(text, "- For comparison: guessing scores {guessing} %{}.", largest.unwrap_or_default());
    }
    text
}

fn settings(summary: &Summary) -> Table {
    let mut head = vec!["run".to_string()];
    head.extend(summary.differing_settings.iter().cloned());
    let mut table = Table::new(&head);
    for run in summary.runs.iter().filter(|run| run.state == "finished") {
        let cells = summary.differing_settings.iter().map(|key| setting(run, key));
        table.row(std::iter::once(run.name.clone()).chain(cells).collect());
    }
    table
}

fn losses(runs: &[RunSummary]) -> Table {
    let terms = terms(runs.iter().flat_map(|run| run.final_metrics.keys().map(String::as_str)));
    let head = ["run", ">steps", ">loss"].map(String::from).into_iter();
    let head: Vec<String> = head.chain(terms.iter().map(|term| format!(">{}", term.column))).collect();
    let mut table = Table::new(&head);
    for run in runs.iter().filter(|run| !run.final_metrics.is_empty()) {
        let metric = |key: &str, unit: &str| {
            let write = |value: &f64| if unit == "percent" { percent(*value) } else { format!("{value:.4}") };
            run.final_metrics.get(key).map_or_else(dash, write)
        };
        let steps = run.steps.map_or_else(dash, |steps| steps.to_string());
        let mut cells = vec![run.name.clone(), steps, metric("loss", "")];
        cells.extend(terms.iter().map(|term| metric(&term.key, term.unit)));
        table.row(cells);
    }
    table
}

fn linear(runs: &[RunSummary]) -> Table {
    let mut table =
        Table::new(&["run", ">lr", ">top-1", ">top-5", ">best top-1", ">best top-5", ">best epoch", "remark"]);
    for run in runs {
        for head in &run.linear {
            let pair = |epoch: &EpochAccuracy| [percent(epoch.top1), percent(epoch.top5)];
            let mut cells = vec![run.name.clone(), head.lr.to_string()];
            cells.extend(pair(&head.last));
            cells.extend(pair(&head.best));
            cells.push(head.best.epoch.to_string());
            cells.push(if head.diverged { "diverged".into() } else { String::new() });
            table.row(cells);
        }
    }
    table
}

fn knn(runs: &[RunSummary]) -> Table {
    let mut ks: Vec<usize> = runs.iter().flat_map(|run| run.knn.iter().map(|accuracy| accuracy.k)).collect();
    ks.sort_unstable();
    ks.dedup();
    let head: Vec<String> = std::iter::once("run".into()).chain(ks.iter().map(|k| format!(">k = {k}"))).collect();
    let mut table = Table::new(&head);
    for run in runs.iter().filter(|run| !run.knn.is_empty()) {
        let cell = |k: &usize| {
            let found = run.knn.iter().find(|accuracy| accuracy.k == *k);
            found.map_or_else(dash, |accuracy| format!("{} / {}", percent(accuracy.top1), percent(accuracy.top5)))
        };
        table.row(std::iter::once(run.name.clone()).chain(ks.iter().map(cell)).collect());
    }
    table
}

/// Accuracy of each class under the best learning rate of each run, where that is readable.
fn classes(summary: &Summary) -> Option<Table> {
    let probed: Vec<&RunSummary> = summary.runs.iter().filter(|run| !run.linear.is_empty()).collect();
    if probed.is_empty() || probed.len() > MAX_CLASS_COLUMNS || summary.classes.len() > MAX_CLASS_ROWS {
        return None;
    }
    let head: Vec<String> =
        std::iter::once("class".into()).chain(probed.iter().map(|run| format!(">{}", run.name))).collect();
    let mut table = Table::new(&head);
    for (index, class) in summary.classes.iter().enumerate() {
        let cell = |run: &&RunSummary| {
            let accuracy = run.headline_linear().and_then(|head| head.per_class_top1.get(index).copied().flatten());
            accuracy.map_or_else(dash, percent)
        };
        table.row(std::iter::once(class.clone()).chain(probed.iter().map(cell)).collect());
    }
    Some(table)
}

fn provenance(summary: &Summary) -> String {
    let mut table = Table::new(&["run", "path", "fingerprint", "weights", "trained on", "teacher", ">seed"]);
    for run in &summary.runs {
        let hash = |value: Option<&String>| value.map_or_else(dash, |value| format!("`{}`", short(value)));
        table.row(vec![
            run.name.clone(),
            format!("`{}`", run.path),
            hash(run.fingerprint.as_ref()),
            hash(run.weights.as_ref()),
            hash(run.inputs.get("shards")),
            hash(run.inputs.get("embeddings")),
            run.seed.map_or_else(dash, |seed| seed.to_string()),
        ]);
    }
    let mut text = table.markdown();
    let mut sets = Table::new(&["measured on", "shard set", "fingerprint", ">samples", ">views"]);
    let linear = summary
        .linear
        .iter()
        .flat_map(|p| [("linear probe, training", &p.train), ("linear probe, validation", &p.val)]);
    let knn = summary.knn.iter().flat_map(|p| [("k-NN, training", &p.train), ("k-NN, validation", &p.val)]);
    for (role, set) in linear.chain(knn) {
        let (samples, views) = (set.samples.to_string(), set.views.to_string());
        let fingerprint = format!("`{}`", short(&set.shards.fingerprint));
        sets.row(vec![role.into(), format!("`{}`", set.shards.path), fingerprint, samples, views]);
    }
    if !sets.is_empty() {
        text.push('\n');
        text.push_str(&sets.markdown());
    }
    text
}

fn pictures(text: &mut String, summary: &Summary, section: &str) {
    for picture in summary.pictures.iter().filter(|picture| picture.section == section) {
        push(text, &format!("![{}]({})\n", picture.caption, picture.file));
    }
}

fn setting(run: &RunSummary, key: &str) -> String {
    run.settings.get(key).cloned().unwrap_or_else(dash)
}

fn percent(value: f64) -> String {
    format!("{value:.2}")
}

fn dash() -> String {
    "–".into()
}

/// A block and an empty line.
fn push(text: &mut String, block: &str) {
    text.push_str(block);
    text.push('\n');
}
