//! Whole trainings, in this process and as processes of their own: resuming, equal bytes, exported students, and what is refused.

mod cli;
mod export;
mod init;
#[cfg(unix)]
mod kills;
mod methods;
mod objectives;
mod optimisation;
mod probe;
mod refusals;
mod resume;
mod workspace;

use clap::Parser as _;
use shared::Result;
use student_train::{Args, Summary, Trained};
use workspace::Workspace;

/// Runs a tiny training; `more` are `--flag=value` or `--flag`.
fn train(workspace: &Workspace, command: &str, run: &str, more: &[&str]) -> Result<Trained> {
    train_with(&workspace.arguments(command, run, more))
}

/// Runs the training of a whole command line.
fn train_with(arguments: &[String]) -> Result<Trained> {
    match student_train::run(&Args::parse_from(arguments))? {
        Summary::Trained(trained) => Ok(trained),
        Summary::Planned(_) | Summary::Exported(_) | Summary::Imported(_) => {
            Err(shared::Error::usage("not a training"))
        }
    }
}
