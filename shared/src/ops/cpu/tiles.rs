//! Element-wise passes over tiles of `rows x channels` that lie in a core's cache: normalising, activating, their gradients, sums.
//!
//! Sums over rows are kept in f32 within a call; callers pass few rows at a time and add up in f64.
#![expect(unsafe_code, reason = "vector kernels over raw pointers; every public function checks the sizes")]
#![expect(clippy::multiple_unsafe_ops_per_block, clippy::inline_always, reason = "kernels are one unsafe computation")]
#![expect(clippy::too_many_arguments, reason = "a kernel takes pointers and strides one by one")]

use super::activation::{Act, with_activation};
use super::norm::{Affine, Slope};
use super::simd::{EXP2_LIMIT, Simd, dispatch};
use crate::ops::Activation;

/// Rows that a kernel takes side by side, so that what belongs to channels is read once for all of them.
const BLOCK: usize = 4;

#[inline(always)]
unsafe fn load<V: Simd, const WHOLE: bool>(from: *const f32, count: usize) -> V {
    // SAFETY: the caller's contract.
    unsafe { if WHOLE { V::load(from) } else { V::load_first(from, count) } }
}

#[inline(always)]
unsafe fn store<V: Simd, const WHOLE: bool>(x: V, to: *mut f32, count: usize) {
    // SAFETY: the caller's contract.
    unsafe { if WHOLE { x.store(to) } else { x.store_first(to, count) } }
}

/// Runs `$body` for blocks of rows and vectors of channels. Its constants are the rows of the block and whether the vector is whole, its
/// first arguments the offset of the block's first number, the first channel, the number of channels, and how many of them are left.
macro_rules! for_blocks {
    ([$v:ident $(, $act:ident)?] $rows:expr, $channels:expr, $body:ident($($argument:expr),*)) => {
        let mut row = 0;
        while row + BLOCK <= $rows {
            for_blocks!(@ [$v $(, $act)?] row, 4, $channels, $body($($argument),*));
            row += BLOCK;
        }
        while row < $rows {
            for_blocks!(@ [$v $(, $act)?] row, 1, $channels, $body($($argument),*));
            row += 1;
        }
    };
    (@ [$v:ident $(, $act:ident)?] $row:expr, $count:tt, $channels:expr, $body:ident($($argument:expr),*)) => {
        let mut channel = 0;
        while channel + $v::LANES <= $channels {
            $body::<$v $(, $act)?, $count, true>($row * $channels + channel, channel, $channels, $v::LANES, $($argument),*);
            channel += $v::LANES;
        }
        if channel < $channels {
            let left = $channels - channel;
            $body::<$v $(, $act)?, $count, false>($row * $channels + channel, channel, $channels, left, $($argument),*);
        }
    };
}

/// Numbers ahead of their use that the passes over large tensors ask for: memory is slower to begin than its streams are found.
const AHEAD: usize = 8192;

/// A second summand of `z`, normalised on its own, and factors after the activation; each may be absent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extras<'a> {
    /// Added to the normalised value before the activation, as it is or normalised too.
    pub(super) residual: Option<(&'a [f32], Option<&'a Affine>)>,
    /// Multiplies the activated value, per channel.
    pub(super) gate: Option<&'a [f32]>,
}

/// [`Extras`] for the kernels: null where absent.
#[derive(Debug, Clone, Copy)]
struct RawExtras {
    residual: *const f32,
    residual_scale: *const f32,
    residual_shift: *const f32,
    gate: *const f32,
}

impl Extras<'_> {
    /// # Panics
    /// When something is too short for `length` numbers in `channels` channels.
    fn checked(&self, length: usize, channels: usize) -> RawExtras {
        let mut raw = RawExtras {
            residual: std::ptr::null(),
            residual_scale: std::ptr::null(),
            residual_shift: std::ptr::null(),
            gate: std::ptr::null(),
        };
        if let Some((residual, affine)) = self.residual {
            assert!(residual.len() >= length, "the residual is too short");
            raw.residual = residual.as_ptr();
            if let Some(affine) = affine {
                assert_eq!(affine.channels(), channels, "the residual has other channels");
                raw.residual_scale = affine.scale.as_ptr();
                raw.residual_shift = affine.shift.as_ptr();
            }
        }
        if let Some(gate) = self.gate {
            assert!(gate.len() >= channels, "the gate is too short");
            raw.gate = gate.as_ptr();
        }
        raw
    }
}

/// The normalised value of numbers that lie at `at`, with the residual.
#[inline(always)]
unsafe fn normalised<V: Simd, const WHOLE: bool>(
    x: V,
    at: usize,
    left: usize,
    scale: V,
    shift: V,
    residual_scale: V,
    residual_shift: V,
    extras: &RawExtras,
) -> V {
    // SAFETY: the contract of the kernels.
    unsafe {
        let z = x.mul_add(scale, shift);
        if extras.residual.is_null() {
            return z;
        }
        let residual = load::<V, WHOLE>(extras.residual.add(at), left);
        z.add(if extras.residual_scale.is_null() { residual } else { residual.mul_add(residual_scale, residual_shift) })
    }
}

