//! How parameters move: optimisers, clipping of gradients, and moving averages of parameters.

mod clip;
mod config;
mod ema;
mod optimizer;

pub use clip::{clip_gradients, gradient_norm};
pub use config::{NoDecay, OptimizerConfig, Rule};
pub use ema::{average_update, ema_update};
pub use optimizer::Optimizer;
