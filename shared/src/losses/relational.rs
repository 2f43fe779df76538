//! Relational distillation: the student keeps the distances and angles between the teacher's embeddings.
//!
//! Relations exist between samples of one group only, rows that stand together, so that a loss does not depend on how a batch
//! is cut into pieces of whole groups. Both losses are functions of the squared distances between rows; losses and gradients
//! are computed in f64, in one order.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::{Error, Result};

/// The least squared distance that counts as one.
const MIN_SQUARED_DISTANCE: f64 = 1e-12;
/// The squared length below which a difference of rows has no direction.
const MIN_SQUARED_LENGTH: f64 = 1e-24;

/// How far the student's distances between rows are from the teacher's, each in units of the mean distance in its group.
///
/// Of a group of `n` rows: the mean over all `n^2` ordered pairs of `smooth_l1(d_ij / mean(d) - t_ij / mean(t))`, where a row's
/// distance to itself is 0 and does not count in `mean`. The loss is the mean over the groups. Only `student` gets a gradient.
///
/// # Shapes
/// - `student`: `(B, D)` f32; `teacher`: `(B, E)` f32
/// - `groups` divides `B` into groups of two rows at least
/// - returns: scalar
///
/// # Errors
/// `Error::Shape` when the two differ in their rows or cannot be cut into the groups.
///
/// # Source
/// Park et al., RKD, arXiv 1904.05068, section 3.2.1; official code `metric/loss.py`, `RkdDistance`, which `DisCo/loss.py` repeats.
pub fn rkd_distance(student: &Tensor, teacher: &Tensor, groups: usize) -> Result<Tensor> {
    relational("rkd_distance", student, teacher, groups, distance_loss)
}

/// How far the cosines of the student's angles between three rows are from the teacher's.
///
/// Of a group of `n` rows: the mean over all `n^3` ordered triples of `smooth_l1(cos_ijk - t_ijk)`, where `cos_ijk` is that of the
/// angle at row `i` between the directions to `j` and `k`; a direction from a row to its equal is 0. The loss is the mean over the
/// groups. Only `student` gets a gradient.
///
/// # Shapes
/// As [`rkd_distance`].
///
/// # Errors
/// As [`rkd_distance`].
///
/// # Source
/// Park et al., RKD, arXiv 1904.05068, section 3.2.2; official code `metric/loss.py`, `RKdAngle`, which `DisCo/loss.py` repeats.
pub fn rkd_angle(student: &Tensor, teacher: &Tensor, groups: usize) -> Result<Tensor> {
    relational("rkd_angle", student, teacher, groups, angle_loss)
}

/// The squared distances between the rows of a group.
#[derive(Debug)]
struct Distances {
    count: usize,
    /// `(n, n)`.
    squared: Vec<f64>,
}

/// A loss and its gradient as a matrix: row `i` of the gradient is the sum over `k` of entry `(i, k)` times row `k`.
#[derive(Debug)]
struct Relation {
    loss: f64,
    /// `(n, n)`.
    coefficients: Vec<f64>,
}

impl Distances {
    fn new(rows: &[f32], width: usize) -> Self {
        let count = rows.len() / width;
        let row = |index: usize| &rows[index * width..(index + 1) * width];
        let mut squared = vec![0.0; count * count];
        for i in 0..count {
            for j in 0..i {
                let sum = row(i).iter().zip(row(j)).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>();
                squared[i * count + j] = sum;
                squared[j * count + i] = sum;
            }
        }
        Self { count, squared }
    }

    fn squared(&self, i: usize, j: usize) -> f64 {
        self.squared[i * self.count + j]
    }

    /// The distance of two rows, 0 of a row to itself.
    fn distance(&self, i: usize, j: usize) -> f64 {
        // NaN stays.
        let squared = self.squared(i, j);
        if i == j {
            0.0
        } else if squared < MIN_SQUARED_DISTANCE {
            MIN_SQUARED_DISTANCE.sqrt()
        } else {
            squared.sqrt()
        }
    }

