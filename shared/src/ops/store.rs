//! All parameters and buffers of a model by name, and the border at which file layouts become memory layouts.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use super::parameter::{BatchNorm, Conv2d, ConvBn, Geometry, Init, Linear, Parameter, WeightLayout};
use super::token_parameter::{BiasedConv, LayerNorm};
use super::{BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, LAYER_NORM_EPS};
use crate::rng::KeyedRng;
use crate::{Error, Result};

/// How many names of each kind an error lists.
const NAMES_LISTED: usize = 8;
/// The standard deviation of the weights of vision transformers.
pub(crate) const TOKEN_STD: f64 = 0.02;

#[derive(Debug, Clone)]
struct Entry {
    parameter: Parameter,
    shape: Vec<usize>,
    layout: WeightLayout,
    init: Init,
    trainable: bool,
}

/// The parameters and buffers of one model, sorted by name (`PyTorch`'s names).
///
/// Cloning shares the tensors. A store alone cannot be copied deeply, because a model's blocks hold handles into it: make
/// another model and [`ParameterStore::copy_from`].
#[derive(Debug, Clone, Default)]
pub struct ParameterStore {
    entries: BTreeMap<String, Entry>,
}

impl ParameterStore {
    /// Names and file shapes of parameters and buffers, in order.
    pub fn names_and_shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.entries.iter().map(|(name, entry)| (name.clone(), entry.shape.clone())).collect()
    }

    /// The trainable parameters, in order of their names.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.entries.iter().filter(|(_, entry)| entry.trainable).map(|(name, entry)| (name.as_str(), &entry.parameter))
    }

    /// The running means and variances of batch norm, in order of their names.
    pub fn running_statistics(&self) -> impl Iterator<Item = &Parameter> {
        let is_statistic = |name: &str| name.ends_with(".running_mean") || name.ends_with(".running_var");
        self.entries.iter().filter(move |(name, _)| is_statistic(name)).map(|(_, entry)| &entry.parameter)
    }

    /// The number of trainable values, buffers left out.
    pub fn num_parameters(&self) -> usize {
        let trainable = self.entries.values().filter(|entry| entry.trainable);
        trainable.map(|entry| entry.shape.iter().product::<usize>()).sum()
    }

    /// Copies of all parameters and buffers in file names and layouts.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        self.to_file_layout(self.entries.iter().map(|(name, entry)| (name.as_str(), entry.parameter.var().as_tensor())))
    }

    /// Tensors that lie like this store's parameters in memory (gradients, momenta), copied into the file layout.
    ///
    /// # Errors
    /// `Error::Invalid` for a name that is not in the store.
    pub fn to_file_layout<'a>(
        &self,
        tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    ) -> Result<BTreeMap<String, Tensor>> {
        tensors
            .into_iter()
            .map(|(name, tensor)| {
                let layout = self.entry(name)?.layout;
                Ok((name.to_owned(), layout.to_file(tensor)?.copy()?.detach()))
            })
            .collect()
    }

    /// The reverse of [`ParameterStore::to_file_layout`], on the store's device, in the types of its tensors.
    ///
    /// # Errors
    /// `Error::Invalid` for a name that is not in the store or a tensor of another shape.
    pub fn to_memory_layout(&self, tensors: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        tensors
            .iter()
            .map(|(name, tensor)| {
                let entry = self.entry(name)?;
                if tensor.dims() != entry.shape {
                    let message = format!("tensor `{name}` has shape {:?}, expected {:?}", tensor.dims(), entry.shape);
                    return Err(Error::invalid(message, ""));
                }
                let var = entry.parameter.var();
                let tensor = tensor.to_device(var.device())?.to_dtype(var.dtype())?;
                Ok((name.clone(), entry.layout.to_memory(&tensor)?))
            })
            .collect()
    }

    /// Replaces all values by `tensors`, which bear file names and layouts; floats of any width become the store's.
    ///
    /// A missing `num_batches_tracked` counts as 0: `PyTorch` wrote none before 0.4.1.
    ///
    /// # Errors
    /// `Error::Invalid` that lists missing, unexpected and mis-shaped names; nothing is changed then.
    pub fn load(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let counter = |name: &str| self.entries.get(name).is_some_and(|entry| entry.init == Init::Counter);
        let missing = self.entries.keys().filter(|name| !tensors.contains_key(*name) && !counter(name)).cloned();
        let unexpected = tensors.keys().filter(|name| !self.entries.contains_key(*name)).cloned();
        let misshaped = self.entries.iter().filter_map(|(name, entry)| {
            let found = tensors.get(name)?.dims();
            (found != entry.shape).then(|| format!("`{name}` (expected {:?}, found {found:?})", entry.shape))
        });
        let faults: Vec<String> = [
            listed("missing", missing.map(quoted).collect()),
            listed("unexpected", unexpected.map(quoted).collect()),
            listed("of another shape", misshaped.collect()),
        ]
        .into_iter()
        .flatten()
        .collect();
        if !faults.is_empty() {
            return Err(Error::invalid(
                format!("the tensors do not fit the model: {}", faults.join("; ")),
                "check the architecture and the head that the weights were trained with",
            ));
        }
        let converted = self.to_memory_layout(tensors)?;
        for (name, entry) in &self.entries {
            match converted.get(name) {
                Some(tensor) => entry.parameter.var().set(tensor)?,
                None => entry.parameter.var().set(&entry.parameter.var().zeros_like()?)?,
            }
        }
        Ok(())
    }

    /// Copies all values of a store of the same model.
    ///
    /// # Errors
    /// `Error::Invalid` when the two differ in names or shapes.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        self.load(&other.to_tensors()?)
    }

    /// Runs the backward pass of a scalar loss and collects the gradients of this store's parameters.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn backward(&self, loss: &Tensor) -> Result<Gradients> {
        self.clear_deposits();
        let tracked = loss.backward()?;
        self.take_gradients(&tracked)
    }

    /// Forgets gradients that were deposited and never collected.
    pub fn clear_deposits(&self) {
        for entry in self.entries.values() {
            drop(entry.parameter.take_deposit());
        }
    }

    /// Collects the gradients after `tracked = loss.backward()`, for losses that reach several stores: call
    /// [`ParameterStore::clear_deposits`] on each before.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn take_gradients(&self, tracked: &GradStore) -> Result<Gradients> {
        let mut tensors = BTreeMap::new();
        for (name, entry) in self.entries.iter().filter(|(_, entry)| entry.trainable) {
            let deposited = entry.parameter.take_deposit();
            let gradient = match (deposited, tracked.get(entry.parameter.var())) {
                (Some(deposited), Some(tracked)) => (deposited + tracked)?,
                (Some(deposited), None) => deposited,
                (None, Some(tracked)) => tracked.contiguous()?,
                (None, None) => continue,
            };
            tensors.insert(name.clone(), gradient.detach());
        }
        Ok(Gradients { tensors })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| Error::invalid(format!("the model has no tensor `{name}`"), ""))
    }
}

