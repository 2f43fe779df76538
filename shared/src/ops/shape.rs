//! The shape of what passes from block to block, for interpreters that compute nothing.

use super::{Geometry, Linear, PatchEmbedding};
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
    /// Tokens whose places on a grid no longer matter; before that they are the pixels of an image.
    Tokens {
        /// `N`.
        count: usize,
        /// `C`.
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
            _ => Err(self.error("max_pool", "(H, W, C)")),
        }
    }

    /// Behind the mean over all pixels.
    ///
    /// # Errors
    /// [`Error::Shape`] for no image.
    pub fn averaged(self) -> Result<Self> {
        match self {
            Self::Image { channels, .. } => Ok(Self::Row { width: channels }),
            _ => Err(self.error("global_average_pool", "(H, W, C)")),
        }
    }

    /// Behind an affine map of rows, of each token, or of each pixel.
    ///
    /// # Errors
    /// [`Error::Shape`] for another width.
    pub fn mapped(self, params: &Linear) -> Result<Self> {
        let (inputs, outputs) = params.weight.var().dims2()?;
        self.expect_width("linear", inputs)?;
        Ok(self.with_width(outputs))
    }

    /// Behind an embedding of patches and a class token.
    ///
    /// # Errors
    /// [`Error::Shape`] for no image, or one that cannot be cut into whole patches.
    pub fn embedded(self, params: &PatchEmbedding) -> Result<Self> {
        let patch = params.projection.conv.geometry.kernel;
        match (self, self.convolved(&params.projection.conv.geometry)) {
            (Self::Image { height, width, .. }, Ok(Self::Image { channels, height: rows, width: columns }))
                if height.is_multiple_of(patch) && width.is_multiple_of(patch) =>
            {
                Ok(Self::Tokens { count: 1 + rows * columns, width: channels })
            }
            _ => Err(self.error("embed_patches", format!("(H, W, 3) with H and W multiples of {patch} pixels"))),
        }
    }

    /// Rows, tokens or pixels: how many, and their width.
    pub fn rows(self) -> (usize, usize) {
        match self {
            Self::Image { channels, height, width } => (height * width, channels),
            Self::Tokens { count, width } => (count, width),
            Self::Row { width } => (1, width),
        }
    }

    /// The same with rows, tokens or pixels of another width.
    #[must_use]
    pub fn with_width(self, new: usize) -> Self {
        match self {
            Self::Image { height, width, .. } => Self::Image { channels: new, height, width },
            Self::Tokens { count, .. } => Self::Tokens { count, width: new },
            Self::Row { .. } => Self::Row { width: new },
        }
    }

    /// Checks the width of rows, tokens or pixels.
    ///
    /// # Errors
    /// [`Error::Shape`] for another one.
    pub fn expect_width(self, op: &'static str, expected: usize) -> Result<()> {
        if self.rows().1 == expected { Ok(()) } else { Err(self.error(op, format!("(.., {expected})"))) }
    }

    /// An [`Error::Shape`] about this one.
    pub fn error(self, op: &'static str, expected: impl Into<String>) -> Error {
        let got = match self {
            Self::Image { channels, height, width } => format!("({height}, {width}, {channels})"),
            Self::Tokens { count, width } => format!("({count}, {width})"),
            Self::Row { width } => format!("({width})"),
        };
        Error::Shape { op, expected: expected.into(), got }
    }
}
