//! What is minimised: contrast against the queue, plus agreement with the teacher on both views.
//!
//! ```text
//! loss = info_nce(s_q; k, queue) + distill_weight * (distance(s_q, t_q) + distance(s_k, t_k))
//! ```
//! `s` are the query encoder's embeddings of the two views, `t` the teacher's, `k` the key encoder's of the second view. The sum
//! has one part for each view, [`query_part`] and [`key_part`], so that the graph of one view can be freed before that of the
//! other is built.

use candle_core::Tensor;
use shared::Result;
use shared::losses::{InfoNce, distillation, info_nce};

/// The teacher's opinion of a view, and what it weighs.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// `(B, D)` f32, unit rows.
    pub teacher: &'a Tensor,
    /// `distill_weight`.
    pub weight: f64,
}

/// The part of the loss that depends on the student's embeddings of the query's view.
#[derive(Debug)]
pub struct QueryPart {
    /// To be minimised.
    pub loss: Tensor,
    /// The contrastive term and its accuracy.
    pub contrast: InfoNce,
    /// Mean squared distance to the teacher, unweighted.
    pub distance: Option<Tensor>,
}

/// Contrast, and agreement on the query's view.
///
/// # Shapes
/// - `queries`, `keys`: `(B, D)` f32, unit rows
/// - `queue`: `(K, D)` f32, unit rows, before `keys` enter it
///
/// # Errors
/// [`shared::Error::Shape`] when the shapes do not fit together.
pub fn query_part(
    queries: &Tensor,
    keys: &Tensor,
    queue: &Tensor,
    temperature: f64,
    target: Option<Target<'_>>,
) -> Result<QueryPart> {
    let contrast = info_nce(queries, keys, queue, temperature)?;
    let Some(target) = target else {
        return Ok(QueryPart { loss: contrast.loss.clone(), contrast, distance: None });
    };
    let (weighted, distance) = key_part(queries, target)?;
    Ok(QueryPart { loss: (&contrast.loss + weighted)?, contrast, distance: Some(distance) })
}

/// Agreement on a view: the weighted mean squared distance, to be minimised, and the distance itself.
///
/// # Shapes
/// - `embeddings`: `(B, D)` f32, unit rows
///
/// # Errors
/// [`shared::Error::Shape`] when the teacher's embeddings are of another shape.
pub fn key_part(embeddings: &Tensor, target: Target<'_>) -> Result<(Tensor, Tensor)> {
    let distance = distillation(embeddings, target.teacher)?;
    Ok(((&distance * target.weight)?, distance))
}
