//! Activations and gates, values and derivatives, against `PyTorch`: at kinks above all.
//!
//! `tests/golden/activations.py` computed the values. Every path is driven to an exact input of the function: a linear layer by the weight
//! 1, a batch norm by the scale 0 and the input as its shift, squeeze-excite by weights 0 and the input as a bias.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use candle_core::{Device, Tensor, Var};
use serde::Deserialize;
use shared::ops::{
    Activation, Builder, Engine, Gate, Geometry, Gradients, MbConv, Mode, ParameterStore, Pass, SqueezeExcite, conv_bn,
    linear, mb_conv,
};

const ENGINES: [Engine; 2] = [Engine::Cpu, Engine::Reference];
const ACTIVATIONS: [(&str, Activation); 6] = [
    ("identity", Activation::Identity),
    ("relu", Activation::Relu),
    ("relu6", Activation::Relu6),
    ("silu", Activation::Silu),
    ("hardswish", Activation::HardSwish),
    ("gelu", Activation::Gelu),
];

/// On values and slopes, as a part of them, beside a tenth of it.
const TOLERANCE: f64 = 1e-6;

#[derive(Deserialize)]
struct Golden {
    inputs: Vec<f64>,
    functions: BTreeMap<String, Function>,
}

#[derive(Deserialize)]
struct Function {
    values: Vec<f64>,
    slopes: Vec<f64>,
}

fn golden() -> Result<Golden> {
    serde_json::from_str(include_str!("../../golden/activations.json")).context("golden values")
}

