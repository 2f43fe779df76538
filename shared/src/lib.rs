//! What the four stages have in common: file formats, augmentations, tensor operations, models, losses and optimisers.
//!
//! Modules are listed bottom-up; each uses only those above it.

pub mod error;
pub mod rng;
pub mod io;
pub mod mmap;
pub mod page_cache;
pub mod memory;
pub mod space;
pub mod tensor_file;
pub mod manifest;
pub mod output;
pub mod shard;
pub mod embedding;
pub mod transforms;
pub mod data_loader;
pub mod progress;
pub mod signals;
pub mod typeface;
pub mod ops;
pub mod cli;
pub mod distributed;
pub mod models;
pub mod onnx;
pub mod weights;
pub mod losses;
pub mod optim;
pub mod schedule;
pub mod metrics;
pub mod matrix;
pub mod feature_rows;
pub mod knn;
pub mod checkpoint;
pub mod logging;
pub mod tensorboard;
pub mod run;

pub use error::{Error, Fault, Result};