fn quoted(name: String) -> String {
    format!("`{name}`")
}

fn listed(what: &str, names: Vec<String>) -> Option<String> {
    if names.is_empty() {
        return None;
    }
    let rest = names.len().saturating_sub(NAMES_LISTED);
    let shown = &names[..names.len().min(NAMES_LISTED)];
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    Some(format!("{} {what}: {}{more}", names.len(), shown.join(", ")))
}

/// Gradients by parameter name, in memory layout. A parameter that the loss does not reach is absent.
#[derive(Debug, Default)]
pub struct Gradients {
    tensors: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// The gradient of a parameter.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All gradients in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// All gradients, to be replaced in place (an all-reduce).
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Tensor)> {
        self.tensors.iter_mut().map(|(name, tensor)| (name.as_str(), tensor))
    }
}

impl Gradients {
    /// Adds other gradients of the same model to these.
    ///
    /// # Errors
    /// A gradient of another shape.
    pub fn add(&mut self, more: Self) -> Result<()> {
        for (name, gradient) in more.tensors {
            match self.tensors.get_mut(&name) {
                Some(sum) => *sum = (&*sum + gradient)?,
                None => {
                    self.tensors.insert(name, gradient);
                }
            }
        }
        Ok(())
    }
}

impl FromIterator<(String, Tensor)> for Gradients {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(gradients: I) -> Self {
        Self { tensors: gradients.into_iter().collect() }
    }
}

