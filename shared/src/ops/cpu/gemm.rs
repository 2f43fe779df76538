//! Matrix products of tiles that lie in a core's cache: the inner kernel of every convolution and linear layer.
//!
//! The left factor is read where it lies, with any distance between its rows, and may consist of several runs side by side
//! ([`Run`]): that is how a convolution reads the pixels under its kernel without gathering them. The right factor is arranged once
//! into panels of one to three vectors' width ([`Packed`]). A block of rows times a panel is summed in registers.
#![expect(unsafe_code, reason = "register blocks over raw pointers; every public function checks the sizes")]
#![expect(clippy::multiple_unsafe_ops_per_block, clippy::inline_always, reason = "kernels are one unsafe computation")]
#![expect(clippy::too_many_arguments, reason = "a kernel takes pointers and strides one by one")]

use rayon::prelude::*;

use super::simd::{Portable, Simd, dispatch};
use crate::ops::isa::{Isa, isa};

/// Numbers of a right factor above which it is packed by several threads.
const PARALLEL_PACK: usize = 32 * 1024;
/// Vectors in the widest panel.
const WIDEST: usize = 3;

/// Numbers in a vector of the instruction set in use.
pub(super) fn lanes() -> usize {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => <std::arch::x86_64::__m512 as Simd>::LANES,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => <std::arch::x86_64::__m256 as Simd>::LANES,
        _ => Portable::LANES,
    }
}

/// Vectors of the next panel when `left` remain: no remainder of one, which would compute half idle.
fn panel_vectors(left: usize) -> usize {
    match left {
        1 => 1,
        left if left % 2 == 1 => WIDEST,
        _ => 2,
    }
}

/// Columns of one panel, as widths and first columns, for a right factor of `columns`.
fn panels(columns: usize) -> Vec<(usize, usize)> {
    let lanes = lanes();
    let (mut left, mut first, mut all) = (columns.div_ceil(lanes), 0, Vec::new());
    while left > 0 {
        let vectors = panel_vectors(left);
        all.push((first, vectors));
        first += vectors * lanes;
        left -= vectors;
    }
    all
}

/// Right factors of one shape, `rows x columns`, arranged for the kernels of the instruction set in use.
#[derive(Debug)]
pub(super) struct Packed {
    /// Panel by panel, within a panel factor by factor, within a factor row by row.
    values: Vec<f32>,
    factors: usize,
    rows: usize,
    columns: usize,
    /// First column and vectors of each panel.
    panels: Vec<(usize, usize)>,
    lanes: usize,
}

impl Packed {
    /// Arranges the matrix whose element `(row, column)` is `values[row * row_stride + column * column_stride]`.
    ///
    /// # Panics
    /// When `values` is too short.
    pub(super) fn new(values: &[f32], rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> Self {
        assert!(
            rows * columns == 0 || (rows - 1) * row_stride + (columns - 1) * column_stride < values.len(),
            "the right factor is longer than its values"
        );
        Self::from_rows(rows, columns, |row, first, target| {
            let start = row * row_stride + first * column_stride;
            if column_stride == 1 {
                target.copy_from_slice(&values[start..start + target.len()]);
            } else {
                for (offset, slot) in target.iter_mut().enumerate() {
                    *slot = values[start + offset * column_stride];
                }
            }
        })
    }

    /// Arranges a matrix whose parts `fill` writes: `(row, first column, target)`.
    pub(super) fn from_rows(rows: usize, columns: usize, fill: impl Fn(usize, usize, &mut [f32]) + Sync) -> Self {
        Self::from_panels(1, rows, columns, |first, width, part| {
            let used = width.min(columns - first);
            for (row, target) in part.chunks_exact_mut(width).enumerate() {
                fill(row, first, &mut target[..used]);
            }
        })
    }

    /// Arranges `factors` matrices whose panels `fill` writes: `(first column, width, target)`, where the target holds the rows of all
    /// factors, each as wide as the panel. Columns beyond the last are 0 already.
    pub(super) fn from_panels(
        factors: usize,
        rows: usize,
        columns: usize,
        fill: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) -> Self {
        let (lanes, panels) = (lanes(), panels(columns));
        let mut values = vec![0.0; columns.div_ceil(lanes) * lanes * rows * factors];
        let mut parts = Vec::with_capacity(panels.len());
        let mut rest = values.as_mut_slice();
        for &(first, vectors) in &panels {
            let (part, others) = rest.split_at_mut(factors * rows * vectors * lanes);
            parts.push((first, vectors * lanes, part));
            rest = others;
        }
        let pack = |(first, width, part): (usize, usize, &mut [f32])| fill(first, width, part);
        if factors * rows * columns > PARALLEL_PACK {
            parts.into_par_iter().for_each(pack);
        } else {
            parts.into_iter().for_each(pack);
        }
        Self { values, factors, rows, columns, panels, lanes }
    }

    /// The panels of a factor, to be multiplied one after the other.
    pub(super) fn panels(&self, factor: usize) -> impl Iterator<Item = Panel<'_>> {
        let mut start = 0;
        self.panels.iter().map(move |&(first, vectors)| {
            let length = self.rows * vectors * self.lanes;
            let values = &self.values[start + factor * length..][..length];
            start += self.factors * length;
            let columns = (vectors * self.lanes).min(self.columns - first);
            Panel { values, first, vectors, columns, rows: self.rows }
        })
    }
}

