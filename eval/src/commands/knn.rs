//! `student-eval knn`.

use shared::cli::{print, print_json, with_threads};
use shared::knn::{nearest, vote};
use shared::progress::note;
use shared::shard::{ShardSet, check_classes, open_labelled};
use shared::{Error, Result};

use crate::args::KnnArgs;
use crate::commands::warn_of_shared_samples;
use crate::results::{KnnConfig, Measurement, Record, SetRecord, path_for};
use crate::source::{self, Source};
use crate::table::Table;

pub(crate) fn knn(args: &KnnArgs) -> Result<()> {
    if !args.temperature.is_finite() || args.temperature <= 0.0 {
        return Err(Error::usage("`--temperature` must be a positive number"));
    }
    args.compute.apply()?;
    let sources = source::open_all(&args.source)?;
    let train = open_labelled(&args.train)?;
    let val = match &args.val {
        Some(path) => open_labelled(path)?,
        None => open_labelled(&args.train)?,
    };
    check_classes(&train, &val)?;
    let leave_one_out = train.manifest().fingerprint == val.manifest().fingerprint;
    if leave_one_out && train.len() < 2 {
        return Err(Error::invalid("a set of one sample has no neighbours", ""));
    }
    let mut k: Vec<usize> = args.k.iter().map(|&k| k as usize).collect();
    k.sort_unstable();
    k.dedup();
    let config = KnnConfig { k, temperature: args.temperature, view: args.view, leave_one_out };
    let measured = sources
        .iter()
        .map(|source| with_threads(args.common.threads, || measure(source, &train, &val, &config, args)))
        .collect::<Result<Vec<_>>>()?;
    if args.common.json {
        return print_json(&measured);
    }
    print(&show(&sources, &measured, &config))
}

fn measure(source: &Source, train: &ShardSet, val: &ShardSet, config: &KnnConfig, args: &KnnArgs) -> Result<Record> {
    let common = &args.common;
    let train_set = source.features(train, common.overwrite, common.quiet)?;
    // Not extracted twice when it is the same set.
    let val_set = source.features(val, common.overwrite && !config.leave_one_out, common.quiet)?;
    let records = (SetRecord::new(&train_set)?, SetRecord::new(&val_set)?);
    let path = path_for(source.home(), "knn", source.weights(), (&records.0, &records.1), config)?;
    if !common.overwrite
        && let Some(record) = Record::read_if_exists(&path)?
    {
        if !common.quiet {
            note(&format!("`{}` is up to date", path.display()));
        }
        return Ok(record);
    }
    if !config.leave_one_out {
        warn_of_shared_samples(&train_set, &val_set, common.quiet)?;
    }
    let (train_rows, val_rows) = (train_set.rows()?, val_set.rows()?);
    let classes = train.classes();
    let train_classes = train_rows.class_indices(&format!("`{}`", args.train.display()), classes.len())?;
    let val_name = args.val.as_ref().unwrap_or(&args.train);
    let val_classes = val_rows.class_indices(&format!("`{}`", val_name.display()), classes.len())?;
    let most = config.k.iter().copied().max().unwrap_or(1);
    let neighbours = nearest(&train_rows, &val_rows, config.view, most, config.leave_one_out)?;
    let result = vote(&neighbours, &train_classes, &val_classes, classes.len(), &config.k, config.temperature);
    let measurement = Measurement::Knn { config: config.clone(), result };
    let arch = train_set.details().arch.clone();
    let record = Record::new(arch, source.weights().clone(), records, classes.to_vec(), measurement);
    record.write(&path)?;
    Ok(record)
}

fn show(sources: &[Source], records: &[Record], config: &KnnConfig) -> String {
    let mut table = Table::new(&["run", ">k", ">T", ">top-1", ">top-5"]);
    for (source, record) in sources.iter().zip(records) {
        let Measurement::Knn { result, .. } = &record.measurement else { continue };
        for accuracy in result {
            table.row(vec![
                source.path().display().to_string(),
                accuracy.k.to_string(),
                config.temperature.to_string(),
                format!("{:.2}", accuracy.top1),
                format!("{:.2}", accuracy.top5),
            ]);
        }
    }
    let protocol = if config.leave_one_out { "each sample by the others of its set" } else { "validation by training" };
    format!("k-NN, cosine similarity, {protocol}, accuracy in percent\n\n{}", table.plain())
}
