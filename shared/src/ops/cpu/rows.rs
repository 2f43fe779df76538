//! Operations on rows: linear layers, unit length, and the contrastive loss against a queue.

use rayon::prelude::*;

use super::gemm::{Packed, Rows, lanes, multiply, multiply_transposed, multiply_unpacked};
use super::norm::{Affine, ShortSums};
use super::tiles::{self, Activated, Extras};
use crate::ops::Activation;

/// Rows of a piece.
const PIECE_ROWS: usize = 16;
/// Columns of a piece of a linear layer.
const PIECE_COLUMNS: usize = 192;
/// Rows of the weights of a linear layer in a piece.
const PIECE_WEIGHT_ROWS: usize = 48;
/// Keys of the queue in a piece.
const PIECE_KEYS: usize = 1024;
/// The norm below which a row is divided by this instead, as `PyTorch`'s `normalize`.
const MIN_NORM: f32 = 1e-12;

/// `xs weight + bias`, in pieces of columns.
pub(super) fn linear(xs: &[f32], inputs: usize, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let outputs = bias.len();
    let rows = xs.len() / inputs;
    let starts: Vec<usize> = (0..outputs).step_by(PIECE_COLUMNS).collect();
    let pieces: Vec<Vec<f32>> = starts
        .into_par_iter()
        .map(|start| {
            let columns = PIECE_COLUMNS.min(outputs - start);
            let mut out = bias[start..start + columns].repeat(rows);
            // Whole vectors that would reach beyond the weights are arranged first.
            if start + columns.next_multiple_of(lanes()) <= outputs {
                let sizes = [rows, columns, inputs];
                multiply_unpacked(sizes, xs, inputs, &weight[start..], outputs, &mut out, columns, true);
            } else {
                let packed = Packed::new(&weight[start..], inputs, columns, outputs, 1);
                multiply(rows, xs, inputs, &packed, &mut out, columns, true);
            }
            out
        })
        .collect();
    let mut out = vec![0.0; rows * outputs];
    for (row, out) in out.chunks_exact_mut(outputs).enumerate() {
        for (piece, target) in pieces.iter().zip(out.chunks_mut(PIECE_COLUMNS)) {
            let columns = target.len();
            target.copy_from_slice(&piece[row * columns..][..columns]);
        }
    }
    out
}

/// `xs' dout`, the gradient of the weights of [`linear`], in pieces of rows of the weights.
pub(super) fn linear_weight_gradient(xs: &[f32], dout: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut dweight = vec![0.0; inputs * outputs];
    let count = xs.len() / inputs;
    dweight.par_chunks_mut(PIECE_WEIGHT_ROWS * outputs).enumerate().for_each(|(piece, dweight)| {
        let shared = Rows { left: &xs[piece * PIECE_WEIGHT_ROWS..], right: dout, count };
        let rows = dweight.len() / outputs;
        multiply_transposed([rows, outputs], &[shared], inputs, outputs, dweight, outputs);
    });
    dweight
}

/// `dout weight'`, the gradient of the input of [`linear`]: the weights are the left factor, as they lie.
pub(super) fn linear_input_gradient(dout: &[f32], weight: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let rows = dout.len() / outputs;
    let right = Packed::new(dout, outputs, rows, 1, outputs);
    let mut transposed = vec![0.0; inputs * rows];
    let weights = weight.par_chunks(PIECE_WEIGHT_ROWS * outputs);
    transposed.par_chunks_mut(PIECE_WEIGHT_ROWS * rows).zip(weights).for_each(|(out, weight)| {
        multiply(weight.len() / outputs, weight, outputs, &right, out, rows, false);
    });
    transpose(&transposed, rows)
}

/// The transpose of rows of `columns` numbers.
fn transpose(xs: &[f32], columns: usize) -> Vec<f32> {
    let rows = xs.len() / columns.max(1);
    let mut out = vec![0.0; xs.len()];
    for (row, xs) in xs.chunks_exact(columns.max(1)).enumerate() {
        for (column, x) in xs.iter().enumerate() {
            out[column * rows + row] = *x;
        }
    }
    out
}

/// `act(xs)` for rows of `columns` numbers, in place.
pub(super) fn activate(xs: &mut [f32], columns: usize, act: Activation) {
    let unchanged = Affine::identity(columns);
    tiles::apply_in_place(xs, &unchanged, act, Extras::default());
}

