//! What a network's definition is run by: one definition computes, counts its cost, or becomes a graph for other programs.
//!
//! The networks of [`crate::models`] are written once, generic over an [`Interpreter`]. [`Pass`] computes tensors. Others follow the same
//! calls and see the blocks' parameters, but compute nothing.

use candle_core::Tensor;

use super::parameter::{Activation, BasicBlock, Bottleneck, ConvBn, Linear, MbConv, SqueezeExcite, Stem};
use super::{Pass, blocks};
use crate::Result;

/// Runs the blocks that networks are made of.
///
/// The blocks without an implementation here are primitive. The others are composed of these, for interpreters that gain nothing from
/// seeing them whole.
pub trait Interpreter {
    /// What passes from block to block: for [`Pass`] images `(B, H, W, C)` or rows `(B, F)`.
    type Value: Clone;

    /// Convolution, batch norm, the sum with `residual` if there is one, activation: [`crate::ops::conv_bn`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn conv_bn(
        &mut self,
        xs: &Self::Value,
        params: &ConvBn,
        residual: Option<&Self::Value>,
        act: Activation,
    ) -> Result<Self::Value>;

    /// 3x3 max pool of stride 2 with padding 1: [`crate::ops::max_pool`].
    ///
    /// # Errors
    /// As [`crate::ops::max_pool`].
    fn max_pool(&mut self, xs: &Self::Value) -> Result<Self::Value>;

    /// The mean over all pixels: [`crate::ops::global_average_pool`].
    ///
    /// # Errors
    /// As [`crate::ops::global_average_pool`].
    fn global_average_pool(&mut self, xs: &Self::Value) -> Result<Self::Value>;

    /// An affine map of rows: [`crate::ops::linear`].
    ///
    /// # Errors
    /// As [`crate::ops::linear`].
    fn linear(&mut self, xs: &Self::Value, params: &Linear, act: Activation) -> Result<Self::Value>;

    /// Each channel times a factor computed from the means of all: see [`SqueezeExcite`].
    ///
    /// # Errors
    /// `Error::Shape` for an image of other channels.
    fn squeeze_excite(&mut self, xs: &Self::Value, params: &SqueezeExcite) -> Result<Self::Value>;

    /// The first layers of a residual network: [`crate::ops::stem`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn stem(&mut self, xs: &Self::Value, params: &Stem) -> Result<Self::Value> {
        let xs = self.conv_bn(xs, &params.conv, None, Activation::Relu)?;
        self.max_pool(&xs)
    }

    /// Two 3x3 convolutions around a shortcut: [`crate::ops::basic_block`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn basic_block(&mut self, xs: &Self::Value, params: &BasicBlock) -> Result<Self::Value> {
        composed::basic_block(self, xs, params)
    }

    /// 1x1, 3x3 and 1x1 convolutions around a shortcut: [`crate::ops::bottleneck`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn bottleneck(&mut self, xs: &Self::Value, params: &Bottleneck) -> Result<Self::Value> {
        composed::bottleneck(self, xs, params)
    }

    /// The inverted residual block: [`crate::ops::mb_conv`].
    ///
    /// # Errors
    /// As [`crate::ops::conv_bn`].
    fn mb_conv(&mut self, xs: &Self::Value, params: &MbConv) -> Result<Self::Value> {
        composed::mb_conv(self, xs, params)
    }
}

/// Blocks out of primitive ones: what the whole blocks mean.
pub(super) mod composed {
    use super::{Activation, BasicBlock, Bottleneck, ConvBn, Interpreter, MbConv, Result};

    pub(in crate::ops) fn basic_block<I>(run: &mut I, xs: &I::Value, params: &BasicBlock) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let shortcut = shortcut(run, xs, params.downsample.as_ref())?;
        let xs = run.conv_bn(xs, &params.conv1, None, Activation::Relu)?;
        run.conv_bn(&xs, &params.conv2, Some(&shortcut), Activation::Relu)
    }

    pub(in crate::ops) fn bottleneck<I>(run: &mut I, xs: &I::Value, params: &Bottleneck) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let shortcut = shortcut(run, xs, params.downsample.as_ref())?;
        let xs = run.conv_bn(xs, &params.conv1, None, Activation::Relu)?;
        let xs = run.conv_bn(&xs, &params.conv2, None, Activation::Relu)?;
        run.conv_bn(&xs, &params.conv3, Some(&shortcut), Activation::Relu)
    }

    pub(in crate::ops) fn mb_conv<I>(run: &mut I, xs: &I::Value, params: &MbConv) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        let mut inner = xs.clone();
        if let Some(expand) = &params.expand {
            inner = run.conv_bn(&inner, expand, None, params.act)?;
        }
        inner = run.conv_bn(&inner, &params.depthwise, None, params.act)?;
        if let Some(squeeze_excite) = &params.squeeze_excite {
            inner = run.squeeze_excite(&inner, squeeze_excite)?;
        }
        run.conv_bn(&inner, &params.project, params.residual.then_some(xs), Activation::Identity)
    }

    fn shortcut<I>(run: &mut I, xs: &I::Value, downsample: Option<&ConvBn>) -> Result<I::Value>
    where
        I: Interpreter + ?Sized,
    {
        match downsample {
            Some(params) => run.conv_bn(xs, params, None, Activation::Identity),
            None => Ok(xs.clone()),
        }
    }
}

/// Computes, each block by the pass's engine.
impl Interpreter for Pass {
    type Value = Tensor;

    fn conv_bn(&mut self, xs: &Tensor, params: &ConvBn, residual: Option<&Tensor>, act: Activation) -> Result<Tensor> {
        blocks::conv_bn(xs, params, residual, act, self)
    }

    fn max_pool(&mut self, xs: &Tensor) -> Result<Tensor> {
        blocks::max_pool(xs, self)
    }

    fn global_average_pool(&mut self, xs: &Tensor) -> Result<Tensor> {
        blocks::global_average_pool(xs, self)
    }

    fn linear(&mut self, xs: &Tensor, params: &Linear, act: Activation) -> Result<Tensor> {
        blocks::linear(xs, params, act, self)
    }

    /// By itself, outside [`Interpreter::mb_conv`], it has no fused form.
    fn squeeze_excite(&mut self, xs: &Tensor, params: &SqueezeExcite) -> Result<Tensor> {
        super::reference::squeeze_excite(xs, params, self)
    }

    fn basic_block(&mut self, xs: &Tensor, params: &BasicBlock) -> Result<Tensor> {
        blocks::basic_block(xs, params, self)
    }

    fn bottleneck(&mut self, xs: &Tensor, params: &Bottleneck) -> Result<Tensor> {
        blocks::bottleneck(xs, params, self)
    }

    fn mb_conv(&mut self, xs: &Tensor, params: &MbConv) -> Result<Tensor> {
        blocks::mb_conv(xs, params, self)
    }
}
