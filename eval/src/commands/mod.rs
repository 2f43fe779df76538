//! The subcommands that measure: what they share is opening sets and checking that they belong together.

mod features;
mod knn;
mod linear;

pub(crate) use features::features;
pub(crate) use knn::knn;
pub(crate) use linear::linear;

use std::collections::BTreeSet;
use std::path::Path;

use shared::progress::note;
use shared::shard::ShardSet;
use shared::{Error, Result};

use crate::features::FeatureSet;

/// Opens a shard set that must have classes.
fn open_labelled(path: &Path) -> Result<ShardSet> {
    let shards = ShardSet::open(path)?;
    if shards.classes().is_empty() {
        return Err(Error::invalid(
            format!("shard set `{}` has no labels", path.display()),
            "pack images that lie in one folder per class; `student-eval features` needs no labels",
        ));
    }
    Ok(shards)
}

/// Refuses sets whose labels mean different classes.
fn check_classes(train: &ShardSet, val: &ShardSet) -> Result<()> {
    if train.classes() == val.classes() {
        return Ok(());
    }
    let (train_set, val_set): (BTreeSet<_>, BTreeSet<_>) =
        (train.classes().iter().collect(), val.classes().iter().collect());
    let only = |a: &BTreeSet<&String>, b: &BTreeSet<&String>| a.difference(b).next().map(|name| (*name).clone());
    let difference = match (only(&train_set, &val_set), only(&val_set, &train_set)) {
        (Some(name), _) => format!("only the training set has `{name}`"),
        (None, Some(name)) => format!("only the validation set has `{name}`"),
        (None, None) => "the same classes stand in another order".into(),
    };
    Err(Error::invalid(
        format!(
            "`{}` and `{}` have different classes: {difference}",
            train.directory().display(),
            val.directory().display()
        ),
        "pack both from trees with the same class folders",
    ))
}

/// Says so when the validation set seems to be made of training images, which would flatter.
fn warn_of_shared_samples(train: &FeatureSet, val: &FeatureSet, quiet: bool) -> Result<()> {
    let (train, val) = (train.rows()?, val.rows()?);
    let known: BTreeSet<u64> = train.sample_ids().iter().copied().collect();
    let shared = val.sample_ids().iter().filter(|id| known.contains(id)).count();
    if shared > 0 && !quiet {
        note(&format!(
            "note: {shared} of {} validation samples have the same relative path as a training sample; if they are the same \
             images, the accuracy means nothing",
            val.len()
        ));
    }
    Ok(())
}
