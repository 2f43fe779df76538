//! Principal components: the plane of largest variance, for looking at features.
//!
//! Orthogonal iteration on the centred rows with a block of eight directions, of which the first two are kept. Starting
//! directions come from a fixed key and the iteration count from the data alone, so the picture is the same every time.

use candle_core::Tensor;
use shared::Result;
use shared::feature_rows::FeatureRows;
use shared::matrix;
use shared::rng::KeyedRng;

/// Directions iterated together: more than are kept, which speeds convergence.
const BLOCK: usize = 8;
/// Iterations at most.
const MAX_ITERATIONS: usize = 100;
/// The iteration ends when the leading variances change by less than this fraction.
const TOLERANCE: f64 = 1e-6;

/// Samples in the plane of their two leading principal components.
#[derive(Debug, Clone, PartialEq)]
pub struct Plane {
    /// One point per sample that was asked for.
    pub points: Vec<[f64; 2]>,
    /// The share of the whole variance along each axis, from 0 to 1.
    pub explained: [f64; 2],
}

/// Projects the unit-length features of the first view of `samples` onto their two leading components.
///
/// The sign of each axis is such that the largest coordinate of its direction is positive. Fewer than two components (one
/// sample, features of width 1, no variance) give zeros.
///
/// # Errors
/// When a matrix product fails.
pub fn plane(rows: &FeatureRows<'_>, samples: &[usize]) -> Result<Plane> {
    let (count, width) = (samples.len(), rows.width());
    let mut data = matrix::gather(count, width, |i, out| {
        out.copy_from_slice(rows.row(samples[i], 0));
        matrix::normalize_row(out);
    });
    let total = centre(&mut data, width);
    let mut result = Plane { points: vec![[0.0; 2]; count], explained: [0.0; 2] };
    if total <= 0.0 {
        return Ok(result);
    }
    let xs = matrix::tensor(data, count, width)?; // (N, F)
    let (directions, variances) = leading_directions(&xs, width)?;
    for axis in 0..2.min(variances.len()) {
        let direction: Vec<f32> = directions[axis].iter().map(|&x| x as f32).collect();
        let projected = xs.matmul(&matrix::tensor(direction, width, 1)?)?; // (N, 1)
        matrix::with_slice(&projected, |values| {
            for (point, &value) in result.points.iter_mut().zip(values) {
                point[axis] = f64::from(value);
            }
        })?;
        result.explained[axis] = (variances[axis] / total).clamp(0.0, 1.0);
    }
    Ok(result)
}

/// Subtracts the mean row; returns the sum of all squares that is left.
fn centre(data: &mut [f32], width: usize) -> f64 {
    let count = data.len() / width.max(1);
    let mut mean = vec![0.0; width];
    for row in data.chunks(width) {
        for (sum, &x) in mean.iter_mut().zip(row) {
            *sum += f64::from(x) / count as f64;
        }
    }
    let mut total = 0.0;
    for row in data.chunks_mut(width) {
        for (x, mean) in row.iter_mut().zip(&mean) {
            let centred = f64::from(*x) - mean;
            *x = centred as f32;
            total += centred * centred;
        }
    }
    // What rounding leaves of constant data is no variance.
    if total < 1e-12 * count as f64 { 0.0 } else { total }
}

