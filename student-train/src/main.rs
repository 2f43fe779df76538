//! `student-train`: trains students, alone or under a teacher.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use student_train::Args;

fn main() -> ExitCode {
    shared::ops::tune_allocator();
    shared::cli::run_main(|| student_train::run_and_print(&Args::parse()))
}
