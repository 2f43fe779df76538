//! The subcommands that measure: what they share is opening sets and checking that they belong together.

mod features;
mod knn;
mod linear;

pub(crate) use features::features;
pub(crate) use knn::knn;
pub(crate) use linear::linear;

use std::collections::BTreeSet;

use shared::Result;
use shared::progress::note;

use crate::features::FeatureSet;

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