/// Some columns of a right factor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panel<'a> {
    values: &'a [f32],
    first: usize,
    vectors: usize,
    columns: usize,
    rows: usize,
}

/// Neighbouring columns of a left factor: `length` values in each row, which meet the right factor's rows from `factor_row` on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) values: &'a [f32],
    pub(super) length: usize,
    pub(super) factor_row: usize,
}

/// [`Run`] for the kernels.
#[derive(Debug, Clone, Copy)]
struct RawRun {
    left: *const f32,
    right: *const f32,
    length: usize,
}

const NO_RUN: RawRun = RawRun { left: std::ptr::null(), right: std::ptr::null(), length: 0 };

/// Most runs of a left factor: rows of a convolution's kernel.
pub(super) const MAX_RUNS: usize = 16;

impl Panel<'_> {
    /// `out = left * panel`, or `out += left * panel`, where row `i` of `left` begins `i * left_stride` behind the start of each run and
    /// row `i` of `out` (of all columns) at `i * out_stride`.
    ///
    /// # Panics
    /// When a run or `out` is too short, or a run reaches beyond the right factor.
    pub(super) fn multiply(
        &self,
        rows: usize,
        runs: &[Run<'_>],
        left_stride: usize,
        out: &mut [f32],
        out_stride: usize,
        accumulate: bool,
    ) {
        if rows == 0 {
            return;
        }
        let width = self.vectors * lanes();
        assert!(runs.len() <= MAX_RUNS, "too many runs");
        assert_eq!(width * self.rows, self.values.len(), "packed for another instruction set");
        assert!((rows - 1) * out_stride + self.first + self.columns <= out.len(), "output out of bounds");
        let mut raw = [NO_RUN; MAX_RUNS];
        for (raw, run) in raw.iter_mut().zip(runs) {
            assert!((rows - 1) * left_stride + run.length <= run.values.len(), "left factor out of bounds");
            assert!(run.factor_row + run.length <= self.rows, "right factor out of bounds");
            let right = self.values[run.factor_row * width..].as_ptr();
            *raw = RawRun { left: run.values.as_ptr(), right, length: run.length };
        }
        let out = out[self.first..].as_mut_ptr();
        // SAFETY: by the assertions, the last element of each row of each run, of the panel and of `out` lies inside its slice; `out` is
        // borrowed mutably, so it overlaps none of the others.
        unsafe {
            let (vectors, columns) = (self.vectors, self.columns);
            multiply_panel(rows, &raw[..runs.len()], left_stride, width, out, out_stride, vectors, columns, accumulate);
        }
    }
}

/// `out = left * right` for a left factor of one run with `left_stride` between its rows.
///
/// # Panics
/// As [`Panel::multiply`].
pub(super) fn multiply(
    rows: usize,
    left: &[f32],
    left_stride: usize,
    right: &Packed,
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
) {
    multiply_factor(rows, left, left_stride, right, 0, out, out_stride, accumulate);
}

/// As [`multiply`], by one of several right factors.
///
/// # Panics
/// As [`Panel::multiply`].
pub(super) fn multiply_factor(
    rows: usize,
    left: &[f32],
    left_stride: usize,
    right: &Packed,
    factor: usize,
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
) {
    let run = Run { values: left, length: right.rows, factor_row: 0 };
    for panel in right.panels(factor) {
        panel.multiply(rows, &[run], left_stride, out, out_stride, accumulate);
    }
}

