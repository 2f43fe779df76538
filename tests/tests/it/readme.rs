//! The README's table of models says what the program computes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use shared::models::{Arch, cost};

/// The cells of a row whose first cell is the name of an architecture.
fn cells(line: &str) -> Option<(Arch, Vec<&str>)> {
    let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
    Some((cells.first()?.trim_matches('`').parse().ok()?, cells))
}

#[test]
fn the_table_of_models_is_true_and_whole() -> Result<()> {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"))?;
    let rows: BTreeMap<Arch, Vec<&str>> = readme.lines().filter_map(cells).collect();
    assert!(rows.keys().eq(&Arch::ALL), "the table lists {:?}", rows.keys());
    for (arch, cells) in rows {
        let cost = cost(arch, [224, 224])?;
        let (millions, billions) = (cost.parameters as f64 / 1e6, cost.multiply_accumulates as f64 / 1e9);
        let expected = [format!("{millions:.1}"), format!("{billions:.2}"), arch.feature_width().to_string()];
        ensure!(cells.get(1..4).context("a short row")? == expected, "{arch}: {cells:?}, expected {expected:?}");
    }
    Ok(())
}
