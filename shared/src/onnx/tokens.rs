//! The operators of transformers: tokens are `(B, N, C)`, also those of a grid, and heads are cut out of their channels.

use candle_core::{DType, Device};

use super::builder::{Edge, GraphBuilder, Layout, integer, integers, layer_name};
use crate::Result;
use crate::ops::{FOURIER_CHANNELS, Linear, Parameter, PatchEmbedding, Shape, fourier_positions, resampled_positions};

impl GraphBuilder<'_> {
    /// From `(B, C, H, W)` to `(B, H * W, C)`.
    pub(super) fn tokens(&mut self, xs: &Edge) -> Edge {
        let flat = self.reshape(format!("{}.flat", xs.name), &xs.name, &[0, xs.shape.channels() as i64, -1]);
        let name = self.transpose(format!("{}.tokens", xs.name), &flat, &[0, 2, 1]);
        Edge { name, layout: Layout::ChannelsLast, ..xs.clone() }
    }

    /// From `(B, H * W, C)` to `(B, C, H, W)`.
    pub(super) fn planes(&mut self, xs: &Edge) -> Result<Edge> {
        let Shape::Image { channels, height, width } = xs.shape else {
            return Err(xs.shape.error("local_patch_interaction", "(H, W, C)"));
        };
        let flat = self.transpose(format!("{}.channels", xs.name), &xs.name, &[0, 2, 1]);
        let sizes = [0, channels as i64, height as i64, width as i64];
        let name = self.reshape(format!("{}.planes", xs.name), &flat, &sizes);
        Ok(Edge { name, layout: Layout::ChannelsFirst, ..xs.clone() })
    }

    /// `xs weight' + bias` for each token.
    pub(super) fn map_tokens(&mut self, name: String, [xs, weight, bias]: [&str; 3]) -> String {
        let transposed = self.transpose(format!("{name}.transposed"), weight, &[1, 0]);
        let product = self.node("MatMul", format!("{name}.product"), &[xs, &transposed], vec![]);
        self.node("Add", name, &[&product, bias], vec![])
    }

    /// The patches of an image behind a class token, with the positions for its size.
    pub(super) fn patch_tokens(&mut self, xs: &Edge, params: &PatchEmbedding) -> Result<Edge> {
        let Shape::Image { height, width, .. } = xs.shape.patches(params)? else {
            return Err(xs.shape.error("embed_patches", "(H, W, C)"));
        };
        let convolved = self.convolution(xs, &params.projection.conv, Some(&params.projection.bias))?;
        let tokens = self.tokens(&convolved);
        let tokens = self.with_first_token(&tokens, &params.class_token)?;
        let table = resampled_positions(&params.positions, [height, width], false)?;
        let sizes = [1, tokens.shape.positions(), tokens.shape.channels()];
        let table = self.floats(params.positions.table.name(), &sizes, &table)?;
        let name = self.node("Add", format!("{}.add", tokens.name), &[&tokens.name, &table], vec![]);
        Ok(Edge { name, ..tokens })
    }

    /// From `(B, C, H, W)` to tokens, with what a 1x1 convolution makes of waves added.
    pub(super) fn with_fourier_positions(&mut self, xs: &Edge, params: &Linear) -> Result<Edge> {
        let Shape::Image { height, width, .. } = xs.shape else {
            return Err(xs.shape.error("add_fourier_positions", "(H, W, C)"));
        };
        let waves = fourier_positions([height, width], DType::F32, &Device::Cpu)?.t()?.contiguous()?;
        let layer = layer_name(&params.weight);
        let waves = self.floats(&format!("{layer}.waves"), &[1, FOURIER_CHANNELS, height, width], &waves)?;
        let (weight, bias) = (self.parameter(&params.weight)?, self.parameter(&params.bias)?);
        let attributes = vec![integers("kernel_shape", &[1; 2])];
        let positions = self.node("Conv", layer.clone(), &[&waves, &weight, &bias], attributes);
        let name = self.node("Add", format!("{layer}.add"), &[&xs.name, &positions], vec![]);
        Ok(self.tokens(&Edge { name, ..xs.clone() }))
    }

    /// `softmax(Q K' / sqrt(width)) V` of each head.
    pub(super) fn token_attention(&mut self, qkv: &Edge, heads: usize) -> Result<Edge> {
        let shape = qkv.shape.attended(heads)?;
        let base = qkv.name.as_str();
        // (3, B, heads, N, width)
        let [queries, keys, values] = self.parts(base, shape, heads, &[2, 0, 3, 1, 4]);
        let keys = self.transpose(format!("{base}.keys_last"), &keys, &[0, 1, 3, 2]);
        let queries = self.scaled_queries(base, &queries, shape.channels() / heads);
        let mixed = self.weighted_sum(base, [&queries, &keys, &values], None); // (B, heads, N, width)
        let joined = self.transpose(format!("{base}.joined"), &mixed, &[0, 2, 1, 3]);
        let name = self.reshape(format!("{base}.attended"), &joined, &[0, 0, shape.channels() as i64]);
        Ok(Edge { name, shape, layout: qkv.layout })
    }

    /// `softmax(temperature * Q K') V` of each head, where queries and keys are channels of unit length.
    pub(super) fn channel_attention(&mut self, qkv: &Edge, temperature: &Parameter) -> Result<Edge> {
        let heads = temperature.var().elem_count();
        let shape = qkv.shape.attended(heads)?;
        let base = qkv.name.as_str();
        // (3, B, heads, width, N)
        let [queries, keys, values] = self.parts(base, shape, heads, &[2, 0, 3, 4, 1]);
        let queries = self.l2_normalise(&queries, &format!("{base}.unit_queries"));
        let keys = self.l2_normalise(&keys, &format!("{base}.unit_keys"));
        let keys = self.transpose(format!("{base}.keys_last"), &keys, &[0, 1, 3, 2]);
        let temperature = self.parameter(temperature)?;
        let mixed = self.weighted_sum(base, [&queries, &keys, &values], Some(&temperature)); // (B, heads, width, N)
        let joined = self.transpose(format!("{base}.joined"), &mixed, &[0, 3, 1, 2]);
        let name = self.reshape(format!("{base}.attended"), &joined, &[0, 0, shape.channels() as i64]);
        Ok(Edge { name, shape, layout: qkv.layout })
    }

    /// As [`Self::token_attention`], of one query in each image.
    pub(super) fn first_token_attention(&mut self, query: &Edge, keys: &Edge, values: &Edge, heads: usize) -> Edge {
        let base = query.name.as_str();
        let (heads, width) = (heads as i64, query.shape.channels() / heads);
        let queries = self.reshape(format!("{base}.heads"), base, &[0, heads, 1, width as i64]);
        let queries = self.scaled_queries(base, &queries, width);
        let mut by_head = |edge: &Edge, axes: &[i64]| {
            let cut = self.reshape(format!("{}.heads", edge.name), &edge.name, &[0, 0, heads, width as i64]);
            self.transpose(format!("{}.by_head", edge.name), &cut, axes)
        };
        let keys = by_head(keys, &[0, 2, 3, 1]); // (B, heads, width, N)
        let values = by_head(values, &[0, 2, 1, 3]); // (B, heads, N, width)
        let mixed = self.weighted_sum(base, [&queries, &keys, &values], None); // (B, heads, 1, width)
        let name = self.reshape(format!("{base}.attended"), &mixed, &[0, query.shape.channels() as i64]);
        Edge { name, ..query.clone() }
    }

    /// Tokens behind another one, the same in each image.
    pub(super) fn with_first_token(&mut self, xs: &Edge, token: &Parameter) -> Result<Edge> {
        let base = token.name();
        let constant = self.parameter(token)?;
        let attributes = vec![integer("start", 0), integer("end", 1)];
        let batch = self.node("Shape", format!("{base}.batch"), &[&xs.name], attributes);
        let rest = self.list(&[1, xs.shape.channels() as i64]);
        let sizes = self.node("Concat", format!("{base}.sizes"), &[&batch, &rest], vec![integer("axis", 0)]);
        let token = self.node("Expand", format!("{base}.expanded"), &[&constant, &sizes], vec![]);
        let name = self.node("Concat", format!("{base}.first"), &[&token, &xs.name], vec![integer("axis", 1)]);
        Ok(Edge { name, shape: xs.shape.with_first_token(), layout: Layout::ChannelsLast })
    }

    /// `(B, C)`.
    pub(super) fn take_first_token(&mut self, xs: &Edge) -> Edge {
        let index = self.index(0);
        let name = self.node("Gather", format!("{}.first", xs.name), &[&xs.name, &index], vec![integer("axis", 1)]);
        Edge { name, shape: Shape::Row { channels: xs.shape.channels() }, layout: Layout::ChannelsLast }
    }

    /// Tokens with a row in the place of the first.
    pub(super) fn with_other_first_token(&mut self, xs: &Edge, token: &Edge) -> Edge {
        let axis = self.list(&[1]);
        let (start, end) = (self.list(&[1]), self.list(&[i64::MAX]));
        let others = self.node("Slice", format!("{}.others", xs.name), &[&xs.name, &start, &end, &axis], vec![]);
        let first = self.node("Unsqueeze", format!("{}.token", token.name), &[&token.name, &axis], vec![]);
        let attributes = vec![integer("axis", 1)];
        let name = self.node("Concat", format!("{}.replaced", xs.name), &[&first, &others], attributes);
        Edge { name, ..xs.clone() }
    }

    /// Queries, keys and values of each head, from `(B, N, 3, heads, width)` by a permutation that puts the 3 first.
    fn parts(&mut self, base: &str, shape: Shape, heads: usize, axes: &[i64]) -> [String; 3] {
        let width = shape.channels() / heads;
        let cut = self.reshape(format!("{base}.heads"), base, &[0, 0, 3, heads as i64, width as i64]);
        let parts = self.transpose(format!("{base}.parts"), &cut, axes);
        [(0, "queries"), (1, "keys"), (2, "values")].map(|(index, what)| {
            let index = self.index(index);
            self.node("Gather", format!("{base}.{what}"), &[&parts, &index], vec![integer("axis", 0)])
        })
    }

    fn scaled_queries(&mut self, base: &str, queries: &str, width: usize) -> String {
        let scale = self.scalar(&format!("one_over_root_of_{width}"), 1.0 / (width as f32).sqrt());
        self.node("Mul", format!("{base}.scaled_queries"), &[queries, &scale], vec![])
    }

    /// `softmax(factor * queries keys) values`.
    fn weighted_sum(&mut self, base: &str, [queries, keys, values]: [&String; 3], factor: Option<&String>) -> String {
        let mut similarities = self.node("MatMul", format!("{base}.similarities"), &[queries, keys], vec![]);
        if let Some(factor) = factor {
            similarities = self.node("Mul", format!("{base}.tempered"), &[&similarities, factor], vec![]);
        }
        let weights = self.node("Softmax", format!("{base}.weights"), &[&similarities], vec![integer("axis", -1)]);
        self.node("MatMul", format!("{base}.mixed"), &[&weights, values], vec![])
    }

    /// A size of 0 is that of the input, one of -1 takes what is left.
    fn reshape(&mut self, name: String, xs: &str, sizes: &[i64]) -> String {
        let sizes = self.list(sizes);
        self.node("Reshape", name, &[xs, &sizes], vec![])
    }

    fn transpose(&mut self, name: String, xs: &str, axes: &[i64]) -> String {
        self.node("Transpose", name, &[xs], vec![integers("perm", axes)])
    }
}
