//! From shards to batches: the order of an epoch, the views of a sample, normalised pixels made ahead of their use.
//!
//! Pixels are copied once: bytes of the mapped shard, or of the view that was redrawn, are normalised straight into the batch's
//! memory, which becomes the tensor.

mod batch;
mod local_schedule;
mod order;
mod prefetch;
mod sampler;

pub use batch::{embedding_batch, normalized_batch, normalized_views};
pub use local_schedule::LocalSchedule;
pub use order::{Order, RUN_SAMPLES, WINDOW_RUNS, quasi_order};
pub use prefetch::Prefetcher;
pub use sampler::{EpochSampler, ViewSchedule};
