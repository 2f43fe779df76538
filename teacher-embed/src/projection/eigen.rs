//! The largest eigenvalues of a symmetric matrix and their vectors, in a fixed order and with fixed signs.

use nalgebra::{DMatrix, SymmetricEigen};
use shared::{Error, Result};

/// QR steps that each eigenvalue may take on average; two or three are usual.
const STEPS_PER_VALUE: usize = 64;

/// The `count` largest eigenvalues, not increasing, and their vectors `(count, F)`, flattened. Only the lower triangle is read.
///
/// Of each vector the first coordinate of the largest magnitude is positive. Values that rounding made negative are zero: the
/// matrix is a covariance.
///
/// # Errors
/// [`Error::Invalid`] when the matrix holds numbers that are not finite, or does not converge.
///
/// # Source
/// Householder reflections to a tridiagonal matrix, then implicit QR steps (Golub and Van Loan, Matrix Computations, 8.3), as
/// nalgebra has them: scalar loops in one order, without vector extensions chosen at run time.
pub(super) fn largest(matrix: DMatrix<f64>, count: usize) -> Result<(Vec<f64>, Vec<f32>)> {
    let failed = || {
        let hint = "leave `--pca` out, or check the checkpoint: its outputs may be far too large";
        Error::invalid("the principal components of the teacher's outputs cannot be computed", hint)
    };
    if !matrix.iter().all(|x| x.is_finite()) {
        return Err(failed());
    }
    let steps = STEPS_PER_VALUE * matrix.nrows().max(1);
    let SymmetricEigen { eigenvalues, eigenvectors } =
        SymmetricEigen::try_new(matrix, f64::EPSILON, steps).ok_or_else(failed)?;
    let mut order: Vec<usize> = (0..eigenvalues.len()).collect();
    order.sort_by(|a, b| eigenvalues[*b].total_cmp(&eigenvalues[*a]));
    order.truncate(count);
    let mut vectors = Vec::with_capacity(count * eigenvectors.nrows());
    for index in &order {
        let vector = eigenvectors.column(*index);
        let top = vector.iter().fold(0.0_f64, |top, x| if x.abs() > top.abs() { *x } else { top });
        vectors.extend(vector.iter().map(|x| (if top < 0.0 { -x } else { *x }) as f32));
    }
    Ok((order.iter().map(|index| eigenvalues[*index].max(0.0)).collect(), vectors))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Q diag(values) Q^T` for a rotation of the first two axes by 30 degrees.
    fn turned(values: &[f64]) -> DMatrix<f64> {
        let (sin, cos) = (0.5, 0.75f64.sqrt());
        let mut turn = DMatrix::identity(values.len(), values.len());
        (turn[(0, 0)], turn[(0, 1)], turn[(1, 0)], turn[(1, 1)]) = (cos, -sin, sin, cos);
        &turn * DMatrix::from_diagonal(&values.to_vec().into()) * turn.transpose()
    }

    #[test]
    fn values_come_sorted_with_their_vectors_and_signs() {
        let (values, vectors) = largest(turned(&[1.0, 4.0, 2.0]), 3).unwrap();
        let expected = [(4.0, [-0.5, 0.75f32.sqrt(), 0.0]), (2.0, [0.0, 0.0, 1.0]), (1.0, [0.75f32.sqrt(), 0.5, 0.0])];
        for (((value, vector), found), row) in expected.iter().zip(&values).zip(vectors.chunks(3)) {
            assert!((value - found).abs() < 1e-12, "{values:?}");
            assert!(vector.iter().zip(row).all(|(a, b)| (a - b).abs() < 1e-6), "{row:?}, expected {vector:?}");
        }
        assert_eq!(largest(turned(&[1.0, 4.0, 2.0]), 1).unwrap().0.len(), 1);
    }

    #[test]
    fn matrices_without_full_rank_have_orthonormal_vectors_and_no_negative_values() {
        let width = 40;
        // Rank 3, with dead columns; rank 1; nothing at all.
        let wave = |row: usize, column: usize| ((row * 37 + column * 11) % 17) as f64 - 8.0;
        let low = DMatrix::from_fn(3, width, |i, j| if j % 4 == 0 { 0.0 } else { wave(i, j) });
        for matrix in [low.transpose() * &low, DMatrix::from_element(width, width, 3.0), DMatrix::zeros(width, width)] {
            let (values, vectors) = largest(matrix, width).unwrap();
            assert!(
                values.iter().all(|value| *value >= 0.0) && values[3] <= 1e-9 * values[0].max(1e-300),
                "{values:?}"
            );
            for i in 0..width {
                for j in 0..width {
                    let row = |index: usize| vectors[index * width..(index + 1) * width].iter();
                    let product: f32 = row(i).zip(row(j)).map(|(a, b)| a * b).sum();
                    assert!((product - f32::from(u8::from(i == j))).abs() < 1e-5, "{i} {j} {product}");
                }
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut matrix = DMatrix::identity(3, 3);
            matrix[(1, 0)] = bad;
            assert!(matches!(largest(matrix, 2), Err(Error::Invalid { .. })));
        }
    }
}
