//! `student-eval`: measures students and reports on them.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    shared::ops::tune_allocator();
    let args = eval::Args::parse();
    shared::cli::run_main(|| eval::run(&args))
}
