//! Passes over rows that lie in a core's cache: layer norm, softmax, and their gradients.
//!
//! A row is summed in the lanes of a vector, then the lanes in order. Sums over rows are kept in f32 within a call; callers pass few rows at
//! a time and add up in f64.
#![expect(unsafe_code, reason = "vector kernels over raw pointers; every public function checks the sizes")]
#![expect(clippy::multiple_unsafe_ops_per_block, clippy::inline_always, reason = "kernels are one unsafe computation")]
#![expect(clippy::too_many_arguments, reason = "a kernel takes pointers and sizes one by one")]

use super::norm::ShortSums;
use super::simd::{EXP2_LIMIT, Simd, dispatch};

/// The widest vector's lanes.
const MOST_LANES: usize = 16;
static ONES: [f32; MOST_LANES] = [1.0; MOST_LANES];

/// The sum of all lanes, in order.
#[inline(always)]
unsafe fn across<V: Simd>(sums: V) -> f32 {
    let mut lanes = [0.0; MOST_LANES];
    // SAFETY: no vector has more lanes; the caller's contract.
    unsafe { sums.store(lanes.as_mut_ptr()) };
    lanes[..V::LANES].iter().sum()
}

/// The largest of all lanes; NaN may be lost.
#[inline(always)]
unsafe fn largest<V: Simd>(xs: V) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; MOST_LANES];
    // SAFETY: no vector has more lanes; the caller's contract.
    unsafe { xs.store(lanes.as_mut_ptr()) };
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Runs `$body` for the vectors of a row, with the place of the vector and the number of its lanes that belong to the row.
macro_rules! for_row {
    ($v:ident, $columns:expr, |$at:ident, $left:ident| $body:expr) => {
        let mut $at = 0;
        while $at < $columns {
            let $left = $columns - $at;
            $body;
            $at += $v::LANES;
        }
    };
}

/// Scale, shift and variance offset of a layer norm.
#[derive(Debug, Clone, Copy)]
pub(super) struct Norm<'a> {
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) eps: f64,
}

/// `out = layer norm(xs)` for rows of all channels.
///
/// # Panics
/// When a slice is too short.
pub(super) fn normalise(xs: &[f32], norm: &Norm<'_>, out: &mut [f32]) {
    let channels = norm.weight.len();
    assert!(channels == norm.bias.len() && xs.len().is_multiple_of(channels), "rows are incomplete");
    assert_eq!(xs.len(), out.len(), "the output has another size");
    let rows = xs.len() / channels;
    let (weight, bias, eps) = (norm.weight.as_ptr(), norm.bias.as_ptr(), norm.eps as f32);
    // SAFETY: all slices were checked.
    unsafe { normalise_raw(xs.as_ptr(), rows, channels, weight, bias, eps, out.as_mut_ptr()) }
}

/// The mean of a row and the inverse of its standard deviation.
#[inline(always)]
unsafe fn statistics<V: Simd>(xs: *const f32, channels: usize, eps: f32) -> (f32, f32) {
    // SAFETY: the contract of the kernels.
    unsafe {
        let mut sum = V::splat(0.0);
        for_row!(V, channels, |at, left| sum = sum.add(V::load_first(xs.add(at), left)));
        let mean = across(sum) / channels as f32;
        let (mut squares, centre) = (V::splat(0.0), V::splat(mean));
        for_row!(V, channels, |at, left| {
            let apart = V::load_first(xs.add(at), left).sub(centre);
            let apart = if left < V::LANES { apart.mul(V::load_first(ONES.as_ptr(), left)) } else { apart };
            squares = apart.mul_add(apart, squares);
        });
        (mean, 1.0 / (across(squares) / channels as f32 + eps).sqrt())
    }
}

#[inline(always)]
unsafe fn normalise_with<V: Simd>(
    xs: *const f32,
    rows: usize,
    channels: usize,
    weight: *const f32,
    bias: *const f32,
    eps: f32,
    out: *mut f32,
) {
    for row in 0..rows {
        // SAFETY: the contract of `normalise_raw`.
        unsafe {
            let (xs, out) = (xs.add(row * channels), out.add(row * channels));
            let (mean, inverse) = statistics::<V>(xs, channels, eps);
            let (mean, inverse) = (V::splat(mean), V::splat(inverse));
            for_row!(V, channels, |at, left| {
                let unit = V::load_first(xs.add(at), left).sub(mean).mul(inverse);
                let (weight, bias) = (V::load_first(weight.add(at), left), V::load_first(bias.add(at), left));
                unit.mul_add(weight, bias).store_first(out.add(at), left);
            });
        }
    }
}

