//! Fitting the projection of an embedding set: mean and principal components of the teacher's outputs.
//!
//! The outputs are taken as the teacher gives them, not scaled to unit length: a projection is applied to such rows, and only
//! of the rows that it is applied to does it take off the whole mean and keep the most variance. (Fitted to rows of unit length
//! instead, EfficientNet-Lite0's agreement between views of photos differed by less than 0.005 at every D tried.) All arithmetic is plain f64
//! in an order that follows from the shapes alone, so the bits depend on the outputs and on nothing else: not on the number of
//! threads, and not on the machine.

mod covariance;
mod eigen;

use shared::Result;
use shared::embedding::{Projection, Reduction};

use self::covariance::{covariance, mean};
use self::eigen::largest;

/// The projection of some outputs: centring alone, or with the `components` directions of the largest variance.
///
/// Of each component the coordinate of the largest magnitude is positive.
///
/// # Shapes
/// - `parts`: outputs `(n, F)` each, flattened, together `(N, F)`; `N` is at least 2
/// - `width`: `F`
/// - `components`: at most `F`
/// - `progress` is told how many rows were read; every row is read once, or twice for components
///
/// # Errors
/// [`shared::Error::Invalid`] when the outputs vary beyond f64.
///
/// # Source
/// Principal component analysis by the covariance, as scikit-learn's `PCA(svd_solver="covariance_eigh")`, variances over `N - 1`.
pub fn fit(
    parts: &[&[f32]],
    width: usize,
    components: Option<usize>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Projection> {
    let mean = mean(parts, width, progress);
    let reduction = match components {
        None => None,
        Some(count) => {
            let covariance = covariance(parts, &mean, progress);
            let total_variance = covariance.trace();
            let (variances, components) = largest(covariance, count)?;
            Some(Reduction { components, variances, total_variance })
        }
    };
    Ok(Projection { mean: mean.iter().map(|x| *x as f32).collect(), reduction })
}
