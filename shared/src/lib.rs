//! What the four stages have in common: file formats, augmentations, tensor operations, models, losses and optimisers.
//!
//! Modules are listed bottom-up; each uses only those above it.

pub mod error;
pub mod rng;

pub use error::{Error, Fault, Result};
