//! Operations on rows: linear layers, unit length, and the contrastive loss against a queue.

use rayon::prelude::*;

use super::gemm::{View, multiply};

/// Rows of a piece.
const PIECE_ROWS: usize = 16;
/// Columns of a piece of a linear layer.
const PIECE_COLUMNS: usize = 128;
/// The norm below which a row is divided by this instead, as `PyTorch`'s `normalize`.
const MIN_NORM: f32 = 1e-12;

/// `out = a b` for `a: m x k` and `b: k x n`, in pieces of columns of `out`.
pub(super) fn product_by_columns([m, n, k]: [usize; 3], a: View<'_>, b: View<'_>, bias: Option<&[f32]>) -> Vec<f32> {
    let pieces: Vec<Vec<f32>> = (0..n.div_ceil(PIECE_COLUMNS))
        .into_par_iter()
        .map(|piece| {
            let start = piece * PIECE_COLUMNS;
            let columns = PIECE_COLUMNS.min(n - start);
            let mut out = vec![0.0; m * columns];
            if let Some(bias) = bias {
                out.chunks_exact_mut(columns).for_each(|row| row.copy_from_slice(&bias[start..start + columns]));
            }
            multiply([m, columns, k], a, b.skip_columns(start), &mut out, columns, true);
            out
        })
        .collect();
    let mut out = vec![0.0; m * n];
    for (row, out) in out.chunks_exact_mut(n.max(1)).enumerate() {
        for (piece, target) in pieces.iter().zip(out.chunks_mut(PIECE_COLUMNS)) {
            let columns = target.len();
            target.copy_from_slice(&piece[row * columns..][..columns]);
        }
    }
    out
}

/// Sums of columns, rows added in order.
pub(super) fn column_sums(xs: &[f32], columns: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; columns];
    for row in xs.chunks_exact(columns) {
        for (sum, &x) in sums.iter_mut().zip(row) {
            *sum += f64::from(x);
        }
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn divisor(row: &[f32]) -> f32 {
    (dot(row, row).sqrt() as f32).max(MIN_NORM)
}

/// Rows divided by their length.
pub(super) fn normalise(xs: &[f32], width: usize) -> Vec<f32> {
    let mut out = xs.to_vec();
    out.par_chunks_mut(PIECE_ROWS * width).for_each(|piece| {
        for row in piece.chunks_exact_mut(width) {
            let divisor = divisor(row);
            for x in row {
                *x /= divisor;
            }
        }
    });
    out
}

/// The gradient of [`normalise`], from its input, its output and the gradient of its output.
pub(super) fn normalise_gradient(xs: &[f32], out: &[f32], dout: &[f32], width: usize) -> Vec<f32> {
    let mut dxs = vec![0.0; xs.len()];
    let length = PIECE_ROWS * width;
    dxs.par_chunks_mut(length).enumerate().for_each(|(piece, dxs)| {
        for (row, dxs) in dxs.chunks_exact_mut(width).enumerate() {
            let range = piece * length + row * width..piece * length + (row + 1) * width;
            let (xs, out, dout) = (&xs[range.clone()], &out[range.clone()], &dout[range]);
            let divisor = divisor(xs);
            let along = if divisor > MIN_NORM { dot(out, dout) as f32 } else { 0.0 };
            for ((dx, y), d) in dxs.iter_mut().zip(out).zip(dout) {
                *dx = (d - y * along) / divisor;
            }
        }
    });
    dxs
}

/// What [`info_nce`] finds.
#[derive(Debug)]
pub(super) struct InfoNceResult {
    /// Mean over the rows.
    pub(super) loss: f64,
    /// Rows whose positive has the largest logit.
    pub(super) correct: usize,
    /// The gradient of the loss with respect to the queries; empty unless wanted.
    pub(super) dqueries: Vec<f32>,
}

/// Cross entropy of `[q . k, q . queue] / temperature` with the positive first.
pub(super) fn info_nce(
    queries: &[f32],
    keys: &[f32],
    queue: &[f32],
    width: usize,
    temperature: f64,
    gradient: bool,
) -> InfoNceResult {
    let (batch, length) = (queries.len() / width, queue.len() / width);
    let scale = (1.0 / temperature) as f32;
    let pieces: Vec<(f64, usize, Vec<f32>)> = queries
        .par_chunks(PIECE_ROWS * width)
        .zip(keys.par_chunks(PIECE_ROWS * width))
        .map(|(queries, keys)| {
            let rows = queries.len() / width;
            let mut logits = vec![0.0; rows * length];
            let by_queue = View::rows(queue, width).t();
            multiply([rows, length, width], View::rows(queries, width), by_queue, &mut logits, length, false);
            let (mut loss, mut correct) = (0.0, 0);
            let mut positive_weights = Vec::with_capacity(rows);
            for ((logits, query), key) in
                logits.chunks_exact_mut(length.max(1)).zip(queries.chunks_exact(width)).zip(keys.chunks_exact(width))
            {
                for logit in logits.iter_mut() {
                    *logit *= scale;
                }
                let positive = dot(query, key) as f32 * scale;
                let negative = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                correct += usize::from(positive > negative);
                let top = positive.max(negative);
                let mut sum = f64::from((positive - top).exp());
                for logit in logits.iter_mut() {
                    *logit = (*logit - top).exp();
                    sum += f64::from(*logit);
                }
                loss += sum.ln() - f64::from(positive - top);
                // Softmax over the batch and the temperature: what each row of the queue adds to the gradient.
                let factor = f64::from(scale) / (sum * batch as f64);
                positive_weights.push((f64::from((positive - top).exp()) - sum) * factor);
                for logit in logits {
                    *logit *= factor as f32;
                }
            }
            let mut dqueries = Vec::new();
            if gradient {
                for (key, weight) in keys.chunks_exact(width).zip(&positive_weights) {
                    dqueries.extend(key.iter().map(|k| k * *weight as f32));
                }
                let sizes = [rows, width, length];
                multiply(sizes, View::rows(&logits, length), View::rows(queue, width), &mut dqueries, width, true);
            }
            (loss, correct, dqueries)
        })
        .collect();
    let mut result = InfoNceResult { loss: 0.0, correct: 0, dqueries: Vec::new() };
    for (loss, correct, dqueries) in pieces {
        result.loss += loss / batch as f64;
        result.correct += correct;
        result.dqueries.extend(dqueries);
    }
    result
}
