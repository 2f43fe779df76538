//! What a backbone costs: the multiplications of one image, and the parameters.

use super::{Arch, Backbone};
use crate::Result;
use crate::ops::{Activation, Builder, ConvBn, Interpreter, Linear, Shape, SqueezeExcite};
use candle_core::Device;

/// What one image costs a backbone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Multiply-accumulate operations of convolutions and linear layers; shifts, norms, activations and pools are left out.
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
    let backbone = Backbone::new(&mut builder, arch)?;
    let parameters = builder.finish_zeroed().num_parameters() as u64;
    let mut counter = Counter::default();
    backbone.forward(&mut counter, &Shape::Image { channels: 3, height, width })?;
    Ok(Cost { multiply_accumulates: counter.multiply_accumulates, parameters })
}

/// Follows a network's definition and counts.
#[derive(Debug, Default)]
struct Counter {
    multiply_accumulates: u64,
}

impl Interpreter for Counter {
    type Value = Shape;

    fn conv_bn(&mut self, xs: &Shape, params: &ConvBn, _: Option<&Shape>, _: Activation) -> Result<Shape> {
        let geometry = params.conv.geometry;
        let ys = xs.convolved(&geometry)?;
        if let Shape::Image { channels, height, width } = ys {
            let taps = geometry.channels_per_group() * geometry.kernel * geometry.kernel;
            self.multiply_accumulates += (channels * height * width * taps) as u64;
        }
        Ok(ys)
    }

    fn max_pool(&mut self, xs: &Shape) -> Result<Shape> {
        xs.max_pooled()
    }

    fn global_average_pool(&mut self, xs: &Shape) -> Result<Shape> {
        xs.averaged()
    }

    fn linear(&mut self, xs: &Shape, params: &Linear, _: Activation) -> Result<Shape> {
        self.multiply_accumulates += params.weight.var().elem_count() as u64;
        xs.mapped(params)
    }

    fn squeeze_excite(&mut self, xs: &Shape, params: &SqueezeExcite) -> Result<Shape> {
        let means = self.global_average_pool(xs)?;
        let few = self.linear(&means, &params.reduce, params.act)?;
        self.linear(&few, &params.expand, Activation::Identity)?;
        Ok(*xs)
    }
}
