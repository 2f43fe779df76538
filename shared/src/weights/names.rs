//! Tells which network a checkpoint belongs to, from the names and shapes of its tensors alone.
//!
//! Training programs wrap the network in others, so its tensors carry prefixes (`module.encoder_q.`). A prefix is found
//! by looking for the stem's convolution; then every known architecture is compared with what lies under it, and what
//! lies elsewhere is told apart: left over by the method's design, or unexpected.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::Checkpoint;
use crate::error::{Error, Result};
use crate::models::{Arch, HeadConfig, names_and_shapes};

/// The stems of the networks known here.
const STEMS: &[&str] = &["conv1.weight", "conv_stem.weight"];
/// The layers of the networks known here that are numbered.
const NUMBERED: &[&str] = &["layer", "blocks."];
/// Where a classifier may be: torchvision's place, and timm's in the efficient networks.
const CLASSIFIERS: &[&str] = &["fc", "classifier"];
/// Prefixes of the network that a method gives to others, in order of preference.
const PREFERRED: &[&str] = &["encoder_q.", "base_encoder.", "query.", "teacher.", "student.", "backbone.", "model."];
/// Prefixes of the copy that is only needed to go on training.
const KEY_ENCODERS: &[&str] = &["encoder_k.", "momentum_encoder.", "key."];
/// Most places where a network is looked for.
const MAX_PREFIXES: usize = 16;
/// Buffers that count batches: absent from files made before PyTorch 0.4.1, and of no use in evaluation.
const BATCH_COUNT: &str = "num_batches_tracked";

/// How a teacher was trained, as far as it decides what its final embedding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// The head of `MoCo` v2: linear, `ReLU`, linear (`fc.0`, `fc.2`); its embedding is the head's output.
    MocoV2,
    /// The head of `MoCo` v1: one linear layer (`fc`); its embedding is the head's output.
    MocoV1,
    /// A classifier (`fc`, or `classifier`), as torchvision's and timm's; its embedding is the pooled feature before it.
    Supervised,
    /// No head; its embedding is the pooled feature.
    Backbone,
}

impl Method {
    /// Every method, in the order of preference.
    pub const ALL: [Self; 4] = [Self::MocoV2, Self::MocoV1, Self::Supervised, Self::Backbone];

    /// The name in flags and files: `moco-v2`.
    pub fn name(self) -> &'static str {
        match self {
            Self::MocoV2 => "moco-v2",
            Self::MocoV1 => "moco-v1",
            Self::Supervised => "supervised",
            Self::Backbone => "backbone",
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

/// What follows the pooled features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Head {
    /// Nothing.
    None,
    /// One linear layer, `fc` or `classifier`.
    Linear {
        /// Its width.
        out: usize,
    },
    /// Linear, `ReLU`, linear: `fc.0`, `fc.2`.
    Projection(HeadConfig),
}

/// Tensors that belong to a method but not to the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOver {
    /// What they are.
    pub what: &'static str,
    /// How many.
    pub tensors: usize,
}

/// How well one architecture fits what a checkpoint holds under one prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recognised {
    /// The architecture.
    pub arch: Arch,
    /// The method.
    pub method: Method,
    /// What stands before every name of the network; may be empty.
    pub prefix: String,
    /// What follows the pooled features.
    pub head: Head,
    /// Tensors of the network that are there, with the right shape.
    pub matched: usize,
    /// Tensors that the network needs and that are not there, without the prefix.
    pub missing: Vec<String>,
    /// Tensors of another shape, as `name: expected, found`.
    pub mismatched: Vec<String>,
    /// Tensors that neither the network nor the method accounts for.
    pub unexpected: Vec<String>,
    /// Tensors that the method leaves over by design.
    pub left_over: Vec<LeftOver>,
}

