//! A frozen projection head of any depth: linear layers, batch norms and activations over rows of features.
//!
//! The heads of teachers differ from method to method; [`MlpConfig`] says what one is made of, under the names of its file.
//! Students learn with those of [`super::HeadConfig`].

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Device, Tensor};
use serde::Serialize;

use crate::ops::{self, Activation, BATCH_NORM_EPS, Builder, Engine, Linear, Mode, Pass, reference};
use crate::{Error, Result};

/// One layer of a head; `name` is what stands before `.weight` in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum MlpLayer {
    /// An affine map.
    Linear {
        /// Its name.
        name: String,
        /// Width in.
        inputs: usize,
        /// Width out.
        outputs: usize,
        /// Whether it has a bias.
        bias: bool,
    },
    /// Batch norm by its running statistics.
    BatchNorm {
        /// Its name.
        name: String,
        /// Its width.
        width: usize,
        /// Whether it has a scale and a shift of its own.
        affine: bool,
    },
    /// `max(0, x)`.
    Relu,
    /// `x` times the normal distribution function of `x`, exactly, not by the hyperbolic tangent.
    Gelu,
}

/// What a head is made of, first layer first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct MlpConfig {
    layers: Vec<MlpLayer>,
    #[serde(skip)]
    inputs: usize,
    #[serde(skip)]
    outputs: usize,
}

impl MlpConfig {
    /// A head; its layers must fit together, and one of them must be linear.
    ///
    /// # Errors
    /// A sentence that names the first layer that does not fit.
    pub fn new(layers: Vec<MlpLayer>) -> std::result::Result<Self, String> {
        let mut ends: Option<(usize, usize)> = None;
        let mut follows = false;
        for layer in &layers {
            let (name, inputs, outputs) = match layer {
                MlpLayer::Linear { name, inputs, outputs, .. } => (name, *inputs, *outputs),
                MlpLayer::BatchNorm { name, width, .. } => (name, *width, *width),
                MlpLayer::Relu | MlpLayer::Gelu if follows => {
                    follows = false;
                    continue;
                }
                MlpLayer::Relu | MlpLayer::Gelu => return Err("an activation follows no layer".to_owned()),
            };
            follows = true;
            if inputs == 0 || outputs == 0 {
                return Err(format!("`{name}` has no columns"));
            }
            if let Some((_, width)) = ends.filter(|(_, width)| *width != inputs) {
                return Err(format!("`{name}` takes rows of width {inputs}, the layer before it gives {width}"));
            }
            ends = Some((ends.map_or(inputs, |(first, _)| first), outputs));
        }
        match ends {
            Some((inputs, outputs)) if layers.iter().any(|layer| matches!(layer, MlpLayer::Linear { .. })) => {
                Ok(Self { layers, inputs, outputs })
            }
            _ => Err("it has no linear layer".to_owned()),
        }
    }

    /// Its layers.
    pub fn layers(&self) -> &[MlpLayer] {
        &self.layers
    }

    /// The width of the features it takes.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// `D`, the width of its rows.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The names and shapes of the tensors it needs.
    pub fn names_and_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut found = Vec::new();
        for layer in &self.layers {
            match layer {
                MlpLayer::Linear { name, inputs, outputs, bias } => {
                    found.push((format!("{name}.weight"), vec![*outputs, *inputs]));
                    found.extend(bias.then(|| (format!("{name}.bias"), vec![*outputs])));
                }
                MlpLayer::BatchNorm { name, width, affine } => {
                    let own: &[&str] = if *affine { &["weight", "bias"] } else { &[] };
                    let fields = own.iter().chain(&["running_mean", "running_var"]);
                    found.extend(fields.map(|field| (format!("{name}.{field}"), vec![*width])));
                }
                MlpLayer::Relu | MlpLayer::Gelu => {}
            }
        }
        found
    }
}

