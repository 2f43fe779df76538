//! Tells which network a checkpoint holds and how it was trained, from the names and shapes of its tensors alone.
//!
//! 1. Places where a network may be are found (`prefixes`) and every known architecture is compared with what is there.
//! 2. Heads in or beside the network are read layer by layer (`head`).
//! 3. The method is told by the head and by words in the names ([`Method`]).
//! 4. Every other tensor is left over by the method's design (`left_over`), or unexpected.
//!
//! [`Recognised`] is the result, and loads the tensors under the names that the network gives them.

mod head;
mod left_over;
mod load;
mod method;
mod prefixes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use self::head::Site;
use self::left_over::Surroundings;
pub use self::method::Method;
use self::prefixes::{Names, Place, Source};
use crate::error::Result;
use crate::models::{Arch, MlpConfig, VitOptions, names_and_shapes};
use crate::ops::PositionResampling;

/// The layers of the networks known here that are numbered.
const NUMBERED: &[&str] = &["layer", "blocks.", "cls_attn_blocks."];
/// Words of a name that are looked at: a name may be of any length.
const MAX_WORDS: usize = 16;
/// Buffers that count batches: absent from files made before PyTorch 0.4.1, and of no use in evaluation.
const BATCH_COUNT: &str = "num_batches_tracked";

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
#[serde(rename_all = "kebab-case")]
pub struct Recognised {
    /// The architecture.
    pub arch: Arch,
    /// The method.
    pub method: Method,
    /// Methods whose files look the same, and whose embeddings are the same.
    pub alike: Vec<Method>,
    /// What stands before every name of the network; may be empty.
    pub prefix: String,
    /// What makes the embedding of the pooled features; `None` where they are the embedding.
    pub head: Option<MlpConfig>,
    /// Tensors of the network and its head that are there, with the right shape.
    pub matched: usize,
    /// Tensors that the network needs and that are not there, without the prefix.
    pub missing: Vec<String>,
    /// Tensors of another shape, as `name: expected, found`.
    pub mismatched: Vec<String>,
    /// Tensors that neither the network nor the method accounts for.
    pub unexpected: Vec<String>,
    /// Tensors that the method leaves over by design.
    pub left_over: Vec<LeftOver>,
    /// What the names tell of the training, whatever method was asked for.
    #[serde(skip)]
    trained_by: Method,
    /// Where in the file the tensors of the network are.
    #[serde(skip)]
    sources: BTreeMap<String, Source>,
    /// Whether an unexpected tensor is a layer of the network's own kind.
    #[serde(skip)]
    further_layers: bool,
}

impl Recognised {
    /// Whether every tensor of the network and its head is there.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.mismatched.is_empty()
    }

    /// Whether the file has further layers of the network's own kind: then it holds another network, even if all of a
    /// smaller one is in it.
    pub fn has_further_layers(&self) -> bool {
        self.further_layers
    }

    /// What the tensors of a vision transformer do not tell: `MoCo` v3's small one has twice as many heads as others, and DINO
    /// resamples positions in its own way.
    ///
    /// # Source
    /// facebookresearch/moco-v3 `vits.py` (`vit_small`); facebookresearch/dino `vision_transformer.py` (`interpolate_pos_encoding`).
    pub fn vit_options(&self) -> VitOptions {
        let is = |method| self.method == method || self.trained_by == method;
        let small = matches!(self.arch, Arch::VitSmallPatch16 | Arch::VitSmallPatch8);
        let positions = if is(Method::Dino) { PositionResampling::Dino } else { PositionResampling::default() };
        VitOptions { heads: (small && is(Method::MocoV3)).then_some(12), positions }
    }

    /// The width of the teacher's final embedding.
    pub fn embedding_dim(&self) -> usize {
        self.head.as_ref().map_or_else(|| self.arch.feature_width(), MlpConfig::outputs)
    }
}

/// The networks that a checkpoint holds, one for each prefix, the likeliest first; empty when none has a known stem.
///
/// # Errors
/// Only if the description of a known architecture fails.
pub fn recognise(entries: &[(String, Vec<usize>)]) -> Result<Vec<Recognised>> {
    let names = Names::new(entries);
    let places = prefixes::places(&names);
    let known = Arch::ALL.into_iter().map(Known::new).collect::<Result<Vec<_>>>()?;
    let mut found = Vec::new();
    for place in &places {
        let tensors = place.tensors(&names);
        let compared = known.iter().map(|known| known.compare(&tensors));
        // The first of equals: their order is that of `Arch::ALL`.
        let best = compared.reduce(|best, next| if next.score() > best.score() { next } else { best });
        if let Some(best) = best.filter(|best| best.matched > 0) {
            found.push(best.describe(&names, place, &places, None));
        }
    }
    Ok(found)
}

/// How well one architecture fits at the likeliest place; `method` is told by the names when it is none.
///
/// # Errors
/// Only if the description of the architecture fails.
pub fn fit(entries: &[(String, Vec<usize>)], arch: Arch, method: Option<Method>) -> Result<Recognised> {
    let names = Names::new(entries);
    let mut places = prefixes::places(&names);
    if places.is_empty() {
        places.push(Place::top());
    }
    let known = Known::new(arch)?;
    let fitted = |place: &Place| known.compare(&place.tensors(&names)).describe(&names, place, &places, method);
    let mut best = fitted(&places[0]);
    for place in &places[1..] {
        if best.is_complete() {
            break;
        }
        let next = fitted(place);
        if next.is_complete() {
            best = next;
        }
    }
    Ok(best)
}

