//! Where in a file a network is: the prefix before its names, and what its names stand for.
//!
//! Training programs wrap networks in others, so that a name is `module.encoder_q.conv1.weight`, and some number the layers
//! of a residual network instead of naming them; torchvision numbers those of an EfficientNet, which timm names. A place is
//! found by looking for the convolution that every network begins with.

use std::collections::BTreeMap;
use std::ops::Bound;

/// The first layer of the networks known here.
const STEMS: &[&str] = &["conv1.weight", "conv_stem.weight", "patch_embed.proj.weight", "patch_embed.proj.0.0.weight"];
/// The first layer of a residual network whose layers are numbered.
const NUMBERED_STEM: &str = "0.weight";
/// What `nn.Sequential(*resnet.children())` calls the layers of a residual network.
const NUMBERED_LAYERS: &[(&str, &str)] =
    &[("0.", "conv1."), ("1.", "bn1."), ("4.", "layer1."), ("5.", "layer2."), ("6.", "layer3."), ("7.", "layer4.")];
/// What the official code of `XCiT` and its checkpoints call the positions, and what timm does.
const XCIT_POSITIONS: (&str, &str) = ("pos_embeder.", "pos_embed.");
/// One layer in the class attention of the official code, and the three of timm that it stands for, in the order of their rows.
const XCIT_CLASS_ATTENTION: (&str, &str, [&str; 3]) =
    ("cls_attn_blocks.", ".attn.qkv.", [".attn.q.", ".attn.k.", ".attn.v."]);
/// The first layer of torchvision's EfficientNet.
const FEATURES_STEM: &str = "features.0.0.weight";
/// What torchvision and timm call the layers of an EfficientNet outside its blocks.
const FEATURES_LAYERS: &[(&str, &str)] =
    &[("0.0.", "conv_stem."), ("0.1.", "bn1."), ("8.0.", "conv_head."), ("8.1.", "bn2.")];
/// What they call the layers of its first block, which does not widen.
const DEPTHWISE_LAYERS: &[(&str, &str)] = &[
    ("0.0.", "conv_dw."),
    ("0.1.", "bn1."),
    ("1.fc1.", "se.conv_reduce."),
    ("1.fc2.", "se.conv_expand."),
    ("2.0.", "conv_pw."),
    ("2.1.", "bn2."),
];
/// What they call the layers of its other blocks.
const INVERTED_LAYERS: &[(&str, &str)] = &[
    ("0.0.", "conv_pw."),
    ("0.1.", "bn1."),
    ("1.0.", "conv_dw."),
    ("1.1.", "bn2."),
    ("2.fc1.", "se.conv_reduce."),
    ("2.fc2.", "se.conv_expand."),
    ("3.0.", "conv_pwl."),
    ("3.1.", "bn3."),
];
/// Words before the network that is to be taken, the likeliest first.
const PREFERRED: &[&str] = &[
    "encoder_q",
    "base_encoder",
    "query",
    "online_network",
    "online_encoder",
    "teacher",
    "student",
    "backbone",
    "encoder",
    "trunk",
    "model",
];
/// Words before a copy that is needed only to go on training, and what it is.
pub(super) const COPIES: &[(&str, &str)] = &[
    ("encoder_k", "key encoder"),
    ("key", "key encoder"),
    ("momentum_encoder", "momentum encoder"),
    ("momentum_backbone", "momentum encoder"),
    ("momentum_projector", "momentum encoder"),
    ("backbone_momentum", "momentum encoder"),
    ("projection_head_momentum", "momentum encoder"),
    ("target_encoder", "target network"),
    ("target_network", "target network"),
    ("ema", "moving average"),
];
/// Most places where a network is looked for.
const MAX_PLACES: usize = 16;

/// Names and shapes of a file's tensors, sorted by name.
#[derive(Debug)]
pub(super) struct Names<'a>(BTreeMap<&'a str, &'a [usize]>);

impl<'a> Names<'a> {
    pub(super) fn new(entries: &'a [(String, Vec<usize>)]) -> Self {
        Self(entries.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a str, &'a [usize])> {
        self.0.iter().map(|(name, shape)| (*name, *shape))
    }

    /// The tensors under a prefix, and what is left of their names.
    pub(super) fn under<'b>(&'b self, prefix: &'b str) -> impl Iterator<Item = (&'a str, &'a [usize])> + 'b {
        let from = self.0.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        from.map_while(move |(name, shape)| Some((name.strip_prefix(prefix)?, *shape)))
    }
}

/// How the tensors of a network are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// As torchvision and timm name them.
    Usual,
    /// By the number of the layer.
    Numbered,
    /// By the number of the stage, as torchvision's `EfficientNet`s.
    Features,
}

/// A tensor of a network in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    /// Its name in the file.
    pub(super) name: String,
    /// Its shape; of a part, that of the part.
    pub(super) shape: Vec<usize>,
    /// The first of its rows, where it is a part of the tensor of the file.
    pub(super) first_row: Option<usize>,
}