/// `out = act(x * scale + shift [+ residual]) [* gate]` for rows of all channels; `out` may be `xs` itself, see [`apply_in_place`].
///
/// # Panics
/// When a slice is too short.
pub(super) fn apply(xs: &[f32], out: &mut [f32], affine: &Affine, act: Activation, extras: Extras<'_>) {
    let channels = affine.channels();
    assert!(xs.len() == out.len() && xs.len().is_multiple_of(channels), "tiles of different sizes");
    let raw = extras.checked(out.len(), channels);
    let (scale, shift) = (affine.scale.as_ptr(), affine.shift.as_ptr());
    // SAFETY: all slices were checked; every number of `xs` is read before the number of `out` at its place is written.
    unsafe { apply_raw(xs.as_ptr(), out.as_mut_ptr(), xs.len() / channels, channels, scale, shift, act, &raw) };
}

/// As [`apply`], over `xs` itself.
///
/// # Panics
/// When a slice is too short.
pub(super) fn apply_in_place(xs: &mut [f32], affine: &Affine, act: Activation, extras: Extras<'_>) {
    let channels = affine.channels();
    assert!(xs.len().is_multiple_of(channels), "rows are incomplete");
    let raw = extras.checked(xs.len(), channels);
    let (scale, shift, rows) = (affine.scale.as_ptr(), affine.shift.as_ptr(), xs.len() / channels);
    let xs = xs.as_mut_ptr();
    // SAFETY: as in `apply`, where input and output are the same numbers.
    unsafe { apply_raw(xs, xs, rows, channels, scale, shift, act, &raw) };
}

#[inline(always)]
unsafe fn apply_block<V: Simd, A: Act, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    xs: *const f32,
    out: *mut f32,
    scale: *const f32,
    shift: *const f32,
    extras: &RawExtras,
) {
    // SAFETY: the contract of `apply_raw`.
    unsafe {
        let of_channel = |from: *const f32, otherwise: f32| -> V {
            if from.is_null() { V::splat(otherwise) } else { load::<V, WHOLE>(from.add(channel), left) }
        };
        let (scale, shift) = (of_channel(scale, 1.0), of_channel(shift, 0.0));
        let (residual_scale, residual_shift) =
            (of_channel(extras.residual_scale, 1.0), of_channel(extras.residual_shift, 0.0));
        let gate = of_channel(extras.gate, 1.0);
        for row in 0..ROWS {
            let at = at + row * channels;
            V::prefetch(xs.wrapping_add(at + AHEAD));
            let x = load::<V, WHOLE>(xs.add(at), left);
            let z = normalised::<V, WHOLE>(x, at, left, scale, shift, residual_scale, residual_shift, extras);
            let mut value = A::value(z);
            if !extras.gate.is_null() {
                value = value.mul(gate);
            }
            store::<V, WHOLE>(value, out.add(at), left);
        }
    }
}

#[inline(always)]
unsafe fn apply_for<V: Simd, A: Act>(
    xs: *const f32,
    out: *mut f32,
    rows: usize,
    channels: usize,
    scale: *const f32,
    shift: *const f32,
    extras: &RawExtras,
) {
    // SAFETY: the contract of `apply_raw`.
    unsafe {
        for_blocks!([V, A] rows, channels, apply_block(xs, out, scale, shift, extras));
    }
}

#[inline(always)]
unsafe fn apply_with<V: Simd>(
    xs: *const f32,
    out: *mut f32,
    rows: usize,
    channels: usize,
    scale: *const f32,
    shift: *const f32,
    act: Activation,
    extras: &RawExtras,
) {
    // SAFETY: the contract of `apply_raw`.
    unsafe { with_activation!(act, apply_for::<V>(xs, out, rows, channels, scale, shift, extras)) }
}

dispatch!(
    /// # Safety
    /// `xs`, `out` and the residual hold `rows * channels` numbers, the others `channels`.
    apply_raw = apply_with(
        xs: *const f32,
        out: *mut f32,
        rows: usize,
        channels: usize,
        scale: *const f32,
        shift: *const f32,
        act: Activation,
        extras: &RawExtras,
    )
);

/// Adds to `sums` and `squares` those of `x - origin` over the rows of `xs`.
///
/// # Panics
/// When a slice is too short.
pub(super) fn moments(xs: &[f32], origin: &[f32], sums: &mut [f32], squares: &mut [f32]) {
    let channels = origin.len();
    assert!(xs.len().is_multiple_of(channels), "rows are incomplete");
    assert!(sums.len() == channels && squares.len() == channels, "one sum for each channel");
    let rows = xs.len() / channels;
    // SAFETY: all slices were checked.
    unsafe {
        moments_raw(xs.as_ptr(), rows, channels, origin.as_ptr(), sums.as_mut_ptr(), squares.as_mut_ptr());
    }
}

