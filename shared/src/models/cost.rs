//! What a backbone costs: the multiplications of one image, and the parameters.

use candle_core::Device;

use super::{Arch, Backbone, VitOptions};
use crate::Result;
use crate::ops::{
    Activation, BatchNorm, BiasedConv, Builder, Conv2d, ConvBn, FOURIER_CHANNELS, Interpreter, LayerNorm, Linear,
    LocalPatchInteraction, Parameter, PatchEmbedding, Shape, SqueezeExcite,
};

/// What one image costs a backbone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Multiply-accumulate operations of convolutions, linear layers and the products of attention; shifts, norms, activations and pools
    /// are left out.
    pub multiply_accumulates: u64,
    /// Trainable values.
    pub parameters: u64,
}

/// The cost of a backbone without a head, for one image of `[H, W]` pixels.
///
/// # Errors
/// [`crate::Error::Shape`] for an image that the network does not take.
///
/// # Source
/// Counted as fvcore's `FlopCountAnalysis` and the `GMACs` of timm's model cards count.
///
/// # Examples
/// ```
/// use shared::models::{Arch, cost};
///
/// let resnet18 = cost(Arch::ResNet18, [224, 224])?;
/// assert_eq!(resnet18.multiply_accumulates / 10_000_000, 181); // 1.81 billion
/// # Ok::<(), shared::Error>(())
/// ```
pub fn cost(arch: Arch, [height, width]: [usize; 2]) -> Result<Cost> {
    let mut builder = Builder::new(&Device::Cpu);
    let backbone = Backbone::new(&mut builder, arch, VitOptions::default())?;
    let parameters = builder.finish_zeroed().num_parameters() as u64;
    let mut counter = Counter::default();
    backbone.forward(&mut counter, &Shape::Image { channels: 3, height, width })?;
    Ok(Cost { multiply_accumulates: counter.multiply_accumulates, parameters })
}

/// About how many values of one image a training step keeps until its backward pass: the outputs of convolutions, before and
/// after their norms, of linear layers, layer norms and attention.
///
/// # Errors
/// As [`cost`].
pub fn kept_values(arch: Arch, [height, width]: [usize; 2]) -> Result<u64> {
    let mut builder = Builder::new(&Device::Cpu);
    let backbone = Backbone::new(&mut builder, arch, VitOptions::default())?;
    let mut counter = Counter::default();
    backbone.forward(&mut counter, &Shape::Image { channels: 3, height, width })?;
    Ok(counter.kept_values)
}

/// Follows a network's definition and counts.
#[derive(Debug, Default)]
struct Counter {
    multiply_accumulates: u64,
    kept_values: u64,
}

impl Counter {
    fn add(&mut self, multiply_accumulates: usize) {
        self.multiply_accumulates += multiply_accumulates as u64;
    }

    fn keep(&mut self, xs: &Shape) {
        self.kept_values += (xs.channels() * xs.positions()) as u64;
    }

    fn convolution(&mut self, xs: Shape, params: &Conv2d) -> Result<Shape> {
        let geometry = params.geometry;
        let ys = xs.convolved(&geometry)?;
        self.keep(&ys);
        self.add(ys.channels() * ys.positions() * geometry.channels_per_group() * geometry.kernel * geometry.kernel);
        Ok(ys)
    }

    fn biased(&mut self, xs: Shape, params: &BiasedConv) -> Result<Shape> {
        self.convolution(xs, &params.conv)
    }
}

impl Interpreter for Counter {
    type Value = Shape;

    fn conv_bn(&mut self, xs: &Shape, params: &ConvBn, _: Option<&Shape>, _: Activation) -> Result<Shape> {
        let ys = self.convolution(*xs, &params.conv)?;
        self.keep(&ys);
        Ok(ys)
    }

    fn max_pool(&mut self, xs: &Shape) -> Result<Shape> {
        xs.max_pooled()
    }

    fn global_average_pool(&mut self, xs: &Shape) -> Result<Shape> {
        xs.averaged()
    }

    fn linear(&mut self, xs: &Shape, params: &Linear, _: Activation) -> Result<Shape> {
        self.add(xs.positions() * params.weight.var().elem_count());
        let ys = xs.mapped(params)?;
        self.keep(&ys);
        Ok(ys)
    }

    fn batch_norm_rows(&mut self, xs: &Shape, _: &BatchNorm, _: Activation) -> Result<Shape> {
        Ok(*xs)
    }

    fn squeeze_excite(&mut self, xs: &Shape, params: &SqueezeExcite) -> Result<Shape> {
        let means = self.global_average_pool(xs)?;
        let few = self.linear(&means, &params.reduce, params.act)?;
        self.linear(&few, &params.expand, Activation::Identity)?;
        Ok(*xs)
    }

    fn embed_patches(&mut self, xs: &Shape, params: &PatchEmbedding) -> Result<Shape> {
        xs.patches(params)?;
        Ok(self.biased(*xs, &params.projection)?.with_first_token())
    }

    fn add_fourier_positions(&mut self, xs: &Shape, params: &Linear) -> Result<Shape> {
        let positions = self.linear(&xs.with_channels(FOURIER_CHANNELS), params, Activation::Identity)?;
        self.add_branch(xs, &positions, None)
    }

    fn layer_norm(&mut self, xs: &Shape, _: &LayerNorm) -> Result<Shape> {
        self.keep(xs);
        Ok(*xs)
    }

    /// Queries with keys, weights with values.
    fn attention(&mut self, qkv: &Shape, heads: usize) -> Result<Shape> {
        let ys = qkv.attended(heads)?;
        self.keep(&ys);
        self.kept_values += (heads * ys.positions() * ys.positions()) as u64;
        self.add(2 * ys.positions() * ys.positions() * ys.channels());
        Ok(ys)
    }

    fn cross_covariance_attention(&mut self, qkv: &Shape, temperature: &Parameter) -> Result<Shape> {
        let heads = temperature.var().elem_count();
        let ys = qkv.attended(heads)?;
        self.keep(&ys);
        self.add(2 * ys.positions() * ys.channels() * (ys.channels() / heads));
        Ok(ys)
    }

    fn class_attention(&mut self, query: &Shape, keys: &Shape, _: &Shape, _: usize) -> Result<Shape> {
        self.add(2 * keys.positions() * keys.channels());
        Ok(*query)
    }

    fn local_patch_interaction(&mut self, xs: &Shape, params: &LocalPatchInteraction) -> Result<Shape> {
        let xs = self.biased(*xs, &params.conv1)?;
        self.biased(xs, &params.conv2)
    }

    fn prepend_token(&mut self, xs: &Shape, _: &Parameter) -> Result<Shape> {
        Ok(xs.with_first_token())
    }

    fn first_token(&mut self, xs: &Shape) -> Result<Shape> {
        Ok(Shape::Row { channels: xs.channels() })
    }

    fn replace_first_token(&mut self, xs: &Shape, _: &Shape) -> Result<Shape> {
        Ok(*xs)
    }

    fn add_branch(&mut self, xs: &Shape, branch: &Shape, _: Option<&Parameter>) -> Result<Shape> {
        branch.expect("add_branch", *xs)?;
        Ok(*xs)
    }
}