impl Recognised {
    /// Whether every tensor of the network is there.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.mismatched.is_empty()
    }

    /// Whether the file has further layers of the network's own kind: then it holds another network, even if all of a
    /// smaller one is in it.
    pub fn has_further_layers(&self) -> bool {
        self.unexpected
            .iter()
            .filter_map(|name| name.strip_prefix(&self.prefix))
            .any(|own| own.starts_with("fc.") || NUMBERED.iter().any(|layer| own.starts_with(layer)))
    }

    /// The width of the teacher's final embedding.
    pub fn embedding_dim(&self) -> usize {
        match (self.method, self.head) {
            (Method::MocoV2, Head::Projection(head)) => head.embedding_dim,
            (Method::MocoV1, Head::Linear { out }) => out,
            _ => self.arch.feature_width(),
        }
    }

    /// The projection head that the encoder is built with.
    pub fn head_config(&self) -> Option<HeadConfig> {
        if let (Method::MocoV2, Head::Projection(head)) = (self.method, self.head) { Some(head) } else { None }
    }

    /// The network's tensors under their own names, for [`crate::ops::ParameterStore::load`], without the counts of
    /// batches, which are of no use in evaluation. The head of [`Method::MocoV1`] is not among them, since the encoder has no such layer: it stays in the checkpoint.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the network is not complete or the file has further layers, listing them;
    /// [`Error::Damaged`] when the numbers cannot be read.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<BTreeMap<String, Tensor>> {
        if !self.is_complete() || self.has_further_layers() {
            return Err(self.refusal(checkpoint));
        }
        let mut tensors = BTreeMap::new();
        for (name, _) in names_and_shapes(self.arch, self.head_config())? {
            if !is_batch_count(&name) {
                let tensor = checkpoint.tensor(&format!("{}{name}", self.prefix))?;
                tensors.insert(name, tensor);
            }
        }
        Ok(tensors)
    }

    /// The one error that tells all: what is missing, of another shape, and unexpected.
    pub fn refusal(&self, checkpoint: &Checkpoint) -> Error {
        let place = if self.prefix.is_empty() { String::new() } else { format!(" under `{}`", self.prefix) };
        let summary = format!(
            "`{}` does not hold the weights of {} ({}){place}: {} tensors fit",
            checkpoint.path().display(),
            self.arch,
            self.method,
            self.matched
        );
        let lists =
            [("missing", &self.missing), ("of another shape", &self.mismatched), ("unexpected", &self.unexpected)];
        let parts = lists.iter().filter(|(_, names)| !names.is_empty());
        let parts = parts.map(|(what, names)| format!("{} {what}: {}", names.len(), listed(names)));
        let message = std::iter::once(summary).chain(parts).collect::<Vec<_>>().join("; ");
        let hint = format!("`teacher-embed describe {}` tells what it holds", checkpoint.path().display());
        Error::invalid(message, hint)
    }
}

/// The first names of a list, and how many more there are.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 6;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{}`", name.escape_debug())).collect();
    let rest = names.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    shown.join(", ") + &more
}

/// The networks that a checkpoint holds, one for each prefix, the likeliest first; empty when none has a known stem.
///
/// # Errors
/// Only if the description of a known architecture fails.
pub fn recognise(entries: &[(String, Vec<usize>)]) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    for prefix in prefixes(entries) {
        let mut best: Option<Recognised> = None;
        for arch in Arch::ALL {
            let fitted = fit_at(entries, &prefix, arch, None)?;
            if best.as_ref().is_none_or(|best| score(&fitted) > score(best)) {
                best = Some(fitted);
            }
        }
        found.extend(best.filter(|best| best.matched > 0));
    }
    Ok(found)
}

/// How well one architecture fits at the likeliest place; `method` is told by the head when it is none.
///
/// # Errors
/// Only if the description of the architecture fails.
pub fn fit(entries: &[(String, Vec<usize>)], arch: Arch, method: Option<Method>) -> Result<Recognised> {
    let mut best: Option<Recognised> = None;
    let mut places = prefixes(entries);
    if places.is_empty() {
        places.push(String::new());
    }
    for prefix in places {
        let fitted = fit_at(entries, &prefix, arch, method)?;
        if best.as_ref().is_none_or(|best| fitted.is_complete() && !best.is_complete()) {
            best = Some(fitted);
        }
    }
    best.ok_or_else(|| Error::invalid("no place to look for the network", ""))
}

/// Tensors that fit, less everything that does not.
fn score(fitted: &Recognised) -> isize {
    let against = fitted.missing.len() + fitted.mismatched.len() + fitted.unexpected.len();
    fitted.matched as isize - against as isize
}

