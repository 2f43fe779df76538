//! The second stage: the final embeddings of a frozen teacher for every stored view, computed once for many students.
//!
//! `embed` reads a shard set and the teacher's weights, runs the teacher in evaluation mode over every view of every
//! sample, and writes one embedding file for each shard, row for row; on request it centres and reduces what the teacher
//! gives, in a second pass. `describe` tells what a checkpoint holds and which
//! network it belongs to. `verify` checks a finished set against its hashes, its shards and the teacher. The embeddings
//! depend on the pixels and the weights alone: not on threads, batch size or
//! interruptions, but in their last bits on the instruction set of the machine.

pub mod args;
pub mod config;
mod describe;
mod embed;
mod projected;
pub mod projection;
mod rows;
mod summary;
pub mod teacher;
mod verify;

pub use args::Args;
pub use describe::{Description, describe};
pub use embed::{Embedded, ProjectionSummary, embed};
use shared::cli::ComputeArgs;
use shared::{Result, cli};
pub use summary::Statistics;
pub use verify::{Verified, verify};

use crate::args::Command;
use crate::config::{EmbedConfig, VerifyConfig};

/// Carries out a command line.
///
/// # Errors
/// What the subcommand meets: see [`embed()`], [`describe()`] and [`verify()`].
pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Embed(args) => {
            let config = EmbedConfig::resolve(args)?;
            args.compute.apply()?;
            let embedded = cli::with_threads(config.threads, || embed(&config))?;
            if config.json { cli::print_json(&embedded) } else { cli::print(&embedded.to_string()) }
        }
        Command::Describe(args) => {
            let description = describe(&args.checkpoint, args.state_key.as_deref())?;
            if args.json { cli::print_json(&description) } else { cli::print(&description.to_string()) }
        }
        Command::Verify(args) => {
            let config = VerifyConfig::resolve(args)?;
            ComputeArgs { isa: args.isa }.apply()?;
            let verified = cli::with_threads(config.threads, || verify(&config))?;
            if config.json { cli::print_json(&verified) } else { cli::print(&verified.to_string()) }
        }
    }
}
