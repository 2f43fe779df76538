//! `student-eval linear`.

use shared::cli::{print, print_json, with_threads};
use shared::progress::{Progress, note};
use shared::shard::{ShardSet, check_classes, open_labelled};
use shared::{Error, Result};

use crate::args::LinearArgs;
use crate::commands::warn_of_shared_samples;
use crate::linear_probe::{EpochAccuracy, ProbeConfig, check_config, train};
use crate::results::{Measurement, Record, SetRecord, path_for};
use crate::source::{self, Source};
use crate::table::Table;

pub(crate) fn linear(args: &LinearArgs) -> Result<()> {
    let config = args.probe_config();
    check_config(&config)?;
    args.compute.apply()?;
    let sources = source::open_all(&args.source)?;
    let train_shards = open_labelled(&args.train)?;
    let val_shards = open_labelled(&args.val)?;
    check_classes(&train_shards, &val_shards)?;
    let same = train_shards.manifest().fingerprint == val_shards.manifest().fingerprint;
    if same {
        return Err(Error::invalid(
            format!("`{}` is given for training and for validation", args.val.display()),
            "pack a validation set of its own, or run `student-eval knn --train SHARDS`, which leaves one out",
        ));
    }
    let measured = sources
        .iter()
        .map(|source| with_threads(args.common.threads, || measure(source, &train_shards, &val_shards, &config, args)))
        .collect::<Result<Vec<_>>>()?;
    if args.common.json {
        return print_json(&measured);
    }
    print(&show(&sources, &measured, &config))
}

fn measure(
    source: &Source,
    train_shards: &ShardSet,
    val_shards: &ShardSet,
    config: &ProbeConfig,
    args: &LinearArgs,
) -> Result<Record> {
    let common = &args.common;
    let train_set = source.features(train_shards, common.overwrite, common.quiet)?;
    let val_set = source.features(val_shards, common.overwrite, common.quiet)?;
    let records = (SetRecord::new(&train_set)?, SetRecord::new(&val_set)?);
    let path = path_for(source.home(), "linear", source.weights(), (&records.0, &records.1), config)?;
    if !common.overwrite
        && let Some(record) = Record::read_if_exists(&path)?
    {
        if !common.quiet {
            note(&format!("`{}` is up to date", path.display()));
        }
        return Ok(record);
    }
    warn_of_shared_samples(&train_set, &val_set, common.quiet)?;
    let progress = Progress::new("linear probe", "epochs", config.epochs as u64, common.quiet);
    let classes = train_shards.classes();
    let result = train(&train_set.rows()?, &val_set.rows()?, classes.len(), config, |epoch| {
        let best = epoch.iter().map(|head| head.top1).fold(0.0, f64::max);
        progress.message(format!("top-1 {best:.2}"));
        progress.inc(1);
    })?;
    progress.finish();
    let measurement = Measurement::Linear { config: config.clone(), result };
    let arch = train_set.details().arch.clone();
    let record = Record::new(arch, source.weights().clone(), records, classes.to_vec(), measurement);
    record.write(&path)?;
    Ok(record)
}

fn show(sources: &[Source], records: &[Record], config: &ProbeConfig) -> String {
    let columns =
        ["run", ">lr", ">lr at the end", ">top-1", ">top-5", ">best top-1", ">best top-5", ">best epoch", "remark"];
    let mut table = Table::new(&columns);
    let mut batch = config.batch_size;
    for (source, record) in sources.iter().zip(records) {
        let Measurement::Linear { result, .. } = &record.measurement else { continue };
        batch = result.effective_batch_size;
        for head in &result.heads {
            let percent = |pick: fn(&EpochAccuracy) -> f64, epoch: &EpochAccuracy| format!("{:.2}", pick(epoch));
            table.row(vec![
                source.path().display().to_string(),
                head.lr.to_string(),
                format!("{:.2e}", head.lr_last_epoch),
                percent(|epoch| epoch.top1, &head.last),
                percent(|epoch| epoch.top5, &head.last),
                percent(|epoch| epoch.top1, &head.best),
                percent(|epoch| epoch.top5, &head.best),
                head.best.epoch.to_string(),
                if head.diverged { "diverged".into() } else { String::new() },
            ]);
        }
    }
    format!(
        "linear probe, {} epochs, batch {batch}, accuracy in percent after the last and the best epoch\n\n{}",
        config.epochs,
        table.plain()
    )
}
