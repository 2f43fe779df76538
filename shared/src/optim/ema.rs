//! Moving averages of an encoder's parameters: the key encoder, and the averaged student.

use crate::ops::{self, ParameterStore};
use crate::{Error, Result};

/// `key = momentum * key + (1 - momentum) * query` for every parameter; buffers of batch norm stay the key encoder's own.
///
/// # Errors
/// `Error::Invalid` when the two are not the same model.
///
/// # Source
/// `MoCo`, arXiv 1911.05722, equation 2; official DisCo code @ 1d732c8, `_momentum_update_key_encoder`.
pub fn ema_update(key: &ParameterStore, query: &ParameterStore, momentum: f64) -> Result<()> {
    let mut queries = query.parameters();
    for (name, parameter) in key.parameters() {
        match queries.next() {
            Some((other, query)) if other == name => {
                ops::ema_in_place(parameter.var().as_tensor(), query.var().as_tensor(), momentum)?;
            }
            _ => return Err(mismatch(name)),
        }
    }
    match queries.next() {
        Some((name, _)) => Err(mismatch(name)),
        None => Ok(()),
    }
}

/// Moves an average of a whole model towards it: the parameters as [`ema_update`], the buffers of batch norm copied.
///
/// # Errors
/// `Error::Invalid` when the two are not the same model.
///
/// # Source
/// timm 1.0, `ModelEmaV3` with `exclude_buffers`, and `torch.optim.swa_utils.AveragedModel` without `use_buffers`: the running
/// statistics are averages already.
pub fn average_update(average: &ParameterStore, model: &ParameterStore, decay: f64) -> Result<()> {
    ema_update(average, model, decay)?;
    average.copy_buffers_from(model)
}

fn mismatch(name: &str) -> Error {
    Error::invalid(format!("key and query encoder are not the same model: `{name}` is in one only"), "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Builder;

    #[test]
    fn parameters_move_and_buffers_stay() {
        let store = |seed| {
            let mut builder = Builder::new(&candle_core::Device::Cpu);
            builder.batch_norm("bn", 3).unwrap();
            builder.linear("fc", 5, 2).unwrap();
            builder.finish(seed).unwrap()
        };
        let (key, query) = (store(1), store(2));
        let mut moved = query.to_tensors().unwrap();
        for name in ["bn.running_mean", "bn.bias"] {
            moved.insert(name.into(), (&moved[name] + 2.0).unwrap());
        }
        query.load(&moved).unwrap();
        let before = key.to_tensors().unwrap();
        ema_update(&key, &query, 0.75).unwrap();
        let after = key.to_tensors().unwrap();
        assert_eq!(after["bn.bias"].to_vec1::<f32>().unwrap(), [0.5; 3]);
        assert_eq!(after["bn.running_mean"].to_vec1::<f32>().unwrap(), [0.0; 3]);
        let value = |tensor: &candle_core::Tensor| tensor.to_vec2::<f32>().unwrap()[1][3];
        let expected = 0.75 * value(&before["fc.weight"]) + 0.25 * value(&moved["fc.weight"]);
        assert!((value(&after["fc.weight"]) - expected).abs() < 1e-7);
        average_update(&key, &query, 0.5).unwrap();
        let average = key.to_tensors().unwrap();
        assert_eq!(average["bn.running_mean"].to_vec1::<f32>().unwrap(), [2.0; 3]);
        assert_eq!(average["bn.bias"].to_vec1::<f32>().unwrap(), [1.25; 3]);
    }
}
