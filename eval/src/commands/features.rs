//! `student-eval features`.

use serde::Serialize;
use shared::Result;
use shared::cli::{print, print_json, with_threads};
use shared::shard::ShardSet;

use crate::args::FeaturesArgs;
use crate::source;
use crate::table::Table;

/// What was extracted, for a script.
#[derive(Debug, Serialize)]
struct Summary {
    run: String,
    features: String,
    fingerprint: String,
    arch: String,
    samples: u64,
    views: usize,
    feature_width: usize,
}

pub(crate) fn features(args: &FeaturesArgs) -> Result<()> {
    args.compute.apply()?;
    let sources = source::open_all(&args.source)?;
    let shards = ShardSet::open(&args.shards)?;
    let common = &args.common;
    let mut summaries = Vec::new();
    for source in &sources {
        let set = with_threads(common.threads, || source.features(&shards, common.overwrite, common.quiet))?;
        let details = set.details();
        summaries.push(Summary {
            run: source.path().display().to_string(),
            features: set.directory().display().to_string(),
            fingerprint: set.manifest().fingerprint.clone(),
            arch: details.arch.clone(),
            samples: set.manifest().count("samples"),
            views: details.views,
            feature_width: details.feature_width,
        });
    }
    if common.json {
        return print_json(&summaries);
    }
    let mut table = Table::new(&["run", "arch", ">samples", ">views", ">width", "features"]);
    for s in summaries {
        let (samples, views, width) = (s.samples.to_string(), s.views.to_string(), s.feature_width.to_string());
        table.row(vec![s.run, s.arch, samples, views, width, s.features]);
    }
    print(&table.plain())
}
