//! `teacher-embed`: computes a frozen teacher's embeddings of a shard set, once.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    shared::ops::tune_allocator();
    let args = teacher_embed::Args::parse();
    shared::cli::run_main(|| teacher_embed::run(&args))
}
