//! Operations over images and grids of tokens in candle's graph: patch embedding, positions, local patch interaction.

use candle_core::Tensor;
use rayon::prelude::*;

use super::block::check_groups;
use super::flow::{Conv, Finish, Incoming, Source, Wanted, buffer};
use super::layer_norm::{add_up, column_sums, rounded};
use super::norm::Affine;
use super::token_layers::NormValues;
use super::{convolution, deposit, graph, layer_norm, local_patch, tiles, values, with_values};
use crate::Result;
use crate::ops::token_blocks::{Embedding, check_grid};
use crate::ops::{Activation, LocalBlock, LocalPatchInteraction, Mode, Pass, PatchEmbedding};

const EMBED_PATCHES: &str = "embed_patches";
const ADD_POSITIONS: &str = "add_fourier_positions";
const LOCAL_PATCH_INTERACTION: &str = "local_patch_interaction";
const LOCAL_BLOCK: &str = "local_block";

/// See [`crate::ops::embed_patches`]; `table` is what is added: `(1 + N, C)`, the class token with its position and the positions of patches.
pub(in crate::ops) fn embed_patches(
    xs: &Tensor,
    params: &PatchEmbedding,
    table: &Tensor,
    pass: &Pass,
) -> Result<Tensor> {
    let Embedding { batch, grid: [height, width], channels } = Embedding::of(xs, params)?;
    let (xs, table) = (xs.contiguous()?, table.contiguous()?);
    let geometry = params.projection.conv.geometry;
    let patch = geometry.kernel;
    let conv = Conv { geometry, batch, groups: 1, height: height * patch, width: width * patch };
    let shift = values(params.projection.bias.var())?;
    let affine = Affine { scale: vec![1.0; channels], shift };
    let mut patches = buffer(batch * conv.output_length());
    with_values(&xs, |xs| {
        with_values(params.projection.conv.weight.var(), |weight| {
            let finish = Finish::Apply { affine: &affine, act: Activation::Identity, residual: None };
            convolution::forward(&conv, &Source::plain(xs), weight, &mut patches, finish);
            Ok(())
        })
    })?;
    let length = conv.output_length() + channels;
    let mut out = buffer(batch * length);
    with_values(&table, |table| {
        out.par_chunks_mut(length).zip(patches.par_chunks(conv.output_length())).for_each(|(out, patches)| {
            out.copy_from_slice(table);
            tiles::add(&mut out[channels..], patches);
        });
        Ok(())
    })?;
    let shape = (batch, 1 + height * width, channels);
    if !pass.record {
        return Ok(Tensor::from_vec(out, shape, xs.device())?);
    }
    let (params, input, wants_input) = (params.clone(), xs.detach(), xs.track_op());
    let back = move |dout: Vec<f32>| {
        let dtable = sum_of_images(&dout, length);
        let mut dpatches = buffer(batch * conv.output_length());
        dpatches
            .par_chunks_mut(conv.output_length())
            .zip(dout.par_chunks(length))
            .for_each(|(dpatches, dout)| dpatches.copy_from_slice(&dout[channels..]));
        deposit(&params.projection.bias, column_sums(&dpatches, channels))?;
        let wanted = if wants_input { Wanted::Gradient { plus: None } } else { Wanted::Nothing };
        let incoming = Incoming { gradient: &dpatches, norm: None };
        let outgoing = with_values(&input, |xs| {
            with_values(params.projection.conv.weight.var(), |weight| {
                Ok(convolution::backward(&conv, &Source::plain(xs), weight, &incoming, wanted))
            })
        })?;
        deposit(&params.projection.conv.weight, outgoing.dweight)?;
        Ok(vec![wants_input.then_some(outgoing.gradient), Some(dtable)])
    };
    Ok(graph::record(EMBED_PATCHES, out, shape, &[&xs, &table], back)?)
}

/// The sum of a batch's images of `length` numbers.
fn sum_of_images(xs: &[f32], length: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; length];
    for image in xs.chunks_exact(length) {
        add_up(&mut sums, image);
    }
    rounded(sums)
}

