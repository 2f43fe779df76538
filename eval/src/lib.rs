//! The last stage: what has a student learnt?
//!
//! A student's backbone runs once over each shard set and its features are cached beside the run ([`features`]). On the cached
//! features work an exact k-NN classifier ([`shared::knn`]) and a linear probe with the official schedule ([`linear_probe`]); their
//! numbers are stored with everything they depend on ([`results`]). A report puts many runs into one table with pictures.
//! Nothing here depends on the number of threads, and everything that was measured once is found again.

mod args;
mod commands;
pub mod features;
pub mod linear_probe;
pub mod pca;
mod plot;
mod report;
pub mod results;
pub mod source;
mod table;

pub use args::{Args, Command, FeaturesArgs, KnnArgs, LinearArgs, ReportArgs, SourceArgs};

use shared::Result;

/// Runs one command.
///
/// # Errors
/// One sentence on what is wrong: see [`shared::Error`].
pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Features(args) => commands::features(args),
        Command::Knn(args) => commands::knn(args),
        Command::Linear(args) => commands::linear(args),
        Command::Report(args) => report::report(args),
    }
}
