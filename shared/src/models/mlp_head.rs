//! A frozen projection head of any depth: linear layers, batch norms and activations over rows of features.
//!
//! A file of such a head holds its tensors in f32 and, in its metadata under `layers`, what it is made of.
//!
//! The heads of teachers differ from method to method; [`MlpConfig`] says what one is made of, under the names of its file.
//! Students learn with those of [`super::HeadConfig`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::io::FileEntry;
use crate::ops::{self, Activation, BATCH_NORM_EPS, Builder, Engine, Linear, Mode, Pass, reference};
use crate::tensor_file::{TensorFile, write_tensors};
use crate::{Error, Fault, Result};

/// The key of the layers in a file's metadata.
const LAYERS_KEY: &str = "layers";

/// One layer of a head; `name` is what stands before `.weight` in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<MlpLayer>", into = "Vec<MlpLayer>")]
pub struct MlpConfig {
    layers: Vec<MlpLayer>,
    inputs: usize,
    outputs: usize,
}

impl TryFrom<Vec<MlpLayer>> for MlpConfig {
    type Error = String;

    fn try_from(layers: Vec<MlpLayer>) -> std::result::Result<Self, String> {
        Self::new(layers)
    }
}

impl From<MlpConfig> for Vec<MlpLayer> {
    fn from(config: MlpConfig) -> Self {
        config.layers
    }
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
    config: MlpConfig,
    /// As in a file.
    tensors: BTreeMap<String, Tensor>,
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
        let named = config.names_and_shapes().into_iter();
        let tensors = named.filter_map(|(name, _)| Some((name.clone(), tensors.get(&name)?.clone()))).collect();
        Ok(Self { config: config.clone(), tensors, steps })
    }

    /// What it is made of.
    pub fn config(&self) -> &MlpConfig {
        &self.config
    }

    /// Writes it to a file of its own.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] when a number is not finite.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<FileEntry> {
        if let Some(name) = not_finite(&self.tensors)? {
            return Err(Error::invalid(format!("`{name}` of the head holds numbers that are not finite"), ""));
        }
        let layers = serde_json::to_string(&self.config)
            .map_err(|e| Error::invalid(format!("the layers of the head have no JSON form: {e}"), ""))?;
        write_tensors(path, &BTreeMap::from([(LAYERS_KEY.into(), layers)]), &self.tensors)
    }

    /// Reads what [`MlpHead::write`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when the file does not describe a head, or a tensor is missing, of another type or shape,
    /// or not finite.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let layers = file.metadata().get(LAYERS_KEY).cloned().unwrap_or_default();
        let config: MlpConfig = serde_json::from_str(&layers)
            .map_err(|e| file.fault(Fault::Value(format!("its `{LAYERS_KEY}` are not those of a head: {e}"))))?;
        let mut tensors = BTreeMap::new();
        for (name, shape) in config.names_and_shapes() {
            file.view_shaped::<f32>(&name, &shape, "the shape of its layer")?;
            tensors.insert(name.clone(), file.tensor(&name)?);
        }
        match not_finite(&tensors)? {
            Some(name) => Err(file.fault(Fault::Value(format!("tensor `{name}` is not finite")))),
            None => Self::new(&config, &tensors),
        }
    }

    /// The rows before they are made unit length. A gradient passes through to `xs`; the head itself gets none.
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

/// The first tensor with numbers that are not finite.
fn not_finite(tensors: &BTreeMap<String, Tensor>) -> Result<Option<&str>> {
    for (name, tensor) in tensors {
        if !tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.is_finite()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
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
    fn gradients_pass_through_and_files_keep_everything() {
        const STEP: f32 = 1e-2;
        let norm = MlpLayer::BatchNorm { name: "b".into(), width: 5, affine: true };
        let layers = vec![linear("a", 4, 5, true), norm, MlpLayer::Relu, linear("c", 5, 3, false), MlpLayer::Gelu];
        let config = MlpConfig::new(layers).unwrap();
        let values = |count: usize, phase: f32| (0..count).map(move |i| (i as f32 * 1.7 + phase).sin());
        let mut tensors = BTreeMap::new();
        for (index, (name, shape)) in config.names_and_shapes().into_iter().enumerate() {
            let count = shape.iter().product();
            let all: Vec<f32> = values(count, index as f32).collect();
            let tensor = Tensor::from_vec(all, shape, &Device::Cpu).unwrap();
            let tensor = if name.ends_with("running_var") { (tensor.abs().unwrap() + 0.1).unwrap() } else { tensor };
            tensors.insert(name, tensor);
        }
        let head = MlpHead::new(&config, &tensors).unwrap();
        let at: Vec<f32> = values(8, 0.3).collect();
        let sum = |head: &MlpHead, at: &[f32]| -> f32 {
            let xs = Tensor::from_slice(at, (2, 4), &Device::Cpu).unwrap();
            head.forward(&xs).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar().unwrap()
        };
        let xs = candle_core::Var::from_slice(&at, (2, 4), &Device::Cpu).unwrap();
        let loss = head.forward(&xs).unwrap().sqr().unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let gradient = grads.get(&xs).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(gradient.iter().any(|d| d.abs() > 0.1), "{gradient:?}");
        for (index, found) in gradient.iter().enumerate() {
            let shifted = |by: f32| {
                let mut at = at.clone();
                at[index] += by;
                sum(&head, &at)
            };
            let expected = (shifted(STEP) - shifted(-STEP)) / (2.0 * STEP);
            assert!((found - expected).abs() < 2e-2 * expected.abs().max(0.5), "{index}: {found} {expected}");
        }

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head.safetensors");
        head.write(&path).unwrap();
        let read = MlpHead::open(&path).unwrap();
        assert_eq!((read.config(), sum(&read, &at)), (&config, sum(&head, &at)));
        write_tensors(&path, &BTreeMap::new(), &tensors).unwrap();
        let message = MlpHead::open(&path).unwrap_err().to_string();
        assert!(message.contains("not those of a head"), "{message}");
        tensors.insert("a.bias".into(), Tensor::new(&[f32::NAN; 5], &Device::Cpu).unwrap());
        assert!(MlpHead::new(&config, &tensors).unwrap().write(&path).is_err());
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
