//! Follows a network's definition and writes down the operators of ONNX that compute it.
//!
//! Images are `(B, C, H, W)`. An edge is called like the node that it leaves, a node like the parameters that it uses: `layer1.0.conv1`,
//! `layer1.0.bn1`, `layer1.0.bn1.relu`. Constants have the names and layouts of the file that `PyTorch` reads, which are ONNX's as well.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::proto::{AttributeProto, AttributeType, DataType, NodeProto, TensorProto};
use crate::ops::{
    Activation, BatchNorm, Conv2d, ConvBn, Gate, Interpreter, Linear, Padding, Parameter, Shape, SqueezeExcite,
};
use crate::{Error, Result};

/// Rows shorter than this are divided by it instead, as in [`crate::ops::l2_normalise`].
const SHORTEST_ROW: f32 = 1e-12;

/// What flows from node to node.
#[derive(Debug, Clone)]
pub(super) struct Edge {
    pub(super) name: String,
    pub(super) shape: Shape,
    /// Whether a row is still `(B, F, 1, 1)`, as a pool leaves it.
    is_pixel: bool,
}

impl Edge {
    /// A graph's input.
    pub(super) fn image(name: &str, shape: Shape) -> Self {
        Self { name: name.into(), shape, is_pixel: false }
    }
}

/// A graph under construction.
pub(super) struct GraphBuilder<'a> {
    /// All constants that the network may use.
    tensors: &'a BTreeMap<String, Tensor>,
    used: BTreeSet<String>,
    pub(super) nodes: Vec<NodeProto>,
    pub(super) initializers: Vec<TensorProto>,
}

impl<'a> GraphBuilder<'a> {
    /// An empty graph over a model's tensors, in file layouts.
    pub(super) fn new(tensors: &'a BTreeMap<String, Tensor>) -> Self {
        Self { tensors, used: BTreeSet::new(), nodes: Vec::new(), initializers: Vec::new() }
    }

    /// Makes an edge of rows an output: `(B, F)` under a name of its own.
    pub(super) fn output(&mut self, edge: &Edge, name: &str) -> Edge {
        let (op, attributes) = if edge.is_pixel { ("Flatten", vec![integer("axis", 1)]) } else { ("Identity", vec![]) };
        self.node(op, name.into(), &[&edge.name], attributes);
        Edge { name: name.into(), is_pixel: false, ..edge.clone() }
    }

    /// Rows of unit length.
    pub(super) fn l2_normalise(&mut self, rows: &Edge, name: &str) -> Edge {
        let attributes = vec![integers("axes", vec![1]), integer("keepdims", 1)];
        let norm = self.node("ReduceL2", format!("{name}.norm"), &[&rows.name], attributes);
        let shortest = self.scalar(format!("{name}.shortest"), SHORTEST_ROW);
        let bounded = self.node("Clip", format!("{name}.bounded_norm"), &[&norm, &shortest], vec![]);
        let name = self.node("Div", name.into(), &[&rows.name, &bounded], vec![]);
        Edge { name, ..rows.clone() }
    }