/// `xs` with the same numbers added to each image: `xs` is `(B, H, W, C)`, `table` `(H, W, C)`.
pub(in crate::ops) fn add_positions(xs: &Tensor, table: &Tensor, pass: &Pass) -> Result<Tensor> {
    let (xs, table) = (xs.contiguous()?, table.contiguous()?);
    let length = table.elem_count();
    let mut out = with_values(&xs, |xs| Ok(xs.to_vec()))?;
    with_values(&table, |table| {
        out.par_chunks_mut(length).for_each(|out| tiles::add(out, table));
        Ok(())
    })?;
    if !pass.record {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    }
    let back = move |dout: Vec<f32>| {
        let dtable = sum_of_images(&dout, length);
        Ok(vec![Some(dout), Some(dtable)])
    };
    Ok(graph::record(ADD_POSITIONS, out, xs.shape(), &[&xs, &table], back)?)
}

/// The convolutions of a local patch interaction over a grid.
fn local_conv(name: &'static str, xs: &Tensor, params: &LocalPatchInteraction, mode: Mode) -> Result<Conv> {
    let geometry = params.conv1.conv.geometry;
    let [batch, height, width, _] = check_grid(name, xs, geometry.in_channels)?;
    let groups = match mode {
        Mode::Eval => 1,
        Mode::Train { bn_groups } => {
            check_groups(batch, bn_groups, batch * height * width)?;
            bn_groups
        }
    };
    Ok(Conv { geometry, batch, groups, height, width })
}

/// See [`crate::ops::local_patch_interaction`].
pub(in crate::ops) fn local_patch_interaction(
    xs: &Tensor,
    params: &LocalPatchInteraction,
    pass: &Pass,
) -> Result<Tensor> {
    let conv = local_conv(LOCAL_PATCH_INTERACTION, xs, params, pass.mode)?;
    let xs = xs.contiguous()?;
    let (out, saved) = with_values(&xs, |xs| local_patch::forward(params, &conv, xs, None, None, pass.mode))?;
    let Some(saved) = saved.filter(|_| pass.record) else {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    };
    let (params, input) = (params.clone(), xs.detach());
    let back = move |dout: Vec<f32>| {
        let gradient = with_values(&input, |xs| local_patch::backward(&params, &conv, saved, xs, &dout, None))?;
        Ok(vec![Some(gradient)])
    };
    Ok(graph::record(LOCAL_PATCH_INTERACTION, out, xs.shape(), &[&xs], back)?)
}

/// See [`LocalBlock`].
pub(in crate::ops) fn local_block(xs: &Tensor, params: &LocalBlock, pass: &Pass) -> Result<Tensor> {
    let conv = local_conv(LOCAL_BLOCK, xs, &params.interaction, pass.mode)?;
    let xs = xs.contiguous()?;
    let norm = NormValues::of(&params.norm)?;
    let (out, saved) = with_values(&xs, |xs| {
        let normed = layer_norm::forward(xs, &norm.norm());
        let scale = Some(&params.layer_scale);
        local_patch::forward(&params.interaction, &conv, &normed, scale, Some(xs), pass.mode)
    })?;
    let Some(saved) = saved.filter(|_| pass.record) else {
        return Ok(Tensor::from_vec(out, xs.shape(), xs.device())?);
    };
    let (params, input) = (params.clone(), xs.detach());
    let back = move |dout: Vec<f32>| {
        let gradient = with_values(&input, |xs| {
            let normed = layer_norm::forward(xs, &norm.norm());
            let scale = Some(&params.layer_scale);
            let mut gradient = local_patch::backward(&params.interaction, &conv, saved, &normed, &dout, scale)?;
            let (shift, scale) = layer_norm::backward(xs, &norm.norm(), &mut gradient, Some(&dout));
            deposit(&params.norm.bias, shift)?;
            deposit(&params.norm.weight, scale)?;
            Ok(gradient)
        })?;
        Ok(vec![Some(gradient)])
    };
    Ok(graph::record(LOCAL_BLOCK, out, xs.shape(), &[&xs], back)?)
}