/// Declares a model's parameters while its blocks are made, then draws all initial values at once.
#[derive(Debug)]
pub struct Builder {
    store: ParameterStore,
    device: Device,
    dtype: DType,
    allocate: bool,
}

impl Builder {
    /// A builder for a real model.
    pub fn new(device: &Device) -> Self {
        Self { store: ParameterStore::default(), device: device.clone(), dtype: DType::F32, allocate: true }
    }

    /// The same builder with floats of another width. Drawn values stay those of f32, whatever the width.
    ///
    /// Models are f32. The reference also computes in f64, as the yardstick of f32 and for finite differences.
    #[must_use]
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// A builder that only learns names and shapes: its tensors are empty and its blocks cannot run.
    pub fn describing() -> Self {
        Self { store: ParameterStore::default(), device: Device::Cpu, dtype: DType::F32, allocate: false }
    }

    /// Draws the initial values and hands over the store.
    ///
    /// Each tensor's generator is keyed by the seed and its name, so it does not matter what else the model holds.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn finish(self, seed: u64) -> Result<ParameterStore> {
        if self.allocate {
            let entries: Vec<_> = self.store.entries.iter().collect();
            entries.into_par_iter().try_for_each(|(name, entry)| initialise(name, entry, seed))?;
        }
        Ok(self.store)
    }

    /// Hands over the store with zeros everywhere, to be loaded.
    pub fn finish_zeroed(self) -> ParameterStore {
        self.store
    }

    /// A convolution `{name}.weight` with He's initialisation for `ReLU` (normal, fan-out per group), as the residual networks of
    /// torchvision and the efficient networks of timm.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn conv(&mut self, name: &str, geometry: Geometry) -> Result<Conv2d> {
        let Geometry { out_channels, kernel, depthwise, .. } = geometry;
        let fan_out = if depthwise { kernel * kernel } else { out_channels * kernel * kernel };
        let std = (2.0 / fan_out as f64).sqrt();
        let shape = [out_channels, geometry.channels_per_group(), kernel, kernel];
        let weight =
            self.add(format!("{name}.weight"), &shape, WeightLayout::Convolution, Init::Normal { std }, true)?;
        Ok(Conv2d { weight, geometry })
    }

    /// A batch norm with scale 1 and shift 0.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn batch_norm(&mut self, name: &str, channels: usize) -> Result<BatchNorm> {
        let mut add = |field: &str, value: f32, trainable| {
            self.add(format!("{name}.{field}"), &[channels], WeightLayout::Plain, Init::Constant(value), trainable)
        };
        Ok(BatchNorm {
            weight: add("weight", 1.0, true)?,
            bias: add("bias", 0.0, true)?,
            running_mean: add("running_mean", 0.0, false)?,
            running_var: add("running_var", 1.0, false)?,
            num_batches_tracked: self.add(
                format!("{name}.num_batches_tracked"),
                &[],
                WeightLayout::Plain,
                Init::Counter,
                false,
            )?,
            eps: BATCH_NORM_EPS,
            momentum: BATCH_NORM_MOMENTUM,
        })
    }

    /// A convolution and the batch norm after it.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn conv_bn(&mut self, conv: &str, norm: &str, geometry: Geometry) -> Result<ConvBn> {
        Ok(ConvBn { conv: self.conv(conv, geometry)?, norm: self.batch_norm(norm, geometry.out_channels)? })
    }

    /// A linear layer, weight and bias uniform in `±1/sqrt(in)`, `PyTorch`'s default.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn linear(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        let init = Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() };
        Ok(Linear {
            weight: self.add(format!("{name}.weight"), &[outputs, inputs], WeightLayout::Linear, init, true)?,
            bias: self.add(format!("{name}.bias"), &[outputs], WeightLayout::Plain, init, true)?,
        })
    }

    /// A 1x1 convolution with bias that works on rows, drawn as [`Builder::conv`] draws; its bias starts at 0.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn pointwise(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        let init = Init::Normal { std: (2.0 / outputs as f64).sqrt() };
        let shape = [outputs, inputs, 1, 1];
        let weight = self.add(format!("{name}.weight"), &shape, WeightLayout::Pointwise, init, true)?;
        let bias = self.add(format!("{name}.bias"), &[outputs], WeightLayout::Plain, Init::Constant(0.0), true)?;
        Ok(Linear { weight, bias })
    }

    /// A linear layer as vision transformers start it: weight normal, bias 0.
    ///
    /// timm cuts its normal distribution off at 2, a hundred standard deviations away.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn token_linear(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        let init = Init::Normal { std: TOKEN_STD };
        Ok(Linear {
            weight: self.add(format!("{name}.weight"), &[outputs, inputs], WeightLayout::Linear, init, true)?,
            bias: self.add(format!("{name}.bias"), &[outputs], WeightLayout::Plain, Init::Constant(0.0), true)?,
        })
    }

    /// A convolution without bias, uniform in `±1/sqrt(fan-in)`, `PyTorch`'s default.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn uniform_conv(&mut self, name: &str, geometry: Geometry) -> Result<Conv2d> {
        let (shape, bound) = uniform(geometry);
        let init = Init::Uniform { bound };
        let weight = self.add(format!("{name}.weight"), &shape, WeightLayout::Convolution, init, true)?;
        Ok(Conv2d { weight, geometry })
    }

    /// A convolution with bias, both drawn as [`Builder::uniform_conv`] draws.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn biased_conv(&mut self, name: &str, geometry: Geometry) -> Result<BiasedConv> {
        let init = Init::Uniform { bound: uniform(geometry).1 };
        let conv = self.uniform_conv(name, geometry)?;
        let bias = self.add(format!("{name}.bias"), &[geometry.out_channels], WeightLayout::Plain, init, true)?;
        Ok(BiasedConv { conv, bias })
    }

    /// A layer norm with scale 1 and shift 0.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub fn layer_norm(&mut self, name: &str, channels: usize) -> Result<LayerNorm> {
        let mut add = |field: &str, value: f32| {
            self.add(format!("{name}.{field}"), &[channels], WeightLayout::Plain, Init::Constant(value), true)
        };
        Ok(LayerNorm { weight: add("weight", 1.0)?, bias: add("bias", 0.0)?, eps: LAYER_NORM_EPS })
    }

    /// Any tensor.
    ///
    /// # Errors
    /// `Error::Invalid` for a name that is taken.
    pub fn add(
        &mut self,
        name: String,
        shape: &[usize],
        layout: WeightLayout,
        init: Init,
        trainable: bool,
    ) -> Result<Parameter> {
        let dtype = if init == Init::Counter { DType::I64 } else { self.dtype };
        let memory_shape = if self.allocate { layout.memory_shape(shape) } else { vec![0] };
        let parameter = Parameter::new(name.clone(), Var::zeros(memory_shape, dtype, &self.device)?);
        let entry = Entry { parameter: parameter.clone(), shape: shape.to_vec(), layout, init, trainable };
        if self.store.entries.insert(name.clone(), entry).is_some() {
            return Err(Error::invalid(format!("tensor `{name}` is declared twice"), ""));
        }
        Ok(parameter)
    }
}

