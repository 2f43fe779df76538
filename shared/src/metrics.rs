//! Accuracies, in percent.

/// The percentage of rows whose label is among the `k` largest logits; of equal logits the lower class counts as larger.
///
/// Rows with a label outside `0..classes` (-1: none) are left out; 0 when none is left.
///
/// # Shapes
/// - `logits`: `N` rows of `classes` values
/// - `labels`: `N`
///
/// # Panics
/// When `logits` is not `labels.len()` rows of `classes` values.
///
/// # Examples
/// ```
/// use shared::metrics::top_k;
/// let logits = [0.1, 0.9, 0.0, 0.5, 0.3, 0.2];
/// assert_eq!(top_k(&logits, 3, &[1, 1], 1), 50.0);
/// assert_eq!(top_k(&logits, 3, &[1, 1], 2), 100.0);
/// ```
pub fn top_k(logits: &[f32], classes: usize, labels: &[i64], k: usize) -> f64 {
    let (correct, counted) = top_k_counts(logits, classes, labels, k);
    if counted == 0 { 0.0 } else { 100.0 * correct as f64 / counted as f64 }
}

/// As [`top_k`], the number of correct rows and of rows that counted: to be summed over batches.
///
/// # Panics
/// When `logits` is not `labels.len()` rows of `classes` values.
pub fn top_k_counts(logits: &[f32], classes: usize, labels: &[i64], k: usize) -> (u64, u64) {
    assert_eq!(logits.len(), labels.len() * classes, "logits do not fit the labels");
    let (mut correct, mut counted) = (0, 0);
    for (row, &label) in logits.chunks_exact(classes.max(1)).zip(labels) {
        let Some(label) = usize::try_from(label).ok().filter(|&label| label < classes) else { continue };
        let own = row[label];
        let ahead = row.iter().enumerate().filter(|&(class, &x)| x > own || (x == own && class < label)).count();
        counted += 1;
        correct += u64::from(ahead < k && !own.is_nan());
    }
    (correct, counted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_ties_and_missing_labels() {
        let logits = [0.5, 0.5, 0.1, /**/ 0.0, 0.2, 0.9, /**/ 1.0, 2.0, 3.0];
        assert_eq!(top_k_counts(&logits, 3, &[0, 2, -1], 1), (2, 2));
        assert_eq!(top_k_counts(&logits, 3, &[1, 1, 0], 1), (0, 3));
        assert_eq!(top_k_counts(&logits, 3, &[1, 1, 0], 2), (2, 3));
        assert_eq!(top_k(&logits, 3, &[-1, -1, -1], 1), 0.0);
    }

    #[test]
    fn diverged_logits_are_never_correct() {
        assert_eq!(top_k(&[f32::NAN, f32::NAN], 2, &[0], 1), 0.0);
    }
}