#[inline(always)]
unsafe fn moments_block<V: Simd, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    xs: *const f32,
    origin: *const f32,
    sums: *mut f32,
    squares: *mut f32,
) {
    // SAFETY: the contract of `moments_raw`.
    unsafe {
        let origin = load::<V, WHOLE>(origin.add(channel), left);
        let (mut sum, mut square) = (V::splat(0.0), V::splat(0.0));
        for row in 0..ROWS {
            let x = load::<V, WHOLE>(xs.add(at + row * channels), left).sub(origin);
            sum = sum.add(x);
            square = x.mul_add(x, square);
        }
        let (sums, squares) = (sums.add(channel), squares.add(channel));
        store::<V, WHOLE>(sum.add(load::<V, WHOLE>(sums, left)), sums, left);
        store::<V, WHOLE>(square.add(load::<V, WHOLE>(squares, left)), squares, left);
    }
}

#[inline(always)]
unsafe fn moments_with<V: Simd>(
    xs: *const f32,
    rows: usize,
    channels: usize,
    origin: *const f32,
    sums: *mut f32,
    squares: *mut f32,
) {
    // SAFETY: the contract of `moments_raw`.
    unsafe {
        for_blocks!([V] rows, channels, moments_block(xs, origin, sums, squares));
    }
}

dispatch!(
    /// # Safety
    /// `xs` holds `rows * channels` numbers, the others `channels`.
    moments_raw = moments_with(
        xs: *const f32,
        rows: usize,
        channels: usize,
        origin: *const f32,
        sums: *mut f32,
        squares: *mut f32,
    )
);

/// What [`activation_gradient`] reads besides the gradient.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activated<'a> {
    /// Raw numbers, before batch norm.
    pub(super) raw: &'a [f32],
    pub(super) affine: &'a Affine,
    /// Means of the raw numbers.
    pub(super) mean: &'a [f32],
    pub(super) act: Activation,
    pub(super) residual: Option<(&'a [f32], Option<&'a Affine>)>,
}

/// Where [`activation_gradient`] leaves its results.
#[derive(Debug)]
pub(super) struct GradientSums<'a> {
    /// `sum(dz)` per channel, added to.
    pub(super) sums: &'a mut [f32],
    /// `sum(dz * (raw - mean))` per channel, added to.
    pub(super) products: &'a mut [f32],
}

/// Turns `gradient`, that of the activated value, into `dz`, that of the normalised value, in place; also writes the activated value
/// to `value`, if that is given.
///
/// # Panics
/// When a slice is too short.
pub(super) fn activation_gradient(
    of: &Activated<'_>,
    gradient: &mut [f32],
    value: Option<&mut [f32]>,
    into: &mut GradientSums<'_>,
) {
    let (from, to) = (gradient.as_ptr(), gradient.as_mut_ptr());
    let length = gradient.len();
    // SAFETY: input and output are the same `length` numbers.
    unsafe { activation_gradient_checked(of, from, to, length, value, into) }
}

/// As [`activation_gradient`], but `dz` goes to another place.
///
/// # Panics
/// When a slice is too short.
pub(super) fn activation_gradient_to(
    of: &Activated<'_>,
    gradient: &[f32],
    dz: &mut [f32],
    value: Option<&mut [f32]>,
    into: &mut GradientSums<'_>,
) {
    assert_eq!(gradient.len(), dz.len(), "tiles of different sizes");
    // SAFETY: both hold `gradient.len()` numbers.
    unsafe { activation_gradient_checked(of, gradient.as_ptr(), dz.as_mut_ptr(), gradient.len(), value, into) }
}

/// # Safety
/// `gradient` and `dz` hold `length` numbers.
unsafe fn activation_gradient_checked(
    of: &Activated<'_>,
    gradient: *const f32,
    dz: *mut f32,
    length: usize,
    value: Option<&mut [f32]>,
    into: &mut GradientSums<'_>,
) {
    let channels = of.affine.channels();
    assert!(length.is_multiple_of(channels) && of.raw.len() >= length, "rows are incomplete");
    assert!(of.mean.len() == channels && into.sums.len() == channels, "one number for each channel");
    assert!(into.products.len() == channels, "one number for each channel");
    let value = match value {
        Some(value) => {
            assert!(value.len() >= length, "too few values");
            value.as_mut_ptr()
        }
        None => std::ptr::null_mut(),
    };
    let extras = Extras { residual: of.residual, gate: None }.checked(length, channels);
    let pointers = GradientPointers {
        raw: of.raw.as_ptr(),
        gradient,
        dz,
        value,
        scale: of.affine.scale.as_ptr(),
        shift: of.affine.shift.as_ptr(),
        mean: of.mean.as_ptr(),
        extras,
        sums: into.sums.as_mut_ptr(),
        products: into.products.as_mut_ptr(),
    };
    // SAFETY: all slices were checked.
    unsafe { activation_gradient_raw(length / channels, channels, of.act, &pointers) };
}