fn is_batch_count(name: &str) -> bool {
    name == BATCH_COUNT || name.ends_with(".num_batches_tracked")
}

/// Prefixes under which there is a stem for pictures of three channels, the preferred ones first.
fn prefixes(entries: &[(String, Vec<usize>)]) -> Vec<String> {
    let stems = entries.iter().filter(|(_, shape)| matches!(shape[..], [_, 3, _, _]));
    let mut found: Vec<String> = stems
        .filter_map(|(name, _)| STEMS.iter().find_map(|stem| name.strip_suffix(stem)))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
        .map(str::to_owned)
        .collect();
    let preference = |prefix: &String| {
        let preferred = PREFERRED.iter().position(|wanted| prefix.ends_with(wanted));
        let key_encoder = KEY_ENCODERS.iter().any(|key| prefix.ends_with(key));
        (key_encoder, preferred.unwrap_or(PREFERRED.len()), prefix.len())
    };
    found.sort_by_key(preference);
    found.truncate(MAX_PREFIXES);
    found
}

/// The head under a prefix.
fn head(under: &BTreeMap<&str, &[usize]>) -> Head {
    let classifier = CLASSIFIERS.iter().find_map(|layer| under.get(format!("{layer}.weight").as_str()));
    match (under.get("fc.0.weight"), under.get("fc.2.weight"), classifier) {
        (Some([hidden, _]), Some([out, inner]), None) if hidden == inner => {
            Head::Projection(HeadConfig { hidden: *hidden, embedding_dim: *out })
        }
        (None, None, Some([out, _])) => Head::Linear { out: *out },
        _ => Head::None,
    }
}

fn fit_at(entries: &[(String, Vec<usize>)], prefix: &str, arch: Arch, method: Option<Method>) -> Result<Recognised> {
    let under: BTreeMap<&str, &[usize]> =
        entries.iter().filter_map(|(name, shape)| Some((name.strip_prefix(prefix)?, shape.as_slice()))).collect();
    let head = head(&under);
    let of_moco = prefix.contains("encoder_q.")
        || prefix.contains("encoder_k.")
        || entries.iter().any(|(name, _)| is_queue(name));
    let told = match head {
        Head::Projection(_) => Method::MocoV2,
        Head::Linear { .. } if of_moco && under.contains_key("fc.weight") => Method::MocoV1,
        Head::Linear { .. } => Method::Supervised,
        Head::None => Method::Backbone,
    };
    let method = method.unwrap_or(told);
    let mut expected = names_and_shapes(arch, wanted_head(method, head))?;
    if method == Method::MocoV1 {
        let out = if let Head::Linear { out } = head { out } else { 128 };
        expected.push(("fc.weight".to_owned(), vec![out, arch.feature_width()]));
        expected.push(("fc.bias".to_owned(), vec![out]));
    }
    expected.retain(|(name, _)| !is_batch_count(name));

    let mut fitted = Recognised {
        arch,
        method,
        prefix: prefix.to_owned(),
        head,
        matched: 0,
        missing: Vec::new(),
        mismatched: Vec::new(),
        unexpected: Vec::new(),
        left_over: Vec::new(),
    };
    let mut used = BTreeSet::new();
    for (name, shape) in &expected {
        match under.get(name.as_str()) {
            Some(found) if *found == shape.as_slice() => fitted.matched += 1,
            Some(found) => fitted.mismatched.push(format!("{name}: {shape:?} expected, {found:?} found")),
            None => fitted.missing.push(name.clone()),
        }
        used.insert(format!("{prefix}{name}"));
    }
    let mut left_over: BTreeMap<&'static str, usize> = BTreeMap::new();
    for (name, _) in entries.iter().filter(|(name, _)| !used.contains(name)) {
        let own = name.strip_prefix(prefix);
        if own.is_some_and(is_batch_count) {
            continue;
        }
        match leftover_kind(name, own, prefix, method) {
            Some(kind) => *left_over.entry(kind).or_default() += 1,
            None => fitted.unexpected.push(name.clone()),
        }
    }
    fitted.left_over = left_over.into_iter().map(|(what, tensors)| LeftOver { what, tensors }).collect();
    Ok(fitted)
}