/// `out = left * right` for a right factor as it lies, rows of `right_stride` numbers of which `columns` are multiplied: for products
/// with few rows, which do not repay packing.
///
/// # Panics
/// When a slice is too short, or `columns` are not whole vectors (see [`lanes`]) and reach beyond the end of the last row.
pub(super) fn multiply_unpacked(
    [rows, columns, inner]: [usize; 3],
    left: &[f32],
    left_stride: usize,
    right: &[f32],
    right_stride: usize,
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(inner > 0 && (rows - 1) * left_stride + inner <= left.len(), "left factor out of bounds");
    assert!(columns <= out_stride && (rows - 1) * out_stride + columns <= out.len(), "output out of bounds");
    let lanes = lanes();
    assert!((inner - 1) * right_stride + columns.next_multiple_of(lanes) <= right.len(), "right factor out of bounds");
    for (first, vectors) in panels(columns) {
        let run = RawRun { left: left.as_ptr(), right: right[first..].as_ptr(), length: inner };
        let used = (vectors * lanes).min(columns - first);
        let out = out[first..].as_mut_ptr();
        // SAFETY: by the assertions, the last element of each row of each matrix lies inside its slice, whole vectors of the right factor
        // included; `out` is borrowed mutably, so it overlaps none of the others.
        unsafe {
            multiply_panel(rows, &[run], left_stride, right_stride, out, out_stride, vectors, used, accumulate);
        }
    }
}

/// Rows summed together, so that the last block is not much smaller than the others.
#[inline(always)]
fn balanced(rows: usize, most: usize) -> usize {
    rows.div_ceil(rows.div_ceil(most))
}

#[inline(always)]
unsafe fn block<V: Simd, const ROWS: usize, const VECTORS: usize>(
    runs: &[RawRun],
    first: usize,
    left_stride: usize,
    right_stride: usize,
    out: *mut f32,
    out_stride: usize,
    columns: usize,
    accumulate: bool,
) {
    // SAFETY: the contract of `multiply_panel`.
    unsafe {
        let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
        for run in runs {
            let left = run.left.add(first);
            let mut right = run.right;
            for k in 0..run.length {
                let mut factors = [V::splat(0.0); VECTORS];
                for (j, factor) in factors.iter_mut().enumerate() {
                    *factor = V::load(right.add(j * V::LANES));
                }
                right = right.wrapping_add(right_stride);
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*left.add(i * left_stride + k));
                    for (sum, factor) in sums.iter_mut().zip(factors) {
                        *sum = x.mul_add(factor, *sum);
                    }
                }
            }
        }
        let whole = columns == VECTORS * V::LANES;
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, sum) in sums.into_iter().enumerate() {
                let to = out.add(i * out_stride + j * V::LANES);
                if whole {
                    (if accumulate { sum.add(V::load(to)) } else { sum }).store(to);
                } else {
                    let count = columns - j * V::LANES;
                    (if accumulate { sum.add(V::load_first(to, count)) } else { sum }).store_first(to, count);
                }
            }
        }
    }
}

