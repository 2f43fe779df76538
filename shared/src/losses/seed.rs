//! SEED: the student is as similar to a queue of the teacher's embeddings as the teacher is.

use candle_core::{Tensor, Var};

use super::info_nce::info_nce;
use crate::{Error, Result};

/// Cross entropy between the teacher's and the student's distributions over the sample's own teacher embedding and a queue of
/// others.
///
/// A row's logits are its products with `teacher_i`, then with all `queue_j`, over a temperature; the loss is the mean over the
/// rows of `-sum_j softmax(teacher)_j * log softmax(student)_j`. It is at least the entropy of the teacher's distribution. Only
/// `student` gets a gradient.
///
/// # Shapes
/// - `student`, `teacher`: `(B, D)` f32, rows of unit L2 norm
/// - `queue`: `(K, D)` f32, rows of unit L2 norm, as it was before `teacher` enters it
/// - returns: scalar
///
/// # Errors
/// `Error::Shape` when the three do not fit together or one is empty; `Error::Invalid` for a temperature that is not positive.
///
/// # Source
/// Fang et al., SEED, arXiv 2101.04731, section 3.2; official code `seed/builder.py`, `forward`, and the soft cross entropy of
/// `main_small-patch.py`.
pub fn seed(
    student: &Tensor,
    teacher: &Tensor,
    queue: &Tensor,
    temperature: f64,
    teacher_temperature: f64,
) -> Result<Tensor> {
    // With `m` the mean of own embedding and queue by the teacher's softmax, the sum of targets times logits is `s . m / temperature`.
    // The gradient of the contrastive loss at the teacher's embedding is `(m - own) / (B * teacher_temperature)`.
    let contrast = info_nce(student, teacher, queue, temperature)?.loss;
    let at_teacher = Var::from_tensor(&teacher.detach())?;
    let grads = info_nce(&at_teacher, teacher, queue, teacher_temperature)?.loss.backward()?;
    let towards = grads.get(&at_teacher).ok_or_else(|| Error::invalid("the contrastive loss has no gradient", ""))?;
    let towards = (towards.detach() * (teacher_temperature / temperature))?;
    Ok((contrast - (student * towards)?.sum_all()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::losses::unit_rows as rows;

    /// The definition, in f64.
    fn plainly(student: &[Vec<f32>], teacher: &[Vec<f32>], queue: &[Vec<f32>], temperatures: [f64; 2]) -> f64 {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let log_softmax = |row: &[f32], own: &[f32], temperature: f64| {
            let others = queue.iter().map(|other| dot(row, other));
            let logits: Vec<f64> = std::iter::once(dot(row, own)).chain(others).map(|x| x / temperature).collect();
            let sum = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
            logits.into_iter().map(|x| x - sum).collect::<Vec<f64>>()
        };
        let losses = student.iter().zip(teacher).map(|(student, teacher)| {
            let targets = log_softmax(teacher, teacher, temperatures[1]);
            let found = log_softmax(student, teacher, temperatures[0]);
            -targets.iter().zip(found).map(|(target, found)| target.exp() * found).sum::<f64>()
        });
        losses.sum::<f64>() / student.len() as f64
    }

    #[test]
    fn loss_and_gradient_are_those_of_the_definition() {
        const STEP: f32 = 1e-2;
        let (teacher, queue) = (rows(3, 8, 0.4), rows(21, 8, 0.9));
        let vectors = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
        for temperatures in [[0.2, 0.01], [0.5, 0.3]] {
            let student = Var::from_tensor(&rows(3, 8, 0.1)).unwrap();
            let loss = seed(&student, &teacher, &queue, temperatures[0], temperatures[1]).unwrap();
            let value = |student: &[Vec<f32>]| plainly(student, &vectors(&teacher), &vectors(&queue), temperatures);
            let expected = value(&vectors(&student));
            assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - expected).abs() < 1e-5 * expected);
            let grads = loss.backward().unwrap();
            let gradient = vectors(grads.get(&student).unwrap());
            for (row, gradient) in gradient.iter().enumerate() {
                for (column, found) in gradient.iter().enumerate() {
                    let shifted = |by: f32| {
                        let mut student = vectors(&student);
                        student[row][column] += by;
                        value(&student)
                    };
                    let expected = (shifted(STEP) - shifted(-STEP)) / f64::from(2.0 * STEP);
                    assert!((f64::from(*found) - expected).abs() < 2e-3, "{row} {column}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn a_student_like_the_teacher_costs_the_entropy() {
        let (teacher, queue) = (rows(4, 8, 0.4), rows(9, 8, 0.9));
        let student = Var::from_tensor(&teacher).unwrap();
        let grads = seed(&student, &teacher, &queue, 0.1, 0.1).unwrap().backward().unwrap();
        let gradient = grads.get(&student).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(gradient.iter().all(|x| x.abs() < 1e-6), "{gradient:?}");
    }

    #[test]
    fn misfits_are_refused() {
        let a = rows(2, 4, 0.0);
        assert!(matches!(seed(&a, &a, &rows(3, 5, 0.0), 0.2, 0.01), Err(Error::Shape { .. })));
        assert!(matches!(seed(&a, &a, &a, 0.2, 0.0), Err(Error::Invalid { .. })));
    }
}