    /// The mean distance of two different rows.
    fn mean(&self) -> f64 {
        let all = (0..self.count).flat_map(|i| (0..self.count).map(move |j| (i, j)));
        all.map(|(i, j)| self.distance(i, j)).sum::<f64>() / (self.count * (self.count - 1)) as f64
    }

    /// The reciprocal distance of two rows; 0 where there is no direction from one to the other.
    fn reciprocal(&self, i: usize, j: usize) -> f64 {
        let squared = self.squared(i, j);
        if squared < MIN_SQUARED_LENGTH { 0.0 } else { squared.sqrt().recip() }
    }

    /// The cosine of the angle at `i` between the directions to `j` and `k`.
    fn cosine(&self, reciprocals: &[f64], i: usize, j: usize, k: usize) -> f64 {
        let product = 0.5 * (self.squared(i, j) + self.squared(i, k) - self.squared(j, k));
        product * reciprocals[i * self.count + j] * reciprocals[i * self.count + k]
    }

    fn reciprocals(&self) -> Vec<f64> {
        let all = (0..self.count).flat_map(|i| (0..self.count).map(move |j| (i, j)));
        all.map(|(i, j)| self.reciprocal(i, j)).collect()
    }
}

fn distance_loss(student: &Distances, teacher: &Distances) -> Relation {
    let count = student.count;
    let (mean, teacher_mean) = (student.mean(), teacher.mean());
    let pairs = (count * count) as f64;
    let (mut loss, mut along) = (0.0, 0.0);
    // The derivatives of the loss by the distances in units of their mean.
    let mut slopes = vec![0.0; count * count];
    for i in 0..count {
        for j in 0..count {
            let distance = student.distance(i, j);
            let difference = distance / mean - teacher.distance(i, j) / teacher_mean;
            loss += smooth_l1(difference) / pairs;
            let slope = smooth_l1_slope(difference) / pairs;
            slopes[i * count + j] = slope;
            along += slope * distance;
        }
    }
    let by_mean = along / (mean * mean) / (count * (count - 1)) as f64;
    let mut coefficients = vec![0.0; count * count];
    for i in 0..count {
        for j in (0..count).filter(|&j| j != i) {
            if student.squared(i, j) < MIN_SQUARED_DISTANCE {
                continue;
            }
            // Each distance stands in two pairs, and its square has twice the difference as its gradient.
            let factor = 2.0 * (slopes[i * count + j] / mean - by_mean) / student.distance(i, j);
            coefficients[i * count + i] += factor;
            coefficients[i * count + j] -= factor;
        }
    }
    Relation { loss, coefficients }
}

fn angle_loss(student: &Distances, teacher: &Distances) -> Relation {
    let count = student.count;
    let (reciprocals, teacher_reciprocals) = (student.reciprocals(), teacher.reciprocals());
    let triples = (count * count * count) as f64;
    let mut loss = 0.0;
    let mut coefficients = vec![0.0; count * count];
    let mut slopes = vec![0.0; count];
    for i in 0..count {
        for j in 0..count {
            let mut along = 0.0;
            for (k, slope) in slopes.iter_mut().enumerate() {
                let cosine = student.cosine(&reciprocals, i, j, k);
                let difference = cosine - teacher.cosine(&teacher_reciprocals, i, j, k);
                loss += smooth_l1(difference) / triples;
                *slope = smooth_l1_slope(difference) / triples;
                along += *slope * cosine;
            }
            let reciprocal = reciprocals[i * count + j];
            for (k, slope) in slopes.iter().enumerate() {
                // What the difference of rows `k` and `i` adds to the gradient by the difference of `j` and `i`; each angle
                // stands in two triples.
                let mut factor = 2.0 * slope * reciprocal * reciprocals[i * count + k];
                if k == j {
                    factor -= 2.0 * along * reciprocal * reciprocal;
                }
                coefficients[j * count + k] += factor;
                coefficients[j * count + i] -= factor;
                coefficients[i * count + k] -= factor;
                coefficients[i * count + i] += factor;
            }
        }
    }
    Relation { loss, coefficients }
}

