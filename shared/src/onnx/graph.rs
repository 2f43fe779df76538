//! Follows a network's definition and writes down the operators of ONNX that compute it.
//!
//! Images are `(B, C, H, W)`; `tokens` has the blocks of transformers. An edge is called like the node that it leaves, a node like the parameters that it uses: `layer1.0.conv1`,
//! `layer1.0.bn1`, `layer1.0.bn1.relu`. Constants have the names and layouts of the file that `PyTorch` reads, which are ONNX's as well.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::proto::{AttributeProto, AttributeType, DataType, NodeProto, TensorProto};
use crate::ops::{
    Activation, BatchNorm, Conv2d, ConvBn, Gate, Interpreter, LayerNorm, Linear, LocalPatchInteraction, Padding,
    Parameter, PatchEmbedding, Shape, SqueezeExcite,
};
use crate::{Error, Result};

/// Rows shorter than this are divided by it instead, as in [`crate::ops::l2_normalise`].
const SHORTEST_ROW: f32 = 1e-12;

/// What flows from node to node.
#[derive(Debug, Clone)]
pub(super) struct Edge {
    pub(super) name: String,
    pub(super) shape: Shape,
    pub(super) form: Form,
}

/// How the numbers of an edge lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// An image as `(B, C, H, W)`, or a row as `(B, F, 1, 1)`, as a pool leaves it.
    Planes,
    /// The pixels of an image or tokens as `(B, N, C)`, a row as `(B, F)`.
    Rows,
}