/// Whether a name that a network does not have is of its kind all the same.
fn is_further_layer(name: &str) -> bool {
    name.starts_with("fc.") || NUMBERED.iter().any(|layer| name.starts_with(layer))
}

fn is_batch_count(name: &str) -> bool {
    name == BATCH_COUNT || name.ends_with(".num_batches_tracked")
}

/// What an architecture needs, without the counts of batches.
struct Known {
    arch: Arch,
    tensors: Vec<(String, Vec<usize>)>,
}

impl Known {
    fn new(arch: Arch) -> Result<Self> {
        let mut tensors = names_and_shapes(arch, None)?;
        tensors.retain(|(name, _)| !is_batch_count(name));
        Ok(Self { arch, tensors })
    }

    fn compare(&self, found: &BTreeMap<String, Source>) -> Comparison {
        let mut comparison = Comparison {
            arch: self.arch,
            matched: 0,
            missing: Vec::new(),
            mismatched: Vec::new(),
            sources: BTreeMap::new(),
            others: 0,
        };
        for (name, shape) in &self.tensors {
            match found.get(name) {
                Some(source) => {
                    if source.shape == *shape {
                        comparison.matched += 1;
                    } else {
                        comparison.mismatched.push(format!("{name}: {shape:?} expected, {:?} found", source.shape));
                    }
                    comparison.sources.insert(name.clone(), source.clone());
                }
                None => comparison.missing.push(name.clone()),
            }
        }
        comparison.others = found.len() - comparison.sources.len();
        comparison
    }
}

/// An architecture beside the tensors of one place.
struct Comparison {
    arch: Arch,
    matched: usize,
    missing: Vec<String>,
    mismatched: Vec<String>,
    sources: BTreeMap<String, Source>,
    /// Tensors of the place that the architecture does not have.
    others: usize,
}

impl Comparison {
    /// Tensors that fit, less everything that does not.
    fn score(&self) -> isize {
        self.matched as isize - (self.missing.len() + self.mismatched.len() + self.others) as isize
    }

    /// Reads the head, tells the method, and accounts for every tensor.
    fn describe(self, names: &Names<'_>, place: &Place, places: &[Place], asked: Option<Method>) -> Recognised {
        let sites = head::sites(names, place);
        let projection = sites.iter().find(|site| !site.is_classifier());
        let classifier = sites.iter().find(|site| site.is_classifier());
        let told = method::tell(names, place, projection, classifier);
        let method = asked.unwrap_or(told.method);
        let mut found = Recognised {
            arch: self.arch,
            method,
            alike: if asked.is_none() { told.alike.to_vec() } else { Vec::new() },
            prefix: place.prefix.clone(),
            head: None,
            matched: self.matched,
            missing: self.missing,
            mismatched: self.mismatched,
            unexpected: Vec::new(),
            left_over: Vec::new(),
            trained_by: told.trained_by,
            sources: self.sources,
            further_layers: false,
        };
        let site = match method {
            Method::Supervised | Method::Backbone => None,
            Method::MocoV1 => classifier.or(projection),
            _ => projection,
        };
        let head_prefix = site.map(|site| site.prefix.as_str());
        found.take_head(site, names);
        let used: BTreeSet<String> = found
            .sources
            .values()
            .map(|source| source.name.clone())
            .chain(found.head.iter().flat_map(MlpConfig::names_and_shapes).map(|(name, _)| name))
            .collect();
        let others = places.iter().filter(|other| *other != place).collect();
        let surroundings = Surroundings { method, place, others, sites: &sites, names };
        let mut left_over: BTreeMap<&'static str, usize> = BTreeMap::new();
        for (name, _) in names.iter().filter(|(name, _)| !used.contains(*name)) {
            let of_network = name.starts_with(&place.prefix) || head_prefix.is_some_and(|head| name.starts_with(head));
            match surroundings.kind(name) {
                _ if of_network && is_batch_count(name) => {}
                Some(kind) => *left_over.entry(kind).or_default() += 1,
                None => {
                    let own = place.network_name(name);
                    found.further_layers |= own.is_some_and(|own| is_further_layer(&own));
                    found.unexpected.push(name.to_owned());
                }
            }
        }
        found.left_over = left_over.into_iter().map(|(what, tensors)| LeftOver { what, tensors }).collect();
        found
    }
}

impl Recognised {
    /// Takes the head that makes the embedding, or says why there is none.
    fn take_head(&mut self, site: Option<&Site>, names: &Names<'_>) {
        if self.method.is_headless() {
            return;
        }
        let Some(site) = site else {
            // DINO publishes backbones alone; and the method tells how a transformer of MoCo v3 computes, with a head or without.
            let transformer = self.arch.name().starts_with("vit_");
            if self.method != Method::Dino && !(self.method == Method::MocoV3 && transformer) {
                self.missing.push(self.method.usual_head().to_owned());
            }
            return;
        };
        let gelu = self.method == Method::Dino || site.is_dino(names);
        match if gelu { site.with_gelu() } else { site.head.clone() } {
            Ok(head) => {
                let features = self.arch.feature_width();
                if head.inputs() == features {
                    self.matched += head.names_and_shapes().len();
                } else {
                    let what =
                        format!("{}: a head of {features} features expected, of {} found", site.prefix, head.inputs());
                    self.mismatched.push(what);
                }
                self.head = Some(head);
            }
            Err(reason) => self.missing.push(format!("a head that can be read: {reason}")),
        }
    }
}
