//! How a teacher was trained, and how its files tell it.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::head::Site;
use super::prefixes::{Names, Place};
use crate::error::{Error, Result};
use crate::models::{MlpConfig, MlpLayer};

/// How a teacher was trained, as far as it decides what its final embedding is.
///
/// The head is read from the file whatever the method is; the method says which head, and that there must be one. Its rows are
/// made unit length afterwards. Every method with a head does so in its loss, but Barlow Twins and `VICReg`.
///
/// # Source
/// The official code of each method: facebookresearch/moco and moco-v3 `moco/builder.py`, swav `src/resnet50.py`, dino
/// `vision_transformer.py` (`DINOHead`), barlowtwins `main.py`, vicreg `main_vicreg.py`. The code of `SimCLR` and BYOL is not in
/// `PyTorch`: sthalles/SimCLR, Spijkervet/SimCLR, sthalles/PyTorch-BYOL, lucidrains/byol-pytorch and lightly stand for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// `MoCo` v2: the output of the query encoder's head (`fc`: linear, `ReLU`, linear).
    MocoV2,
    /// `MoCo` v1: the output of the query encoder's one linear layer (`fc`).
    MocoV1,
    /// `MoCo` v3: the output of the base encoder's projector (`fc` or `head`), before the predictor. Of a vision transformer without
    /// a head, the pooled feature.
    MocoV3,
    /// `SwAV`: the output of `projection_head`, before the prototypes.
    Swav,
    /// DeepCluster-v2: as `swav`.
    #[serde(rename = "deepcluster-v2")]
    #[value(name = "deepcluster-v2")]
    DeepClusterV2,
    /// SeLa-v2: as `swav`.
    #[serde(rename = "sela-v2")]
    #[value(name = "sela-v2")]
    SelaV2,
    /// DINO: the output of `head.mlp`, before `last_layer`; of a file without a head, the pooled feature. A vision transformer
    /// resamples its positions as DINO does.
    Dino,
    /// `SimCLR`: the output of the projection head.
    #[serde(rename = "simclr")]
    #[value(name = "simclr")]
    SimClr,
    /// BYOL: the output of the online network's projector, before the predictor.
    Byol,
    /// Barlow Twins: the output of the projector, before the batch norm of the loss.
    BarlowTwins,
    /// `VICReg`: the output of the projector (the expander).
    #[serde(rename = "vicreg")]
    #[value(name = "vicreg")]
    VicReg,
    /// A classifier (`fc`, `classifier` or `head`): the pooled feature before it.
    Supervised,
    /// The pooled feature, whatever else the file holds.
    Backbone,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 13] = [
        Self::MocoV2,
        Self::MocoV1,
        Self::MocoV3,
        Self::Swav,
        Self::DeepClusterV2,
        Self::SelaV2,
        Self::Dino,
        Self::SimClr,
        Self::Byol,
        Self::BarlowTwins,
        Self::VicReg,
        Self::Supervised,
        Self::Backbone,
    ];

    /// The name in flags and files: `moco-v2`.
    pub fn name(self) -> &'static str {
        match self {
            Self::MocoV2 => "moco-v2",
            Self::MocoV1 => "moco-v1",
            Self::MocoV3 => "moco-v3",
            Self::Swav => "swav",
            Self::DeepClusterV2 => "deepcluster-v2",
            Self::SelaV2 => "sela-v2",
            Self::Dino => "dino",
            Self::SimClr => "simclr",
            Self::Byol => "byol",
            Self::BarlowTwins => "barlow-twins",
            Self::VicReg => "vicreg",
            Self::Supervised => "supervised",
            Self::Backbone => "backbone",
        }
    }

    /// Whether the embedding is the pooled feature.
    pub(super) fn is_headless(self) -> bool {
        matches!(self, Self::Supervised | Self::Backbone)
    }

    /// Where the official code puts the head: named as missing when a file has none.
    pub(super) fn usual_head(self) -> &'static str {
        match self {
            Self::MocoV1 => "fc.weight",
            Self::MocoV2 | Self::MocoV3 => "fc.0.weight",
            Self::Swav | Self::DeepClusterV2 | Self::SelaV2 => "projection_head.0.weight",
            Self::Dino => "head.mlp.0.weight",
            _ => "projector.0.weight",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::usage(format!("`{name}` is no known method, these are: {known}"))
        })
    }
}

/// Words in the names of `MoCo` v3.
const V3: &[&str] = &["base_encoder", "momentum_encoder"];

/// What the names and shapes of a file say about the method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) method: Method,
    /// The method that trained the network: another where the file has no head, so that the embedding is the feature.
    pub(super) trained_by: Method,
    /// Methods whose files look the same, and whose embeddings are the same.
    pub(super) alike: &'static [Method],
}

