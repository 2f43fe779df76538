//! The contrastive loss of `MoCo`.

use candle_core::Tensor;

use crate::ops::{self, Engine};
use crate::{Error, Result};

/// The contrastive loss and how often it is won.
#[derive(Debug)]
pub struct InfoNce {
    /// Scalar, mean over the batch; at a random start about `ln(K + 1)`.
    pub loss: Tensor,
    /// Scalar: percentage of queries that are closer to their own key than to all of the queue.
    pub top1: Tensor,
}

/// Cross entropy of each query's similarities to its key and to a queue of other keys, where its key is right.
///
/// The logits of row `i` are `q_i . k_i`, then `q_i . queue_j` for all `j`, divided by `temperature`; the loss is the mean over
/// the rows of `-log softmax(logits)_0`. Only `q` gets a gradient: keys and queue are constants.
///
/// # Shapes
/// - `q`, `k`: `(B, D)` f32, rows of unit L2 norm
/// - `queue`: `(K, D)` f32, rows of unit L2 norm, as it was before `k` enters it
///
/// # Errors
/// `Error::Shape` when the three do not fit together or one is empty; `Error::Invalid` for a temperature that is not positive.
///
/// # Source
/// He et al., `MoCo`, arXiv 1911.05722, equation 1 and algorithm 1; official DisCo code @ 1d732c8,
/// `moco/builder_kq_mse_largeembedding_2048.py`, `forward`.
pub fn info_nce(q: &Tensor, k: &Tensor, queue: &Tensor, temperature: f64) -> Result<InfoNce> {
    if temperature.is_nan() || temperature <= 0.0 {
        return Err(Error::invalid(format!("the temperature must be positive, got {temperature}"), ""));
    }
    let (loss, top1) = ops::info_nce(q, k, queue, temperature, Engine::for_device(q.device()))?;
    Ok(InfoNce { loss, top1 })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::losses::unit_rows as rows;

    #[test]
    fn equal_logits_cost_the_logarithm_of_their_number() {
        let q = Tensor::new(&[[1f32, 0.0]], &Device::Cpu).unwrap();
        let queue = Tensor::new(&[[1f32, 0.0], [1.0, 0.0], [1.0, 0.0]], &Device::Cpu).unwrap();
        let InfoNce { loss, top1 } = info_nce(&q, &q, &queue, 0.2).unwrap();
        assert!((loss.to_scalar::<f32>().unwrap() - 4f32.ln()).abs() < 1e-6);
        assert_eq!(top1.to_scalar::<f32>().unwrap(), 0.0);
    }

    #[test]
    fn loss_and_gradient_agree_with_the_reference() {
        // 37 rows and 131 keys: neither is a multiple of a piece.
        let (k, queue) = (rows(37, 24, 0.3), rows(131, 24, 0.9));
        let mut results = Vec::new();
        for engine in [Engine::Reference, Engine::Cpu] {
            let q = Var::from_tensor(&rows(37, 24, 0.1)).unwrap();
            let (loss, top1) = ops::info_nce(&q, &k, &queue, 0.2, engine).unwrap();
            let grads = (&loss * 3.0).unwrap().backward().unwrap();
            let gradient = grads.get(&q).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            results.push((loss.to_scalar::<f32>().unwrap(), top1.to_scalar::<f32>().unwrap(), gradient));
        }
        let (reference, cpu) = (&results[0], &results[1]);
        assert!((reference.0 - cpu.0).abs() < 1e-5 * reference.0);
        assert!((reference.1 - cpu.1).abs() < 1e-3);
        let scale = reference.2.iter().fold(0f32, |a, b| a.max(b.abs()));
        assert!(scale > 1e-3);
        for (a, b) in reference.2.iter().zip(&cpu.2) {
            assert!((a - b).abs() < 1e-5 * scale, "{a} {b}");
        }
    }

    #[test]
    fn empty_queues_and_other_widths_are_refused() {
        let q = rows(2, 4, 0.0);
        let empty = Tensor::zeros((0, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(matches!(info_nce(&q, &q, &empty, 0.2), Err(Error::Shape { .. })));
        assert!(matches!(info_nce(&q, &q, &rows(3, 5, 0.0), 0.2), Err(Error::Shape { .. })));
        assert!(matches!(info_nce(&q, &rows(3, 4, 0.0), &q, 0.2), Err(Error::Shape { .. })));
        assert!(matches!(info_nce(&q, &q, &q, 0.0), Err(Error::Invalid { .. })));
    }
}
