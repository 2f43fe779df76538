//! Batch norm as numbers per channel: statistics gathered tile by tile, the affine map that normalises, the slopes of its backward pass.

use super::tiles;
use crate::ops::BatchNorm;

/// Rows summed in f32 before the sums move to f64.
const SHORT_ROWS: usize = 128;

/// Mean and variance of one group, per channel.
#[derive(Debug, Clone)]
pub(super) struct Statistics {
    pub(super) mean: Vec<f64>,
    /// Biased variance.
    pub(super) variance: Vec<f64>,
    pub(super) rows: usize,
}

/// `normalised = x * scale + shift`.
#[derive(Debug, Clone)]
pub(super) struct Affine {
    pub(super) scale: Vec<f32>,
    pub(super) shift: Vec<f32>,
}

impl Affine {
    /// The map that gives numbers of this mean and variance the batch norm's scale and shift.
    pub(super) fn new(mean: &[f64], variance: &[f64], weight: &[f32], bias: &[f32], eps: f64) -> Self {
        let scale: Vec<f64> = weight.iter().zip(variance).map(|(&w, v)| f64::from(w) / (v + eps).sqrt()).collect();
        let shift = bias.iter().zip(mean).zip(&scale).map(|((&b, m), s)| (f64::from(b) - m * s) as f32).collect();
        Self { scale: scale.into_iter().map(|s| s as f32).collect(), shift }
    }

    /// The map that changes nothing.
    pub(super) fn identity(channels: usize) -> Self {
        Self { scale: vec![1.0; channels], shift: vec![0.0; channels] }
    }

    pub(super) fn channels(&self) -> usize {
        self.scale.len()
    }
}

/// Sums over some rows, from which the statistics of all rows are put together.
///
/// Squares are taken around the first row, so that they are exact enough even where the mean is far from zero.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    rows: usize,
    pending: usize,
    origin: Vec<f32>,
    /// Of the pending rows: sums, then squares.
    short: Vec<f32>,
    /// Of the rows before them: sums, then squares.
    long: Vec<f64>,
}

impl Moments {
    pub(super) fn new(channels: usize) -> Self {
        Self {
            rows: 0,
            pending: 0,
            origin: vec![0.0; channels],
            short: vec![0.0; 2 * channels],
            long: vec![0.0; 2 * channels],
        }
    }

    /// Takes rows of all channels into account.
    pub(super) fn add(&mut self, xs: &[f32]) {
        let channels = self.origin.len();
        if self.rows == 0 && !xs.is_empty() {
            self.origin.copy_from_slice(&xs[..channels]);
        }
        for xs in xs.chunks(SHORT_ROWS * channels) {
            let rows = xs.len() / channels;
            if self.pending + rows > SHORT_ROWS {
                self.settle();
            }
            let (sums, squares) = self.short.split_at_mut(channels);
            tiles::moments(xs, &self.origin, sums, squares);
            self.pending += rows;
            self.rows += rows;
        }
    }

    fn settle(&mut self) {
        for (long, short) in self.long.iter_mut().zip(&mut self.short) {
            *long += f64::from(*short);
            *short = 0.0;
        }
        self.pending = 0;
    }

    /// Statistics of all rows of several parts, which are put together in their order.
    ///
    /// # Source
    /// Chan, Golub, `LeVeque`: Updating formulae and a pairwise algorithm for computing sample variances, 1979, equation 2.1.
    pub(super) fn combine(parts: impl IntoIterator<Item = Self>, channels: usize) -> Statistics {
        let (mut rows, mut mean, mut squares) = (0usize, vec![0.0f64; channels], vec![0.0f64; channels]);
        for mut part in parts {
            if part.rows == 0 {
                continue;
            }
            part.settle();
            let count = part.rows as f64;
            let share = count / (rows + part.rows) as f64;
            for c in 0..channels {
                let centred = part.long[c] / count;
                let part_mean = f64::from(part.origin[c]) + centred;
                let part_squares = (part.long[channels + c] - centred * part.long[c]).max(0.0);
                let difference = part_mean - mean[c];
                mean[c] += difference * share;
                squares[c] += part_squares + difference * difference * (rows as f64) * share;
            }
            rows += part.rows;
        }
        let variance = squares.into_iter().map(|square| square / rows.max(1) as f64).collect();
        Statistics { mean, variance, rows }
    }
}

/// The batch norm of one group as its backward pass needs it: `draw = (dz - centre) * scale + (raw - mean) * bend + offset`.
///
/// The centre is the mean of `dz`, so that little is lost where all of a channel's gradients are nearly equal.
#[derive(Debug, Clone)]
pub(super) struct Slope {
    pub(super) mean: Vec<f32>,
    pub(super) centre: Vec<f32>,
    pub(super) scale: Vec<f32>,
    pub(super) bend: Vec<f32>,
    pub(super) offset: Vec<f32>,
}

