//! The blocks of transformers as operators of ONNX.
//!
//! Tokens are `(B, N, C)`. Only the batch is unknown when the graph is written, so positions are constants for the size of the images.

use super::graph::{Edge, Form, GraphBuilder, float, integer, integers, layer_name};
use crate::Result;
use crate::ops::{
    Activation, BiasedConv, LayerNorm, Linear, LocalPatchInteraction, Parameter, PatchEmbedding, Shape, positions,
};

/// Rows of queries and keys shorter than this are divided by it instead, as in [`crate::ops::cross_covariance_attention`].
const SHORTEST_ROW: f32 = 1e-12;
/// Stands for a size that stays as it is, in what `Reshape` is given.
const KEPT: i64 = 0;

impl GraphBuilder<'_> {
    /// The pixels of an image as tokens.
    fn tokens(&mut self, xs: &Edge) -> Edge {
        if xs.form == Form::Rows {
            return xs.clone();
        }
        let (count, width) = xs.shape.rows();
        let flat = self.reshape(&xs.name, format!("{}.flat", xs.name), &[KEPT, width as i64, count as i64]);
        let name = self.transpose(&flat, format!("{}.tokens", xs.name), &[0, 2, 1]);
        Edge { name, shape: xs.shape, form: Form::Rows }
    }

    /// Tokens on a grid as an image.
    fn planes(&mut self, xs: &Edge) -> Edge {
        let Shape::Image { channels, height, width } = xs.shape else { return xs.clone() };
        if xs.form == Form::Planes {
            return xs.clone();
        }
        let turned = self.transpose(&xs.name, format!("{}.turned", xs.name), &[0, 2, 1]);
        let sizes = [KEPT, channels as i64, height as i64, width as i64];
        let name = self.reshape(&turned, format!("{}.planes", xs.name), &sizes);
        Edge { name, shape: xs.shape, form: Form::Planes }
    }

    fn reshape(&mut self, input: &str, name: String, sizes: &[i64]) -> String {
        let words: Vec<String> = sizes.iter().map(ToString::to_string).collect();
        let sizes = self.whole_numbers(format!("shape.{}", words.join("x")), &[sizes.len()], sizes);
        self.node("Reshape", name, &[input, &sizes], vec![])
    }

    fn transpose(&mut self, input: &str, name: String, axes: &[usize]) -> String {
        self.node("Transpose", name, &[input], vec![integers("perm", axes.to_vec())])
    }

    fn product(&mut self, left: &str, right: &str, name: String) -> String {
        self.node("MatMul", name, &[left, right], vec![])
    }

    /// Exactly, by the error function: operator set 17 has no operator for it.
    pub(super) fn gelu(&mut self, input: &str) -> String {
        let root = self.scalar("gelu.half_root".into(), std::f32::consts::FRAC_1_SQRT_2);
        let (one, half) = (self.scalar("gelu.one".into(), 1.0), self.scalar("gelu.half".into(), 0.5));
        let scaled = self.node("Mul", format!("{input}.gelu.scaled"), &[input, &root], vec![]);
        let erf = self.node("Erf", format!("{input}.gelu.erf"), &[&scaled], vec![]);
        let twice = self.node("Add", format!("{input}.gelu.twice"), &[&erf, &one], vec![]);
        let halved = self.node("Mul", format!("{input}.gelu.halved"), &[input, &half], vec![]);
        self.node("Mul", format!("{input}.gelu"), &[&halved, &twice], vec![])
    }

    pub(super) fn linear_of_tokens(&mut self, xs: &Edge, params: &Linear, act: Activation) -> Result<Edge> {
        let xs = self.tokens(xs);
        let shape = xs.shape.mapped(params)?;
        let ((weight, _), (bias, _)) = (self.parameter(&params.weight)?, self.parameter(&params.bias)?);
        let layer = layer_name(&params.weight);
        let turned = self.transpose(&weight, format!("{layer}.weight.turned"), &[1, 0]);
        let multiplied = self.product(&xs.name, &turned, format!("{layer}.product"));
        let name = self.node("Add", layer, &[&multiplied, &bias], vec![]);
        Ok(self.activation(Edge { name, shape, form: Form::Rows }, act))
    }

    pub(super) fn norm_of_tokens(&mut self, xs: &Edge, params: &LayerNorm) -> Result<Edge> {
        let xs = self.tokens(xs);
        xs.shape.expect_width("layer_norm", params.weight.var().elem_count())?;
        let ((weight, _), (bias, _)) = (self.parameter(&params.weight)?, self.parameter(&params.bias)?);
        let attributes = vec![float("epsilon", params.eps as f32)];
        let layer = layer_name(&params.weight);
        let name = self.node("LayerNormalization", layer, &[&xs.name, &weight, &bias], attributes);
        Ok(Edge { name, ..xs })
    }

    fn biased_convolution(&mut self, xs: &Edge, params: &BiasedConv) -> Result<Edge> {
        self.convolution(xs, &params.conv, Some(&params.bias))
    }

    pub(super) fn patches_with_positions(&mut self, xs: &Edge, params: &PatchEmbedding) -> Result<Edge> {
        let shape = xs.shape.embedded(params)?;
        let patches = self.biased_convolution(xs, &params.projection)?;
        let tokens = self.with_token_before(&patches, &params.class_token)?;
        let Shape::Image { height, width, .. } = patches.shape else {
            return Err(patches.shape.error("embed_patches", "a grid of patches"));
        };
        let table = &params.positions.table;
        let positions = if [height, width] == [params.positions.side; 2] {
            self.parameter(table)?.0
        } else {
            let values = positions::resampled(&params.positions, [height, width], false)?;
            let (count, channels) = values.dims2()?;
            let values = values.flatten_all()?.to_vec1::<f32>()?;
            self.floats(format!("{}.{height}x{width}", table.name()), &[1, count, channels], &values)
        };
        let name = self.node("Add", format!("{}.placed", tokens.name), &[&tokens.name, &positions], vec![]);
        Ok(Edge { name, shape, form: Form::Rows })
    }

    pub(super) fn plus_fourier_positions(&mut self, xs: &Edge, params: &Linear) -> Result<Edge> {
        let Shape::Image { channels, height, width } = xs.shape else {
            return Err(xs.shape.error("add_fourier_positions", "a grid of tokens"));
        };
        let tokens = self.tokens(xs);
        let waves = positions::fourier([height, width], candle_core::DType::F32, params.bias.var().device())?;
        let values = waves.matmul(&params.weight.value(false))?.broadcast_add(&params.bias.value(false))?;
        let values = values.flatten_all()?.to_vec1::<f32>()?;
        let name = format!("{}.{height}x{width}", layer_name(&params.weight));
        let positions = self.floats(name, &[1, height * width, channels], &values);
        let name = self.node("Add", format!("{}.placed", tokens.name), &[&tokens.name, &positions], vec![]);
        Ok(Edge { name, ..tokens })
    }

    /// Queries, keys and values by head, their axes in the given order: before it, they are `(B, N, heads, width)`.
    fn by_head(&mut self, input: &str, heads: usize, width: usize, tokens: usize, axes: [usize; 4]) -> String {
        let sizes = [KEPT, tokens as i64, heads as i64, width as i64];
        let parted = self.reshape(input, format!("{input}.parted"), &sizes);
        self.transpose(&parted, format!("{input}.by_head"), &axes)
    }

    /// The three equal parts of the last axis.
    fn parts(&mut self, qkv: &str) -> [String; 3] {
        let parts = ["queries", "keys", "values"].map(|part| format!("{qkv}.{part}"));
        self.node_of_many("Split", format!("{qkv}.split"), &[qkv], parts.to_vec(), vec![integer("axis", 2)]);
        parts
    }

    fn softmax(&mut self, input: &str, name: String) -> String {
        self.node("Softmax", name, &[input], vec![integer("axis", 3)])
    }

    /// Values weighted by the similarities of queries to keys; all are `(B, heads, N, width)`, the keys turned.
    fn mixed(&mut self, [queries, keys, values]: [&str; 3], width: usize, name: &str) -> String {
        let similarities = self.product(queries, keys, format!("{name}.similarities"));
        let factor = self.scalar(format!("attention.factor.{width}"), 1.0 / (width as f32).sqrt());
        let scaled = self.node("Mul", format!("{name}.scaled"), &[&similarities, &factor], vec![]);
        let weights = self.softmax(&scaled, format!("{name}.weights"));
        self.product(&weights, values, format!("{name}.mixed"))
    }

    pub(super) fn attention_of_tokens(&mut self, qkv: &Edge, heads: usize) -> Result<Edge> {
        let qkv = self.tokens(qkv);
        let (tokens, channels) = (qkv.shape.rows().0, qkv.shape.rows().1 / 3);
        let width = channels / heads;
        qkv.shape.expect_width("attention", 3 * heads * width)?;
        let [queries, keys, values] = self.parts(&qkv.name);
        let queries = self.by_head(&queries, heads, width, tokens, [0, 2, 1, 3]);
        let keys = self.by_head(&keys, heads, width, tokens, [0, 2, 3, 1]);
        let values = self.by_head(&values, heads, width, tokens, [0, 2, 1, 3]);
        let mixed = self.mixed([&queries, &keys, &values], width, &qkv.name);
        let joined = self.transpose(&mixed, format!("{}.by_token", qkv.name), &[0, 2, 1, 3]);
        let name = self.reshape(&joined, format!("{}.attention", qkv.name), &[KEPT, tokens as i64, channels as i64]);
        Ok(Edge { name, shape: qkv.shape.with_width(channels), form: Form::Rows })
    }

    pub(super) fn attention_of_channels(&mut self, qkv: &Edge, temperature: &Parameter) -> Result<Edge> {
        let qkv = self.tokens(qkv);
        let heads = temperature.var().elem_count();
        let (tokens, channels) = (qkv.shape.rows().0, qkv.shape.rows().1 / 3);
        let width = channels / heads;
        qkv.shape.expect_width("cross_covariance_attention", 3 * heads * width)?;
        let parts = self.parts(&qkv.name);
        let [queries, keys, values] = parts.map(|part| self.by_head(&part, heads, width, tokens, [0, 2, 3, 1])); // (B, heads, width, N)
        let [queries, keys] = [queries, keys].map(|rows| self.unit_rows(&rows));
        let keys = self.transpose(&keys, format!("{keys}.turned"), &[0, 1, 3, 2]);
        let similarities = self.product(&queries, &keys, format!("{}.similarities", qkv.name));
        let (factor, _) = self.parameter(temperature)?;
        let scaled = self.node("Mul", format!("{}.scaled", qkv.name), &[&similarities, &factor], vec![]);
        let weights = self.softmax(&scaled, format!("{}.weights", qkv.name));
        let mixed = self.product(&weights, &values, format!("{}.mixed", qkv.name));
        let joined = self.transpose(&mixed, format!("{}.by_token", qkv.name), &[0, 3, 1, 2]);
        let name = self.reshape(&joined, format!("{}.attention", qkv.name), &[KEPT, tokens as i64, channels as i64]);
        Ok(Edge { name, shape: qkv.shape.with_width(channels), form: Form::Rows })
    }

    fn unit_rows(&mut self, rows: &str) -> String {
        let attributes = vec![integers("axes", vec![3]), integer("keepdims", 1)];
        let norm = self.node("ReduceL2", format!("{rows}.norm"), &[rows], attributes);
        let shortest = self.scalar("attention.shortest".into(), SHORTEST_ROW);
        let bounded = self.node("Clip", format!("{rows}.bounded_norm"), &[&norm, &shortest], vec![]);
        self.node("Div", format!("{rows}.unit"), &[rows, &bounded], vec![])
    }

    pub(super) fn attention_of_a_row(&mut self, query: &Edge, keys: &Edge, values: &Edge, heads: usize) -> Edge {
        let (tokens, channels) = keys.shape.rows();
        let width = channels / heads;
        let queries = self.by_head(&query.name, heads, width, 1, [0, 2, 1, 3]);
        let turned = self.by_head(&keys.name, heads, width, tokens, [0, 2, 3, 1]);
        let parted = self.by_head(&values.name, heads, width, tokens, [0, 2, 1, 3]);
        let mixed = self.mixed([&queries, &turned, &parted], width, &query.name);
        let name = self.reshape(&mixed, format!("{}.attention", query.name), &[KEPT, channels as i64]);
        Edge { name, ..query.clone() }
    }

    pub(super) fn convolutions_of_tokens(&mut self, xs: &Edge, params: &LocalPatchInteraction) -> Result<Edge> {
        let xs = self.planes(xs);
        let xs = self.biased_convolution(&xs, &params.conv1)?;
        let xs = self.activation(xs, Activation::Gelu);
        let xs = self.batch_norm(&xs, &params.norm)?;
        self.biased_convolution(&xs, &params.conv2)
    }

    pub(super) fn with_token_before(&mut self, xs: &Edge, token: &Parameter) -> Result<Edge> {
        let xs = self.tokens(xs);
        let (count, width) = xs.shape.rows();
        let (parameter, _) = self.parameter(token)?;
        let attributes = vec![integer("start", 0), integer("end", 1)];
        let batch = self.node("Shape", format!("{parameter}.batch"), &[&xs.name], attributes);
        let row = self.whole_numbers(format!("{parameter}.row"), &[2], &[1, width as i64]);
        let sizes = self.node("Concat", format!("{parameter}.sizes"), &[&batch, &row], vec![integer("axis", 0)]);
        let copies = self.node("Expand", format!("{parameter}.copies"), &[&parameter, &sizes], vec![]);
        let joined = format!("{}.with_{parameter}", xs.name);
        let name = self.node("Concat", joined, &[&copies, &xs.name], vec![integer("axis", 1)]);
        Ok(Edge { name, shape: Shape::Tokens { count: 1 + count, width }, form: Form::Rows })
    }

    pub(super) fn first_of_tokens(&mut self, xs: &Edge) -> Edge {
        let zero = self.whole_numbers("token.first".into(), &[], &[0]);
        let name = self.node("Gather", format!("{}.first", xs.name), &[&xs.name, &zero], vec![integer("axis", 1)]);
        Edge { name, shape: Shape::Row { width: xs.shape.rows().1 }, form: Form::Rows }
    }

    pub(super) fn with_other_first(&mut self, xs: &Edge, token: &Edge) -> Edge {
        let one = self.whole_numbers("token.second".into(), &[1], &[1]);
        let end = self.whole_numbers("token.end".into(), &[1], &[i64::MAX]);
        let others = self.node("Slice", format!("{}.others", xs.name), &[&xs.name, &one, &end, &one], vec![]);
        let row = self.node("Unsqueeze", format!("{}.token", token.name), &[&token.name, &one], vec![]);
        let name = self.node("Concat", format!("{}.joined", token.name), &[&row, &others], vec![integer("axis", 1)]);
        Edge { name, ..xs.clone() }
    }

    pub(super) fn sum_with_branch(&mut self, xs: &Edge, branch: &Edge, scale: Option<&Parameter>) -> Result<Edge> {
        if xs.shape != branch.shape {
            return Err(branch.shape.error("add_branch", format!("{:?}", xs.shape)));
        }
        let (xs, branch) = (self.tokens(xs), self.tokens(branch));
        let mut summand = branch.name;
        if let Some(scale) = scale {
            let (factors, _) = self.parameter(scale)?;
            summand = self.node("Mul", format!("{summand}.scaled"), &[&summand, &factors], vec![]);
        }
        let name = self.node("Add", format!("{summand}.sum"), &[&xs.name, &summand], vec![]);
        Ok(Edge { name, ..xs })
    }
}