fn smooth_l1(x: f64) -> f64 {
    if x.abs() < 1.0 { 0.5 * x * x } else { x.abs() - 0.5 }
}

fn smooth_l1_slope(x: f64) -> f64 {
    // Not `clamp` by comparisons: NaN stays.
    if x.abs() < 1.0 || x.is_nan() { x } else { x.signum() }
}

fn relational(
    op: &'static str,
    student: &Tensor,
    teacher: &Tensor,
    groups: usize,
    relation: fn(&Distances, &Distances) -> Relation,
) -> Result<Tensor> {
    let wrong = || Error::Shape {
        op,
        expected: format!("(B, D) and (B, E), B in {groups} groups of two rows at least"),
        got: format!("{:?} and {:?}", student.dims(), teacher.dims()),
    };
    let (&[rows, width], &[teacher_rows, teacher_width]) = (student.dims(), teacher.dims()) else {
        return Err(wrong());
    };
    if rows != teacher_rows || groups == 0 || !rows.is_multiple_of(groups) || rows < 2 * groups {
        return Err(wrong());
    }
    if width == 0 || teacher_width == 0 {
        return Err(wrong());
    }
    let (ours, theirs) = (flat(student)?, flat(teacher)?);
    let size = rows / groups;
    let results: Vec<(f64, Vec<f32>)> = ours
        .par_chunks_exact(size * width)
        .zip(theirs.par_chunks_exact(size * teacher_width))
        .map(|(ours, theirs)| {
            let found = relation(&Distances::new(ours, width), &Distances::new(theirs, teacher_width));
            (found.loss, gradient(&found.coefficients, ours, width, groups))
        })
        .collect();
    let loss = results.iter().map(|(loss, _)| loss).sum::<f64>() / groups as f64;
    let gradient: Vec<f32> = results.into_iter().flat_map(|(_, gradient)| gradient).collect();
    let gradient = Tensor::from_vec(gradient, (rows, width), student.device())?;
    with_gradient(student, loss as f32, &gradient)
}

/// The gradient by the rows of a group.
fn gradient(coefficients: &[f64], rows: &[f32], width: usize, groups: usize) -> Vec<f32> {
    let count = rows.len() / width;
    let mut gradient = Vec::with_capacity(rows.len());
    let mut sums = vec![0.0; width];
    for coefficients in coefficients.chunks_exact(count) {
        sums.fill(0.0);
        for (coefficient, row) in coefficients.iter().zip(rows.chunks_exact(width)) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += coefficient * f64::from(*x);
            }
        }
        gradient.extend(sums.iter().map(|sum| (sum / groups as f64) as f32));
    }
    gradient
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.detach().flatten_all()?.to_vec1::<f32>()?)
}

