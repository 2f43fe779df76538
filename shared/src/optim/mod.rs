//! How parameters move: stochastic gradient descent for the query encoder, a moving average for the key encoder.

mod ema;
mod sgd;

pub use ema::ema_update;
pub use sgd::{Sgd, SgdConfig};
