//! The projection heads that students are trained with.

use serde::{Deserialize, Serialize};

use super::{MlpConfig, MlpLayer};
use crate::ops::{Builder, HiddenLayer, ProjectionHead};
use crate::{Error, Result};

/// What a projection head is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadKind {
    /// One linear layer named `fc`: `MoCo` v1.
    Linear,
    /// Linear, `ReLU`, linear, named `fc.0` and `fc.2`: `MoCo` v2.
    #[default]
    Mlp,
    /// Linear, batch norm, `ReLU`, linear, named `projection_head.0`, `.1` and `.3`: `SwAV`.
    MlpBatchNorm,
}

impl HeadKind {
    /// What the names of a head's tensors begin with.
    pub(super) const NAMES: [&str; 2] = ["fc.", "projection_head."];

    /// Whether it is the usual kind, which records do not name.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A projection head.
///
/// # Source
/// Official `moco/builder.py` (`mlp`), and `src/resnet50.py` of `SwAV`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadConfig {
    /// Its layers.
    pub kind: HeadKind,
    /// Width between the two layers; 0 for a linear head, which has one.
    pub hidden: usize,
    /// `D`.
    pub embedding_dim: usize,
}

impl HeadConfig {
    /// A head of two layers without batch norm.
    pub const fn mlp(hidden: usize, embedding_dim: usize) -> Self {
        Self { kind: HeadKind::Mlp, hidden, embedding_dim }
    }

    /// Its layers, for features of a width.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a width is 0.
    pub fn layers(self, features: usize) -> Result<MlpConfig> {
        let Self { kind, hidden, embedding_dim } = self;
        let linear = |name: &str, inputs, outputs| MlpLayer::Linear { name: name.into(), inputs, outputs, bias: true };
        let layers = match kind {
            HeadKind::Linear => vec![linear("fc", features, embedding_dim)],
            HeadKind::Mlp => {
                vec![linear("fc.0", features, hidden), MlpLayer::Relu, linear("fc.2", hidden, embedding_dim)]
            }
            HeadKind::MlpBatchNorm => vec![
                linear("projection_head.0", features, hidden),
                MlpLayer::BatchNorm { name: "projection_head.1".into(), width: hidden, affine: true },
                MlpLayer::Relu,
                linear("projection_head.3", hidden, embedding_dim),
            ],
        };
        MlpConfig::new(layers).map_err(|why| Error::invalid(format!("the projection head makes no sense: {why}"), ""))
    }

    /// Declares its parameters.
    ///
    /// # Errors
    /// A tensor operation that fails.
    pub(super) fn declare(self, builder: &mut Builder, features: usize) -> Result<ProjectionHead> {
        let Self { kind, hidden, embedding_dim } = self;
        let (hidden, output) = match kind {
            HeadKind::Linear => (None, builder.linear("fc", features, embedding_dim)?),
            HeadKind::Mlp => {
                let linear = builder.linear("fc.0", features, hidden)?;
                (Some(HiddenLayer { linear, norm: None }), builder.linear("fc.2", hidden, embedding_dim)?)
            }
            HeadKind::MlpBatchNorm => {
                let linear = builder.linear("projection_head.0", features, hidden)?;
                let norm = Some(builder.batch_norm("projection_head.1", hidden)?);
                let output = builder.linear("projection_head.3", hidden, embedding_dim)?;
                (Some(HiddenLayer { linear, norm }), output)
            }
        };
        Ok(ProjectionHead { hidden, output })
    }
}

impl std::fmt::Display for HeadConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, hidden, embedding_dim } = self;
        match kind {
            HeadKind::Linear => write!(f, "one linear layer to {embedding_dim} features"),
            HeadKind::Mlp => write!(f, "{hidden} hidden and {embedding_dim} final features"),
            HeadKind::MlpBatchNorm => {
                write!(f, "{hidden} hidden features with batch norm and {embedding_dim} final ones")
            }
        }
    }
}