impl Edge {
    /// A graph's input.
    pub(super) fn image(name: &str, shape: Shape) -> Self {
        Self { name: name.into(), shape, form: Form::Planes }
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
        let (op, attributes) = match edge.form {
            Form::Planes => ("Flatten", vec![integer("axis", 1)]),
            Form::Rows => ("Identity", vec![]),
        };
        self.node(op, name.into(), &[&edge.name], attributes);
        Edge { name: name.into(), form: Form::Rows, ..edge.clone() }
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
    pub(super) fn node(&mut self, op: &str, name: String, inputs: &[&str], attribute: Vec<AttributeProto>) -> String {
        self.node_of_many(op, name.clone(), inputs, vec![name.clone()], attribute);
        name
    }

    /// Adds an operator with any outputs.
    pub(super) fn node_of_many(
        &mut self,
        op: &str,
        name: String,
        inputs: &[&str],
        output: Vec<String>,
        attribute: Vec<AttributeProto>,
    ) {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(ToString::to_string).collect(),
            output,
            name: Some(name),
            op_type: Some(op.into()),
            attribute,
        });
    }

    /// Adds a parameter to the constants, once, and hands over its name and shape.
    pub(super) fn parameter(&mut self, parameter: &Parameter) -> Result<(String, &'a [usize])> {
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
    pub(super) fn scalar(&mut self, name: String, value: f32) -> String {
        self.floats(name, &[], &[value])
    }

    /// Adds numbers to the constants, once, and hands over their name.
    pub(super) fn floats(&mut self, name: String, dims: &[usize], values: &[f32]) -> String {
        self.constant(name, dims, DataType::Float, bytemuck::cast_slice(values).to_vec())
    }

    /// Adds whole numbers to the constants, once, and hands over their name.
    pub(super) fn whole_numbers(&mut self, name: String, dims: &[usize], values: &[i64]) -> String {
        self.constant(name, dims, DataType::Int64, bytemuck::cast_slice(values).to_vec())
    }

    fn constant(&mut self, name: String, dims: &[usize], data_type: DataType, raw_data: Vec<u8>) -> String {
        if self.used.insert(name.clone()) {
            self.initializers.push(TensorProto {
                dims: dims.iter().map(|size| *size as i64).collect(),
                data_type: Some(data_type.into()),
                name: Some(name.clone()),
                raw_data: Some(raw_data),
            });
        }
        name
    }

    /// A convolution, with a bias or without.
    pub(super) fn convolution(&mut self, xs: &Edge, params: &Conv2d, bias: Option<&Parameter>) -> Result<Edge> {
        let geometry = params.geometry;
        let shape = xs.shape.convolved(&geometry)?;
        let mut inputs = vec![xs.name.clone(), self.parameter(&params.weight)?.0];
        if let Some(bias) = bias {
            inputs.push(self.parameter(bias)?.0);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attributes = vec![
            integer("group", if geometry.depthwise { geometry.in_channels } else { 1 }),
            integers("kernel_shape", vec![geometry.kernel; 2]),
            integers("pads", pads(xs.shape, shape, params)),
            integers("strides", vec![geometry.stride; 2]),
        ];
        let name = self.node("Conv", layer_name(&params.weight), &inputs, attributes);
        Ok(Edge { name, shape, form: Form::Planes })
    }

    pub(super) fn batch_norm(&mut self, xs: &Edge, params: &BatchNorm) -> Result<Edge> {
        let mut inputs = vec![xs.name.clone()];
        for parameter in [&params.weight, &params.bias, &params.running_mean, &params.running_var] {
            inputs.push(self.parameter(parameter)?.0);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attributes = vec![float("epsilon", params.eps as f32)];
        let name = self.node("BatchNormalization", layer_name(&params.weight), &inputs, attributes);
        Ok(Edge { name, ..xs.clone() })
    }

    pub(super) fn activation(&mut self, xs: Edge, act: Activation) -> Edge {
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
            Activation::Gelu => self.gelu(input),
        };
        Edge { name, ..xs }
    }

    fn mean(&mut self, xs: &Edge, name: String) -> Result<Edge> {
        let shape = xs.shape.averaged()?;
        let name = self.node("GlobalAveragePool", name, &[&xs.name], vec![]);
        Ok(Edge { name, shape, form: Form::Planes })
    }
}

impl Interpreter for GraphBuilder<'_> {
    type Value = Edge;

    fn conv_bn(&mut self, xs: &Edge, params: &ConvBn, residual: Option<&Edge>, act: Activation) -> Result<Edge> {
        let convolved = self.convolution(xs, &params.conv, None)?;
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
        Ok(Edge { name, shape, form: Form::Planes })
    }

    fn global_average_pool(&mut self, xs: &Edge) -> Result<Edge> {
        self.mean(xs, format!("{}.mean", xs.name))
    }

    /// A weight of a 1x1 convolution stays one.
    fn linear(&mut self, xs: &Edge, params: &Linear, act: Activation) -> Result<Edge> {
        let shape = xs.shape.mapped(params)?;
        if !matches!(xs.shape, Shape::Row { .. }) {
            return self.linear_of_tokens(xs, params, act);
        }
        let ((weight, dims), (bias, _)) = (self.parameter(&params.weight)?, self.parameter(&params.bias)?);
        let is_convolution = dims.len() == 4;
        if is_convolution != (xs.form == Form::Planes) {
            return Err(xs.shape.error("linear", format!("input for a weight {dims:?}")));
        }
        let inputs = [xs.name.as_str(), &weight, &bias];
        let name = layer_name(&params.weight);
        let name = if is_convolution {
            self.node("Conv", name, &inputs, vec![integers("kernel_shape", vec![1; 2])])
        } else {
            self.node("Gemm", name, &inputs, vec![integer("transB", 1)])
        };
        Ok(self.activation(Edge { name, shape, form: xs.form }, act))
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

    fn embed_patches(&mut self, xs: &Edge, params: &PatchEmbedding) -> Result<Edge> {
        self.patches_with_positions(xs, params)
    }

    fn add_fourier_positions(&mut self, xs: &Edge, params: &Linear) -> Result<Edge> {
        self.plus_fourier_positions(xs, params)
    }

    fn layer_norm(&mut self, xs: &Edge, params: &LayerNorm) -> Result<Edge> {
        self.norm_of_tokens(xs, params)
    }

    fn attention(&mut self, qkv: &Edge, heads: usize) -> Result<Edge> {
        self.attention_of_tokens(qkv, heads)
    }

    fn cross_covariance_attention(&mut self, qkv: &Edge, temperature: &Parameter) -> Result<Edge> {
        self.attention_of_channels(qkv, temperature)
    }

    fn class_attention(&mut self, query: &Edge, keys: &Edge, values: &Edge, heads: usize) -> Result<Edge> {
        Ok(self.attention_of_a_row(query, keys, values, heads))
    }

    fn local_patch_interaction(&mut self, xs: &Edge, params: &LocalPatchInteraction) -> Result<Edge> {
        self.convolutions_of_tokens(xs, params)
    }

    fn prepend_token(&mut self, xs: &Edge, token: &Parameter) -> Result<Edge> {
        self.with_token_before(xs, token)
    }

    fn first_token(&mut self, xs: &Edge) -> Result<Edge> {
        Ok(self.first_of_tokens(xs))
    }

    fn replace_first_token(&mut self, xs: &Edge, token: &Edge) -> Result<Edge> {
        Ok(self.with_other_first(xs, token))
    }

    fn add_branch(&mut self, xs: &Edge, branch: &Edge, scale: Option<&Parameter>) -> Result<Edge> {
        self.sum_with_branch(xs, branch, scale)
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
pub(super) fn layer_name(weight: &Parameter) -> String {
    weight.name().trim_end_matches(".weight").into()
}

pub(super) fn integer(name: &str, value: usize) -> AttributeProto {
    AttributeProto { i: Some(value as i64), ..attribute(name, AttributeType::Int) }
}

pub(super) fn integers(name: &str, values: Vec<usize>) -> AttributeProto {
    let ints = values.into_iter().map(|value| value as i64).collect();
    AttributeProto { ints, ..attribute(name, AttributeType::Ints) }
}

pub(super) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) }
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: Some(name.into()), r#type: Some(kind.into()), ..AttributeProto::default() }
}