/// The shape of a convolution's weights in a file, and the bound that `PyTorch` draws them within.
fn uniform(geometry: Geometry) -> ([usize; 4], f64) {
    let Geometry { out_channels, kernel, .. } = geometry;
    let fan_in = geometry.channels_per_group() * kernel * kernel;
    ([out_channels, geometry.channels_per_group(), kernel, kernel], 1.0 / (fan_in as f64).sqrt())
}

fn initialise(name: &str, entry: &Entry, seed: u64) -> Result<()> {
    let var = entry.parameter.var();
    let count = entry.shape.iter().product();
    let mut key = [0; 8];
    key.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..8]);
    let mut rng = KeyedRng::new("init", seed, &[u64::from_le_bytes(key)]);
    let values: Vec<f32> = match entry.init {
        Init::Counter => return Ok(()),
        Init::Constant(value) => vec![value; count],
        Init::Normal { std } => (0..count).map(|_| (rng.normal() * std) as f32).collect(),
        Init::Uniform { bound } => (0..count).map(|_| ((2.0 * rng.unit_f64() - 1.0) * bound) as f32).collect(),
    };
    let tensor = Tensor::from_vec(values, entry.shape.as_slice(), var.device())?.to_dtype(var.dtype())?;
    Ok(var.set(&entry.layout.to_memory(&tensor)?)?)
}