#[derive(Debug)]
struct GradientPointers {
    raw: *const f32,
    gradient: *const f32,
    dz: *mut f32,
    value: *mut f32,
    scale: *const f32,
    shift: *const f32,
    mean: *const f32,
    extras: RawExtras,
    sums: *mut f32,
    products: *mut f32,
}

#[inline(always)]
unsafe fn activation_gradient_block<V: Simd, A: Act, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    p: &GradientPointers,
) {
    // SAFETY: the contract of `activation_gradient_raw`.
    unsafe {
        let of_channel = |from: *const f32, otherwise: f32| -> V {
            if from.is_null() { V::splat(otherwise) } else { load::<V, WHOLE>(from.add(channel), left) }
        };
        let (scale, shift, mean) = (of_channel(p.scale, 1.0), of_channel(p.shift, 0.0), of_channel(p.mean, 0.0));
        let residual_scale = of_channel(p.extras.residual_scale, 1.0);
        let residual_shift = of_channel(p.extras.residual_shift, 0.0);
        let (mut sum, mut product) = (V::splat(0.0), V::splat(0.0));
        for row in 0..ROWS {
            let at = at + row * channels;
            V::prefetch(p.raw.wrapping_add(at + AHEAD));
            V::prefetch(p.gradient.wrapping_add(at + AHEAD));
            let raw = load::<V, WHOLE>(p.raw.add(at), left);
            let z = normalised::<V, WHOLE>(raw, at, left, scale, shift, residual_scale, residual_shift, &p.extras);
            let gradient = load::<V, WHOLE>(p.gradient.add(at), left);
            let (value, dz) = A::both(z, gradient);
            store::<V, WHOLE>(dz, p.dz.add(at), left);
            if !p.value.is_null() {
                store::<V, WHOLE>(value, p.value.add(at), left);
            }
            sum = sum.add(dz);
            product = dz.mul_add(raw.sub(mean), product);
        }
        let (sums, products) = (p.sums.add(channel), p.products.add(channel));
        store::<V, WHOLE>(sum.add(load::<V, WHOLE>(sums, left)), sums, left);
        store::<V, WHOLE>(product.add(load::<V, WHOLE>(products, left)), products, left);
    }
}

#[inline(always)]
unsafe fn activation_gradient_for<V: Simd, A: Act>(rows: usize, channels: usize, pointers: &GradientPointers) {
    // SAFETY: the contract of `activation_gradient_raw`.
    unsafe {
        for_blocks!([V, A] rows, channels, activation_gradient_block(pointers));
    }
}

#[inline(always)]
unsafe fn activation_gradient_with<V: Simd>(
    rows: usize,
    channels: usize,
    act: Activation,
    pointers: &GradientPointers,
) {
    // SAFETY: the contract of `activation_gradient_raw`.
    unsafe { with_activation!(act, activation_gradient_for::<V>(rows, channels, pointers)) }
}

dispatch!(
    /// # Safety
    /// Rows hold `rows * channels` numbers, the others `channels`; `dz` is `gradient` or does not overlap it.
    activation_gradient_raw = activation_gradient_with(
        rows: usize,
        channels: usize,
        act: Activation,
        pointers: &GradientPointers,
    )
);

/// The gradient of raw numbers from that of the normalised ones: `out = (dz - centre) * scale + (raw - mean) * bend + offset`.
///
/// # Panics
/// When a slice is too short.
pub(super) fn raw_gradient(dz: &[f32], raw: &[f32], slope: &Slope, out: &mut [f32]) {
    let channels = slope.mean.len();
    assert!(dz.len() == out.len() && raw.len() == out.len(), "tiles of different sizes");
    assert!(out.len().is_multiple_of(channels), "rows are incomplete");
    let slope = SlopePointers::checked(slope, channels);
    // SAFETY: all slices were checked.
    unsafe { raw_gradient_raw(dz.as_ptr(), raw.as_ptr(), out.as_mut_ptr(), out.len() / channels, channels, &slope) };
}

/// [`Slope`] for the kernels.
#[derive(Debug)]
struct SlopePointers {
    mean: *const f32,
    centre: *const f32,
    scale: *const f32,
    bend: *const f32,
    offset: *const f32,
}

impl SlopePointers {
    /// # Panics
    /// When a row of numbers is not one for each channel.
    fn checked(slope: &Slope, channels: usize) -> Self {
        let checked = |row: &[f32]| {
            assert_eq!(row.len(), channels, "one number for each channel");
            row.as_ptr()
        };
        Self {
            mean: checked(&slope.mean),
            centre: checked(&slope.centre),
            scale: checked(&slope.scale),
            bend: checked(&slope.bend),
            offset: checked(&slope.offset),
        }
    }
}