dispatch!(
    /// # Safety
    /// `xs` and `out` hold `rows * channels` numbers, `weight` and `bias` `channels`.
    normalise_raw = normalise_with(
        xs: *const f32,
        rows: usize,
        channels: usize,
        weight: *const f32,
        bias: *const f32,
        eps: f32,
        out: *mut f32,
    )
);

/// From `gradient`, that of [`normalise`]'s output, to that of its input, in place. Writes the output once more to `value`, and adds to `short`
/// the gradients of shift (its sums) and scale (its products).
///
/// # Panics
/// When a slice is too short.
pub(super) fn normalise_gradient(
    xs: &[f32],
    norm: &Norm<'_>,
    gradient: &mut [f32],
    value: &mut [f32],
    short: &mut ShortSums,
) {
    let channels = norm.weight.len();
    assert!(channels == norm.bias.len() && xs.len().is_multiple_of(channels), "rows are incomplete");
    assert!(xs.len() == gradient.len() && xs.len() == value.len(), "rows of other sizes");
    assert!(short.sums.len() == channels && short.products.len() == channels, "sums of other channels");
    let rows = xs.len() / channels;
    let (weight, bias, eps) = (norm.weight.as_ptr(), norm.bias.as_ptr(), norm.eps as f32);
    let (sums, products) = (short.sums.as_mut_ptr(), short.products.as_mut_ptr());
    let (gradient, value) = (gradient.as_mut_ptr(), value.as_mut_ptr());
    // SAFETY: all slices were checked.
    unsafe { normalise_gradient_raw(xs.as_ptr(), rows, channels, weight, bias, eps, gradient, value, sums, products) }
}

#[inline(always)]
unsafe fn normalise_gradient_with<V: Simd>(
    xs: *const f32,
    rows: usize,
    channels: usize,
    weight: *const f32,
    bias: *const f32,
    eps: f32,
    gradient: *mut f32,
    value: *mut f32,
    sums: *mut f32,
    products: *mut f32,
) {
    for row in 0..rows {
        // SAFETY: the contract of `normalise_gradient_raw`.
        unsafe {
            let xs = xs.add(row * channels);
            let (gradient, value) = (gradient.add(row * channels), value.add(row * channels));
            let (mean, inverse) = statistics::<V>(xs, channels, eps);
            let (mean, inverse) = (V::splat(mean), V::splat(inverse));
            let (mut total, mut along) = (V::splat(0.0), V::splat(0.0));
            for_row!(V, channels, |at, left| {
                let unit = V::load_first(xs.add(at), left).sub(mean).mul(inverse);
                let (weight, bias) = (V::load_first(weight.add(at), left), V::load_first(bias.add(at), left));
                unit.mul_add(weight, bias).store_first(value.add(at), left);
                let gradient = V::load_first(gradient.add(at), left);
                V::load_first(sums.add(at), left).add(gradient).store_first(sums.add(at), left);
                gradient.mul_add(unit, V::load_first(products.add(at), left)).store_first(products.add(at), left);
                // Lanes beyond the row have the weight 0.
                let scaled = gradient.mul(weight);
                total = total.add(scaled);
                along = scaled.mul_add(unit, along);
            });
            let (total, along) = (across(total) / channels as f32, across(along) / channels as f32);
            let (total, along) = (V::splat(total), V::splat(along));
            for_row!(V, channels, |at, left| {
                let unit = V::load_first(xs.add(at), left).sub(mean).mul(inverse);
                let scaled = V::load_first(gradient.add(at), left).mul(V::load_first(weight.add(at), left));
                unit.neg_mul_add(along, scaled.sub(total)).mul(inverse).store_first(gradient.add(at), left);
            });
        }
    }
}

dispatch!(
    /// # Safety
    /// `xs`, `gradient` and `value` hold `rows * channels` numbers, the others `channels`.
    normalise_gradient_raw = normalise_gradient_with(
        xs: *const f32,
        rows: usize,
        channels: usize,
        weight: *const f32,
        bias: *const f32,
        eps: f32,
        gradient: *mut f32,
        value: *mut f32,
        sums: *mut f32,
        products: *mut f32,
    )
);