/// Tells the method by the head and by words that occur in the names.
pub(super) fn tell(names: &Names<'_>, place: &Place, projection: Option<&Site>, classifier: Option<&Site>) -> Told {
    let told = |method| Told { method, trained_by: method, alike: &[] };
    let words = Words::of(names);
    let of_moco = words.any(&["encoder_q", "encoder_k", "queue", "query"]);
    let Some((site, head)) = projection.and_then(|site| Some((site, site.head.as_ref().ok()?))) else {
        let in_encoder = classifier.is_some_and(|site| site.prefix.starts_with(&place.prefix));
        return match classifier {
            Some(_) if of_moco && in_encoder => told(Method::MocoV1),
            Some(_) => told(Method::Supervised),
            None if words.any(V3) => Told { trained_by: Method::MocoV3, ..told(Method::Backbone) },
            None => told(Method::Backbone),
        };
    };
    if site.is_dino(names) {
        return told(Method::Dino);
    }
    if words.any(&["prototypes"]) {
        // One layer of prototypes is SwAV's. Several heads of them are what the other two use, and look the same.
        let several = words.of_level_after("prototypes", "prototypes");
        let alike = &[Method::SelaV2][..];
        return if several { Told { alike, ..told(Method::DeepClusterV2) } } else { told(Method::Swav) };
    }
    if of_moco {
        return told(Method::MocoV2);
    }
    if words.any(V3) {
        return told(Method::MocoV3);
    }
    let byol =
        ["online_encoder", "online_network", "online_predictor", "target_encoder", "target_network", "projetion"];
    if words.any(&byol) || words.any(&["predictor", "prediction_head"]) {
        return told(Method::Byol);
    }
    if words.any(&["momentum_backbone", "backbone_momentum"]) {
        return told(Method::MocoV2);
    }
    by_layers(site, head, place)
}

/// Tells the method by the layers of the head and its place alone.
fn by_layers(site: &Site, head: &MlpConfig, place: &Place) -> Told {
    let biases: Vec<bool> = head
        .layers()
        .iter()
        .filter_map(|layer| if let MlpLayer::Linear { bias, .. } = layer { Some(*bias) } else { None })
        .collect();
    let norms = head.layers().iter().filter(|layer| matches!(layer, MlpLayer::BatchNorm { .. })).count();
    let in_encoder = site.prefix.starts_with(&place.prefix) && ["fc", "head"].contains(&site.name);
    let told = |method, alike| Told { method, trained_by: method, alike };
    match (biases.as_slice(), norms) {
        // SwAV without its prototypes: the only method that has `projection_head` within the network.
        (_, 1..) if site.name == "projection_head" && site.prefix.starts_with(&place.prefix) => {
            told(Method::Swav, &[Method::DeepClusterV2, Method::SelaV2])
        }
        (_, 1..) if in_encoder => told(Method::MocoV3, &[]),
        (_, 0) if in_encoder && !place.prefix.ends_with("backbone.") => told(Method::MocoV2, &[Method::SimClr]),
        (_, 0) if in_encoder => told(Method::SimClr, &[Method::MocoV2]),
        ([false, .., false], 1..) if biases.len() > 2 && norms < biases.len() => told(Method::BarlowTwins, &[]),
        ([true, .., false], 1..) => told(Method::VicReg, &[]),
        // lightly gives a bias to the last layer of both.
        ([false, .., true], 1..) if biases.len() > 2 => told(Method::BarlowTwins, &[Method::VicReg]),
        (_, 1..) => told(Method::SimClr, &[Method::Byol]),
        _ => told(Method::SimClr, &[]),
    }
}

/// The words between dots that occur in the names of a file.
struct Words<'a> {
    single: BTreeSet<&'a str>,
    pairs: BTreeSet<(&'a str, &'a str)>,
}

impl<'a> Words<'a> {
    fn of(names: &Names<'a>) -> Self {
        let mut words = Self { single: BTreeSet::new(), pairs: BTreeSet::new() };
        for (name, _) in names.iter() {
            let mut before = None;
            for word in name.split('.').take(super::MAX_WORDS) {
                words.single.insert(word);
                words.pairs.extend(before.map(|before| (before, word)));
                before = Some(word);
            }
        }
        words
    }

    fn any(&self, wanted: &[&str]) -> bool {
        wanted.iter().any(|word| self.single.contains(word))
    }

    /// Whether a word that begins with `start` and goes on follows `before`.
    fn of_level_after(&self, before: &str, start: &str) -> bool {
        let follows = |pair: &&(&str, &str)| pair.0 == before && pair.1.starts_with(start) && pair.1 != start;
        self.pairs.iter().any(|pair| follows(&pair))
    }
}