/// [`Slope`] for one vector of channels.
#[derive(Debug, Clone, Copy)]
struct SlopeVectors<V> {
    mean: V,
    centre: V,
    scale: V,
    bend: V,
    offset: V,
}

impl<V: Simd> SlopeVectors<V> {
    #[inline(always)]
    unsafe fn load<const WHOLE: bool>(slope: &SlopePointers, channel: usize, left: usize) -> Self {
        // SAFETY: the contract of the kernels.
        unsafe {
            Self {
                mean: load::<V, WHOLE>(slope.mean.add(channel), left),
                centre: load::<V, WHOLE>(slope.centre.add(channel), left),
                scale: load::<V, WHOLE>(slope.scale.add(channel), left),
                bend: load::<V, WHOLE>(slope.bend.add(channel), left),
                offset: load::<V, WHOLE>(slope.offset.add(channel), left),
            }
        }
    }

    /// The gradient of raw numbers.
    #[inline(always)]
    unsafe fn raw_gradient(self, dz: V, raw: V) -> V {
        // SAFETY: the contract of the kernels.
        unsafe { dz.sub(self.centre).mul_add(self.scale, raw.sub(self.mean).mul_add(self.bend, self.offset)) }
    }
}

#[inline(always)]
unsafe fn raw_gradient_block<V: Simd, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    dz: *const f32,
    raw: *const f32,
    out: *mut f32,
    slope: &SlopePointers,
) {
    // SAFETY: the contract of `raw_gradient_raw`.
    unsafe {
        let slope = SlopeVectors::<V>::load::<WHOLE>(slope, channel, left);
        for row in 0..ROWS {
            let at = at + row * channels;
            V::prefetch(raw.wrapping_add(at + AHEAD));
            V::prefetch(dz.wrapping_add(at + AHEAD));
            let (dz, raw) = (load::<V, WHOLE>(dz.add(at), left), load::<V, WHOLE>(raw.add(at), left));
            store::<V, WHOLE>(slope.raw_gradient(dz, raw), out.add(at), left);
        }
    }
}

#[inline(always)]
unsafe fn raw_gradient_with<V: Simd>(
    dz: *const f32,
    raw: *const f32,
    out: *mut f32,
    rows: usize,
    channels: usize,
    slope: &SlopePointers,
) {
    // SAFETY: the contract of `raw_gradient_raw`.
    unsafe {
        for_blocks!([V] rows, channels, raw_gradient_block(dz, raw, out, slope));
    }
}

dispatch!(
    /// # Safety
    /// `dz`, `raw` and `out` hold `rows * channels` numbers, the slope's rows `channels`.
    raw_gradient_raw = raw_gradient_with(
        dz: *const f32,
        raw: *const f32,
        out: *mut f32,
        rows: usize,
        channels: usize,
        slope: &SlopePointers,
    )
);

/// Adds `sum(dz)` and `sum(dz * (raw - mean))` over the rows.
///
/// # Panics
/// When a slice is too short.
pub(super) fn gradient_sums(dz: &[f32], raw: &[f32], mean: &[f32], into: &mut GradientSums<'_>) {
    let channels = mean.len();
    assert!(dz.len() == raw.len() && dz.len().is_multiple_of(channels), "tiles of different sizes");
    assert!(into.sums.len() == channels && into.products.len() == channels, "one sum for each channel");
    let rows = dz.len() / channels;
    let (sums, products) = (into.sums.as_mut_ptr(), into.products.as_mut_ptr());
    // SAFETY: all slices were checked.
    unsafe { gradient_sums_raw(dz.as_ptr(), raw.as_ptr(), rows, channels, mean.as_ptr(), sums, products) };
}

#[inline(always)]
unsafe fn gradient_sums_block<V: Simd, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    dz: *const f32,
    raw: *const f32,
    mean: *const f32,
    sums: *mut f32,
    products: *mut f32,
) {
    // SAFETY: the contract of `gradient_sums_raw`.
    unsafe {
        let mean = load::<V, WHOLE>(mean.add(channel), left);
        let (mut sum, mut product) = (V::splat(0.0), V::splat(0.0));
        for row in 0..ROWS {
            let at = at + row * channels;
            V::prefetch(raw.wrapping_add(at + AHEAD));
            V::prefetch(dz.wrapping_add(at + AHEAD));
            let dz = load::<V, WHOLE>(dz.add(at), left);
            sum = sum.add(dz);
            product = dz.mul_add(load::<V, WHOLE>(raw.add(at), left).sub(mean), product);
        }
        let (sums, products) = (sums.add(channel), products.add(channel));
        store::<V, WHOLE>(sum.add(load::<V, WHOLE>(sums, left)), sums, left);
        store::<V, WHOLE>(product.add(load::<V, WHOLE>(products, left)), products, left);
    }
}

