//! Positions of patches: learned tables resampled for other grids, and those made of sines.

use candle_core::{DType, Device, Tensor};

use super::token_parameter::{PositionResampling, Positions};
use crate::Result;

/// Waves for each of the two coordinates.
const WAVES: usize = 32;
/// The longest wave over the shortest.
const TEMPERATURE: f64 = 10_000.0;
/// Added to sides, which are divisors.
const SIDE_EPS: f64 = 1e-6;

/// Sines and cosines of a place on a grid, which [`crate::ops::add_fourier_positions`] maps to channels.
pub const FOURIER_CHANNELS: usize = 2 * WAVES;

/// The learned positions of the class token and of a grid of patches.
///
/// # Shapes
/// - `grid`: patches along height and width
/// - returns: `(1 + height * width, C)`
///
/// # Errors
/// A tensor operation that fails.
///
/// # Source
/// timm 1.0.31, `resample_abs_pos_embed`; facebookresearch/dino, `VisionTransformer.interpolate_pos_encoding`.
pub(crate) fn resampled(positions: &Positions, [height, width]: [usize; 2], record: bool) -> Result<Tensor> {
    let Positions { table, side, resampling } = positions;
    let table = table.value(record).squeeze(0)?;
    if height == *side && width == *side {
        return Ok(table);
    }
    let channels = table.dim(1)?;
    let like = |matrix: Vec<f64>, new: usize| -> Result<Tensor> {
        Ok(Tensor::from_vec(matrix, (new, *side), table.device())?.to_dtype(table.dtype())?)
    };
    let along = |new: usize| like(axis_weights(*side, new, *resampling), new);
    let patches = table.narrow(0, 1, side * side)?;
    // Rows first: (side, side * C) -> (height, side * C); then (height, width, C), one product for each row.
    let rows = along(height)?.matmul(&patches.reshape((*side, side * channels))?)?;
    let columns = along(width)?.unsqueeze(0)?.repeat((height, 1, 1))?;
    let grid = columns.matmul(&rows.reshape((height, *side, channels))?)?;
    Ok(Tensor::cat(&[&table.narrow(0, 0, 1)?, &grid.reshape((height * width, channels))?], 0)?)
}

/// The weights of `old` points in each of `new` points along an axis, `[new][old]`.
fn axis_weights(old: usize, new: usize, resampling: PositionResampling) -> Vec<f64> {
    let mut weights = vec![0.0; new * old];
    for (point, weights) in weights.chunks_exact_mut(old).enumerate() {
        match resampling {
            PositionResampling::Timm => antialiased(weights, point, old as f64 / new as f64),
            PositionResampling::Dino => {
                // The small excess is the official code's guard against rounding; it shifts all points a little.
                interpolated(weights, point, old as f64 / (new as f64 + 0.1));
            }
        }
    }
    weights
}

/// `PyTorch`'s bicubic interpolation with `antialias`: the kernel is as wide as the step between new points, but no narrower than
/// the old points need, and its weights inside the axis add up to 1.
fn antialiased(weights: &mut [f64], point: usize, scale: f64) {
    const BEND: f64 = -0.5;
    let stretch = scale.max(1.0);
    let centre = scale * (point as f64 + 0.5);
    let first = (centre - 2.0 * stretch + 0.5).max(0.0) as usize;
    let end = ((centre + 2.0 * stretch + 0.5) as usize).min(weights.len());
    for (old, weight) in weights.iter_mut().enumerate().take(end).skip(first) {
        *weight = cubic((old as f64 - centre + 0.5) / stretch, BEND);
    }
    let sum: f64 = weights.iter().sum();
    for weight in weights {
        *weight /= sum;
    }
}

/// `PyTorch`'s bicubic interpolation: of four old points, those outside count as the outermost.
fn interpolated(weights: &mut [f64], point: usize, scale: f64) {
    const BEND: f64 = -0.75;
    let place = scale * (point as f64 + 0.5) - 0.5;
    let before = place.floor();
    for tap in -1..3 {
        let at = before + f64::from(tap);
        let inside = at.clamp(0.0, (weights.len() - 1) as f64) as usize;
        weights[inside] += cubic(place - at, BEND);
    }
}

/// The cubic convolution kernel; `bend` is its slope at 1.
///
/// # Source
/// Keys: Cubic convolution interpolation for digital image processing, 1981, equation 15 where `bend` is -1/2.
fn cubic(x: f64, bend: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((bend + 2.0) * x - (bend + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((x - 5.0) * x + 8.0) * x * bend - 4.0 * bend
    } else {
        0.0
    }
}

/// Sines and cosines of the positions on a grid: those of the row, then those of the column, each in pairs from short waves to long
/// ones.
///
/// # Shapes
/// - returns: `(height * width, FOURIER_CHANNELS)`
///
/// # Errors
/// A tensor operation that fails.
///
/// # Source
/// El-Nouby et al., `XCiT`, arXiv 2106.09681; timm's `PositionalEncodingFourier`.
pub(crate) fn fourier([height, width]: [usize; 2], dtype: DType, device: &Device) -> Result<Tensor> {
    let waves = |index: usize, side: usize| {
        let angle = (index + 1) as f64 / (side as f64 + SIDE_EPS) * std::f64::consts::TAU;
        (0..WAVES).map(move |wave| {
            let angle = angle / libm::pow(TEMPERATURE, (wave / 2 * 2) as f64 / WAVES as f64);
            if wave % 2 == 0 { libm::sin(angle) } else { libm::cos(angle) }
        })
    };
    let mut values = Vec::with_capacity(height * width * FOURIER_CHANNELS);
    for row in 0..height {
        for column in 0..width {
            values.extend(waves(row, height).chain(waves(column, width)));
        }
    }
    Ok(Tensor::from_vec(values, (height * width, FOURIER_CHANNELS), device)?.to_dtype(dtype)?)
}
