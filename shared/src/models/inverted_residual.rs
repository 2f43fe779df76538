//! Declares the inverted residual blocks of `EfficientNet` and `MobileNetV3`, under timm's names of their tensors.
//!
//! Source: timm's `InvertedResidual` and `DepthwiseSeparableConv` (the block without expansion), `_efficientnet_blocks.py`.

use crate::Result;
use crate::ops::{Activation, Builder, ConvBn, Gate, Geometry, MbConv, Padding, SqueezeExcite};

/// `BN_EPS_TF_DEFAULT` of timm.
const TENSORFLOW_EPS: f64 = 1e-3;

/// The numbers of one block.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockConfig {
    /// Channels in.
    pub(super) inputs: usize,
    /// Channels of the depthwise convolution; none for the block without expansion, where these are `inputs`.
    pub(super) expanded: Option<usize>,
    /// Channels out.
    pub(super) outputs: usize,
    /// Side of the depthwise kernel.
    pub(super) kernel: usize,
    /// Stride of the depthwise convolution.
    pub(super) stride: usize,
    /// After the first two convolutions.
    pub(super) act: Activation,
    /// Squeeze-excite, if there is one.
    pub(super) squeeze: Option<Squeeze>,
    /// Padding and batch norm.
    pub(super) flavour: Flavour,
}

/// Where a network was first trained, which its padding and its batch norms show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flavour {
    /// Zeros on all sides alike, 1e-5 added to variances.
    PyTorch,
    /// `SAME` padding, 1e-3 added to variances.
    TensorFlow,
}

impl Flavour {
    /// Declares a convolution and its batch norm.
    ///
    /// # Errors
    /// A name that is taken, or a tensor operation that fails.
    pub(super) fn conv_bn(self, builder: &mut Builder, conv: &str, norm: &str, geometry: Geometry) -> Result<ConvBn> {
        match self {
            Self::PyTorch => builder.conv_bn(conv, norm, geometry),
            Self::TensorFlow => {
                let mut layer = builder.conv_bn(conv, norm, geometry.with_padding(Padding::Same))?;
                layer.norm.eps = TENSORFLOW_EPS;
                Ok(layer)
            }
        }
    }
}

/// The numbers of squeeze-excite.
#[derive(Debug, Clone, Copy)]
pub(super) struct Squeeze {
    /// Channels between its two layers.
    pub(super) channels: usize,
    /// Between its two layers.
    pub(super) act: Activation,
    /// After both.
    pub(super) gate: Gate,
}

impl BlockConfig {
    /// Declares the block's tensors below `name`.
    ///
    /// # Errors
    /// A name that is taken, or a tensor operation that fails.
    pub(super) fn build(self, builder: &mut Builder, name: &str) -> Result<MbConv> {
        let Self { inputs, expanded, outputs, kernel, stride, act, squeeze, flavour } = self;
        let mut layer = |conv: &str, norm: &str, geometry: Geometry| {
            flavour.conv_bn(builder, &format!("{name}.{conv}"), &format!("{name}.{norm}"), geometry)
        };
        let inner = expanded.unwrap_or(inputs);
        let wide = Geometry::depthwise(inner, kernel, stride);
        let narrow = Geometry::same(inner, outputs, 1, 1);
        let (expand, depthwise, project) = if expanded.is_some() {
            let expand = layer("conv_pw", "bn1", Geometry::same(inputs, inner, 1, 1))?;
            (Some(expand), layer("conv_dw", "bn2", wide)?, layer("conv_pwl", "bn3", narrow)?)
        } else {
            (None, layer("conv_dw", "bn1", wide)?, layer("conv_pw", "bn2", narrow)?)
        };
        let squeeze_excite = match squeeze {
            Some(Squeeze { channels, act, gate }) => Some(SqueezeExcite {
                reduce: builder.pointwise(&format!("{name}.se.conv_reduce"), inner, channels)?,
                expand: builder.pointwise(&format!("{name}.se.conv_expand"), channels, inner)?,
                act,
                gate,
            }),
            None => None,
        };
        Ok(MbConv { expand, depthwise, squeeze_excite, project, act, residual: stride == 1 && inputs == outputs })
    }
}
