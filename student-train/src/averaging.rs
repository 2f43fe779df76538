//! What the ranks of a training average in every step: gradients, batch-norm statistics, losses.
//!
//! Every rank computes the same number of rows, so the mean over the ranks is what one process computes from the whole batch. That
//! holds for the running statistics of batch norm too: a step moves them by a share of the way to the mean over the groups, and
//! the mean of such steps over the ranks is the step towards the mean over all groups.

use candle_core::Tensor;
use shared::Result;
use shared::distributed::World;
use shared::ops::ParameterStore;
use shared::run::Losses;

use crate::method::Method;
use crate::trainable::GradientSum;

/// Averages the gradients of a step, the running statistics of all networks that it ran in training mode, and its losses.
///
/// A loss that is not finite on some rank is not finite afterwards.
///
/// # Errors
/// A tensor operation that fails.
pub fn average(world: &World, losses: &mut Losses, gradients: &mut GradientSum, method: &Method) -> Result<()> {
    if world.is_alone() {
        return Ok(());
    }
    let trained = gradients.iter().map(|(trainable, _)| trainable.store.clone());
    let networks: Vec<ParameterStore> = trained.chain(method.followers()).collect();
    let mut statistics: Vec<Tensor> =
        running_statistics(&networks).map(|parameter| parameter.var().as_detached_tensor()).collect();
    let values: Vec<f32> = std::iter::once(losses.loss).chain(losses.terms.values().copied()).collect();
    let mut values = Tensor::new(values, &candle_core::Device::Cpu)?;
    let gradients = gradients.iter_mut().flat_map(|(_, gradients)| gradients.iter_mut()).map(|(_, tensor)| tensor);
    world.all_reduce_mean(gradients.chain(&mut statistics).chain([&mut values]).collect())?;
    for (parameter, mean) in running_statistics(&networks).zip(&statistics) {
        parameter.var().set(mean)?;
    }
    let means = values.to_vec1::<f32>()?;
    for (value, mean) in std::iter::once(&mut losses.loss).chain(losses.terms.values_mut()).zip(means) {
        *value = mean;
    }
    Ok(())
}

fn running_statistics(networks: &[ParameterStore]) -> impl Iterator<Item = &shared::ops::Parameter> {
    networks.iter().flat_map(ParameterStore::running_statistics)
}
