//! Closing a set that was packed in parts: the parts' records become the manifest that one process would have written.

use std::path::Path;

use serde::{Deserialize, Serialize};
use shared::manifest::{Identity, Manifest, Stage};
use shared::output::{PartRecord, PartSet};
use shared::shard::{ShardConfig, ShardSetDetails, shard_file_name};
use shared::{Error, Fault, Result};

use crate::args::FinishArgs;
use crate::config::MaxRejects;
use crate::pack::{PackSummary, Reject, counts, details_json, refuse_many, remove_notes, write_rejects};

/// What a part tells besides its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PartOutcome {
    /// Images that were listed, of all parts together.
    pub listed: usize,
    /// The part's images that could not be used.
    pub rejects: Vec<Reject>,
    /// What readers of the set must know.
    pub details: ShardSetDetails,
}

/// Closes a set.
///
/// # Errors
/// As [`PartSet::open`]; [`Error::Usage`] for a senseless `--max-rejects`; [`Error::Invalid`] when too many images could not be used;
/// [`Error::Damaged`] when the parts do not make a set.
pub fn finish(args: &FinishArgs) -> Result<PackSummary> {
    let max_rejects = MaxRejects::resolve(args.max_rejects.as_ref())?;
    let set = match PartSet::<PartOutcome>::open(&args.output, Stage::DataPrep, "data-prep pack")? {
        Ok(set) => set,
        Err(manifest) => return Ok(PackSummary::new(&args.output, &manifest, true, 0)),
    };
    let PartOutcome { listed, details, .. } = set.records()[0].outcome.clone();
    let shards = check(&args.output, set.identity(), set.records(), listed, &details)?;
    let mut rejects: Vec<Reject> =
        set.records().iter().flat_map(|record| record.outcome.rejects.iter().cloned()).collect();
    rejects.sort();
    refuse_many(&args.output, &mut rejects, listed, max_rejects.of(listed))?;
    let file = write_rejects(&args.output, &mut rejects)?;
    remove_notes(&args.output, |_| true)?;
    let manifest: Manifest =
        set.finish(counts(listed, details.views, shards, rejects.len()), details_json(&details)?, vec![file])?;
    Ok(PackSummary::new(&args.output, &manifest, false, 0))
}

/// Checks that the parts list the same samples and hold every shard once; gives the number of shards.
fn check(
    output: &Path,
    identity: &Identity,
    records: &[PartRecord<PartOutcome>],
    listed: usize,
    details: &ShardSetDetails,
) -> Result<usize> {
    let fault = |fault| Error::damaged(output, fault);
    let config: ShardConfig = serde_json::from_value(identity.config.clone())
        .map_err(|e| fault(Fault::Syntax(format!("not the configuration of a shard set: {e}"))))?;
    if let Some(other) = records.iter().find(|r| r.outcome.listed != listed || r.outcome.details != *details) {
        return Err(fault(Fault::Value(format!("{} lists other samples than {}", other.part, records[0].part))));
    }
    let mut found: Vec<&str> = records.iter().flat_map(|r| r.files.iter().map(|file| file.path.as_str())).collect();
    found.sort_unstable();
    let shards = listed.div_ceil(config.shard_samples.max(1));
    let mut expected: Vec<String> = (0..shards).map(shard_file_name).collect();
    expected.sort_unstable();
    if found != expected {
        return Err(fault(Fault::Value(format!("the parts hold {} of {shards} shards, or some twice", found.len()))));
    }
    Ok(shards)
}
