//! `data-prep`: packs images into shards of augmented views.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let args = data_prep::Args::parse();
    shared::cli::run_main(|| data_prep::run(&args))
}