    /// Adds an operator with one output, which gets the node's name.
    fn node(&mut self, op: &str, name: String, inputs: &[&str], attribute: Vec<AttributeProto>) -> String {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(ToString::to_string).collect(),
            output: vec![name.clone()],
            name: Some(name.clone()),
            op_type: Some(op.into()),
            attribute,
        });
        name
    }

    /// Adds a parameter to the constants, once, and hands over its name and shape.
    fn parameter(&mut self, parameter: &Parameter) -> Result<(String, &'a [usize])> {
        let name = parameter.name();
        let tensor = self.tensors.get(name).ok_or_else(|| Error::invalid(format!("no values for `{name}`"), ""))?;
        if self.used.insert(name.into()) {
            let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
            self.initializers.push(TensorProto {
                dims: tensor.dims().iter().map(|size| *size as i64).collect(),
                data_type: Some(DataType::Float.into()),
                name: Some(name.into()),
                raw_data: Some(bytemuck::cast_slice(&values).to_vec()),
            });
        }
        Ok((name.into(), tensor.dims()))
    }

    /// Adds a number to the constants, once, and hands over its name.
    fn scalar(&mut self, name: String, value: f32) -> String {
        if self.used.insert(name.clone()) {
            self.initializers.push(TensorProto {
                dims: Vec::new(),
                data_type: Some(DataType::Float.into()),
                name: Some(name.clone()),
                raw_data: Some(value.to_le_bytes().to_vec()),
            });
        }
        name
    }

    fn convolution(&mut self, xs: &Edge, params: &Conv2d) -> Result<Edge> {
        let geometry = params.geometry;
        let shape = xs.shape.convolved(&geometry)?;
        let (weight, _) = self.parameter(&params.weight)?;
        let attributes = vec![
            integer("group", if geometry.depthwise { geometry.in_channels } else { 1 }),
            integers("kernel_shape", vec![geometry.kernel; 2]),
            integers("pads", pads(xs.shape, shape, params)),
            integers("strides", vec![geometry.stride; 2]),
        ];
        let name = self.node("Conv", layer_name(&params.weight), &[&xs.name, &weight], attributes);
        Ok(Edge { name, shape, is_pixel: false })
    }

    fn batch_norm(&mut self, xs: &Edge, params: &BatchNorm) -> Result<Edge> {
        let mut inputs = vec![xs.name.clone()];
        for parameter in [&params.weight, &params.bias, &params.running_mean, &params.running_var] {
            inputs.push(self.parameter(parameter)?.0);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attributes = vec![float("epsilon", params.eps as f32)];
        let name = self.node("BatchNormalization", layer_name(&params.weight), &inputs, attributes);
        Ok(Edge { name, ..xs.clone() })
    }

    fn activation(&mut self, xs: Edge, act: Activation) -> Edge {
        let input = xs.name.as_str();
        let name = match act {
            Activation::Identity => return xs,
            Activation::Relu => self.node("Relu", format!("{input}.relu"), &[input], vec![]),
            Activation::Relu6 => {
                let (low, high) = (self.scalar("relu6.min".into(), 0.0), self.scalar("relu6.max".into(), 6.0));
                self.node("Clip", format!("{input}.relu6"), &[input, &low, &high], vec![])
            }
            Activation::Silu => {
                let gate = self.node("Sigmoid", format!("{input}.sigmoid"), &[input], vec![]);
                self.node("Mul", format!("{input}.silu"), &[input, &gate], vec![])
            }
            Activation::HardSwish => self.node("HardSwish", format!("{input}.hard_swish"), &[input], vec![]),
        };
        Edge { name, ..xs }
    }

    fn mean(&mut self, xs: &Edge, name: String) -> Result<Edge> {
        let shape = xs.shape.averaged()?;
        let name = self.node("GlobalAveragePool", name, &[&xs.name], vec![]);
        Ok(Edge { name, shape, is_pixel: true })
    }
}

