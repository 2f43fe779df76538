//! `student-eval`: measures students and reports on them.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

#[global_allocator]
static ALLOCATOR: shared::ops::TensorAllocator = shared::ops::TensorAllocator;

fn main() -> ExitCode {
    shared::ops::reserve_memory();
    let args = eval::Args::parse();
    shared::cli::run_main(|| eval::run(&args))
}