/// Calls `$function` with the number of rows as a constant.
macro_rules! with_rows {
    ($rows:expr, $most:tt, $function:ident::<$v:ty, $vectors:tt>($($argument:expr),*)) => {
        with_rows!(@ $rows, $most, $function, $v, $vectors, ($($argument),*))
    };
    (@ $rows:expr, 12, $f:ident, $v:ty, $n:tt, $a:tt) => {
        match $rows {
            1 => with_rows!(! $f, $v, 1, $n, $a), 2 => with_rows!(! $f, $v, 2, $n, $a), 3 => with_rows!(! $f, $v, 3, $n, $a),
            4 => with_rows!(! $f, $v, 4, $n, $a), 5 => with_rows!(! $f, $v, 5, $n, $a), 6 => with_rows!(! $f, $v, 6, $n, $a),
            7 => with_rows!(! $f, $v, 7, $n, $a), 8 => with_rows!(! $f, $v, 8, $n, $a), 9 => with_rows!(! $f, $v, 9, $n, $a),
            10 => with_rows!(! $f, $v, 10, $n, $a), 11 => with_rows!(! $f, $v, 11, $n, $a), _ => with_rows!(! $f, $v, 12, $n, $a),
        }
    };
    (@ $rows:expr, 8, $f:ident, $v:ty, $n:tt, $a:tt) => {
        match $rows {
            1 => with_rows!(! $f, $v, 1, $n, $a), 2 => with_rows!(! $f, $v, 2, $n, $a), 3 => with_rows!(! $f, $v, 3, $n, $a),
            4 => with_rows!(! $f, $v, 4, $n, $a), 5 => with_rows!(! $f, $v, 5, $n, $a), 6 => with_rows!(! $f, $v, 6, $n, $a),
            7 => with_rows!(! $f, $v, 7, $n, $a), _ => with_rows!(! $f, $v, 8, $n, $a),
        }
    };
    (@ $rows:expr, 6, $f:ident, $v:ty, $n:tt, $a:tt) => {
        match $rows {
            1 => with_rows!(! $f, $v, 1, $n, $a), 2 => with_rows!(! $f, $v, 2, $n, $a), 3 => with_rows!(! $f, $v, 3, $n, $a),
            4 => with_rows!(! $f, $v, 4, $n, $a), 5 => with_rows!(! $f, $v, 5, $n, $a), _ => with_rows!(! $f, $v, 6, $n, $a),
        }
    };
    (@ $rows:expr, 4, $f:ident, $v:ty, $n:tt, $a:tt) => {
        match $rows {
            1 => with_rows!(! $f, $v, 1, $n, $a), 2 => with_rows!(! $f, $v, 2, $n, $a), 3 => with_rows!(! $f, $v, 3, $n, $a),
            _ => with_rows!(! $f, $v, 4, $n, $a),
        }
    };
    (! $f:ident, $v:ty, $rows:tt, $n:tt, ($($argument:expr),*)) => { $f::<$v, $rows, $n>($($argument),*) };
}

/// Calls `$function` with the rows that fit the registers beside `$vectors`, and both as constants.
macro_rules! with_block {
    ($v:ty, $vectors:expr, $rows:expr, $function:ident($($argument:expr),*)) => {
        if <$v>::ACCUMULATORS >= 24 {
            match $vectors {
                1 => with_rows!($rows, 12, $function::<$v, 1>($($argument),*)),
                2 => with_rows!($rows, 12, $function::<$v, 2>($($argument),*)),
                _ => with_rows!($rows, 8, $function::<$v, 3>($($argument),*)),
            }
        } else {
            match $vectors {
                1 => with_rows!($rows, 12, $function::<$v, 1>($($argument),*)),
                2 => with_rows!($rows, 6, $function::<$v, 2>($($argument),*)),
                _ => with_rows!($rows, 4, $function::<$v, 3>($($argument),*)),
            }
        }
    };
}

/// Most rows of a block beside `vectors` vectors.
#[inline(always)]
fn most_rows<V: Simd>(vectors: usize) -> usize {
    (V::ACCUMULATORS / vectors).min(12)
}

#[inline(always)]
unsafe fn multiply_panel_with<V: Simd>(
    rows: usize,
    runs: &[RawRun],
    left_stride: usize,
    right_stride: usize,
    out: *mut f32,
    out_stride: usize,
    vectors: usize,
    columns: usize,
    accumulate: bool,
) {
    let step = balanced(rows, most_rows::<V>(vectors));
    let mut row = 0;
    while row < rows {
        let count = step.min(rows - row);
        let first = row * left_stride;
        // SAFETY: the contract of `multiply_panel`, for rows `row..row + count`.
        unsafe {
            let out = out.add(row * out_stride);
            with_block!(
                V,
                vectors,
                count,
                block(runs, first, left_stride, right_stride, out, out_stride, columns, accumulate)
            );
        }
        row += count;
    }
}

dispatch!(
    /// `out = sum of the runs' left * right` for one panel.
    ///
    /// # Safety
    /// Row `rows - 1` of each run, the right factors of each run and row `rows - 1` of `out` must be valid, `out` must not overlap
    /// the others, and `columns` must fit `vectors`.
    multiply_panel = multiply_panel_with(
        rows: usize,
        runs: &[RawRun],
        left_stride: usize,
        right_stride: usize,
        out: *mut f32,
        out_stride: usize,
        vectors: usize,
        columns: usize,
        accumulate: bool,
    )
);

