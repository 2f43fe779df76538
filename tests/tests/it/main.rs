//! Tests across the stages, and golden values from other programs; one binary, one module per subject.

mod golden_losses;
mod golden_models;
mod golden_teacher;
