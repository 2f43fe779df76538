//! Tells what the tensors outside the network are, where the method accounts for them.

use super::head::Site;
use super::method::Method;
use super::prefixes::{COPIES, Names, Place};

/// Words that tell what a tensor is, wherever they stand in its name.
const KINDS: &[(&str, &str)] = &[
    ("prototypes", "prototypes"),
    ("predictor", "predictor"),
    ("online_predictor", "predictor"),
    ("prediction_head", "predictor"),
    ("momentum_classifier", "classifier trained beside"),
];
/// Words before another network than the one that was taken, and what it is.
const OTHERS: &[(&str, &str)] = &[
    ("encoder_q", "query encoder"),
    ("query", "query encoder"),
    ("base_encoder", "base encoder"),
    ("online_network", "online network"),
    ("online_encoder", "online network"),
    ("teacher", "teacher"),
    ("student", "student"),
];

/// Words of a name that may say what it belongs to; later ones name layers.
const OUTER_WORDS: usize = 4;

/// What stands beside the network that was taken.
pub(super) struct Surroundings<'a> {
    pub(super) method: Method,
    pub(super) place: &'a Place,
    /// Where other networks are.
    pub(super) others: Vec<&'a Place>,
    /// Every head; the one that makes the embedding is used up before anything is asked here.
    pub(super) sites: &'a [Site],
    pub(super) names: &'a Names<'a>,
}

impl Surroundings<'_> {
    /// What a tensor is that neither the network nor its head holds; `None` when nothing accounts for it.
    pub(super) fn kind(&self, name: &str) -> Option<&'static str> {
        let prefix = self.place.prefix.as_str();
        let words = || name.split('.').take(OUTER_WORDS);
        let of = |table: &[(&'static str, &'static str)]| {
            let found = words().find_map(|word| table.iter().find(|(wanted, _)| *wanted == word));
            found.filter(|(word, _)| !prefix.split('.').any(|own| own == *word)).map(|(_, kind)| *kind)
        };
        let last = name.rsplit('.').next();
        if matches!(last, Some("queue" | "queue_ptr")) {
            return Some("queue of negatives");
        }
        if let Some(kind) = of(COPIES).or_else(|| of(OTHERS)) {
            return Some(kind);
        }
        if let Some(kind) = of(KINDS) {
            return Some(kind);
        }
        if self.sites.iter().any(|site| site.is_dino(self.names) && name.starts_with(&site.last_layer())) {
            return Some("last layer of the head");
        }
        if let Some(site) = self.sites.iter().find(|site| name.starts_with(&site.prefix)) {
            let read = site.head.is_ok() || self.method.is_headless();
            return read.then_some("head that the embedding does not use");
        }
        if self.others.iter().any(|other| !prefix.starts_with(&other.prefix) && name.starts_with(&other.prefix)) {
            return Some("another network");
        }
        let norm_of_loss = |outer: &str| name.strip_prefix(outer).is_some_and(|own| own.starts_with("bn."));
        if !prefix.is_empty() && !name.starts_with(prefix) && self.place.outer_prefixes().any(norm_of_loss) {
            return Some("batch norm of the loss");
        }
        if last == Some("center") {
            return Some("centre of the targets");
        }
        let bare = name.strip_prefix("module.").unwrap_or(name);
        ["sgd.", "lars.", "larc.", "adamw."].iter().any(|rule| bare.starts_with(rule)).then_some("optimiser state")
    }
}
