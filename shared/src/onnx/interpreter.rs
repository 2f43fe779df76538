//! Follows a network's definition and writes down the operators that compute it.

use super::builder::{Edge, GraphBuilder, Layout, float, integer, integers, layer_name};
use crate::Result;
use crate::ops::{
    Activation, BatchNorm, ConvBn, Gate, Interpreter, LayerNorm, Linear, LocalPatchInteraction, Parameter,
    PatchEmbedding, Shape, SqueezeExcite,
};

impl GraphBuilder<'_> {
    fn mean(&mut self, xs: &Edge, name: String) -> Result<Edge> {
        let shape = xs.shape.averaged()?;
        let name = self.node("GlobalAveragePool", name, &[&xs.name], vec![]);
        Ok(Edge { name, shape, layout: Layout::ChannelsFirst })
    }
}

impl Interpreter for GraphBuilder<'_> {
    type Value = Edge;

    fn conv_bn(&mut self, xs: &Edge, params: &ConvBn, residual: Option<&Edge>, act: Activation) -> Result<Edge> {
        let convolved = self.convolution(xs, &params.conv, None)?;
        let mut normed = self.batch_norm(&convolved, &params.norm)?;
        if let Some(residual) = residual {
            residual.shape.expect("conv_bn", normed.shape)?;
            let name = format!("{}.add", normed.name);
            normed.name = self.node("Add", name, &[&normed.name, &residual.name], vec![]);
        }
        Ok(self.activation(normed, act))
    }

    fn max_pool(&mut self, xs: &Edge) -> Result<Edge> {
        let shape = xs.shape.max_pooled()?;
        let attributes =
            vec![integers("kernel_shape", &[3; 2]), integers("pads", &[1; 4]), integers("strides", &[2; 2])];
        let name = self.node("MaxPool", format!("{}.max_pool", xs.name), &[&xs.name], attributes);
        Ok(Edge { name, shape, layout: xs.layout })
    }

    fn global_average_pool(&mut self, xs: &Edge) -> Result<Edge> {
        self.mean(xs, format!("{}.mean", xs.name))
    }

    /// A weight of a 1x1 convolution stays one.
    fn linear(&mut self, xs: &Edge, params: &Linear, act: Activation) -> Result<Edge> {
        let shape = xs.shape.mapped(params)?;
        let dims = self.parameter_shape(&params.weight)?;
        let (weight, bias) = (self.parameter(&params.weight)?, self.parameter(&params.bias)?);
        let inputs = [xs.name.as_str(), &weight, &bias];
        let name = layer_name(&params.weight);
        let name = match (xs.layout, dims.len()) {
            (Layout::ChannelsFirst, 4) => self.node("Conv", name, &inputs, vec![integers("kernel_shape", &[1; 2])]),
            (Layout::ChannelsLast, 2) if matches!(xs.shape, Shape::Row { .. }) => {
                self.node("Gemm", name, &inputs, vec![integer("transB", 1)])
            }
            (Layout::ChannelsLast, 2) => self.map_tokens(name, inputs),
            _ => return Err(xs.shape.error("linear", format!("{:?} for a weight {dims:?}", xs.layout))),
        };
        Ok(self.activation(Edge { name, shape, layout: xs.layout }, act))
    }

    fn batch_norm_rows(&mut self, xs: &Edge, params: &BatchNorm, act: Activation) -> Result<Edge> {
        let normed = self.batch_norm(xs, params)?;
        Ok(self.activation(normed, act))
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
        self.patch_tokens(xs, params)
    }

    fn add_fourier_positions(&mut self, xs: &Edge, params: &Linear) -> Result<Edge> {
        self.with_fourier_positions(xs, params)
    }

    fn layer_norm(&mut self, xs: &Edge, params: &LayerNorm) -> Result<Edge> {
        let (weight, bias) = (self.parameter(&params.weight)?, self.parameter(&params.bias)?);
        let attributes = vec![integer("axis", -1), float("epsilon", params.eps as f32)];
        let name = self.node("LayerNormalization", layer_name(&params.weight), &[&xs.name, &weight, &bias], attributes);
        Ok(Edge { name, ..xs.clone() })
    }

    fn attention(&mut self, qkv: &Edge, heads: usize) -> Result<Edge> {
        self.token_attention(qkv, heads)
    }

    fn cross_covariance_attention(&mut self, qkv: &Edge, temperature: &Parameter) -> Result<Edge> {
        self.channel_attention(qkv, temperature)
    }

    fn class_attention(&mut self, query: &Edge, keys: &Edge, values: &Edge, heads: usize) -> Result<Edge> {
        Ok(self.first_token_attention(query, keys, values, heads))
    }

    fn local_patch_interaction(&mut self, xs: &Edge, params: &LocalPatchInteraction) -> Result<Edge> {
        let planes = self.planes(xs)?;
        let convolved = self.convolution(&planes, &params.conv1.conv, Some(&params.conv1.bias))?;
        let activated = self.activation(convolved, Activation::Gelu);
        let normed = self.batch_norm(&activated, &params.norm)?;
        let convolved = self.convolution(&normed, &params.conv2.conv, Some(&params.conv2.bias))?;
        Ok(self.tokens(&convolved))
    }

    fn prepend_token(&mut self, xs: &Edge, token: &Parameter) -> Result<Edge> {
        self.with_first_token(xs, token)
    }

    fn first_token(&mut self, xs: &Edge) -> Result<Edge> {
        Ok(self.take_first_token(xs))
    }

    fn replace_first_token(&mut self, xs: &Edge, token: &Edge) -> Result<Edge> {
        Ok(self.with_other_first_token(xs, token))
    }

    fn add_branch(&mut self, xs: &Edge, branch: &Edge, scale: Option<&Parameter>) -> Result<Edge> {
        branch.shape.expect("add_branch", xs.shape)?;
        let mut summand = branch.name.clone();
        if let Some(scale) = scale {
            let scale = self.parameter(scale)?;
            summand = self.node("Mul", format!("{}.scaled", branch.name), &[&branch.name, &scale], vec![]);
        }
        let name = self.node("Add", format!("{}.add", branch.name), &[&xs.name, &summand], vec![]);
        Ok(Edge { name, ..xs.clone() })
    }
}
