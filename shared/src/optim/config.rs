//! The constants of an optimiser, and which parameters weight decay spares.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Parameters of transformers that have axes but are no weights of a map: tables of positions and learnt tokens.
const TOKENS: [&str; 3] = ["pos_embed", "cls_token", "dist_token"];

/// How gradients become steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Stochastic gradient descent with momentum, as `torch.optim.SGD` without dampening: `g = gradient + weight_decay * p`,
    /// `buffer = momentum * buffer + g` (the first time `buffer = g`), `p -= lr * buffer`.
    ///
    /// # Source
    /// The algorithm box of `torch.optim.SGD`, `PyTorch` 2.
    Sgd {
        /// What remains of the previous step.
        momentum: f64,
        /// `p -= lr * (g + momentum * buffer)` instead.
        nesterov: bool,
    },
    /// Layer-wise adaptive rates for large batches: `g` of SGD is multiplied by `trust_coefficient * |p| / |g|`, and by 1
    /// where a norm is 0. Parameters without decay are not adapted either.
    ///
    /// # Source
    /// You et al., arXiv 1708.03888; the form is that of facebookresearch/moco-v3, `moco/optimizer.py`, and of the official
    /// codes of `SimCLR` and Barlow Twins.
    Lars {
        /// What remains of the previous step.
        momentum: f64,
        /// Length of a step relative to the parameter's, at rate 1.
        trust_coefficient: f64,
    },
    /// Layer-wise adaptive rates as NVIDIA's apex wraps them around SGD, without clipping: `g` of SGD is multiplied by
    /// `trust_coefficient * |p| / (|gradient| + weight_decay * |p| + 1e-8)` on all parameters. Where a norm is 0 the
    /// gradient stays as it is, without decay.
    ///
    /// # Source
    /// NVIDIA/apex, `apex/parallel/LARC.py`, with `clip=False`, as `SwAV` uses it (arXiv 2006.09882, `main_swav.py`).
    Larc {
        /// What remains of the previous step.
        momentum: f64,
        /// As in SGD.
        nesterov: bool,
        /// Length of a step relative to the parameter's, at rate 1.
        trust_coefficient: f64,
    },
    /// Adam with decoupled weight decay; see [`crate::ops::adamw_in_place`].
    ///
    /// # Source
    /// Loshchilov and Hutter, arXiv 1711.05101; `torch.optim.AdamW`.
    AdamW {
        /// What the mean of the gradients keeps of itself.
        beta1: f64,
        /// What the mean of their squares keeps of itself.
        beta2: f64,
        /// Added to the divisor.
        epsilon: f64,
    },
}

impl Rule {
    /// The name, which stands before the state in a checkpoint too.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sgd { .. } => "sgd",
            Self::Lars { .. } => "lars",
            Self::Larc { .. } => "larc",
            Self::AdamW { .. } => "adamw",
        }
    }

    /// Values that are kept for each value of a parameter.
    pub fn buffers(&self) -> u64 {
        match self {
            Self::Sgd { .. } | Self::Lars { .. } | Self::Larc { .. } => 1,
            Self::AdamW { .. } => 2,
        }
    }
}

/// Parameters that weight decay leaves alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum NoDecay {
    /// None: all decay, as in the official code
    #[default]
    None,
    /// Biases and the parameters of norms: all with one axis, position embeddings and class tokens too
    NormAndBias,
}

impl NoDecay {
    /// Whether a parameter is spared.
    ///
    /// # Source
    /// timm 1.0, `param_groups_weight_decay` and its models' `no_weight_decay`.
    pub fn spares(self, name: &str, rank: usize) -> bool {
        match self {
            Self::None => false,
            Self::NormAndBias => rank <= 1 || name.rsplit('.').next().is_some_and(|last| TOKENS.contains(&last)),
        }
    }
}

/// An optimiser's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerConfig {
    /// How gradients become steps.
    pub rule: Rule,
    /// Pull of every parameter towards 0.
    pub weight_decay: f64,
    /// Parameters without it.
    pub no_decay: NoDecay,
}

impl OptimizerConfig {
    /// SGD with decay on all parameters: the official code's.
    pub fn sgd(momentum: f64, weight_decay: f64) -> Self {
        Self { rule: Rule::Sgd { momentum, nesterov: false }, weight_decay, no_decay: NoDecay::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_biases_positions_and_tokens_are_spared() {
        let spared = |name, rank| NoDecay::NormAndBias.spares(name, rank);
        assert!(spared("bn1.weight", 1) && spared("fc.0.bias", 1) && spared("pos_embed", 3) && spared("cls_token", 3));
        assert!(!spared("conv1.weight", 4) && !spared("fc.0.weight", 2));
        // XCiT makes its positions by a convolution, which is a map.
        assert!(!spared("pos_embed.token_projection.weight", 4));
        assert!(!NoDecay::None.spares("bn1.weight", 1));
    }
}