/// Each row becomes `softmax(factor * row)`, in place.
///
/// # Panics
/// When a row is incomplete.
pub(super) fn softmax(xs: &mut [f32], columns: usize, factor: f32) {
    assert!(columns > 0 && xs.len().is_multiple_of(columns), "rows are incomplete");
    let rows = xs.len() / columns;
    // SAFETY: the slice was checked.
    unsafe { softmax_raw(xs.as_mut_ptr(), rows, columns, factor * std::f32::consts::LOG2_E) }
}

#[inline(always)]
unsafe fn softmax_with<V: Simd>(xs: *mut f32, rows: usize, columns: usize, sharpness: f32) {
    let whole = columns / V::LANES * V::LANES;
    for row in 0..rows {
        // SAFETY: the contract of `softmax_raw`.
        unsafe {
            let xs = xs.add(row * columns);
            let mut top = V::splat(f32::NEG_INFINITY);
            let mut at = 0;
            while at < whole {
                top = top.max(V::load(xs.add(at)));
                at += V::LANES;
            }
            let mut top = largest(top);
            while at < columns {
                top = top.max(*xs.add(at));
                at += 1;
            }
            let (top, sharpness, least) = (V::splat(top), V::splat(sharpness), V::splat(-EXP2_LIMIT));
            let mut sum = V::splat(0.0);
            // NaN stays NaN: of the limit and a number, the number is the second.
            let weight = |x: V| least.max(x.sub(top).mul(sharpness)).exp2();
            let mut at = 0;
            while at < whole {
                let weight = weight(V::load(xs.add(at)));
                weight.store(xs.add(at));
                sum = sum.add(weight);
                at += V::LANES;
            }
            if at < columns {
                let left = columns - at;
                weight(V::load_first(xs.add(at), left)).store_first(xs.add(at), left);
                sum = sum.add(V::load_first(xs.add(at), left));
            }
            let share = V::splat(1.0 / across(sum));
            for_row!(V, columns, |at, left| {
                V::load_first(xs.add(at), left).mul(share).store_first(xs.add(at), left);
            });
        }
    }
}

dispatch!(
    /// # Safety
    /// `xs` holds `rows * columns` numbers.
    softmax_raw = softmax_with(xs: *mut f32, rows: usize, columns: usize, sharpness: f32)
);

/// From `gradient`, that of the results of [`softmax`], to that of `factor * row`, times `factor`: in place.
///
/// # Panics
/// When a slice is too short.
pub(super) fn softmax_gradient(results: &[f32], gradient: &mut [f32], columns: usize, factor: f32) {
    assert!(columns > 0 && results.len().is_multiple_of(columns), "rows are incomplete");
    assert_eq!(results.len(), gradient.len(), "rows of other sizes");
    let rows = results.len() / columns;
    // SAFETY: the slices were checked.
    unsafe { softmax_gradient_raw(results.as_ptr(), gradient.as_mut_ptr(), rows, columns, factor) }
}

#[inline(always)]
unsafe fn softmax_gradient_with<V: Simd>(
    results: *const f32,
    gradient: *mut f32,
    rows: usize,
    columns: usize,
    factor: f32,
) {
    for row in 0..rows {
        // SAFETY: the contract of `softmax_gradient_raw`.
        unsafe {
            let (results, gradient) = (results.add(row * columns), gradient.add(row * columns));
            let mut sum = V::splat(0.0);
            for_row!(V, columns, |at, left| {
                sum = V::load_first(results.add(at), left).mul_add(V::load_first(gradient.add(at), left), sum);
            });
            let (mean, factor) = (V::splat(across(sum)), V::splat(factor));
            for_row!(V, columns, |at, left| {
                let result = V::load_first(results.add(at), left).mul(factor);
                let apart = V::load_first(gradient.add(at), left).sub(mean);
                result.mul(apart).store_first(gradient.add(at), left);
            });
        }
    }
}

dispatch!(
    /// # Safety
    /// `results` and `gradient` hold `rows * columns` numbers.
    softmax_gradient_raw = softmax_gradient_with(
        results: *const f32,
        gradient: *mut f32,
        rows: usize,
        columns: usize,
        factor: f32,
    )
);
