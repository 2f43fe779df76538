//! One report on many runs: numbers as JSON, a Markdown page written from them, and pictures.
//!
//! Everything comes from what training and the probes have stored, so a report takes seconds and never computes a
//! feature. It holds no clock and no absolute path beyond those given, and is the same bytes for the same runs.

mod collect;
mod markdown;
mod names;
mod pictures;
mod summary;
mod terms;

use std::fs;
use std::path::Path;

use shared::cli::{print, print_json, with_threads};
use shared::io::{create_directory, write_atomic, write_json};
use shared::progress::note;
use shared::{Error, Result};

use crate::args::ReportArgs;

/// The file that marks a directory as a report.
const REPORT_JSON: &str = "report.json";
const REPORT_MARKDOWN: &str = "report.md";

pub(crate) fn report(args: &ReportArgs) -> Result<()> {
    refuse_foreign(&args.output)?;
    let entries = collect::collect(&args.runs)?;
    let mut summary = summary::summarize(&entries);
    let mut notes = Vec::new();
    let drawn =
        with_threads(args.threads, || pictures::draw_all(&entries, &summary, args.neighbours.into(), &mut notes))?;
    summary.notes.extend(notes);
    summary.pictures = drawn.iter().map(|drawn| drawn.picture.clone()).collect();

    create_directory(&args.output)?;
    remove_old_pictures(&args.output)?;
    for drawn in &drawn {
        write_atomic(args.output.join(&drawn.picture.file), &drawn.png)?;
    }
    let text = markdown::markdown(&summary);
    write_atomic(args.output.join(REPORT_MARKDOWN), text.as_bytes())?;
    write_json(args.output.join(REPORT_JSON), &summary)?;
    if !args.quiet {
        for missing in &summary.notes {
            note(missing);
        }
        note(&format!("report: {}", args.output.join(REPORT_MARKDOWN).display()));
    }
    if args.json {
        return print_json(&summary);
    }
    print(&format!("{}\n{}", markdown::protocols(&summary), markdown::ranking(&summary).plain()))
}

/// A report replaces a report, and nothing else.
fn refuse_foreign(output: &Path) -> Result<()> {
    let foreign = || Error::Foreign { path: output.into(), stage: "student-eval" };
    if !output.exists() || output.join(REPORT_JSON).is_file() {
        return Ok(());
    }
    if !output.is_dir() {
        return Err(foreign());
    }
    let entries = fs::read_dir(output).map_err(Error::io("list", output))?;
    for entry in entries {
        let name = entry.map_err(Error::io("list", output))?.file_name();
        let name = name.to_string_lossy();
        // What an interrupted report leaves.
        let own = name == REPORT_MARKDOWN || name.ends_with(".png") || name.starts_with(shared::io::TEMPORARY_PREFIX);
        if !own {
            return Err(foreign());
        }
    }
    Ok(())
}

/// Removes the pictures that the earlier report names.
fn remove_old_pictures(output: &Path) -> Result<()> {
    let path = output.join(REPORT_JSON);
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let old: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let files = old["pictures"].as_array().into_iter().flatten().filter_map(|picture| picture["file"].as_str());
    for file in files.filter(|file| !file.contains(['/', '\\'])) {
        let picture = output.join(file);
        if picture.extension().is_some_and(|extension| extension == "png") && picture.is_file() {
            fs::remove_file(&picture).map_err(Error::io("remove", &picture))?;
        }
    }
    Ok(())
}