#[inline(always)]
unsafe fn gradient_sums_with<V: Simd>(
    dz: *const f32,
    raw: *const f32,
    rows: usize,
    channels: usize,
    mean: *const f32,
    sums: *mut f32,
    products: *mut f32,
) {
    // SAFETY: the contract of `gradient_sums_raw`.
    unsafe {
        for_blocks!([V] rows, channels, gradient_sums_block(dz, raw, mean, sums, products));
    }
}

dispatch!(
    /// # Safety
    /// `dz` and `raw` hold `rows * channels` numbers, the others `channels`.
    gradient_sums_raw = gradient_sums_with(
        dz: *const f32,
        raw: *const f32,
        rows: usize,
        channels: usize,
        mean: *const f32,
        sums: *mut f32,
        products: *mut f32,
    )
);

/// Sums per channel that [`gated_sums`] makes.
pub(super) const GATED_SUMS: usize = 5;

/// The first half of the way back through factors that depend on a channel's mean: `gradient` is that of `factors * act(z)`, where
/// `z` is normalised. Writes `factors * act(z)` to `value` and adds to `sums`, one row of channels after the other, the sums over
/// the rows of
///
/// - `gradient * act(z)`: the gradient of the factors,
/// - `gradient * act'(z)` and `act'(z)`: with the factors and the gradient that comes through the mean they give `sum(dz)`,
/// - `gradient * act'(z) * (raw - mean)` and `act'(z) * (raw - mean)`: likewise `sum(dz * (raw - mean))`.
///
/// So neither `dz` nor another pass over it is needed before the gradient of the factors is known.
///
/// # Panics
/// When a slice is too short.
pub(super) fn gated_sums(of: &Activated<'_>, gradient: &[f32], factors: &[f32], value: &mut [f32], sums: &mut [f32]) {
    let channels = of.affine.channels();
    let length = gradient.len();
    assert!(length.is_multiple_of(channels) && of.raw.len() >= length && value.len() >= length, "rows are incomplete");
    assert!(of.mean.len() == channels && factors.len() == channels, "one number for each channel");
    assert_eq!(sums.len(), GATED_SUMS * channels, "one sum for each channel and kind");
    let pointers = GatedPointers {
        raw: of.raw.as_ptr(),
        gradient: gradient.as_ptr(),
        value: value.as_mut_ptr(),
        scale: of.affine.scale.as_ptr(),
        shift: of.affine.shift.as_ptr(),
        mean: of.mean.as_ptr(),
        factors: factors.as_ptr(),
        sums: sums.as_mut_ptr(),
    };
    // SAFETY: all slices were checked.
    unsafe { gated_sums_raw(length / channels, channels, of.act, &pointers) };
}

#[derive(Debug)]
struct GatedPointers {
    raw: *const f32,
    gradient: *const f32,
    value: *mut f32,
    scale: *const f32,
    shift: *const f32,
    mean: *const f32,
    factors: *const f32,
    sums: *mut f32,
}

#[inline(always)]
unsafe fn gated_sums_block<V: Simd, A: Act, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    p: &GatedPointers,
) {
    // SAFETY: the contract of `gated_sums_raw`.
    unsafe {
        let of_channel = |from: *const f32| -> V { load::<V, WHOLE>(from.add(channel), left) };
        let (scale, shift, mean, factor) =
            (of_channel(p.scale), of_channel(p.shift), of_channel(p.mean), of_channel(p.factors));
        let mut sums = [V::splat(0.0); GATED_SUMS];
        for row in 0..ROWS {
            let at = at + row * channels;
            V::prefetch(p.raw.wrapping_add(at + AHEAD));
            let raw = load::<V, WHOLE>(p.raw.add(at), left);
            let gradient = load::<V, WHOLE>(p.gradient.add(at), left);
            let (value, slope) = A::both(raw.mul_add(scale, shift), V::splat(1.0));
            store::<V, WHOLE>(value.mul(factor), p.value.add(at), left);
            let (bent, distance) = (gradient.mul(slope), raw.sub(mean));
            sums[0] = gradient.mul_add(value, sums[0]);
            sums[1] = sums[1].add(bent);
            sums[2] = sums[2].add(slope);
            sums[3] = bent.mul_add(distance, sums[3]);
            sums[4] = slope.mul_add(distance, sums[4]);
        }
        for (kind, sum) in sums.into_iter().enumerate() {
            let to = p.sums.add(kind * channels + channel);
            store::<V, WHOLE>(sum.add(load::<V, WHOLE>(to, left)), to, left);
        }
    }
}

#[inline(always)]
unsafe fn gated_sums_for<V: Simd, A: Act>(rows: usize, channels: usize, pointers: &GatedPointers) {
    // SAFETY: the contract of `gated_sums_raw`.
    unsafe {
        for_blocks!([V, A] rows, channels, gated_sums_block(pointers));
    }
}