impl Interpreter for GraphBuilder<'_> {
    type Value = Edge;

    fn conv_bn(&mut self, xs: &Edge, params: &ConvBn, residual: Option<&Edge>, act: Activation) -> Result<Edge> {
        let convolved = self.convolution(xs, &params.conv)?;
        let mut normed = self.batch_norm(&convolved, &params.norm)?;
        if let Some(residual) = residual {
            if residual.shape != normed.shape {
                return Err(residual.shape.error("conv_bn", format!("{:?}", normed.shape)));
            }
            let name = format!("{}.add", normed.name);
            normed.name = self.node("Add", name, &[&normed.name, &residual.name], vec![]);
        }
        Ok(self.activation(normed, act))
    }

    fn max_pool(&mut self, xs: &Edge) -> Result<Edge> {
        let shape = xs.shape.max_pooled()?;
        let attributes =
            vec![integers("kernel_shape", vec![3; 2]), integers("pads", vec![1; 4]), integers("strides", vec![2; 2])];
        let name = self.node("MaxPool", format!("{}.max_pool", xs.name), &[&xs.name], attributes);
        Ok(Edge { name, shape, is_pixel: false })
    }

    fn global_average_pool(&mut self, xs: &Edge) -> Result<Edge> {
        self.mean(xs, format!("{}.mean", xs.name))
    }

    /// A weight of a 1x1 convolution stays one.
    fn linear(&mut self, xs: &Edge, params: &Linear, act: Activation) -> Result<Edge> {
        let shape = xs.shape.mapped(params)?;
        let ((weight, dims), (bias, _)) = (self.parameter(&params.weight)?, self.parameter(&params.bias)?);
        let is_convolution = dims.len() == 4;
        if is_convolution != xs.is_pixel {
            return Err(xs.shape.error("linear", format!("input for a weight {dims:?}")));
        }
        let inputs = [xs.name.as_str(), &weight, &bias];
        let name = layer_name(&params.weight);
        let name = if is_convolution {
            self.node("Conv", name, &inputs, vec![integers("kernel_shape", vec![1; 2])])
        } else {
            self.node("Gemm", name, &inputs, vec![integer("transB", 1)])
        };
        Ok(self.activation(Edge { name, shape, is_pixel: xs.is_pixel }, act))
    }

    fn squeeze_excite(&mut self, xs: &Edge, params: &SqueezeExcite) -> Result<Edge> {
        let means = self.mean(xs, format!("{}.mean", layer_name(&params.reduce.weight)))?;
        let few = self.linear(&means, &params.reduce, params.act)?;
        let many = self.linear(&few, &params.expand, Activation::Identity)?.name;
        let factors = match params.gate {
            Gate::Sigmoid => self.node("Sigmoid", format!("{many}.sigmoid"), &[&many], vec![]),
            Gate::HardSigmoid => {
                let attributes = vec![float("alpha", 1.0 / 6.0), float("beta", 0.5)];
                self.node("HardSigmoid", format!("{many}.hard_sigmoid"), &[&many], attributes)
            }
        };
        let name = self.node("Mul", format!("{many}.scaled"), &[&xs.name, &factors], vec![]);
        Ok(Edge { name, ..xs.clone() })
    }
}

/// Zeros before and after: `[top, left, bottom, right]`.
fn pads(input: Shape, output: Shape, params: &Conv2d) -> Vec<usize> {
    let geometry = params.geometry;
    match (geometry.padding, input, output) {
        (
            Padding::Same,
            Shape::Image { height, width, .. },
            Shape::Image { height: out_height, width: out_width, .. },
        ) => {
            let before = [height, width].map(|side| geometry.leading_padding(side));
            let reach = [out_height, out_width].map(|side| (side - 1) * geometry.stride + geometry.kernel);
            let after = [reach[0].saturating_sub(height + before[0]), reach[1].saturating_sub(width + before[1])];
            [before, after].concat()
        }
        (Padding::Symmetric(padding), ..) => vec![padding; 4],
        (Padding::Same, ..) => vec![0; 4],
    }
}

/// The layer that a weight belongs to.
fn layer_name(weight: &Parameter) -> String {
    weight.name().trim_end_matches(".weight").into()
}

fn integer(name: &str, value: usize) -> AttributeProto {
    AttributeProto { i: Some(value as i64), ..attribute(name, AttributeType::Int) }
}

fn integers(name: &str, values: Vec<usize>) -> AttributeProto {
    let ints = values.into_iter().map(|value| value as i64).collect();
    AttributeProto { ints, ..attribute(name, AttributeType::Ints) }
}

fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) }
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: Some(name.into()), r#type: Some(kind.into()), ..AttributeProto::default() }
}
