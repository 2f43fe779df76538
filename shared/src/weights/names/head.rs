//! Reads what a head is made of from the names and shapes of its tensors.
//!
//! Heads are written as sequences, so their layers are numbered: a tensor `N.weight` of rank 2 is a linear layer, tensors
//! with `N.running_mean` are a batch norm, and a number that is left out is a layer without tensors, the activation.

use std::collections::BTreeMap;

use super::prefixes::{Names, Place};
use crate::models::{MlpConfig, MlpLayer};

/// Where heads are, within the network or beside it, those that are surely no classifier first.
const HEADS: &[&str] = &[
    "projection_head.layers",
    "projection_head.net",
    "projection_head",
    "projector.layers",
    "projector.net",
    "projector",
    "projetion.net",
    "projetion",
    "projection.layers",
    "projection.net",
    "projection",
    "head.mlp",
    "head.layers",
    "fc",
    "classifier",
    "head",
];
/// Those of them that hold a classifier when they are one linear layer.
const CLASSIFIERS: &[&str] = &["fc", "classifier", "head"];
/// Most layers that a head may have.
const MAX_LAYERS: usize = 64;

/// A place with the tensors of a head.
#[derive(Debug)]
pub(super) struct Site {
    /// What stands before its names, with a dot at the end.
    pub(super) prefix: String,
    /// Which of the usual names it has.
    pub(super) name: &'static str,
    /// What it is made of, or why that cannot be told.
    pub(super) head: Result<MlpConfig, String>,
}

impl Site {
    /// Whether it is one linear layer in the place of a classifier.
    pub(super) fn is_classifier(&self) -> bool {
        CLASSIFIERS.contains(&self.name) && self.head.as_ref().is_ok_and(|head| head.layers().len() == 1)
    }

    /// Whether it is followed by DINO's last layer, or named as DINO names it.
    pub(super) fn is_dino(&self, names: &Names<'_>) -> bool {
        self.name == "head.mlp" || names.under(&self.last_layer()).next().is_some()
    }

    /// The prefix of the layer that DINO has after the head.
    pub(super) fn last_layer(&self) -> String {
        let whole = self.prefix.strip_suffix('.').unwrap_or(&self.prefix);
        let outer = whole.rfind('.').filter(|_| self.name.contains('.')).map_or("", |dot| &whole[..=dot]);
        if self.name.contains('.') { format!("{outer}last_layer.") } else { format!("{whole}.last_layer.") }
    }

    /// The head with DINO's activation.
    pub(super) fn with_gelu(&self) -> Result<MlpConfig, String> {
        let layers = self.head.as_ref().map_err(Clone::clone)?.layers().iter().cloned();
        MlpConfig::new(layers.map(|layer| if layer == MlpLayer::Relu { MlpLayer::Gelu } else { layer }).collect())
    }
}

/// Every head in or beside a network, the likeliest first.
pub(super) fn sites(names: &Names<'_>, place: &Place) -> Vec<Site> {
    let mut found: Vec<Site> = Vec::new();
    for name in HEADS {
        for base in std::iter::once(place.prefix.as_str()).chain(place.outer_prefixes()).take(super::MAX_WORDS) {
            let prefix = format!("{base}{name}.");
            let within_another = found.iter().any(|site| site.prefix.starts_with(&prefix));
            if !within_another && names.under(&prefix).next().is_some() {
                found.push(Site { head: read(names, &prefix), prefix, name });
            }
        }
    }
    found
}

/// The tensors of one layer, by field.
type Fields<'a> = BTreeMap<&'a str, &'a [usize]>;

/// What the tensors under a prefix are made of.
fn read(names: &Names<'_>, prefix: &str) -> Result<MlpConfig, String> {
    let whole = prefix.strip_suffix('.').unwrap_or(prefix);
    let mut layers: BTreeMap<usize, Fields<'_>> = BTreeMap::new();
    let mut single = Fields::new();
    for (own, shape) in names.under(prefix) {
        if own.starts_with("last_layer.") {
            continue;
        }
        match own.split_once('.') {
            None => {
                single.insert(own, shape);
            }
            Some((number, field)) => {
                let number = number.parse::<usize>().ok().filter(|number| *number < MAX_LAYERS);
                let number = number.ok_or_else(|| format!("`{prefix}{own}` is not a layer with a number"))?;
                layers.entry(number).or_default().insert(field, shape);
            }
        }
    }
    if !single.is_empty() {
        if !layers.is_empty() {
            return Err(format!("`{prefix}` holds both a layer and numbered layers"));
        }
        return MlpConfig::new(vec![layer(whole.to_owned(), &single, 0)?]);
    }
    let mut read = Vec::new();
    let mut next = 0;
    for (number, fields) in &layers {
        match (number - next, next) {
            (0, _) => {}
            (1, 1..) => read.push(MlpLayer::Relu),
            _ => return Err(format!("nothing tells what comes before `{prefix}{number}`")),
        }
        let width = read.iter().rev().find_map(width_out).unwrap_or(0);
        read.push(layer(format!("{prefix}{number}"), fields, width)?);
        next = number + 1;
    }
    MlpConfig::new(read)
}

fn width_out(layer: &MlpLayer) -> Option<usize> {
    match layer {
        MlpLayer::Linear { outputs, .. } => Some(*outputs),
        MlpLayer::BatchNorm { width, .. } => Some(*width),
        MlpLayer::Relu | MlpLayer::Gelu => None,
    }
}

/// The layer that a group of tensors is; `width` is that of the rows before it.
fn layer(name: String, fields: &Fields<'_>, width: usize) -> Result<MlpLayer, String> {
    let is_row = |field: &str, width: usize| fields.get(field).is_some_and(|shape| **shape == [width]);
    let only = |known: &[&str]| fields.keys().all(|field| known.contains(field));
    match fields.get("weight") {
        Some(&[outputs, inputs]) if only(&["weight", "bias"]) => {
            let bias = fields.contains_key("bias");
            if bias && !is_row("bias", *outputs) {
                return Err(format!("`{name}.bias` does not fit its weight"));
            }
            Ok(MlpLayer::Linear { name, inputs: *inputs, outputs: *outputs, bias })
        }
        _ if fields.contains_key("running_mean") => {
            let affine = fields.contains_key("weight");
            let all = if affine {
                &["running_mean", "running_var", "weight", "bias"][..]
            } else {
                &["running_mean", "running_var"]
            };
            let fits = all.iter().all(|field| is_row(field, width));
            if fits
                && only(&["running_mean", "running_var", "weight", "bias", "num_batches_tracked"])
                && affine == fields.contains_key("bias")
            {
                Ok(MlpLayer::BatchNorm { name, width, affine })
            } else {
                Err(format!("`{name}` is no whole batch norm over {width} columns"))
            }
        }
        _ => Err(format!("`{name}` is neither a linear layer nor a batch norm")),
    }
}