#[inline(always)]
unsafe fn gated_sums_with<V: Simd>(rows: usize, channels: usize, act: Activation, pointers: &GatedPointers) {
    // SAFETY: the contract of `gated_sums_raw`.
    unsafe { with_activation!(act, gated_sums_for::<V>(rows, channels, pointers)) }
}

dispatch!(
    /// # Safety
    /// Rows hold `rows * channels` numbers, the sums [`GATED_SUMS`] times `channels`, the others `channels`.
    gated_sums_raw = gated_sums_with(rows: usize, channels: usize, act: Activation, pointers: &GatedPointers)
);

/// How the values of one image were activated and multiplied by factors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gated<'a> {
    pub(super) affine: &'a Affine,
    pub(super) act: Activation,
    /// Per channel.
    pub(super) factors: &'a [f32],
    /// The gradient that each activated value gets through its channel's mean.
    pub(super) through_mean: &'a [f32],
}

/// The second half of the way back, see [`gated_sums`]: `dz = (gradient * factors + through_mean) * act'(z)`, and then as
/// [`raw_gradient`].
///
/// # Panics
/// When a slice is too short.
pub(super) fn gated_raw_gradient(of: &Gated<'_>, gradient: &[f32], raw: &[f32], slope: &Slope, out: &mut [f32]) {
    let channels = slope.mean.len();
    assert!(gradient.len() == out.len() && raw.len() == out.len(), "tiles of different sizes");
    assert!(out.len().is_multiple_of(channels) && of.affine.channels() == channels, "rows are incomplete");
    assert!(of.factors.len() == channels && of.through_mean.len() == channels, "one number for each channel");
    let pointers = GatedRawPointers {
        gradient: gradient.as_ptr(),
        raw: raw.as_ptr(),
        out: out.as_mut_ptr(),
        affine: [of.affine.scale.as_ptr(), of.affine.shift.as_ptr()],
        gate: [of.factors.as_ptr(), of.through_mean.as_ptr()],
        slope: SlopePointers::checked(slope, channels),
    };
    // SAFETY: all slices were checked.
    unsafe { gated_raw_gradient_raw(out.len() / channels, channels, of.act, &pointers) };
}

#[derive(Debug)]
struct GatedRawPointers {
    gradient: *const f32,
    raw: *const f32,
    out: *mut f32,
    affine: [*const f32; 2],
    gate: [*const f32; 2],
    slope: SlopePointers,
}

#[inline(always)]
unsafe fn gated_raw_gradient_block<V: Simd, A: Act, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    p: &GatedRawPointers,
) {
    // SAFETY: the contract of `gated_raw_gradient_raw`.
    unsafe {
        let of_channel = |from: *const f32| -> V { load::<V, WHOLE>(from.add(channel), left) };
        let (scale, shift) = (of_channel(p.affine[0]), of_channel(p.affine[1]));
        let (factor, through_mean) = (of_channel(p.gate[0]), of_channel(p.gate[1]));
        let slope = SlopeVectors::<V>::load::<WHOLE>(&p.slope, channel, left);
        for row in 0..ROWS {
            let at = at + row * channels;
            V::prefetch(p.raw.wrapping_add(at + AHEAD));
            V::prefetch(p.gradient.wrapping_add(at + AHEAD));
            let raw = load::<V, WHOLE>(p.raw.add(at), left);
            let gradient = load::<V, WHOLE>(p.gradient.add(at), left).mul_add(factor, through_mean);
            let (_, dz) = A::both(raw.mul_add(scale, shift), gradient);
            store::<V, WHOLE>(slope.raw_gradient(dz, raw), p.out.add(at), left);
        }
    }
}

#[inline(always)]
unsafe fn gated_raw_gradient_for<V: Simd, A: Act>(rows: usize, channels: usize, pointers: &GatedRawPointers) {
    // SAFETY: the contract of `gated_raw_gradient_raw`.
    unsafe {
        for_blocks!([V, A] rows, channels, gated_raw_gradient_block(pointers));
    }
}

#[inline(always)]
unsafe fn gated_raw_gradient_with<V: Simd>(rows: usize, channels: usize, act: Activation, pointers: &GatedRawPointers) {
    // SAFETY: the contract of `gated_raw_gradient_raw`.
    unsafe { with_activation!(act, gated_raw_gradient_for::<V>(rows, channels, pointers)) }
}

dispatch!(
    /// # Safety
    /// Rows hold `rows * channels` numbers, the others `channels`.
    gated_raw_gradient_raw = gated_raw_gradient_with(
        rows: usize,
        channels: usize,
        act: Activation,
        pointers: &GatedRawPointers,
    )
);

