//! `teacher-embed`: computes a frozen teacher's embeddings of a shard set, once.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

#[global_allocator]
static ALLOCATOR: shared::ops::TensorAllocator = shared::ops::TensorAllocator;

fn main() -> ExitCode {
    shared::ops::reserve_memory();
    let args = teacher_embed::Args::parse();
    shared::cli::run_main(|| teacher_embed::run(&args))
}