/// Sums over the rows of a group: of `dz`, and of `dz * (raw - mean)`.
#[derive(Debug, Clone)]
pub(super) struct BackwardSums {
    pub(super) sums: Vec<f64>,
    pub(super) products: Vec<f64>,
}

impl BackwardSums {
    pub(super) fn new(channels: usize) -> Self {
        Self { sums: vec![0.0; channels], products: vec![0.0; channels] }
    }

    /// Adds sums that were made in f32.
    pub(super) fn add(&mut self, short: &ShortSums) {
        for (long, short) in self.sums.iter_mut().zip(&short.sums).chain(self.products.iter_mut().zip(&short.products))
        {
            *long += f64::from(*short);
        }
    }

    /// Adds the sums of other rows.
    pub(super) fn merge(&mut self, other: &Self) {
        for (sum, other) in self.sums.iter_mut().zip(&other.sums).chain(self.products.iter_mut().zip(&other.products)) {
            *sum += other;
        }
    }
}

/// Sums over few rows.
#[derive(Debug, Clone)]
pub(super) struct ShortSums {
    pub(super) sums: Vec<f32>,
    pub(super) products: Vec<f32>,
}

impl ShortSums {
    pub(super) fn new(channels: usize) -> Self {
        Self { sums: vec![0.0; channels], products: vec![0.0; channels] }
    }

    pub(super) fn clear(&mut self) {
        self.sums.fill(0.0);
        self.products.fill(0.0);
    }

    pub(super) fn as_target(&mut self) -> tiles::GradientSums<'_> {
        tiles::GradientSums { sums: &mut self.sums, products: &mut self.products }
    }
}

impl Statistics {
    /// Means in f32, the numbers around which the backward pass takes its sums.
    pub(super) fn mean_f32(&self) -> Vec<f32> {
        self.mean.iter().map(|&mean| mean as f32).collect()
    }

    /// What the backward pass of this group multiplies by; adds the group's gradients of scale and shift to `dweight` and `dbias`.
    pub(super) fn slope(
        &self,
        norm: &BatchNorm,
        weight: &[f32],
        sums: &BackwardSums,
        dweight: &mut [f64],
        dbias: &mut [f64],
    ) -> Slope {
        // draw = scale * (dz - sum(dz) / n - xhat * sum(dz * xhat) / n)
        let count = self.rows as f64;
        let channels = weight.len();
        let mut slope = Slope {
            mean: self.mean_f32(),
            centre: sums.sums.iter().map(|sum| (sum / count) as f32).collect(),
            scale: vec![0.0; channels],
            bend: vec![0.0; channels],
            offset: vec![0.0; channels],
        };
        for c in 0..channels {
            let inverse = 1.0 / (self.variance[c] + norm.eps).sqrt();
            let scale = f64::from(weight[c]) * inverse;
            // The sums were taken around the mean in f32.
            let rounding = f64::from(slope.mean[c]) - self.mean[c];
            let along = (sums.products[c] + sums.sums[c] * rounding) * inverse;
            dweight[c] += along;
            dbias[c] += sums.sums[c];
            slope.scale[c] = scale as f32;
            let bend = -scale * inverse * along / count;
            slope.bend[c] = bend as f32;
            // What the roundings of mean and centre leave.
            slope.offset[c] = (bend * rounding + scale * (f64::from(slope.centre[c]) - sums.sums[c] / count)) as f32;
        }
        slope
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_do_not_suffer_from_a_distant_mean_nor_from_the_cut() {
        let (rows, channels) = (701, 5);
        let xs: Vec<f32> = (0..rows * channels).map(|i| 1000.0 + (i as f32 * 0.7).sin()).collect();
        let exact = |c: usize| {
            let column = || xs.iter().skip(c).step_by(channels).map(|&x| f64::from(x));
            let mean = column().sum::<f64>() / rows as f64;
            (mean, column().map(|x| (x - mean).powi(2)).sum::<f64>() / rows as f64)
        };
        let parts = xs.chunks(300 * channels).map(|xs| {
            let mut moments = Moments::new(channels);
            xs.chunks(7 * channels).for_each(|xs| moments.add(xs));
            moments
        });
        let statistics = Moments::combine(parts, channels);
        assert_eq!(statistics.rows, rows);
        for c in 0..channels {
            let (mean, variance) = exact(c);
            assert!((statistics.mean[c] - mean).abs() < 1e-6);
            assert!(
                (statistics.variance[c] - variance).abs() < 1e-6 * variance,
                "{} {variance}",
                statistics.variance[c]
            );
        }
    }
}