/// Directions of largest variance and the sum of squares along each, in falling order.
fn leading_directions(xs: &Tensor, width: usize) -> Result<(Vec<Vec<f64>>, Vec<f64>)> {
    let block = BLOCK.min(width);
    let mut rng = KeyedRng::new("pca-start", 0, &[]);
    let mut directions: Vec<Vec<f64>> = (0..block).map(|_| (0..width).map(|_| rng.normal()).collect()).collect();
    orthonormalize(&mut directions);
    let mut variances = vec![0.0; block];
    for _ in 0..MAX_ITERATIONS {
        let flat: Vec<f32> = directions.iter().flatten().map(|&x| x as f32).collect();
        let projected = xs.matmul(&matrix::tensor(flat, block, width)?.t()?)?; // (N, block)
        let image = projected.t()?.matmul(xs)?; // (block, F)
        directions = matrix::with_slice(&image, |values| {
            values.chunks(width).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
        })?;
        let next = orthonormalize(&mut directions);
        let settled = next.iter().zip(&variances).take(2).all(|(a, b): (&f64, &f64)| (a - b).abs() <= TOLERANCE * a);
        variances = next;
        if settled {
            break;
        }
    }
    for direction in &mut directions {
        let largest = direction.iter().fold(0.0_f64, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
        if largest < 0.0 {
            for x in direction.iter_mut() {
                *x = -*x;
            }
        }
    }
    Ok((directions, variances))
}

/// Makes the rows orthonormal (Gram and Schmidt, twice, for accuracy); returns the length of each before scaling.
///
/// Rows that depend on earlier ones become zero.
fn orthonormalize(rows: &mut [Vec<f64>]) -> Vec<f64> {
    let mut lengths = Vec::with_capacity(rows.len());
    for i in 0..rows.len() {
        let (done, rest) = rows.split_at_mut(i);
        let row = &mut rest[0];
        let before = dot(row, row).sqrt();
        for _ in 0..2 {
            for earlier in &*done {
                let share = dot(row, earlier);
                row.iter_mut().zip(earlier).for_each(|(x, e)| *x -= share * e);
            }
        }
        let length = dot(row, row).sqrt();
        let scale = if length > 1e-9 * before { length.recip() } else { 0.0 };
        for x in row.iter_mut() {
            *x *= scale;
        }
        lengths.push(length);
    }
    lengths
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plane_of(data: &[f32], width: usize) -> Plane {
        let count = data.len() / width;
        let (labels, ids) = (vec![0; count], vec![0; count]);
        let rows = FeatureRows::new(vec![data], 1, width, &labels, &ids).unwrap();
        plane(&rows, &(0..count).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn an_ellipse_in_a_tilted_plane_is_laid_flat() {
        // Far from the origin unit length changes little: points (100, 3 cos a, sin a, 0) vary along axis 1, then axis 2.
        let data: Vec<f32> = (0..40)
            .flat_map(|i| {
                let angle = i as f32 * std::f32::consts::TAU / 40.0;
                [100.0, 3.0 * angle.cos(), angle.sin(), 0.0]
            })
            .collect();
        let plane = plane_of(&data, 4);
        assert!((plane.explained[0] - 0.9).abs() < 1e-3 && (plane.explained[1] - 0.1).abs() < 1e-3, "{plane:?}");
        for (i, point) in plane.points.iter().enumerate() {
            let angle = i as f64 * std::f64::consts::TAU / 40.0;
            assert!((point[0] - 0.03 * angle.cos()).abs() < 1e-4, "{i} {point:?}");
            assert!((point[1] - 0.01 * angle.sin()).abs() < 1e-4, "{i} {point:?}");
        }
    }

    #[test]
    fn projections_keep_the_variance_they_explain() {
        let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.4;
        let plane = plane_of(&(0..300 * 20).map(value).collect::<Vec<_>>(), 20);
        let sums = [0, 1].map(|axis| plane.points.iter().map(|point| point[axis] * point[axis]).sum::<f64>());
        assert!(sums[0] >= sums[1] && plane.explained[0] >= plane.explained[1]);
        assert!((sums[0] / plane.explained[0] / (sums[1] / plane.explained[1]) - 1.0).abs() < 1e-2);
        assert!(plane.points.iter().map(|point| point[0] * point[1]).sum::<f64>().abs() < 0.05 * sums[1]);
    }

    #[test]
    fn data_without_variance_gives_zeros() {
        assert_eq!(plane_of(&[1.0, 2.0], 2).points, [[0.0; 2]]);
        let constant = plane_of(&[1.0, 2.0, 2.0, 4.0, 0.5, 1.0], 2);
        assert_eq!((constant.points, constant.explained), (vec![[0.0; 2]; 3], [0.0; 2]));
        assert_eq!(plane_of(&[0.0; 12], 4).points, [[0.0; 2]; 3]);
        assert_eq!(plane_of(&[1.0, -1.0, 1.0], 1).points.len(), 3);
    }
}
