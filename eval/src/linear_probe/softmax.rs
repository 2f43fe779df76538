//! Softmax cross-entropy of many stacked heads: losses and gradients in place, and the rank of the true class.

use rayon::prelude::*;

/// Turns logits into the gradient of the mean cross-entropy with respect to them and returns the losses.
///
/// # Shapes
/// - `logits`: `(B, L × C)`, `L` heads of `C` classes side by side; becomes `(softmax - one_hot) / B` per head
/// - `classes`: `(B)`, below `C`
/// - returns: `(B, L)`, the loss of each sample under each head; NaN where a logit is not finite
pub(super) fn cross_entropy_gradient(logits: &mut [f32], classes: &[u32], num_classes: usize) -> Vec<f64> {
    let heads = logits.len() / (classes.len() * num_classes).max(1);
    let scale = 1.0 / classes.len() as f32;
    let mut losses = vec![0.0; classes.len() * heads];
    logits
        .par_chunks_mut((heads * num_classes).max(1))
        .zip(losses.par_chunks_mut(heads.max(1)))
        .zip(classes)
        .with_min_len(8)
        .for_each(|((row, losses), &class)| {
            for (head, loss) in row.chunks_mut(num_classes).zip(losses) {
                *loss = gradient_of_row(head, class as usize, scale);
            }
        });
    losses
}

/// One sample under one head: the loss; `row` becomes its gradient.
fn gradient_of_row(row: &mut [f32], class: usize, scale: f32) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !largest.is_finite() || row.iter().any(|x| x.is_nan()) {
        row.fill(f32::NAN);
        return f64::NAN;
    }
    let true_logit = row[class] - largest;
    for x in row.iter_mut() {
        *x = exp_of_non_positive(*x - largest);
    }
    let sum = lane_sum(row);
    let factor = scale / sum;
    for x in row.iter_mut() {
        *x *= factor;
    }
    row[class] -= scale;
    f64::from(sum).ln() - f64::from(true_logit)
}

/// Sums in eight lanes, in an order that depends on the length alone.
fn lane_sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (whole, rest) = values.as_chunks::<8>();
    for chunk in whole {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x;
    }
    ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]))
}

/// `exp(x)` for `x <= 0`, to 2 units in the last place; below -87 it is `exp(-87)`, about 1.6e-38.
///
/// Branch-free, so that the compiler vectorises it: `x = n ln 2 + r`, a polynomial in `r`, and `n` into the exponent. The
/// coefficients are those of the single precision `expf` of the Cephes library.
#[inline]
fn exp_of_non_positive(x: f32) -> f32 {
    /// 1.5 × 2^23: adding it rounds to an integer, which stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// The upper part of ln 2, exact in few bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    /// What is left of ln 2.
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.max(-87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_3e-1] {
        p = p * r + coefficient;
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (p * r * r + r + 1.0) * scale
}

/// How many classes score higher than `class`, the lower index winning a draw; nothing when its logit is not a number.
pub(super) fn rank_of(logits: &[f32], class: usize) -> Option<usize> {
    let own = logits[class];
    let ahead = |(c, &other): (usize, &f32)| other > own || other.is_nan() || (other == own && c < class);
    (!own.is_nan()).then(|| logits.iter().enumerate().filter(|&entry| ahead(entry)).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_two_ulps() {
        let mut worst = 0.0_f64;
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_of_non_positive(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
        assert_eq!(exp_of_non_positive(0.0), 1.0);
        assert_eq!(exp_of_non_positive(f32::NEG_INFINITY), exp_of_non_positive(-87.0));
    }

    #[test]
    fn losses_and_gradients_of_hand_values() {
        // Two samples, two heads of two classes. Equal logits: loss ln 2, softmax 1/2.
        let mut logits = [0.0, 0.0, 3.0_f32.ln(), 0.0, 5.0, 5.0, 0.0, 3.0_f32.ln()];
        let losses = cross_entropy_gradient(&mut logits, &[0, 1], 2);
        let (ln2, quarter) = (2.0_f64.ln(), (4.0_f64 / 3.0).ln());
        for (got, want) in losses.iter().zip([ln2, quarter, ln2, quarter]) {
            assert!((got - want).abs() < 1e-6, "{losses:?}");
        }
        for (got, want) in logits.iter().zip([-0.25, 0.25, -0.125, 0.125, 0.25, -0.25, 0.125, -0.125]) {
            assert!((got - want).abs() < 1e-7, "{logits:?}");
        }
    }

    #[test]
    fn a_diverged_head_leaves_the_others_alone() {
        let mut logits = [f32::NAN, 1.0, 0.0, 0.0, f32::INFINITY, 0.0];
        let losses = cross_entropy_gradient(&mut logits, &[1], 2);
        assert!(losses[0].is_nan() && (losses[1] - 2.0_f64.ln()).abs() < 1e-6 && losses[2].is_nan());
        assert!(logits[0].is_nan() && logits[2] == 0.5 && logits[4].is_nan());
    }

    #[test]
    fn ranks_break_draws_by_index_and_miss_what_is_not_a_number() {
        assert_eq!(rank_of(&[1.0, 3.0, 2.0], 2), Some(1));
        assert_eq!(rank_of(&[1.0, 1.0], 0), Some(0));
        assert_eq!(rank_of(&[1.0, 1.0], 1), Some(1));
        assert_eq!(rank_of(&[f32::NAN, f32::NAN], 0), None);
        assert_eq!(rank_of(&[f32::NAN, 1.0], 1), Some(1));
    }
}
