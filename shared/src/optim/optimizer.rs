//! An optimiser over several networks, with its state of every parameter.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::{OptimizerConfig, Rule};
use crate::ops::{self, AdamStep, DescentStep, Gradients, ParameterStore};
use crate::{Error, Result};

/// Keeps the divisor of LARC from 0, as apex does.
const LARC_EPSILON: f64 = 1e-8;
/// Names of the state of `AdamW` in a checkpoint, `PyTorch`'s: running means of the gradient and of its square, steps.
const MOMENTS: [&str; 2] = ["exp_avg.", "exp_avg_sq."];
const STEP: &str = "step.";

/// Moves the parameters of named networks, all by the same [`OptimizerConfig`].
///
/// A parameter without a gradient is left alone, and its state too.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    networks: BTreeMap<String, State>,
}

/// By parameter, in memory layout.
#[derive(Debug, Default)]
struct State {
    /// Momenta, or the means of `AdamW`.
    first: BTreeMap<String, Tensor>,
    /// The mean squares of `AdamW`.
    second: BTreeMap<String, Tensor>,
    /// Steps made, of `AdamW`.
    steps: BTreeMap<String, u64>,
}

impl Optimizer {
    /// An optimiser that has not made a step.
    pub fn new(config: OptimizerConfig) -> Self {
        Self { config, networks: BTreeMap::new() }
    }

    /// The constants.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// What the names of a network's state begin with in a checkpoint.
    pub fn prefix(&self, network: &str) -> String {
        format!("{}.{network}.", self.config.rule.name())
    }

    /// Moves the parameters of a network in place.
    ///
    /// # Errors
    /// `Error::Shape` when a gradient or a state is not the parameter's.
    pub fn step(&mut self, network: &str, store: &ParameterStore, gradients: &Gradients, lr: f64) -> Result<()> {
        let state = self.networks.entry(network.to_owned()).or_default();
        for (name, parameter) in store.parameters() {
            let Some(gradient) = gradients.get(name) else { continue };
            state.step(&self.config, name, parameter.var().as_tensor(), gradient, lr)?;
        }
        Ok(())
    }

    /// The state of a network in file names and layouts, for a checkpoint; empty before the first step.
    ///
    /// # Errors
    /// `Error::Invalid` when the store is not the one that was stepped.
    pub fn to_tensors(&self, network: &str, store: &ParameterStore) -> Result<BTreeMap<String, Tensor>> {
        let Some(state) = self.networks.get(network) else { return Ok(BTreeMap::new()) };
        let first = store.to_file_layout(state.first.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
        if !matches!(self.config.rule, Rule::AdamW { .. }) {
            return Ok(first);
        }
        let second = store.to_file_layout(state.second.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
        let mut tensors = BTreeMap::new();
        for (prefix, moments) in MOMENTS.into_iter().zip([first, second]) {
            tensors.extend(moments.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
        }
        for (name, &steps) in &state.steps {
            tensors.insert(format!("{STEP}{name}"), Tensor::new(steps as i64, &Device::Cpu)?);
        }
        Ok(tensors)
    }

    /// Takes the state of a network from a checkpoint; `tensors` are those behind [`Optimizer::prefix`], without it.
    ///
    /// # Errors
    /// `Error::Invalid` for a name or shape that is not the store's, or a state that is not whole.
    pub fn load(&mut self, network: &str, store: &ParameterStore, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut state = State::default();
        if matches!(self.config.rule, Rule::AdamW { .. }) {
            let of = |prefix: &str| -> BTreeMap<String, Tensor> {
                let own =
                    |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.into(), tensor.clone()));
                tensors.iter().filter_map(own).collect()
            };
            let [first, second] = MOMENTS.map(of);
            let steps = of(STEP);
            for (name, steps) in &steps {
                let steps = u64::try_from(steps.to_scalar::<i64>()?).unwrap_or_default();
                state.steps.insert(name.clone(), steps);
            }
            let whole = first.keys().eq(second.keys()) && first.keys().eq(steps.keys());
            if !whole || first.len() * 3 != tensors.len() {
                return Err(Error::invalid("the checkpoint's state of AdamW is not whole", ""));
            }
            state.first = owned(store, &first)?;
            state.second = owned(store, &second)?;
        } else {
            state.first = owned(store, tensors)?;
        }
        self.networks.insert(network.to_owned(), state);
        Ok(())
    }
}

/// Tensors of a file as state of a store's parameters.
fn owned(store: &ParameterStore, tensors: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    for name in tensors.keys() {
        if !store.parameters().any(|(parameter, _)| parameter == name) {
            return Err(Error::invalid(format!("the model has no parameter `{name}` to hold momentum for"), ""));
        }
    }
    let converted = store.to_memory_layout(tensors)?;
    converted.into_iter().map(|(name, tensor)| Ok((name, tensor.copy()?.detach()))).collect()
}

impl State {
    fn step(&mut self, config: &OptimizerConfig, name: &str, value: &Tensor, gradient: &Tensor, lr: f64) -> Result<()> {
        let spared = config.no_decay.spares(name, value.rank());
        let weight_decay = if spared { 0.0 } else { config.weight_decay };
        let first = buffer(&mut self.first, name, value)?;
        let plain = |momentum, nesterov| DescentStep { momentum, nesterov, weight_decay, scale: 1.0, lr };
        let step = match config.rule {
            Rule::Sgd { momentum, nesterov } => plain(momentum, nesterov),
            Rule::Lars { momentum, .. } if spared => plain(momentum, false),
            Rule::Lars { momentum, trust_coefficient } => {
                let length = ops::sum_of_squares(value)?.sqrt();
                let update = ops::sum_of_squares_decayed(gradient, value, weight_decay)?.sqrt();
                let adapted = length > 0.0 && update > 0.0;
                let scale = if adapted { trust_coefficient * length / update } else { 1.0 };
                DescentStep { scale, ..plain(momentum, false) }
            }
            Rule::Larc { momentum, nesterov, trust_coefficient } => {
                let (length, slope) = (ops::sum_of_squares(value)?.sqrt(), ops::sum_of_squares(gradient)?.sqrt());
                if length == 0.0 || slope == 0.0 {
                    DescentStep { weight_decay: 0.0, ..plain(momentum, nesterov) }
                } else {
                    let scale = trust_coefficient * length / (slope + length * weight_decay + LARC_EPSILON);
                    DescentStep { scale, ..plain(momentum, nesterov) }
                }
            }
            Rule::AdamW { beta1, beta2, epsilon } => {
                let second = buffer(&mut self.second, name, value)?;
                let steps = self.steps.entry(name.to_owned()).or_default();
                *steps += 1;
                let step = AdamStep { beta1, beta2, epsilon, weight_decay, lr, step: *steps };
                return ops::adamw_in_place(value, gradient, [&first, &second], &step);
            }
        };
        ops::descend_in_place(value, gradient, &first, &step)
    }
}

/// The state of a parameter, zeros the first time; a handle that shares it.
fn buffer(buffers: &mut BTreeMap<String, Tensor>, name: &str, value: &Tensor) -> Result<Tensor> {
    if let Some(buffer) = buffers.get(name) {
        return Ok(buffer.clone());
    }
    let zeros = value.zeros_like()?.detach();
    buffers.insert(name.to_owned(), zeros.clone());
    Ok(zeros)
}
