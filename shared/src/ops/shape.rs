//! The shape of what passes from block to block, for interpreters that compute nothing.

use super::{Geometry, Linear};
use crate::{Error, Result};

/// The shape of one sample of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// An image of features.
    Image {
        /// `C`.
        channels: usize,
        /// `H`, in pixels.
        height: usize,
        /// `W`, in pixels.
        width: usize,
    },
    /// A row of features.
    Row {
        /// `F`.
        width: usize,
    },
}

impl Shape {
    /// Behind a convolution.
    ///
    /// # Errors
    /// [`Error::Shape`] for no image, other channels, or an image smaller than the kernel.
    pub fn convolved(self, geometry: &Geometry) -> Result<Self> {
        match self {
            Self::Image { channels, height, width }
                if channels == geometry.in_channels && geometry.fits(height, width) =>
            {
                Ok(Self::Image {
                    channels: geometry.out_channels,
                    height: geometry.output_side(height),
                    width: geometry.output_side(width),
                })
            }
            _ => Err(self.error("convolution", format!("(H, W, {})", geometry.in_channels))),
        }
    }

    /// Behind the 3x3 max pool of stride 2.
    ///
    /// # Errors
    /// [`Error::Shape`] for no image.
    pub fn max_pooled(self) -> Result<Self> {
        match self {
            Self::Image { channels, height, width } => {
                Ok(Self::Image { channels, height: height.div_ceil(2), width: width.div_ceil(2) })
            }
            Self::Row { .. } => Err(self.error("max_pool", "(H, W, C)")),
        }
    }

    /// Behind the mean over all pixels.
    ///
    /// # Errors
    /// [`Error::Shape`] for no image.
    pub fn averaged(self) -> Result<Self> {
        match self {
            Self::Image { channels, .. } => Ok(Self::Row { width: channels }),
            Self::Row { .. } => Err(self.error("global_average_pool", "(H, W, C)")),
        }
    }

    /// Behind an affine map of rows.
    ///
    /// # Errors
    /// [`Error::Shape`] for no row, or one of another width.
    pub fn mapped(self, params: &Linear) -> Result<Self> {
        let (inputs, outputs) = params.weight.var().dims2()?;
        if self == (Self::Row { width: inputs }) {
            return Ok(Self::Row { width: outputs });
        }
        Err(self.error("linear", format!("({inputs})")))
    }

    /// An [`Error::Shape`] about this one.
    pub fn error(self, op: &'static str, expected: impl Into<String>) -> Error {
        let got = match self {
            Self::Image { channels, height, width } => format!("({height}, {width}, {channels})"),
            Self::Row { width } => format!("({width})"),
        };
        Error::Shape { op, expected: expected.into(), got }
    }
}