/// Adds the activated values of all rows to `sums`.
///
/// # Panics
/// When a slice is too short.
pub(super) fn pool(xs: &[f32], affine: &Affine, act: Activation, sums: &mut [f32]) {
    let channels = affine.channels();
    assert!(xs.len().is_multiple_of(channels) && sums.len() == channels, "rows are incomplete");
    let (scale, shift, rows) = (affine.scale.as_ptr(), affine.shift.as_ptr(), xs.len() / channels);
    // SAFETY: all slices were checked.
    unsafe { pool_raw(xs.as_ptr(), rows, channels, scale, shift, act, sums.as_mut_ptr()) };
}

#[inline(always)]
unsafe fn pool_block<V: Simd, A: Act, const ROWS: usize, const WHOLE: bool>(
    at: usize,
    channel: usize,
    channels: usize,
    left: usize,
    xs: *const f32,
    scale: *const f32,
    shift: *const f32,
    sums: *mut f32,
) {
    // SAFETY: the contract of `pool_raw`.
    unsafe {
        let scale = load::<V, WHOLE>(scale.add(channel), left);
        let shift = load::<V, WHOLE>(shift.add(channel), left);
        let mut sum = V::splat(0.0);
        for row in 0..ROWS {
            V::prefetch(xs.wrapping_add(at + row * channels + AHEAD));
            let x = load::<V, WHOLE>(xs.add(at + row * channels), left);
            sum = sum.add(A::value(x.mul_add(scale, shift)));
        }
        let sums = sums.add(channel);
        store::<V, WHOLE>(sum.add(load::<V, WHOLE>(sums, left)), sums, left);
    }
}

#[inline(always)]
unsafe fn pool_for<V: Simd, A: Act>(
    xs: *const f32,
    rows: usize,
    channels: usize,
    scale: *const f32,
    shift: *const f32,
    sums: *mut f32,
) {
    // SAFETY: the contract of `pool_raw`.
    unsafe {
        for_blocks!([V, A] rows, channels, pool_block(xs, scale, shift, sums));
    }
}

#[inline(always)]
unsafe fn pool_with<V: Simd>(
    xs: *const f32,
    rows: usize,
    channels: usize,
    scale: *const f32,
    shift: *const f32,
    act: Activation,
    sums: *mut f32,
) {
    // SAFETY: the contract of `pool_raw`.
    unsafe { with_activation!(act, pool_for::<V>(xs, rows, channels, scale, shift, sums)) }
}

dispatch!(
    /// # Safety
    /// `xs` holds `rows * channels` numbers, the others `channels`.
    pool_raw = pool_with(
        xs: *const f32,
        rows: usize,
        channels: usize,
        scale: *const f32,
        shift: *const f32,
        act: Activation,
        sums: *mut f32,
    )
);

/// For rows of similarities, a column for each query: the largest of each column, and `xs = 2^((xs - largest) * sharpness)` in place with
/// the sums of the columns.
///
/// # Panics
/// When a slice is too short.
pub(super) fn softmax_columns(xs: &mut [f32], sharpness: f32, largest: &mut [f32], sums: &mut [f32]) {
    let columns = largest.len();
    assert!(columns == sums.len() && xs.len().is_multiple_of(columns), "rows are incomplete");
    let rows = xs.len() / columns;
    // SAFETY: all slices were checked.
    unsafe {
        softmax_columns_raw(xs.as_mut_ptr(), rows, columns, sharpness, largest.as_mut_ptr(), sums.as_mut_ptr());
    }
}

#[inline(always)]
unsafe fn softmax_columns_with<V: Simd>(
    xs: *mut f32,
    rows: usize,
    columns: usize,
    sharpness: f32,
    largest: *mut f32,
    sums: *mut f32,
) {
    // SAFETY: the contract of `softmax_columns_raw`.
    unsafe {
        let mut column = 0;
        while column < columns {
            let left = columns - column;
            let mut top = V::splat(f32::NEG_INFINITY);
            for row in 0..rows {
                top = top.max(V::load_first(xs.add(row * columns + column), left));
            }
            top.store_first(largest.add(column), left);
            let (mut sum, sharpness, least) = (V::splat(0.0), V::splat(sharpness), V::splat(-EXP2_LIMIT));
            for row in 0..rows {
                let at = xs.add(row * columns + column);
                let weight = least.max(V::load_first(at, left).sub(top).mul(sharpness)).exp2();
                weight.store_first(at, left);
                sum = sum.add(weight);
            }
            sum.store_first(sums.add(column), left);
            column += V::LANES;
        }
    }
}

dispatch!(
    /// # Safety
    /// `xs` holds `rows * columns` numbers, the others `columns`.
    softmax_columns_raw = softmax_columns_with(
        xs: *mut f32,
        rows: usize,
        columns: usize,
        sharpness: f32,
        largest: *mut f32,
        sums: *mut f32,
    )
);

/// `target += values`.
///
/// # Panics
/// When the slices differ in length.
pub(super) fn add(target: &mut [f32], values: &[f32]) {
    assert_eq!(target.len(), values.len(), "tiles of different sizes");
    for (target, value) in target.iter_mut().zip(values) {
        *target += value;
    }
}
