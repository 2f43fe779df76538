//! `data-prep`: packs images into shards of augmented views.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use data_prep::{Args, Command};
use shared::ops::{TensorAllocator, reserve_memory};

#[global_allocator]
static ALLOCATOR: TensorAllocator = TensorAllocator;

fn main() -> ExitCode {
    let args = Args::parse();
    if matches!(args.command, Command::Bench(_)) {
        // batches take their memory as in training
        reserve_memory();
    }
    shared::cli::run_main(|| data_prep::run(&args))
}
