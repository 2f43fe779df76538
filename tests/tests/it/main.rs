//! Tests across the stages, and golden values from other programs; one binary, one module per subject.

mod chain;
mod golden_activations;
mod golden_costs;
mod golden_disco;
mod golden_distillation;
mod golden_losses;
mod golden_models;
mod golden_optimisers;
mod golden_pca;
mod golden_swav;
mod golden_teachers;
mod golden_transformers;
mod pipeline;
mod readme;
mod source_sets;
