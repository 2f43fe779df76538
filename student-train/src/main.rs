//! `student-train`: trains students, alone or under a teacher.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use student_train::{Args, run_and_print};

#[global_allocator]
static ALLOCATOR: shared::ops::TensorAllocator = shared::ops::TensorAllocator;

fn main() -> ExitCode {
    shared::ops::reserve_memory();
    shared::distributed::run_main(|args: &Args, world| run_and_print(args, world))
}