/// Rows that two matrices share: `count` of them, `left_stride` and `right_stride` apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) left: &'a [f32],
    pub(super) right: &'a [f32],
    pub(super) count: usize,
}

/// [`Rows`] for the kernels.
#[derive(Debug, Clone, Copy)]
struct RawRows {
    left: *const f32,
    right: *const f32,
    count: usize,
}

/// Most pieces of shared rows in one call.
pub(super) const MAX_ROW_PIECES: usize = 64;

/// `sum += left^T right`, summed over shared rows: `left` is `m` wide, `right` is `n` wide, `sum` is `m x n` with `sum_stride` between rows.
///
/// # Panics
/// When a slice is too short, or there are more than [`MAX_ROW_PIECES`] pieces.
pub(super) fn multiply_transposed(
    [m, n]: [usize; 2],
    pieces: &[Rows<'_>],
    left_stride: usize,
    right_stride: usize,
    sum: &mut [f32],
    sum_stride: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(pieces.len() <= MAX_ROW_PIECES, "too many pieces of rows");
    assert!(n <= sum_stride && (m - 1) * sum_stride + n <= sum.len(), "sum out of bounds");
    let mut raw = [RawRows { left: std::ptr::null(), right: std::ptr::null(), count: 0 }; MAX_ROW_PIECES];
    for (raw, piece) in raw.iter_mut().zip(pieces) {
        if piece.count > 0 {
            assert!((piece.count - 1) * left_stride + m <= piece.left.len(), "left factor out of bounds");
            assert!((piece.count - 1) * right_stride + n <= piece.right.len(), "right factor out of bounds");
        }
        *raw = RawRows { left: piece.left.as_ptr(), right: piece.right.as_ptr(), count: piece.count };
    }
    // SAFETY: by the assertions, the last element of each row lies inside its slice; `sum` is borrowed mutably, so it overlaps neither.
    unsafe {
        multiply_transposed_raw(m, n, &raw[..pieces.len()], left_stride, right_stride, sum.as_mut_ptr(), sum_stride);
    }
}

#[inline(always)]
unsafe fn block_transposed<V: Simd, const ROWS: usize, const VECTORS: usize>(
    pieces: &[RawRows],
    row: usize,
    column: usize,
    left_stride: usize,
    right_stride: usize,
    sum: *mut f32,
    sum_stride: usize,
    columns: usize,
) {
    // SAFETY: the contract of `multiply_transposed_raw`.
    unsafe {
        let whole = columns == VECTORS * V::LANES;
        let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
        for piece in pieces {
            let (mut left, mut right) = (piece.left.wrapping_add(row), piece.right.wrapping_add(column));
            for _ in 0..piece.count {
                let mut factors = [V::splat(0.0); VECTORS];
                for (j, factor) in factors.iter_mut().enumerate() {
                    let from = right.add(j * V::LANES);
                    *factor = if whole { V::load(from) } else { V::load_first(from, columns - j * V::LANES) };
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*left.add(i));
                    for (sum, factor) in sums.iter_mut().zip(factors) {
                        *sum = x.mul_add(factor, *sum);
                    }
                }
                left = left.wrapping_add(left_stride);
                right = right.wrapping_add(right_stride);
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, partial) in sums.into_iter().enumerate() {
                let to = sum.add(i * sum_stride + j * V::LANES);
                if whole {
                    partial.add(V::load(to)).store(to);
                } else {
                    let count = columns - j * V::LANES;
                    partial.add(V::load_first(to, count)).store_first(to, count);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply_transposed_with<V: Simd>(
    m: usize,
    n: usize,
    pieces: &[RawRows],
    left_stride: usize,
    right_stride: usize,
    sum: *mut f32,
    sum_stride: usize,
) {
    let (mut left, mut column) = (n.div_ceil(V::LANES), 0);
    while left > 0 {
        let vectors = panel_vectors(left);
        let columns = (vectors * V::LANES).min(n - column);
        let step = balanced(m, most_rows::<V>(vectors));
        let mut row = 0;
        while row < m {
            let count = step.min(m - row);
            // SAFETY: the contract of `multiply_transposed_raw`, for rows `row..row + count` and `columns` from `column` on.
            unsafe {
                let sum = sum.add(row * sum_stride + column);
                with_block!(
                    V,
                    vectors,
                    count,
                    block_transposed(pieces, row, column, left_stride, right_stride, sum, sum_stride, columns)
                );
            }
            row += count;
        }
        column += vectors * V::LANES;
        left -= vectors;
    }
}

dispatch!(
    /// `sum += left^T right`.
    ///
    /// # Safety
    /// All rows of all pieces and of `sum` must be valid, and `sum` must not overlap the others.
    multiply_transposed_raw = multiply_transposed_with(
        m: usize,
        n: usize,
        pieces: &[RawRows],
        left_stride: usize,
        right_stride: usize,
        sum: *mut f32,
        sum_stride: usize,
    )
);

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * step).sin()).collect()
    }

    #[test]
    fn products_match_plain_sums_at_every_size() {
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (13, 16, 9), (25, 24, 20), (40, 49, 5), (9, 100, 33), (24, 33, 64)] {
            let (a, b) = (wave(m * (k + 2), 0.37), wave(k * n, 0.61));
            let stride = n + 3;
            for accumulate in [false, true] {
                let mut out = vec![1.0; m * stride];
                multiply(m, &a, k + 2, &Packed::new(&b, k, n, n, 1), &mut out, stride, accumulate);
                for i in 0..m {
                    for j in 0..n {
                        let sum: f32 = (0..k).map(|l| a[i * (k + 2) + l] * b[l * n + j]).sum();
                        let expected = if accumulate { 1.0 + sum } else { sum };
                        assert!((out[i * stride + j] - expected).abs() < 1e-4, "{m} {n} {k}: {i} {j}");
                    }
                    assert_eq!(&out[i * stride + n..(i + 1) * stride], [1.0; 3]);
                }
            }
        }
    }

    #[test]
    fn a_transposed_right_factor_is_packed_by_its_strides() {
        let (m, n, k) = (6, 21, 10);
        let (a, b) = (wave(m * k, 0.3), wave(k * n, 0.7));
        let transposed: Vec<f32> = (0..k * n).map(|i| b[(i % k) * n + i / k]).collect();
        let (mut out, mut other) = (vec![0.0; m * n], vec![0.0; m * n]);
        multiply(m, &a, k, &Packed::new(&b, k, n, n, 1), &mut out, n, false);
        multiply(m, &a, k, &Packed::new(&transposed, k, n, 1, k), &mut other, n, false);
        assert_eq!(out, other);
    }

    #[test]
    fn runs_are_summed_and_may_skip_rows_of_the_right_factor() {
        let (rows, n) = (5, 20);
        let (a, b) = (wave(rows * 2 + 4, 0.5), wave(9 * n, 0.9));
        let packed = Packed::new(&b, 9, n, n, 1);
        let runs = [Run { values: &a, length: 3, factor_row: 0 }, Run { values: &a[1..], length: 2, factor_row: 6 }];
        let mut out = vec![0.0; rows * n];
        for panel in packed.panels(0) {
            panel.multiply(rows, &runs, 2, &mut out, n, false);
        }
        for i in 0..rows {
            for j in 0..n {
                let first: f32 = (0..3).map(|l| a[i * 2 + l] * b[l * n + j]).sum();
                let second: f32 = (0..2).map(|l| a[1 + i * 2 + l] * b[(6 + l) * n + j]).sum();
                assert!((out[i * n + j] - first - second).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn transposed_products_sum_over_pieces() {
        for (m, n) in [(1, 1), (3, 17), (21, 64), (13, 40), (30, 50)] {
            let (a, b) = (wave(11 * (m + 1), 0.3), wave(11 * (n + 2), 0.8));
            let pieces = [
                Rows { left: &a, right: &b, count: 4 },
                Rows { left: &a[4 * (m + 1)..], right: &b[4 * (n + 2)..], count: 6 },
            ];
            let mut sum = vec![0.5; m * n];
            multiply_transposed([m, n], &pieces, m + 1, n + 2, &mut sum, n);
            for i in 0..m {
                for j in 0..n {
                    let expected: f32 = (0..10).map(|row| a[row * (m + 1) + i] * b[row * (n + 2) + j]).sum();
                    assert!((sum[i * n + j] - 0.5 - expected).abs() < 1e-5, "{m} {n}");
                }
            }
        }
    }
}
