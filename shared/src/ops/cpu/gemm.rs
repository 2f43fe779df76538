//! Single-threaded matrix products on strided views; the callers cut the work into pieces.
#![expect(unsafe_code, reason = "the gemm crate takes raw pointers")]

/// A read-only matrix: element `(row, column)` lies at `row * row_stride + column * column_stride`.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `row_stride` values each.
    pub(super) fn rows(data: &'a [f32], row_stride: usize) -> Self {
        Self { data, row_stride, column_stride: 1 }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// The matrix without its first columns.
    pub(super) fn skip_columns(self, columns: usize) -> Self {
        Self { data: &self.data[columns * self.column_stride..], ..self }
    }

    fn assert_holds(&self, rows: usize, columns: usize) {
        let last = (rows - 1) * self.row_stride + (columns - 1) * self.column_stride;
        assert!(last < self.data.len(), "matrix view out of bounds");
    }
}

/// `out = a b`, or `out += a b`; `out` is `m` rows of `out_stride` values of which the first `n` are written.
///
/// # Panics
/// When a view or `out` is too short for `m x k`, `k x n`, `m x n`.
pub(super) fn multiply(
    [m, n, k]: [usize; 3],
    a: View<'_>,
    b: View<'_>,
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            out.chunks_mut(out_stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    a.assert_holds(m, k);
    b.assert_holds(k, n);
    assert!(n <= out_stride && (m - 1) * out_stride + n <= out.len(), "output out of bounds");
    // SAFETY: the assertions above put the last element of each matrix inside its slice, all strides are non-negative, and
    // `out` is borrowed mutably, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_views_and_transposes_match_plain_sums() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.61).cos()).collect();
        let mut out = vec![1.0; m * 9];
        multiply([m, n, k], View::rows(&a, k), View::rows(&b, k).t(), &mut out, 9, true);
        for i in 0..m {
            for j in 0..n {
                let expected = 1.0 + (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum::<f32>();
                assert!((out[i * 9 + j] - expected).abs() < 1e-6);
            }
            assert_eq!(&out[i * 9 + n..(i + 1) * 9], [1.0, 1.0]);
        }
    }
}