/// Where a network is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// What stands before every name of the network; may be empty.
    pub(super) prefix: String,
    pub(super) naming: Naming,
}

impl Place {
    /// The top of a file.
    pub(super) fn top() -> Self {
        Self { prefix: String::new(), naming: Naming::Usual }
    }

    /// The tensors here by the names that the network gives them.
    pub(super) fn tensors(&self, names: &Names<'_>) -> BTreeMap<String, Source> {
        let mut found = BTreeMap::new();
        for (own, shape) in names.under(&self.prefix) {
            let name = format!("{}{own}", self.prefix);
            if let Some(parts) = parts(own, shape) {
                found.extend(parts.map(|(part, rows, first_row)| {
                    let shape = std::iter::once(rows).chain(shape.iter().skip(1).copied()).collect();
                    (part, Source { name: name.clone(), shape, first_row: Some(first_row) })
                }));
            } else {
                let source = Source { name, shape: shape.to_vec(), first_row: None };
                found.insert(self.naming.network_name(own), source);
            }
        }
        found
    }

    /// A name of the file as the network gives it; none when it is elsewhere.
    pub(super) fn network_name(&self, name: &str) -> Option<String> {
        name.strip_prefix(&self.prefix).map(|own| self.naming.network_name(own))
    }

    /// The prefixes that hold this one, the nearest first; the last is empty.
    pub(super) fn outer_prefixes(&self) -> impl Iterator<Item = &str> {
        let mut rest = self.prefix.as_str();
        std::iter::from_fn(move || {
            let inner = rest.strip_suffix('.')?;
            rest = inner.rfind('.').map_or("", |dot| &rest[..=dot]);
            Some(rest)
        })
    }
}

impl Naming {
    fn network_name(self, own: &str) -> String {
        let renamed = match self {
            Self::Usual => renamed_by(&[XCIT_POSITIONS], own),
            Self::Numbered => renamed_by(NUMBERED_LAYERS, own),
            Self::Features => own.strip_prefix("features.").and_then(timm_name),
        };
        renamed.unwrap_or_else(|| own.to_owned())
    }
}

/// The three tensors that one of `XCiT`'s class attention stands for: name, rows, and the first row.
fn parts(own: &str, shape: &[usize]) -> Option<impl Iterator<Item = (String, usize, usize)>> {
    let (start, whole, three) = XCIT_CLASS_ATTENTION;
    let (block, field) = own.strip_prefix(start)?.split_once(whole)?;
    let rows = shape.first().filter(|rows| rows.is_multiple_of(3))? / 3;
    let name = move |part: &str| format!("{start}{block}{part}{field}");
    Some(three.into_iter().enumerate().map(move |(index, part)| (name(part), rows, index * rows)))
}

/// A name with its beginning replaced, by the first entry that fits.
fn renamed_by(table: &[(&str, &str)], name: &str) -> Option<String> {
    table.iter().find_map(|(theirs, ours)| name.strip_prefix(theirs).map(|rest| format!("{ours}{rest}")))
}

/// What timm calls a tensor of torchvision's EfficientNet, `features.` left out.
fn timm_name(name: &str) -> Option<String> {
    if let Some(outside) = renamed_by(FEATURES_LAYERS, name) {
        return Some(outside);
    }
    let (stage, rest) = name.split_once('.')?;
    let (block, layer) = rest.split_once(".block.")?;
    let stage = stage.parse::<usize>().ok()?.checked_sub(1)?;
    let layer = renamed_by(if stage == 0 { DEPTHWISE_LAYERS } else { INVERTED_LAYERS }, layer)?;
    Some(format!("blocks.{stage}.{block}.{layer}"))
}

/// Places with a stem for pictures of three channels, the likeliest first.
pub(super) fn places(names: &Names<'_>) -> Vec<Place> {
    let mut found = Vec::new();
    for (name, shape) in names.iter() {
        let naming = match shape {
            [_, 3, 7, 7] if name == NUMBERED_STEM || name.ends_with(".0.weight") => Naming::Numbered,
            [_, 3, 3, 3] if name.ends_with(FEATURES_STEM) => Naming::Features,
            [_, 3, _, _] => Naming::Usual,
            _ => continue,
        };
        let stems = match naming {
            Naming::Usual => STEMS,
            Naming::Numbered => &[NUMBERED_STEM][..],
            Naming::Features => &[FEATURES_STEM][..],
        };
        let prefix = stems.iter().find_map(|stem| name.strip_suffix(stem));
        if let Some(prefix) = prefix.filter(|prefix| prefix.is_empty() || prefix.ends_with('.')) {
            found.push(Place { prefix: prefix.to_owned(), naming });
        }
    }
    found.sort_by_key(|place| {
        let words = || place.prefix.split('.');
        let copy = words().any(|word| COPIES.iter().any(|(copy, _)| *copy == word));
        let preferred = words().filter_map(|word| PREFERRED.iter().position(|wanted| *wanted == word)).min();
        (copy, preferred.unwrap_or(PREFERRED.len()), place.prefix.len())
    });
    found.truncate(MAX_PLACES);
    found
}
