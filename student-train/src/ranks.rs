//! What the ranks of a training settle before the first step; a single process settles it with itself.

use shared::checkpoint::identity_fingerprint;
use shared::distributed::World;
use shared::manifest::{Identity, Manifest, short};
use shared::ops::isa;
use shared::output::{Begun, OutputDir};
use shared::{Error, Result};

use crate::config::{Config, Plan};
use crate::stopping::StopReason;

/// Checks that a batch and its batch-norm groups can be shared out.
///
/// # Errors
/// [`Error::Usage`] that names the flag.
pub fn check_shares(config: &Config, world: &World) -> Result<()> {
    let ranks = world.size();
    let Config { batch_size, bn_groups, accumulate, .. } = *config;
    for (flag, value) in [("batch-size", batch_size), ("bn-groups", bn_groups)] {
        if !value.is_multiple_of(ranks) {
            let message =
                format!("`--{flag}` {value} is of all ranks together: it must be a multiple of their number, {ranks}");
            return Err(Error::usage(message));
        }
    }
    if !(bn_groups / ranks).is_multiple_of(accumulate) {
        return Err(Error::usage(format!(
            "`--accumulate` {accumulate} must divide the {} batch-norm groups of each of {ranks} ranks",
            bn_groups / ranks
        )));
    }
    Ok(())
}

/// Makes sure that all ranks train the same, with the same rounding.
///
/// # Errors
/// [`Error::Invalid`] when inputs or settings differ; [`Error::Usage`] for several instruction sets.
pub fn check_equal(identity: &Identity, world: &World) -> Result<()> {
    world.same(short(&identity_fingerprint(identity)), |rank, found, expected| {
        Error::invalid(
            format!("rank {rank} has other settings or inputs than rank 0: fingerprint {found}, not {expected}"),
            "give all ranks the same options and the same inputs: a copy on a node's own disk may be another set",
        )
    })?;
    world.same(&isa().to_string(), |rank, found, expected| {
        Error::usage(format!(
            "rank {rank} computes with {found}, rank 0 with {expected}: give all the same `--isa`, or they drift apart"
        ))
    })
}

/// Takes the run's directory: on the first rank, which alone writes. The inner error is the manifest of a finished run.
///
/// # Errors
/// As [`OutputDir::begin`].
pub fn begin(plan: &Plan, identity: &Identity, world: &World) -> Result<Result<Option<OutputDir>, Manifest>> {
    let begun = world.is_first().then(|| OutputDir::begin(&plan.output, identity, plan.overwrite)).transpose();
    let (finished, output) = match world.agree(begun)? {
        Some(Begun::Finished(manifest)) => (Some(manifest), None),
        Some(Begun::Writing(output)) => (None, Some(output)),
        None => (None, None),
    };
    let finished = world.broadcast(world.is_first().then_some(finished))?;
    Ok(finished.map_or(Ok(output), Err))
}

/// Why all ranks stop, if one has a reason to.
///
/// # Errors
/// As [`World::any`].
pub fn reason_to_stop(mine: Option<StopReason>, world: &World) -> Result<Option<StopReason>> {
    Ok(if world.any(mine.is_some())? { Some(mine.unwrap_or(StopReason::OtherRank)) } else { None })
}

#[cfg(test)]
mod tests {
    use shared::run::Objective;

    use super::*;
    use crate::args::Options;

    #[test]
    fn one_process_takes_any_batch() {
        let options = Options { batch_size: Some(6), bn_groups: Some(3), ..Options::default() };
        let config = Config::new(Objective::Pretrain, &options, None).unwrap();
        check_shares(&config, &World::alone()).unwrap();
    }
}
