//! The shape of what passes from block to block, for interpreters that compute nothing.

use super::{Geometry, Linear, PatchEmbedding};
use crate::{Error, Result};

/// The shape of one sample of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// An image of features, or a grid of tokens.
    Image {
        /// `C`.
        channels: usize,
        /// `H`, in pixels.
        height: usize,
        /// `W`, in pixels.
        width: usize,
    },
    /// Tokens without places.
    Tokens {
        /// `N`.
        count: usize,
        /// `C`.
        channels: usize,
    },
    /// A row of features.
    Row {
        /// `F`.
        channels: usize,
    },
}

impl Shape {
    /// Numbers of a pixel, a token or the row.
    pub fn channels(self) -> usize {
        match self {
            Self::Image { channels, .. } | Self::Tokens { channels, .. } | Self::Row { channels } => channels,
        }
    }

    /// The same shape of other channels.
    #[must_use]
    pub fn with_channels(self, channels: usize) -> Self {
        match self {
            Self::Image { height, width, .. } => Self::Image { channels, height, width },
            Self::Tokens { count, .. } => Self::Tokens { count, channels },
            Self::Row { .. } => Self::Row { channels },
        }
    }

    /// Pixels or tokens; a row is one.
    pub fn positions(self) -> usize {
        match self {
            Self::Image { height, width, .. } => height * width,
            Self::Tokens { count, .. } => count,
            Self::Row { .. } => 1,
        }
    }

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
            Self::Image { channels, .. } => Ok(Self::Row { channels }),
            _ => Err(self.error("global_average_pool", "(H, W, C)")),
        }
    }

    /// Behind an affine map of each pixel or token.
    ///
    /// # Errors
    /// [`Error::Shape`] for other channels.
    pub fn mapped(self, params: &Linear) -> Result<Self> {
        let (inputs, outputs) = params.weight.var().dims2()?;
        if self.channels() == inputs {
            return Ok(self.with_channels(outputs));
        }
        Err(self.error("linear", format!("(.., {inputs})")))
    }

    /// The grid of an image's patches.
    ///
    /// # Errors
    /// [`Error::Shape`] for no image, other channels, or a side that is no multiple of a patch's.
    pub fn patches(self, params: &PatchEmbedding) -> Result<Self> {
        let geometry = params.projection.conv.geometry;
        let patch = geometry.kernel;
        match self {
            Self::Image { height, width, .. } if height.is_multiple_of(patch) && width.is_multiple_of(patch) => {
                self.convolved(&geometry)
            }
            _ => {
                let expected = format!("(H, W, {}) with H and W multiples of {patch} pixels", geometry.in_channels);
                Err(self.error("embed_patches", expected))
            }
        }
    }

    /// Behind attention, which makes one of queries, keys and values.
    ///
    /// # Errors
    /// [`Error::Shape`] for a row, or when three times `heads` does not divide the channels.
    pub fn attended(self, heads: usize) -> Result<Self> {
        let channels = self.channels();
        if matches!(self, Self::Row { .. }) || heads == 0 || !channels.is_multiple_of(3 * heads) {
            return Err(self.error("attention", format!("(N, C) with C a multiple of {}", 3 * heads)));
        }
        Ok(self.with_channels(channels / 3))
    }

    /// With one more token, the places of the others forgotten.
    #[must_use]
    pub fn with_first_token(self) -> Self {
        Self::Tokens { count: 1 + self.positions(), channels: self.channels() }
    }

    /// Checks that two are equal.
    ///
    /// # Errors
    /// [`Error::Shape`] about `self`.
    pub fn expect(self, op: &'static str, expected: Self) -> Result<()> {
        if self == expected { Ok(()) } else { Err(self.error(op, expected.to_string())) }
    }

    /// An [`Error::Shape`] about this one.
    pub fn error(self, op: &'static str, expected: impl Into<String>) -> Error {
        Error::Shape { op, expected: expected.into(), got: self.to_string() }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image { channels, height, width } => write!(f, "({height}, {width}, {channels})"),
            Self::Tokens { count, channels } => write!(f, "({count}, {channels})"),
            Self::Row { channels } => write!(f, "({channels})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: Shape = Shape::Image { channels: 8, height: 9, width: 4 };
    const ROW: Shape = Shape::Row { channels: 8 };

    fn refused(result: Result<Shape>) -> String {
        match result.unwrap_err() {
            Error::Shape { op, expected, got } => format!("{op}: {expected}, {got}"),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn sides_and_channels_follow_the_blocks() {
        let strided = Geometry::same(8, 16, 3, 2);
        assert_eq!(IMAGE.convolved(&strided).unwrap(), Shape::Image { channels: 16, height: 5, width: 2 });
        assert_eq!(IMAGE.max_pooled().unwrap(), Shape::Image { channels: 8, height: 5, width: 2 });
        assert_eq!(IMAGE.averaged().unwrap(), ROW);
        assert_eq!(IMAGE.with_first_token(), Shape::Tokens { count: 37, channels: 8 });
        let tokens = Shape::Tokens { count: 37, channels: 24 };
        assert_eq!(tokens.attended(4).unwrap(), IMAGE.with_first_token());
        assert_eq!((tokens.positions(), ROW.positions()), (37, 1));
    }

    #[test]
    fn what_does_not_fit_is_told_with_both_shapes() {
        assert_eq!(refused(IMAGE.convolved(&Geometry::same(3, 16, 3, 2))), "convolution: (H, W, 3), (9, 4, 8)");
        assert_eq!(refused(ROW.averaged()), "global_average_pool: (H, W, C), (8)");
        assert_eq!(refused(ROW.max_pooled()), "max_pool: (H, W, C), (8)");
        let tokens = IMAGE.with_first_token();
        assert_eq!(refused(tokens.attended(3)), "attention: (N, C) with C a multiple of 9, (37, 8)");
        assert_eq!(refused(ROW.expect("add_branch", IMAGE).map(|()| ROW)), "add_branch: (9, 4, 8), (8)");
    }
}
