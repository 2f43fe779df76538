//! Agreement of the student's embeddings with the teacher's.

use candle_core::Tensor;

use crate::{Error, Result};

/// Squared distance between student and teacher embeddings, summed over `D`, then averaged over `B`.
///
/// Gradients flow to both, so pass a teacher that is not tracked (a cache, or the result of a momentum copy).
///
/// # Shapes
/// - `student`, `teacher`: `(B, D)` f32, rows of unit L2 norm
/// - returns: scalar, in `[0, 4]`
///
/// # Errors
/// `Error::Shape` when the two differ in shape or are not of rank 2.
///
/// # Source
/// DisCo, arXiv 2104.09124, the distillation term of section 3; official `DisCo/main.py` @ 1d732c8, `criterion_mse`.
///
/// # Deviation
/// The official code sums over the batch of one GPU, so that its weight depends on that batch: with 32 samples per GPU it
/// equals 32 times this mean (see [the module](crate::losses)).
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// let student = Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[1f32, 0.0], [1.0, 0.0]], &Device::Cpu)?;
/// let loss = shared::losses::distillation(&student, &teacher)?;
/// assert_eq!(loss.to_scalar::<f32>()?, 1.0); // (0 + 2) / 2
/// # Ok::<(), shared::Error>(())
/// ```
pub fn distillation(student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    if student.rank() != 2 || student.dims() != teacher.dims() {
        let got = format!("{:?} and {:?}", student.dims(), teacher.dims());
        return Err(Error::Shape { op: "distillation", expected: "(B, D) twice".into(), got });
    }
    Ok((student - teacher)?.sqr()?.sum(1)?.mean(0)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;

    #[test]
    fn identical_rows_cost_nothing_and_orthogonal_unit_rows_two() {
        let a = Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu).unwrap();
        let b = Tensor::new(&[[0f32, 1.0], [1.0, 0.0]], &Device::Cpu).unwrap();
        assert_eq!(distillation(&a, &a).unwrap().to_scalar::<f32>().unwrap(), 0.0);
        assert_eq!(distillation(&a, &b).unwrap().to_scalar::<f32>().unwrap(), 2.0);
        let opposite = a.neg().unwrap();
        assert_eq!(distillation(&a, &opposite).unwrap().to_scalar::<f32>().unwrap(), 4.0);
    }

    #[test]
    fn gradient_is_twice_the_difference_over_the_batch() {
        let student = Var::new(&[[1f32, 2.0], [3.0, 5.0]], &Device::Cpu).unwrap();
        let teacher = Tensor::new(&[[0f32, 0.0], [3.0, 1.0]], &Device::Cpu).unwrap();
        let grads = distillation(&student, &teacher).unwrap().backward().unwrap();
        assert_eq!(grads.get(&student).unwrap().to_vec2::<f32>().unwrap(), [[1.0, 2.0], [0.0, 4.0]]);
    }

    #[test]
    fn other_shapes_are_refused() {
        let a = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let b = Tensor::zeros((2, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(matches!(distillation(&a, &b), Err(Error::Shape { .. })));
    }
}