fn training(engine: Engine) -> Pass {
    Pass { mode: Mode::Train { bn_groups: 1 }, record: true, engine }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

fn gradient(gradients: &Gradients, name: &str) -> Result<Vec<f64>> {
    numbers(gradients.get(name).with_context(|| format!("`{name}` has a gradient"))?)
}

/// Replaces some values of a store: a name, and one number for all elements or one for each.
fn set(store: &ParameterStore, values: &[(&str, &[f64])]) -> Result<()> {
    let mut tensors = store.to_tensors()?;
    for (name, values) in values {
        let tensor = tensors.get_mut(*name).with_context(|| format!("`{name}` exists"))?;
        let values = Tensor::new(*values, &Device::Cpu)?.to_dtype(tensor.dtype())?;
        *tensor = match values.dims() {
            [1] => values.broadcast_as((tensor.elem_count(),))?.reshape(tensor.shape())?,
            _ => values.reshape(tensor.shape())?,
        };
    }
    Ok(store.load(&tensors)?)
}

fn ensure_close(what: &str, inputs: &[f64], expected: &[f64], found: &[f64]) -> Result<()> {
    ensure!(expected.len() == found.len() && inputs.len() == found.len(), "{what}: {} numbers", found.len());
    for ((input, expected), found) in inputs.iter().zip(expected).zip(found) {
        let close = (expected - found).abs() <= TOLERANCE * expected.abs() + 0.1 * TOLERANCE;
        ensure!(close, "{what} at {input:e}: {found:e} instead of {expected:e}");
    }
    Ok(())
}

#[test]
fn linear_layers_activate_as_pytorch() -> Result<()> {
    let golden = golden()?;
    for (name, act) in ACTIVATIONS {
        let expected = &golden.functions[name];
        for engine in ENGINES {
            let mut builder = Builder::new(&Device::Cpu);
            let layer = builder.linear("fc", 1, 1)?;
            let store = builder.finish(0)?;
            set(&store, &[("fc.weight", &[1.0]), ("fc.bias", &[0.0])])?;
            let xs: Vec<f32> = golden.inputs.iter().map(|&x| x as f32).collect();
            let xs = Var::from_tensor(&Tensor::from_vec(xs, (golden.inputs.len(), 1), &Device::Cpu)?)?;
            let out = linear(&xs, &layer, act, &training(engine))?;
            let tracked = out.sum_all()?.backward()?;
            let slopes = numbers(tracked.get(&xs).context("the input has a gradient")?)?;
            ensure_close(&format!("{name}, {engine:?}"), &golden.inputs, &expected.values, &numbers(&out)?)?;
            ensure_close(&format!("slope of {name}, {engine:?}"), &golden.inputs, &expected.slopes, &slopes)?;
        }
    }
    Ok(())
}

/// Each channel of the normalised image is one input everywhere, so the gradient of its shift is as many slopes as there are pixels.
#[test]
fn batch_norms_activate_as_pytorch() -> Result<()> {
    let golden = golden()?;
    let channels = golden.inputs.len();
    for (name, act) in ACTIVATIONS {
        let expected = &golden.functions[name];
        for engine in ENGINES {
            for kernel in [1, 3] {
                let mut builder = Builder::new(&Device::Cpu);
                let block = builder.conv_bn("conv", "bn", Geometry::same(8, channels, kernel, 1))?;
                let store = builder.finish(0)?;
                set(&store, &[("bn.weight", &[0.0]), ("bn.bias", &golden.inputs)])?;
                let xs = Tensor::arange(0.0f32, 128.0, &Device::Cpu)?.sin()?.reshape((1, 4, 4, 8))?;
                let out = conv_bn(&xs, &block, None, act, &training(engine))?;
                let gradients = store.backward(&out.mean((0, 1, 2))?.sum_all()?)?;
                let values = numbers(&out.narrow(1, 1, 1)?.narrow(2, 1, 1)?.contiguous()?)?;
                let slopes = gradient(&gradients, "bn.bias")?;
                ensure_close(&format!("{name}, {engine:?}, {kernel}"), &golden.inputs, &expected.values, &values)?;
                ensure_close(&format!("slope of {name}, {engine:?}"), &golden.inputs, &expected.slopes, &slopes)?;
            }
        }
    }
    Ok(())
}

/// An inverted residual block with squeeze-excite, of one channel for each input.
struct Squeezed {
    block: MbConv,
    store: ParameterStore,
}

impl Squeezed {
    fn new(channels: usize, act: Activation, gate: Gate) -> Result<Self> {
        let mut builder = Builder::new(&Device::Cpu);
        let block = MbConv {
            expand: None,
            depthwise: builder.conv_bn("depthwise", "depthwise.bn", Geometry::depthwise(channels, 3, 1))?,
            squeeze_excite: Some(SqueezeExcite {
                reduce: builder.pointwise("se.reduce", channels, channels)?,
                expand: builder.pointwise("se.expand", channels, channels)?,
                act,
                gate,
            }),
            project: builder.conv_bn("project", "project.bn", Geometry::same(channels, channels, 1, 1))?,
            act: Activation::Identity,
            residual: false,
        };
        Ok(Self { block, store: builder.finish(0)? })
    }

    /// The gradient of a bias, from drawn weights of the output.
    fn gradient(&self, engine: Engine, name: &str) -> Result<Vec<f64>> {
        let channels = self.block.project.conv.geometry.in_channels;
        let numbers = 2 * 4 * 3 * channels;
        let xs = Tensor::arange(0.0f32, numbers as f32, &Device::Cpu)?.sin()?.reshape((2, 4, 3, channels))?;
        let weights = Tensor::arange(0.0f32, numbers as f32, &Device::Cpu)?.affine(0.7, 1.0)?.cos()?;
        let out = mb_conv(&xs, &self.block, &training(engine))?;
        let gradients = self.store.backward(&(out.flatten_all()? * weights)?.sum_all()?)?;
        gradient(&gradients, name)
    }
}

/// Where the slope is 0 the bias has no gradient at all, elsewhere it has one.
fn ensure_same_zeros(what: &str, inputs: &[f64], slopes: &[f64], found: &[f64]) -> Result<()> {
    ensure!(inputs.len() == found.len(), "{what}: {} numbers", found.len());
    for ((input, slope), found) in inputs.iter().zip(slopes).zip(found) {
        ensure!((*slope == 0.0) == (*found == 0.0), "{what} at {input:e}: gradient {found:e}, slope {slope:e}");
    }
    Ok(())
}

#[test]
fn hard_gates_close_where_pytorch_closes_them() -> Result<()> {
    let golden = golden()?;
    let expected = &golden.functions["hardsigmoid"];
    for engine in ENGINES {
        let squeezed = Squeezed::new(golden.inputs.len(), Activation::Relu, Gate::HardSigmoid)?;
        set(&squeezed.store, &[("se.expand.weight", &[0.0]), ("se.expand.bias", &golden.inputs)])?;
        let found = squeezed.gradient(engine, "se.expand.bias")?;
        ensure_same_zeros(&format!("hard gate, {engine:?}"), &golden.inputs, &expected.slopes, &found)?;
    }
    Ok(())
}

/// The weights after the activation are so small that all but its slope is the same for every activation; the identity tells the rest.
#[test]
fn squeezed_means_activate_as_pytorch() -> Result<()> {
    let golden = golden()?;
    let channels = golden.inputs.len();
    let diagonal: Vec<f64> =
        (0..channels * channels).map(|i| if i % (channels + 1) == 0 { 1e-5 } else { 0.0 }).collect();
    for engine in ENGINES {
        let found = |act: Activation| -> Result<Vec<f64>> {
            let squeezed = Squeezed::new(channels, act, Gate::Sigmoid)?;
            let biases = ("se.reduce.bias", golden.inputs.as_slice());
            set(&squeezed.store, &[("se.reduce.weight", &[0.0]), biases, ("se.expand.weight", &diagonal)])?;
            squeezed.gradient(engine, "se.reduce.bias")
        };
        let whole = found(Activation::Identity)?;
        for (name, act) in ACTIVATIONS {
            let parts = found(act)?;
            for (((input, slope), part), whole) in
                golden.inputs.iter().zip(&golden.functions[name].slopes).zip(parts).zip(&whole)
            {
                let close = *whole != 0.0 && (part / whole - slope).abs() < 1e-2;
                ensure!(close, "slope of {name}, {engine:?}, at {input:e}: {} instead of {slope}", part / whole);
            }
        }
    }
    Ok(())
}
