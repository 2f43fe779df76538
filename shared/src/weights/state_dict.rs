//! Finds the state dict among the values of a pickle, and what else is worth knowing about the checkpoint.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde_json::Value;

use super::object::{Arena, Id, Node, TensorNode};

/// Keys under which training programs keep the weights, the usual one first.
const USUAL_KEYS: &[&str] = &[
    "state_dict",
    "model",
    "model_state_dict",
    "online_network_state_dict",
    "teacher",
    "student",
    "net",
    "module",
    "weights",
];
/// Keys under which they keep their settings.
const SETTINGS_KEYS: &[&str] = &["args", "opt", "config", "cfg", "hparams", "hyper_parameters"];
/// How deep a state dict may be nested.
const MAX_DEPTH: usize = 4;
/// Most dicts that are looked at, and most state dicts that are told apart.
const MAX_DICTS: usize = 4096;
/// Longest piece of text that is kept as metadata.
const MAX_TEXT_BYTES: usize = 1000;

/// The chosen state dict of a checkpoint.
#[derive(Debug)]
pub(super) struct StateDict<'a> {
    /// Where it is: keys joined by dots, empty at the top.
    pub(super) key: String,
    /// Its tensors in the order of the file; a reason where the description of one makes no sense.
    pub(super) tensors: Vec<(&'a str, Result<&'a TensorNode, &'a str>)>,
    /// Entries that are no tensors, with what they are.
    pub(super) skipped: Vec<(&'a str, String)>,
    /// Where other tensors lie, and how many.
    pub(super) others: Vec<(String, usize)>,
}

/// Chooses the state dict: the one at `state_key`, or the likeliest.
///
/// # Errors
/// A sentence, when there is none.
pub(super) fn find<'a>(arena: &'a Arena, root: Id, state_key: Option<&str>) -> Result<StateDict<'a>, String> {
    let mut candidates = candidates(arena, root);
    candidates.sort_by(|a, b| rank(a).cmp(&rank(b)));
    let list = |candidates: &[Candidate]| {
        candidates.iter().take(16).map(|one| format!("`{}`", one.key)).collect::<Vec<_>>().join(", ")
    };
    let (id, key) = match state_key {
        Some(key) => match descend(arena, root, key) {
            Some(id) if tensor_count(arena, id) > 0 => (id, key.to_owned()),
            _ if candidates.is_empty() => return Err(format!("it has no state dict at `{key}` and none elsewhere")),
            _ => return Err(format!("it has no state dict at `{key}`, but at {}", list(&candidates))),
        },
        None => match candidates.first() {
            Some(chosen) => (chosen.id, chosen.key.clone()),
            None => return Err(describe_root(arena, root)),
        },
    };
    let mut seen = BTreeSet::new();
    let mut tensors = Vec::new();
    let mut skipped = Vec::new();
    for (name, value) in named(arena, id) {
        if !seen.insert(name) {
            return Err(format!("its state dict holds `{}` twice", name.escape_debug()));
        }
        match arena.get(value) {
            Node::Tensor(tensor) => tensors.push((name, Ok(tensor))),
            Node::Broken(reason) => tensors.push((name, Err(reason.as_str()))),
            other => skipped.push((name, kind(arena, other))),
        }
    }
    let others = candidates.into_iter().filter(|one| one.id != id).map(|one| (one.key, one.tensors)).collect();
    Ok(StateDict { key, tensors, skipped, others })
}

/// Scalars at the top of the checkpoint, and those of its settings as `args.NAME`.
pub(super) fn metadata(arena: &Arena, root: Id) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for (name, id) in named(arena, root) {
        if let Some(value) = scalar(arena, id) {
            found.insert(name.to_owned(), value);
            continue;
        }
        let settings = match arena.get(id) {
            Node::Object(object) if object.state.is_some() => object.state,
            _ => SETTINGS_KEYS.contains(&name).then_some(id),
        };
        if !SETTINGS_KEYS.contains(&name) {
            continue;
        }
        for (inner, id) in settings.into_iter().flat_map(|settings| named(arena, settings)) {
            if let Some(value) = scalar(arena, id) {
                found.insert(format!("{name}.{inner}"), value);
            }
        }
    }
    found
}

/// A dict that holds at least one tensor under a name.
#[derive(Debug)]
struct Candidate {
    key: String,
    depth: usize,
    id: Id,
    tensors: usize,
}

