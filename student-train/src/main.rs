//! `student-train`: trains students, alone or under a teacher.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use student_train::Args;

#[global_allocator]
static ALLOCATOR: shared::ops::TensorAllocator = shared::ops::TensorAllocator;

fn main() -> ExitCode {
    shared::ops::reserve_memory();
    shared::cli::run_main(|| student_train::run_and_print(&Args::parse()))
}
