//! From the launcher to the end: joining the other ranks, and ending with them.

use std::process::ExitCode;

use clap::Parser;

use super::World;
use crate::cli;
#[cfg(not(feature = "mpi"))]
use crate::error::Error;
use crate::error::Result;

/// Variables that a launcher gives to its processes: of Open MPI, of PMI (MPICH, Intel MPI, Slurm) and of `PMIx`.
const LAUNCHED: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"];

/// As [`cli::run_main`], for a command whose processes may have been started together by an MPI launcher.
///
/// Help and mistakes in the command line are printed by the first rank. When one rank fails by itself, it says why and ends them
/// all; a panic does the same.
pub fn run_main<A: Parser>(command: impl FnOnce(&A, &World) -> Result<()>) -> ExitCode {
    let world = match join() {
        Ok(world) => world,
        Err(error) => return cli::run_main(|| Err(error)),
    };
    let args = match A::try_parse() {
        Ok(args) => args,
        Err(error) => {
            if world.is_first() {
                // there is nobody to tell when standard error is closed
                drop(error.print());
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let Some(collectives) = world.collectives.clone() else { return cli::run_main(|| command(&args, &world)) };
    let mut end_all = None;
    let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cli::run_main(|| {
            command(&args, &world).map_err(|error| {
                if world.failed_together.load(std::sync::atomic::Ordering::Relaxed) {
                    return error;
                }
                end_all = Some(error.exit_status());
                world.name(error)
            })
        })
    }));
    match (status, end_all) {
        (Ok(status), None) => status,
        // The others may be waiting for this rank, and would do so for ever.
        (Ok(_), Some(status)) => collectives.abort(status),
        (Err(_panic), _) => collectives.abort(1),
    }
}

/// The ranks that were launched with this process; alone if it was not launched.
fn join() -> Result<World> {
    if LAUNCHED.iter().all(|variable| std::env::var_os(variable).is_none()) {
        return Ok(World::alone());
    }
    join_launched()
}

#[cfg(feature = "mpi")]
fn join_launched() -> Result<World> {
    Ok(World::new(std::sync::Arc::new(super::mpi::Mpi::start()?)))
}

/// Each of several processes would train by itself.
#[cfg(not(feature = "mpi"))]
fn join_launched() -> Result<World> {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|value| value.parse::<usize>().ok());
    let size = number(LAUNCHED[0]).or_else(|| number(LAUNCHED[1])).or_else(|| number("SLURM_STEP_NUM_TASKS"));
    match size {
        Some(size) if size > 1 => Err(Error::usage(format!(
            "an MPI launcher started {size} processes, but this program was built without MPI: build it with `--features mpi`"
        ))),
        _ => Ok(World::alone()),
    }
}
