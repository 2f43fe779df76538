//! The first stage: packs a folder of images into a shard set.
//!
//! `source` lists the samples and their classes in a fixed order. `pack` decodes every image once, makes its views by the recipe and
//! writes them, shard by shard, in a seeded random order, all or one part of them; `finish` closes a set made of parts. `plan` says
//! beforehand what that takes; `verify`, `inspect` and `bench` read a finished set; `redraw` gives other views of a set of source
//! images. The bytes depend on the images, the recipe and the seed, never on threads, on interruptions or on the machine.

pub mod args;
pub mod bench;
pub mod config;
pub mod finish;
pub mod inspect;
mod memory;
mod order;
mod ordered;
pub mod pack;
pub mod plan;
pub mod redraw;
mod sheet;
pub mod source;
pub mod verify;
pub mod views;

pub use args::{Args, Command};
pub use config::PackConfig;

use shared::Result;
use shared::cli::{print, print_json};
use shared::progress::note;
use shared::transforms::Level;

/// Runs a command and prints its outcome: JSON and reports on standard output, everything else on standard error.
///
/// # Errors
/// Of the command, and when standard output cannot be written.
pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Pack(args) => {
            if let Some(isa) = args.isa {
                Level::limit(isa);
            }
            let config = PackConfig::resolve(&args.pack, args.config.as_deref(), &args.common)?;
            let summary = pack::pack(&config.for_part(args.part)?)?;
            report(&summary, args.common.quiet, args.common.json)
        }
        Command::Finish(args) => report(&finish::finish(args)?, args.quiet, args.json),
        Command::Plan(args) => {
            let config = PackConfig::resolve(&args.pack, args.config.as_deref(), &args.common())?;
            let plan = plan::plan(&config)?;
            if args.json { print_json(&plan) } else { print(&plan.to_string()) }
        }
        Command::Verify(args) => {
            let summary = verify::verify(args)?;
            if args.json { print_json(&summary) } else { print(&summary.to_string()) }
        }
        Command::Redraw(args) => {
            let summary = redraw::redraw(args)?;
            if !args.common.quiet {
                note(&summary.to_string());
            }
            if args.common.json { print_json(&summary) } else { Ok(()) }
        }
        Command::Bench(args) => {
            let measured = bench::bench(args)?;
            if args.json { print_json(&measured) } else { print(&measured.to_string()) }
        }
        Command::Inspect(args) => {
            let summary = inspect::inspect(args)?;
            if args.json { print_json(&summary) } else { print(&summary.to_string()) }
        }
    }
}

fn report(summary: &pack::PackSummary, quiet: bool, json: bool) -> Result<()> {
    if !quiet {
        note(&summary.to_string());
    }
    if json { print_json(summary) } else { Ok(()) }
}