/// A scalar of a known value and a known gradient by `xs`.
fn with_gradient(xs: &Tensor, value: f32, gradient: &Tensor) -> Result<Tensor> {
    // The difference is 0 and bears the graph.
    let nothing = (xs - xs.detach())?;
    Ok(((nothing * gradient)?.sum_all()? + f64::from(value))?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    type Loss = fn(&Tensor, &Tensor, usize) -> Result<Tensor>;

    fn rows(count: usize, width: usize, phase: f32) -> Tensor {
        let values: Vec<f32> = (0..count * width).map(|i| (i as f32 * 1.7 + phase).sin()).collect();
        Tensor::from_vec(values, (count, width), &Device::Cpu).unwrap()
    }

    fn value(loss: Loss, student: &Tensor, teacher: &Tensor, groups: usize) -> f32 {
        loss(student, teacher, groups).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn what_keeps_all_relations_costs_nothing() {
        let teacher = rows(6, 5, 0.3);
        let moved = ((&teacher * 3.0).unwrap() + 2.0).unwrap();
        for loss in [rkd_distance as Loss, rkd_angle] {
            assert!(value(loss, &moved, &teacher, 2) < 1e-11);
            assert!(value(loss, &rows(6, 5, 0.9), &teacher, 2) > 1e-3);
        }
    }

    #[test]
    fn three_rows_by_hand() {
        let student = Tensor::new(&[[0f32, 0.0], [3.0, 0.0], [0.0, 4.0]], &Device::Cpu).unwrap();
        let teacher = Tensor::new(&[[0f32, 0.0], [1.0, 0.0], [2.0, 0.0]], &Device::Cpu).unwrap();
        // Distances 3, 4, 5 of mean 4 and 1, 2, 1 of mean 4/3: differences 0, -0.5, 0.5, each in two pairs of nine.
        assert!((value(rkd_distance, &student, &teacher, 1) - 2.0 * (0.125 + 0.125) / 9.0).abs() < 1e-6);
        // Cosines 0, 0.6, 0.8 and 1, -1, 1, at the three rows, each in two triples of 27: differences -1, 1.6, -0.2.
        assert!((value(rkd_angle, &student, &teacher, 1) - 2.0 * (0.5 + 1.1 + 0.02) / 27.0).abs() < 1e-6);
    }

    #[test]
    fn groups_know_nothing_of_each_other() {
        let (student, teacher) = (rows(8, 5, 0.1), rows(8, 3, 0.6));
        for loss in [rkd_distance as Loss, rkd_angle] {
            let halves = [0, 4].map(|start| {
                let (student, teacher) = (student.narrow(0, start, 4).unwrap(), teacher.narrow(0, start, 4).unwrap());
                value(loss, &student, &teacher, 1)
            });
            let both = value(loss, &student, &teacher, 2);
            assert!((both - f32::midpoint(halves[0], halves[1])).abs() < 1e-7);
            assert!((both - value(loss, &student, &teacher, 1)).abs() > 1e-4);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        const STEP: f32 = 1e-2;
        let teacher = rows(8, 4, 0.6);
        for loss in [rkd_distance as Loss, rkd_angle] {
            let student = Var::from_tensor(&rows(8, 5, 0.1)).unwrap();
            let tripled = (loss(&student, &teacher, 2).unwrap() * 3.0).unwrap();
            let grads = tripled.backward().unwrap();
            let gradient = grads.get(&student).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let at = student.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for index in 0..at.len() {
                let shifted = |by: f32| {
                    let mut at = at.clone();
                    at[index] += by;
                    3.0 * value(loss, &Tensor::from_vec(at, (8, 5), &Device::Cpu).unwrap(), &teacher, 2)
                };
                let expected = (shifted(STEP) - shifted(-STEP)) / (2.0 * STEP);
                assert!((gradient[index] - expected).abs() < 2e-4, "{index}: {} {expected}", gradient[index]);
            }
            assert!(gradient.iter().any(|x| x.abs() > 1e-2));
        }
    }

    #[test]
    fn equal_rows_have_finite_gradients() {
        let teacher = rows(4, 3, 0.2);
        for loss in [rkd_distance as Loss, rkd_angle] {
            let student = Var::ones((4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
            let grads = loss(&student, &teacher, 1).unwrap().backward().unwrap();
            let gradient = grads.get(&student).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(gradient.iter().all(|x| x.is_finite()), "{gradient:?}");
        }
    }

    #[test]
    fn misfits_are_refused() {
        for (rows_, groups) in [(4, 3), (4, 0), (4, 4)] {
            assert!(matches!(rkd_angle(&rows(rows_, 3, 0.0), &rows(4, 3, 0.1), groups), Err(Error::Shape { .. })));
        }
        assert!(matches!(rkd_distance(&rows(4, 3, 0.0), &rows(6, 3, 0.1), 2), Err(Error::Shape { .. })));
    }
}