/// The head that the encoder needs for a method; where the file has none, the usual one, so that it is listed as missing.
fn wanted_head(method: Method, head: Head) -> Option<HeadConfig> {
    match (method, head) {
        (Method::MocoV2, Head::Projection(head)) => Some(head),
        (Method::MocoV2, _) => Some(HeadConfig { hidden: 2048, embedding_dim: 128 }),
        _ => None,
    }
}

fn is_queue(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("queue" | "queue_ptr"))
}

/// What a tensor outside the network is, where the method accounts for it.
fn leftover_kind(name: &str, own: Option<&str>, prefix: &str, method: Method) -> Option<&'static str> {
    let bare = name.strip_prefix("module.").unwrap_or(name);
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| bare.starts_with(prefix));
    if is_queue(name) {
        Some("queue of negatives")
    } else if !prefix.is_empty() && own.is_none() && begins(KEY_ENCODERS) {
        Some("key encoder")
    } else if !prefix.is_empty() && own.is_none() && begins(PREFERRED) {
        Some("another network")
    } else if bare.starts_with("sgd.") {
        Some("optimiser state")
    } else if own.and_then(|own| own.split('.').next()).is_some_and(|layer| CLASSIFIERS.contains(&layer))
        && matches!(method, Method::Supervised | Method::Backbone)
    {
        Some("head that the embedding does not use")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Entries = Vec<(String, Vec<usize>)>;

    fn network(arch: Arch, prefix: &str, head: Head) -> Entries {
        let config = if let Head::Projection(head) = head { Some(head) } else { None };
        let mut entries: Entries = names_and_shapes(arch, config).unwrap();
        if let Head::Linear { out } = head {
            entries.push(("fc.weight".into(), vec![out, arch.feature_width()]));
            entries.push(("fc.bias".into(), vec![out]));
        }
        entries.into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)).collect()
    }

    const PROJECTION: Head = Head::Projection(HeadConfig { hidden: 2048, embedding_dim: 128 });

    fn moco(arch: Arch, head: Head) -> Entries {
        let mut entries = network(arch, "module.encoder_k.", head);
        entries.extend(network(arch, "module.encoder_q.", head));
        entries.push(("module.queue".into(), vec![128, 65536]));
        entries.push(("module.queue_ptr".into(), vec![1]));
        entries
    }

    #[test]
    fn every_architecture_is_told_apart_under_every_prefix() {
        for arch in Arch::ALL {
            for prefix in ["", "module.", "module.encoder_q.", "backbone.", "module.base_encoder.", "net.inner."] {
                let found = recognise(&network(arch, prefix, PROJECTION)).unwrap();
                assert_eq!(found.len(), 1);
                assert_eq!((found[0].arch, found[0].method, found[0].prefix.as_str()), (arch, Method::MocoV2, prefix));
                assert!(found[0].is_complete() && found[0].unexpected.is_empty() && found[0].left_over.is_empty());
            }
        }
    }

    #[test]
    fn moco_checkpoint_gives_its_query_encoder_and_accounts_for_the_rest() {
        let found = recognise(&moco(Arch::ResNet50, PROJECTION)).unwrap();
        assert_eq!(found.len(), 2);
        let query = &found[0];
        assert_eq!((query.prefix.as_str(), query.embedding_dim()), ("module.encoder_q.", 128));
        assert!(query.is_complete() && query.unexpected.is_empty(), "{:?}", query.unexpected);
        let kinds: Vec<_> = query.left_over.iter().map(|kind| kind.what).collect();
        assert_eq!(kinds, ["key encoder", "queue of negatives"]);
        assert_eq!(query.left_over[1].tensors, 2);
        assert_eq!(found[1].prefix, "module.encoder_k.");
    }

    #[test]
    fn linear_heads_of_moco_and_of_classifiers_are_told_apart() {
        let first = |entries: Entries| recognise(&entries).unwrap().remove(0);
        let v1 = first(moco(Arch::ResNet50, Head::Linear { out: 128 }));
        assert_eq!((v1.method, v1.embedding_dim()), (Method::MocoV1, 128));
        let classifier = first(network(Arch::ResNet34, "", Head::Linear { out: 1000 }));
        assert_eq!((classifier.method, classifier.embedding_dim()), (Method::Supervised, 512));
        assert_eq!(classifier.left_over[0].tensors, 2);
        let bare = first(network(Arch::ResNet18, "", Head::None));
        assert_eq!((bare.method, bare.is_complete()), (Method::Backbone, true));
    }

    #[test]
    fn the_classifier_of_timms_efficient_networks_is_told() {
        for arch in [Arch::EfficientNetB0, Arch::MobileNetV3Large] {
            let mut entries = network(arch, "", Head::None);
            entries.push(("classifier.weight".into(), vec![1000, 1280]));
            entries.push(("classifier.bias".into(), vec![1000]));
            let found = recognise(&entries).unwrap().remove(0);
            assert_eq!((found.arch, found.method, found.embedding_dim()), (arch, Method::Supervised, 1280));
            assert!(found.is_complete() && found.unexpected.is_empty() && !found.has_further_layers());
            assert_eq!(found.left_over, [LeftOver { what: "head that the embedding does not use", tensors: 2 }]);
        }
    }

    #[test]
    fn a_deeper_network_is_not_taken_for_the_smaller_one_in_it() {
        let mut entries = network(Arch::EfficientNetB0, "model.", Head::None);
        entries.push(("model.blocks.0.1.conv_dw.weight".into(), vec![16, 1, 3, 3]));
        let found = recognise(&entries).unwrap().remove(0);
        assert_eq!((found.arch, found.is_complete(), found.has_further_layers()), (Arch::EfficientNetB0, true, true));
    }

    #[test]
    fn batch_counts_may_be_absent() {
        let mut entries = network(Arch::ResNet18, "", PROJECTION);
        entries.retain(|(name, _)| !is_batch_count(name));
        let found = recognise(&entries).unwrap();
        assert!(found[0].is_complete());
    }

    #[test]
    fn another_architecture_lists_what_is_missing_and_unexpected() {
        let fitted = fit(&moco(Arch::ResNet18, PROJECTION), Arch::ResNet34, None).unwrap();
        assert!(!fitted.is_complete());
        assert!(fitted.missing.contains(&"layer4.2.conv1.weight".to_owned()));
        assert!(fitted.unexpected.is_empty());
        let fitted = fit(&moco(Arch::ResNet34, PROJECTION), Arch::ResNet18, Some(Method::MocoV2)).unwrap();
        assert!(fitted.unexpected.contains(&"module.encoder_q.layer4.2.conv1.weight".to_owned()));
        let fitted = fit(&network(Arch::ResNet50, "", Head::None), Arch::ResNet50, Some(Method::MocoV2)).unwrap();
        assert_eq!(fitted.missing, ["fc.0.bias", "fc.0.weight", "fc.2.bias", "fc.2.weight"].map(str::to_owned));
    }

    #[test]
    fn a_missing_or_misshapen_tensor_is_named() {
        let mut entries = network(Arch::ResNet18, "module.", Head::None);
        let conv = entries.iter_mut().find(|(name, _)| name == "module.layer1.0.conv1.weight").unwrap();
        conv.1 = vec![64, 64, 5, 5];
        entries.retain(|(name, _)| name != "module.bn1.bias");
        let found = recognise(&entries).unwrap().remove(0);
        assert_eq!(found.arch, Arch::ResNet18);
        assert_eq!(found.missing, ["bn1.bias"]);
        assert_eq!(found.mismatched, ["layer1.0.conv1.weight: [64, 64, 3, 3] expected, [64, 64, 5, 5] found"]);
    }

    #[test]
    fn other_networks_are_not_recognised() {
        let entries = vec![("patch_embed.proj.weight".to_owned(), vec![192, 3, 16, 16]), ("cls".to_owned(), vec![1])];
        assert!(recognise(&entries).unwrap().is_empty());
        let fitted = fit(&entries, Arch::ResNet18, None).unwrap();
        assert_eq!(fitted.matched, 0);
        assert_eq!(fitted.unexpected.len(), 2);
    }
}
