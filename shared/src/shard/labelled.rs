//! Shard sets whose samples have classes: for probes and classifiers.

use std::collections::BTreeSet;
use std::path::Path;

use super::ShardSet;
use crate::error::{Error, Result};

/// Opens a shard set that must have classes.
///
/// # Errors
/// [`Error::Invalid`] when it has none; as [`ShardSet::open`].
pub fn open_labelled(path: &Path) -> Result<ShardSet> {
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
///
/// # Errors
/// [`Error::Invalid`] that names a difference.
pub fn check_classes(train: &ShardSet, val: &ShardSet) -> Result<()> {
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