/// Smaller is likelier: the usual keys, the top itself, then whatever holds most tensors.
fn rank(candidate: &Candidate) -> (usize, usize, &str) {
    let last = candidate.key.rsplit('.').next().unwrap_or_default();
    let usual = USUAL_KEYS.iter().position(|key| *key == last).filter(|_| candidate.depth > 0);
    let class = match (usual, candidate.depth) {
        (Some(position), depth) => position + (depth - 1) * USUAL_KEYS.len(),
        (None, 0) => MAX_DEPTH * USUAL_KEYS.len(),
        (None, _) => MAX_DEPTH * USUAL_KEYS.len() + 1,
    };
    (class, usize::MAX - candidate.tensors, &candidate.key)
}

/// Every dict with tensors, breadth first; each dict is visited once, so shared and cyclic ones are no trap.
fn candidates(arena: &Arena, root: Id) -> Vec<Candidate> {
    let mut queue = VecDeque::from([(String::new(), 0, root)]);
    let mut seen = BTreeSet::from([root]);
    let mut found = Vec::new();
    while let Some((key, depth, id)) = queue.pop_front() {
        if depth < MAX_DEPTH {
            for (name, child) in named(arena, id) {
                let usable = name.len() <= 128 && arena.pairs(child).is_some() && !name.contains("optim");
                if usable && seen.len() < MAX_DICTS && seen.insert(child) {
                    let path = if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
                    queue.push_back((path, depth + 1, child));
                }
            }
        }
        let tensors = tensor_count(arena, id);
        if tensors > 0 {
            found.push(Candidate { key, depth, id, tensors });
        }
    }
    found
}

fn tensor_count(arena: &Arena, id: Id) -> usize {
    named(arena, id).filter(|(_, value)| matches!(arena.get(*value), Node::Tensor(_) | Node::Broken(_))).count()
}

/// The entries of a dict whose keys are text.
fn named(arena: &Arena, id: Id) -> impl Iterator<Item = (&str, Id)> {
    let pairs = arena.pairs(id).unwrap_or_default();
    pairs.iter().filter_map(|(key, value)| Some((arena.text(*key)?, *value)))
}

/// The value at a path of keys joined by dots; keys may hold dots themselves.
fn descend(arena: &Arena, root: Id, key: &str) -> Option<Id> {
    let (mut at, mut rest) = (root, key);
    while !rest.is_empty() {
        let step = named(arena, at).filter_map(|(name, value)| {
            let left = rest.strip_prefix(name)?;
            if left.is_empty() { Some((value, left)) } else { Some((value, left.strip_prefix('.')?)) }
        });
        (at, rest) = step.min_by_key(|(_, left)| left.len())?;
    }
    Some(at)
}

fn scalar(arena: &Arena, id: Id) -> Option<Value> {
    match arena.get(id) {
        Node::Bool(value) => Some(Value::from(*value)),
        Node::Int(value) => Some(Value::from(*value)),
        Node::Float(value) => Some(Value::from(*value)),
        Node::Str(value) if value.len() <= MAX_TEXT_BYTES => Some(Value::from(value.as_str())),
        _ => None,
    }
}

/// What a value is, in a word or two.
fn kind(arena: &Arena, node: &Node) -> String {
    match node {
        Node::None => "None".to_owned(),
        Node::Bool(_) => "a truth value".to_owned(),
        Node::Int(_) | Node::BigInt(_) | Node::Float(_) => "a number".to_owned(),
        Node::Bytes(_) | Node::Str(_) => "text".to_owned(),
        Node::List(_) | Node::Tuple(_) | Node::Set => "a list".to_owned(),
        Node::Dict(_) => "a dict".to_owned(),
        Node::Storage(_) => "a bare storage".to_owned(),
        Node::Tensor(_) => "a tensor".to_owned(),
        Node::Global { module, name } => format!("the name `{module}.{name}`"),
        Node::Object(object) => format!("an object of `{}`", arena.class(object)),
        Node::Broken(reason) => reason.clone(),
    }
}

fn describe_root(arena: &Arena, root: Id) -> String {
    let root = arena.get(root);
    match root {
        Node::Object(object) => {
            format!("it holds an object of `{}`, not a state dict", arena.class(object).escape_debug())
        }
        _ => format!("it holds {} without any tensors under names", kind(arena, root)),
    }
}