impl fmt::Display for MlpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, layer) in self.layers.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            match layer {
                MlpLayer::Linear { inputs, outputs, bias, .. } => {
                    let bias = if *bias { "" } else { " without bias" };
                    write!(f, "{comma}linear {inputs} to {outputs}{bias}")?;
                }
                MlpLayer::BatchNorm { affine: true, .. } => write!(f, "{comma}batch norm")?,
                MlpLayer::BatchNorm { affine: false, .. } => write!(f, "{comma}batch norm without scale")?,
                MlpLayer::Relu => write!(f, "{comma}ReLU")?,
                MlpLayer::Gelu => write!(f, "{comma}GELU")?,
            }
        }
        Ok(())
    }
}

/// A head with its weights, on the CPU, in evaluation mode for ever.
#[derive(Debug)]
pub struct MlpHead {
    steps: Vec<Step>,
}

/// A layer and the activation after it.
#[derive(Debug)]
enum Step {
    Linear(Linear, Activation),
    /// Batch norm with its statistics folded in: a factor and a summand for each column.
    Affine(Tensor, Tensor, Activation),
}

/// Puts an activation after the last step; [`MlpConfig::new`] sees to it that there is one.
fn activate_last(steps: &mut [Step], by: Activation) {
    if let Some(Step::Linear(_, act) | Step::Affine(_, _, act)) = steps.last_mut() {
        *act = by;
    }
}

impl MlpHead {
    /// A head with the tensors that [`MlpConfig::names_and_shapes`] lists.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a tensor is missing or of another shape.
    pub fn new(config: &MlpConfig, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        for (name, shape) in config.names_and_shapes() {
            if tensors.get(&name).is_none_or(|tensor| tensor.dims() != shape) {
                let found = tensors.get(&name).map_or("missing".to_owned(), |tensor| format!("{:?}", tensor.dims()));
                return Err(Error::invalid(format!("`{name}` of the head is {found}, expected {shape:?}"), ""));
            }
        }
        let mut builder = Builder::new(&Device::Cpu);
        let mut weights = BTreeMap::new();
        let mut steps: Vec<Step> = Vec::new();
        for layer in &config.layers {
            match layer {
                MlpLayer::Linear { name, inputs, outputs, bias } => {
                    for field in ["weight", "bias"].map(|field| format!("{name}.{field}")) {
                        let tensor = match tensors.get(&field) {
                            Some(tensor) if *bias || field.ends_with("weight") => tensor.clone(),
                            _ => Tensor::zeros(*outputs, candle_core::DType::F32, &Device::Cpu)?,
                        };
                        weights.insert(field, tensor);
                    }
                    steps.push(Step::Linear(builder.linear(name, *inputs, *outputs)?, Activation::Identity));
                }
                MlpLayer::BatchNorm { name, width, affine } => steps.push(folded(name, *width, *affine, tensors)?),
                MlpLayer::Relu => activate_last(&mut steps, Activation::Relu),
                MlpLayer::Gelu => activate_last(&mut steps, Activation::Gelu),
            }
        }
        builder.finish_zeroed().load(&weights)?;
        Ok(Self { steps })
    }

    /// The rows before they are made unit length.
    ///
    /// # Shapes
    /// - `xs`: `(B, F)` f32
    /// - returns: `(B, D)` f32
    ///
    /// # Errors
    /// `Error::Shape` when `xs` has another width.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let pass = Pass { mode: Mode::Eval, record: false, engine: Engine::for_device(xs.device()) };
        let mut xs = xs.clone();
        for step in &self.steps {
            xs = match step {
                Step::Linear(params, act) => ops::linear(&xs, params, *act, &pass)?,
                Step::Affine(factor, summand, act) => {
                    reference::activate(&xs.broadcast_mul(factor)?.broadcast_add(summand)?, *act)?
                }
            };
        }
        Ok(xs)
    }
}

