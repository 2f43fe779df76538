//! `student-eval`: measures students and reports on them.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let args = eval::Args::parse();
    shared::cli::run_main(|| eval::run(&args))
}