/// `gradient * act'(xs)` for rows of `columns` numbers, in place.
pub(super) fn activation_gradient(xs: &[f32], gradient: &mut [f32], columns: usize, act: Activation) {
    let (unchanged, mean) = (Affine::identity(columns), vec![0.0; columns]);
    let of = Activated { raw: xs, affine: &unchanged, mean: &mean, act, residual: None };
    tiles::activation_gradient(&of, gradient, None, &mut ShortSums::new(columns).as_target());
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
    let norm = dot(row, row).sqrt() as f32;
    // NaN stays.
    if norm < MIN_NORM { MIN_NORM } else { norm }
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

/// Cross entropy of `softmax(logits / temperature)` against `targets`, mean over the rows, and its gradient with respect to the
/// logits, empty unless wanted.
pub(super) fn soft_cross_entropy(
    logits: &[f32],
    targets: &[f32],
    classes: usize,
    temperature: f64,
    gradient: bool,
) -> (f64, Vec<f32>) {
    let rows = logits.len() / classes;
    let sharpness = (1.0 / temperature) as f32;
    let factor = 1.0 / (temperature * rows as f64);
    let mut dlogits = vec![0.0; logits.len()];
    let losses: Vec<f64> = dlogits
        .par_chunks_exact_mut(classes)
        .zip(logits.par_chunks_exact(classes))
        .zip(targets.par_chunks_exact(classes))
        .map(|((weights, logits), targets)| {
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (mut sum, mut mass, mut hit) = (0f64, 0f64, 0f64);
            for ((weight, &logit), &target) in weights.iter_mut().zip(logits).zip(targets) {
                *weight = ((logit - top) * sharpness).exp();
                sum += f64::from(*weight);
                mass += f64::from(target);
                hit += f64::from(target) * f64::from(logit - top);
            }
            let (weight_factor, target_factor) = ((mass / sum * factor) as f32, factor as f32);
            for (weight, &target) in weights.iter_mut().zip(targets) {
                *weight = *weight * weight_factor - target * target_factor;
            }
            mass * sum.ln() - hit / temperature
        })
        .collect();
    if !gradient {
        dlogits = Vec::new();
    }
    (losses.iter().sum::<f64>() / rows as f64, dlogits)
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

/// What a piece of the queue gives each query: its largest similarity, the sum of `exp((similarity - largest) / temperature)`, and the
/// piece's keys summed with these weights.
struct Part {
    largest: Vec<f32>,
    sums: Vec<f32>,
    keys: Vec<f32>,
}

/// Cross entropy of `[q . k, q . queue] / temperature` with the positive first.
///
/// Similarities exist for one piece of the queue at a time: each piece is reduced to a [`Part`], and the parts are put together around
/// the largest similarity of all.
pub(super) fn info_nce(
    queries: &[f32],
    keys: &[f32],
    queue: &[f32],
    width: usize,
    temperature: f64,
    gradient: bool,
) -> InfoNceResult {
    let batch = queries.len() / width;
    let by_query = Packed::new(queries, width, batch, 1, width);
    let sharpness = (std::f64::consts::LOG2_E / temperature) as f32;
    let parts: Vec<Part> = queue
        .par_chunks(PIECE_KEYS * width)
        .map(|queue| {
            let length = queue.len() / width;
            let mut weights = vec![0.0; length * batch];
            multiply(length, queue, width, &by_query, &mut weights, batch, false);
            let (mut largest, mut sums) = (vec![f32::NEG_INFINITY; batch], vec![0.0; batch]);
            tiles::softmax_columns(&mut weights, sharpness, &mut largest, &mut sums);
            let mut keys = vec![0.0; if gradient { batch * width } else { 0 }];
            if gradient {
                let shared = Rows { left: &weights, right: queue, count: length };
                multiply_transposed([batch, width], &[shared], batch, width, &mut keys, width);
            }
            Part { largest, sums, keys }
        })
        .collect();
    let mut result = InfoNceResult { loss: 0.0, correct: 0, dqueries: Vec::with_capacity(queries.len()) };
    for (row, (query, key)) in queries.chunks_exact(width).zip(keys.chunks_exact(width)).enumerate() {
        let positive = dot(query, key) as f32;
        let negative = parts.iter().map(|part| part.largest[row]).fold(f32::NEG_INFINITY, f32::max);
        result.correct += usize::from(positive > negative);
        let top = positive.max(negative);
        let weight = |similarity: f32| (f64::from(similarity - top) / temperature).exp();
        let mut sum = weight(positive);
        for part in &parts {
            sum += weight(part.largest[row]) * f64::from(part.sums[row]);
        }
        result.loss += (sum.ln() - f64::from(positive - top) / temperature) / batch as f64;
        if gradient {
            // Softmax over the batch and the temperature: what each key adds to the gradient.
            let factor = 1.0 / (temperature * sum * batch as f64);
            let mut dquery: Vec<f64> = key.iter().map(|&k| f64::from(k) * (weight(positive) - sum) * factor).collect();
            for part in &parts {
                let factor = weight(part.largest[row]) * factor;
                for (d, &k) in dquery.iter_mut().zip(&part.keys[row * width..]) {
                    *d += f64::from(k) * factor;
                }
            }
            result.dqueries.extend(dquery.into_iter().map(|d| d as f32));
        }
    }
    result
}
