//! A graph under construction: named edges, operators in the order in which they run, constants once each.
//!
//! An edge is called like the node that it leaves, a node like the parameters that it uses: `layer1.0.conv1`, `layer1.0.bn1`,
//! `layer1.0.bn1.relu`. Constants have the names and layouts of the file that `PyTorch` reads, which are ONNX's as well.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::proto::{AttributeProto, AttributeType, DataType, NodeProto, TensorProto};
use crate::ops::{Activation, BatchNorm, Conv2d, Padding, Parameter, Shape};
use crate::{Error, Result};

/// Rows shorter than this are divided by it instead, as in [`crate::ops::l2_normalise`].
const SHORTEST_ROW: f32 = 1e-12;

/// What flows from node to node.
#[derive(Debug, Clone)]
pub(super) struct Edge {
    pub(super) name: String,
    pub(super) shape: Shape,
    pub(super) layout: Layout,
}

/// Where an edge has its channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Images are `(B, C, H, W)`, and a row that a pool made is `(B, F, 1, 1)`.
    ChannelsFirst,
    /// Tokens are `(B, N, C)`, also those of a grid; rows are `(B, F)`.
    ChannelsLast,
}

/// Adds operators one after the other.
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
        match edge.layout {
            Layout::ChannelsFirst => self.node("Flatten", name.into(), &[&edge.name], vec![integer("axis", 1)]),
            Layout::ChannelsLast => self.node("Identity", name.into(), &[&edge.name], vec![]),
        };
        Edge { name: name.into(), layout: Layout::ChannelsLast, ..edge.clone() }
    }

    /// The last axis divided by its length.
    pub(super) fn l2_normalise(&mut self, xs: &str, name: &str) -> String {
        let attributes = vec![integers("axes", &[-1]), integer("keepdims", 1)];
        let norm = self.node("ReduceL2", format!("{name}.norm"), &[xs], attributes);
        let shortest = self.scalar("shortest_row", SHORTEST_ROW);
        let bounded = self.node("Clip", format!("{name}.bounded_norm"), &[&norm, &shortest], vec![]);
        self.node("Div", name.into(), &[xs, &bounded], vec![])
    }

    /// Adds an operator with one output, which gets the node's name.
    pub(super) fn node(&mut self, op: &str, name: String, inputs: &[&str], attribute: Vec<AttributeProto>) -> String {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(ToString::to_string).collect(),
            output: vec![name.clone()],
            name: Some(name.clone()),
            op_type: Some(op.into()),
            attribute,
        });
        name
    }

    /// Adds a parameter to the constants and hands over its name.
    pub(super) fn parameter(&mut self, parameter: &Parameter) -> Result<String> {
        let tensor = self.parameter_tensor(parameter)?;
        self.floats(parameter.name(), tensor.dims(), tensor)
    }

    /// The size of a parameter in the file.
    pub(super) fn parameter_shape(&self, parameter: &Parameter) -> Result<&'a [usize]> {
        Ok(self.parameter_tensor(parameter)?.dims())
    }

    fn parameter_tensor(&self, parameter: &Parameter) -> Result<&'a Tensor> {
        let name = parameter.name();
        self.tensors.get(name).ok_or_else(|| Error::invalid(format!("no values for `{name}`"), ""))
    }

    /// Adds a tensor under another shape to the constants, once, and hands over its name.
    pub(super) fn floats(&mut self, name: &str, dims: &[usize], tensor: &Tensor) -> Result<String> {
        if !self.used.contains(name) {
            let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
            self.constant(name, dims, DataType::Float, bytemuck::cast_slice(&values).to_vec());
        }
        Ok(name.into())
    }

    /// Adds a number to the constants, once, and hands over its name.
    pub(super) fn scalar(&mut self, name: &str, value: f32) -> String {
        self.constant(name, &[], DataType::Float, value.to_le_bytes().to_vec())
    }

    /// Adds the index of an axis's element to the constants, once, and hands over its name.
    pub(super) fn index(&mut self, index: i64) -> String {
        self.constant(&format!("index_{index}"), &[], DataType::Int64, index.to_le_bytes().to_vec())
    }

    /// Adds a list of axes or sizes to the constants, once, and hands over its name.
    pub(super) fn list(&mut self, values: &[i64]) -> String {
        let name = values.iter().fold("list".to_string(), |name, value| format!("{name}_{value}"));
        self.constant(&name, &[values.len()], DataType::Int64, bytemuck::cast_slice(values).to_vec())
    }

    fn constant(&mut self, name: &str, dims: &[usize], kind: DataType, raw_data: Vec<u8>) -> String {
        if self.used.insert(name.into()) {
            self.initializers.push(TensorProto {
                dims: dims.iter().map(|size| *size as i64).collect(),
                data_type: Some(kind.into()),
                name: Some(name.into()),
                raw_data: Some(raw_data),
            });
        }
        name.into()
    }

    /// A convolution over `(B, C, H, W)`.
    pub(super) fn convolution(&mut self, xs: &Edge, params: &Conv2d, bias: Option<&Parameter>) -> Result<Edge> {
        let geometry = params.geometry;
        let shape = xs.shape.convolved(&geometry)?;
        let mut inputs = vec![xs.name.clone(), self.parameter(&params.weight)?];
        if let Some(bias) = bias {
            inputs.push(self.parameter(bias)?);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attributes = vec![
            integer("group", if geometry.depthwise { geometry.in_channels as i64 } else { 1 }),
            integers("kernel_shape", &[geometry.kernel as i64; 2]),
            integers("pads", &pads(xs.shape, shape, params)),
            integers("strides", &[geometry.stride as i64; 2]),
        ];
        let name = self.node("Conv", layer_name(&params.weight), &inputs, attributes);
        Ok(Edge { name, shape, layout: Layout::ChannelsFirst })
    }

    /// A batch norm with its running statistics, over `(B, C, H, W)` or `(B, C)`.
    pub(super) fn batch_norm(&mut self, xs: &Edge, params: &BatchNorm) -> Result<Edge> {
        let mut inputs = vec![xs.name.clone()];
        for parameter in [&params.weight, &params.bias, &params.running_mean, &params.running_var] {
            inputs.push(self.parameter(parameter)?);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attributes = vec![float("epsilon", params.eps as f32)];
        let name = self.node("BatchNormalization", layer_name(&params.weight), &inputs, attributes);
        Ok(Edge { name, ..xs.clone() })
    }

    /// An activation of each number.
    pub(super) fn activation(&mut self, xs: Edge, act: Activation) -> Edge {
        let input = xs.name.as_str();
        let name = match act {
            Activation::Identity => return xs,
            Activation::Relu => self.node("Relu", format!("{input}.relu"), &[input], vec![]),
            Activation::Relu6 => {
                let (low, high) = (self.scalar("zero", 0.0), self.scalar("six", 6.0));
                self.node("Clip", format!("{input}.relu6"), &[input, &low, &high], vec![])
            }
            Activation::Silu => {
                let gate = self.node("Sigmoid", format!("{input}.sigmoid"), &[input], vec![]);
                self.node("Mul", format!("{input}.silu"), &[input, &gate], vec![])
            }
            Activation::HardSwish => self.node("HardSwish", format!("{input}.hard_swish"), &[input], vec![]),
            Activation::Gelu => {
                let root = self.scalar("root_of_two", std::f32::consts::SQRT_2);
                let (one, half) = (self.scalar("one", 1.0), self.scalar("half", 0.5));
                let scaled = self.node("Div", format!("{input}.over_root"), &[input, &root], vec![]);
                let erf = self.node("Erf", format!("{input}.erf"), &[&scaled], vec![]);
                let raised = self.node("Add", format!("{input}.raised"), &[&erf, &one], vec![]);
                let doubled = self.node("Mul", format!("{input}.doubled"), &[input, &raised], vec![]);
                self.node("Mul", format!("{input}.gelu"), &[&doubled, &half], vec![])
            }
        };
        Edge { name, ..xs }
    }
}

/// Zeros before and after: `[top, left, bottom, right]`.
fn pads(input: Shape, output: Shape, params: &Conv2d) -> [i64; 4] {
    let geometry = params.geometry;
    match (geometry.padding, input, output) {
        (
            Padding::Same,
            Shape::Image { height, width, .. },
            Shape::Image { height: out_height, width: out_width, .. },
        ) => {
            let [top, left] = [height, width].map(|side| geometry.leading_padding(side));
            let after = |side: usize, out_side: usize, before: usize| {
                let reach = (out_side - 1) * geometry.stride + geometry.kernel;
                reach.saturating_sub(side + before)
            };
            [top, left, after(height, out_height, top), after(width, out_width, left)].map(|pad| pad as i64)
        }
        (Padding::Symmetric(padding), ..) => [padding as i64; 4],
        (Padding::Same, ..) => [0; 4],
    }
}

/// The layer that a weight belongs to.
pub(super) fn layer_name(weight: &Parameter) -> String {
    weight.name().trim_end_matches(".weight").into()
}

/// An attribute that is a whole number.
pub(super) fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto { i: Some(value), ..attribute(name, AttributeType::Int) }
}

/// An attribute that is a list of whole numbers.
pub(super) fn integers(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto { ints: values.to_vec(), ..attribute(name, AttributeType::Ints) }
}

/// An attribute that is a number.
pub(super) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) }
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: Some(name.into()), r#type: Some(kind.into()), ..AttributeProto::default() }
}
