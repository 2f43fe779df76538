//! Clipping gradients by their common norm.

use crate::Result;
use crate::ops::{self, Gradients};

/// Keeps the divisor from 0.
const EPSILON: f64 = 1e-6;

/// The Euclidean norm of all gradients together; not finite when one of their elements is not.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn gradient_norm<'a>(networks: impl IntoIterator<Item = &'a Gradients>) -> Result<f64> {
    let mut sum = 0.0;
    for (_, gradient) in networks.into_iter().flat_map(Gradients::iter) {
        sum += ops::sum_of_squares(gradient)?;
    }
    Ok(sum.sqrt())
}

/// Shortens all gradients alike, in place, so that their common norm, which is `norm` now, is at most `limit`.
///
/// # Errors
/// Only if a tensor operation fails.
///
/// # Source
/// `torch.nn.utils.clip_grad_norm_`: factor `limit / (norm + 1e-6)`, at most 1.
pub fn clip_gradients<'a>(networks: impl IntoIterator<Item = &'a Gradients>, norm: f64, limit: f64) -> Result<()> {
    let factor = limit / (norm + EPSILON);
    if factor >= 1.0 {
        return Ok(());
    }
    for (_, gradient) in networks.into_iter().flat_map(Gradients::iter) {
        ops::scale_in_place(gradient, factor)?;
    }
    Ok(())
}