/// A batch norm as factor and summand, worked out in f64.
fn folded(name: &str, width: usize, affine: bool, tensors: &BTreeMap<String, Tensor>) -> Result<Step> {
    let field = |field: &str| -> Result<Vec<f32>> {
        match tensors.get(&format!("{name}.{field}")) {
            Some(tensor) => Ok(tensor.to_vec1::<f32>()?),
            None => Err(Error::invalid(format!("`{name}.{field}` of the head is missing"), "")),
        }
    };
    let (mean, variance) = (field("running_mean")?, field("running_var")?);
    let (scale, shift) = if affine { (field("weight")?, field("bias")?) } else { (vec![1.0; width], vec![0.0; width]) };
    let mut factors = Vec::with_capacity(width);
    let mut summands = Vec::with_capacity(width);
    for (((scale, shift), mean), variance) in scale.iter().zip(&shift).zip(&mean).zip(&variance) {
        let factor = f64::from(*scale) / (f64::from(*variance) + BATCH_NORM_EPS).sqrt();
        factors.push(factor as f32);
        summands.push((f64::from(*shift) - f64::from(*mean) * factor) as f32);
    }
    let (factors, summands) = (Tensor::new(factors, &Device::Cpu)?, Tensor::new(summands, &Device::Cpu)?);
    Ok(Step::Affine(factors, summands, Activation::Identity))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(name: &str, inputs: usize, outputs: usize, bias: bool) -> MlpLayer {
        MlpLayer::Linear { name: name.into(), inputs, outputs, bias }
    }

    #[test]
    fn layers_compute_what_they_say() {
        let norm = MlpLayer::BatchNorm { name: "h.1".into(), width: 2, affine: true };
        let config =
            MlpConfig::new(vec![linear("h.0", 2, 2, false), norm, MlpLayer::Relu, linear("h.3", 2, 1, true)]).unwrap();
        assert_eq!((config.inputs(), config.outputs()), (2, 1));
        assert_eq!(config.to_string(), "linear 2 to 2 without bias, batch norm, ReLU, linear 2 to 1");
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([
            ("h.0.weight".to_owned(), tensor(&[1., 2., 3., 4.], &[2, 2])),
            ("h.1.weight".to_owned(), tensor(&[2., 1.], &[2])),
            ("h.1.bias".to_owned(), tensor(&[0.5, -20.], &[2])),
            ("h.1.running_mean".to_owned(), tensor(&[1., 0.], &[2])),
            ("h.1.running_var".to_owned(), tensor(&[4.0 - 1e-5, 1.0 - 1e-5], &[2])),
            ("h.3.weight".to_owned(), tensor(&[10., 100.], &[1, 2])),
            ("h.3.bias".to_owned(), tensor(&[0.25], &[1])),
        ]);
        let head = MlpHead::new(&config, &tensors).unwrap();
        // (1, 1) to (3, 7); normalised ((3 - 1) / 2 * 2 + 0.5, 7 - 20), so (2.5, 0) after the ReLU.
        let rows = head.forward(&tensor(&[1., 1.], &[1, 2])).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!((rows[0] - 25.25).abs() < 1e-4, "{rows:?}");
        assert!(head.forward(&tensor(&[1.], &[1, 1])).is_err());
        let mut short = tensors;
        short.remove("h.1.running_var");
        let message = MlpHead::new(&config, &short).unwrap_err().to_string();
        assert!(message.contains("`h.1.running_var` of the head is missing"), "{message}");
    }

    #[test]
    fn layers_that_do_not_fit_together_are_refused() {
        let error = MlpConfig::new(vec![linear("a", 2, 3, true), linear("b", 4, 5, true)]).unwrap_err();
        assert_eq!(error, "`b` takes rows of width 4, the layer before it gives 3");
        let error = MlpConfig::new(vec![MlpLayer::Relu, linear("a", 2, 3, true)]).unwrap_err();
        assert_eq!(error, "an activation follows no layer");
        assert_eq!(MlpConfig::new(vec![linear("a", 2, 0, true)]).unwrap_err(), "`a` has no columns");
    }

    #[test]
    fn gelu_is_the_exact_one() {
        let config = MlpConfig::new(vec![linear("a", 1, 1, false), MlpLayer::Gelu]).unwrap();
        let one = Tensor::ones((1, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let head = MlpHead::new(&config, &BTreeMap::from([("a.weight".to_owned(), one.clone())])).unwrap();
        let value = head.forward(&one).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
        assert!((value - 0.841_344_8).abs() < 1e-6, "{value}");
    }
}
