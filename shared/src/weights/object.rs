//! The values that a pickle builds, held in an arena: nothing here refers to anything but by index, so that deep or
//! cyclic structures cost neither recursion nor reference counts.

use std::collections::BTreeSet;

use super::dtype::Dtype;

/// Index of a [`Node`] in its [`Arena`].
pub(super) type Id = u32;

/// A value of a pickle, as far as checkpoints need it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits, little-endian two's complement.
    BigInt(Vec<u8>),
    Float(f64),
    Bytes(Vec<u8>),
    Str(String),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Set,
    Dict(Vec<(Id, Id)>),
    /// A name that Python would import; here it stays a name.
    Global {
        module: String,
        name: String,
    },
    Storage(Storage),
    Tensor(TensorNode),
    /// The result of a call or class that is not modelled: never made, only noted.
    Object(Object),
    /// A tensor or storage whose description makes no sense; an error only if the state dict holds it.
    Broken(String),
}

/// A storage as a persistent id describes it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Storage {
    /// Names the bytes: a file name in the archive, or a key of the legacy storage list.
    pub(super) key: String,
    /// `None` where the elements are of a type that is not read.
    pub(super) dtype: Option<Dtype>,
    /// Bytes per element.
    pub(super) element_size: usize,
    /// The class PyTorch gave it, for messages.
    pub(super) class: String,
    /// Elements it claims to hold.
    pub(super) elements: u64,
    /// First element of a legacy storage view within the storage `key`.
    pub(super) view_offset: u64,
}

/// A tensor: a strided view of a storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorNode {
    pub(super) storage: Id,
    /// Element type where it differs from that of the storage.
    pub(super) dtype: Option<Dtype>,
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// An instance of something that is not modelled.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Object {
    /// The global that was called, where it was one.
    pub(super) class: Option<Id>,
    /// The attributes that the pickle set, if it set any.
    pub(super) state: Option<Id>,
    /// Entries, where the pickle used it like a dict.
    pub(super) items: Vec<(Id, Id)>,
}

/// Every value of one pickle.
///
/// The interpreter adds at most one node for each opcode, so the arena is bounded by the length of the pickle.
#[derive(Debug, Default)]
pub(super) struct Arena {
    nodes: Vec<Node>,
    /// Pairs that calls have copied: bounded so that a list used a thousand times cannot fill the memory.
    copied_pairs: usize,
    /// Globals that are on no list of this program, as `module.name`.
    pub(super) unknown_globals: BTreeSet<String>,
}

/// Most dimensions that a tensor may have, as in PyTorch.
const MAX_RANK: usize = 64;
/// Longest name of a storage, and of the module or the class of a global.
pub(super) const MAX_NAME_BYTES: usize = 512;
/// Arguments of a call that are looked at.
const MAX_ARGUMENTS: usize = 16;
/// Pairs that calls may copy in one pickle.
const MAX_COPIED_PAIRS: usize = 1 << 20;

/// Classes whose instances carry settings, not weights: they are met in ordinary checkpoints and worth no remark.
const HARMLESS: &[&str] = &[
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.dict",
    "builtins.frozenset",
    "builtins.list",
    "builtins.object",
    "builtins.set",
    "builtins.slice",
    "builtins.tuple",
    "collections.Counter",
    "collections.defaultdict",
    "collections.OrderedDict",
    "copyreg._reconstructor",
    "datetime.datetime",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
];

fn is_expected(module: &str, name: &str) -> bool {
    let numpy = module.strip_prefix("numpy").is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let torch_builtin = module == "torch"
        && (storage_class(module, name).is_some() || Dtype::from_torch_name(name).is_some() || name.contains("int"));
    let rebuild = matches!(module, "torch._utils" | "torch._tensor") && name.starts_with("_rebuild_");
    let full = format!("{module}.{name}");
    numpy || torch_builtin || rebuild || storage_class(module, name).is_some() || HARMLESS.contains(&full.as_str())
}

/// The storage class a global names, if it names one.
fn storage_class(module: &str, name: &str) -> Option<(Option<Dtype>, usize)> {
    matches!(module, "torch" | "torch.cuda" | "torch.storage").then(|| Dtype::from_storage_class(name)).flatten()
}

impl Arena {
    pub(super) fn push(&mut self, node: Node) -> Id {
        let id = self.nodes.len() as Id;
        self.nodes.push(node);
        id
    }

    /// How many values there are.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn get(&self, id: Id) -> &Node {
        self.nodes.get(id as usize).unwrap_or(&Node::None)
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut Node> {
        self.nodes.get_mut(id as usize)
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        if let Node::Str(text) = self.get(id) { Some(text) } else { None }
    }

    fn unsigned(&self, id: Id) -> Option<u64> {
        if let Node::Int(value) = self.get(id) { u64::try_from(*value).ok() } else { None }
    }

    /// The members of a list or tuple.
    pub(super) fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Node::List(members) | Node::Tuple(members) => Some(members),
            _ => None,
        }
    }

    /// The pairs of a dict, or of an object that was filled like one.
    pub(super) fn pairs(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Node::Dict(pairs) => Some(pairs),
            Node::Object(object) if !object.items.is_empty() => Some(&object.items),
            _ => None,
        }
    }

    fn arguments(&self, id: Id) -> Vec<Id> {
        self.sequence(id).unwrap_or_default().iter().take(MAX_ARGUMENTS).copied().collect()
    }

    fn unsigned_sequence(&self, id: Id) -> Option<Vec<u64>> {
        let members = self.sequence(id).filter(|members| members.len() <= MAX_RANK)?;
        members.iter().map(|member| self.unsigned(*member)).collect()
    }

    /// A name that the pickle asks for.
    pub(super) fn global(&mut self, module: &str, name: &str) -> Id {
        // Protocols 0 to 2 use the names of Python 2.
        let module = match module {
            "__builtin__" => "builtins",
            "copy_reg" => "copyreg",
            other => other,
        };
        if !is_expected(module, name) {
            self.unknown_globals.insert(format!("{module}.{name}"));
        }
        self.push(Node::Global { module: module.to_owned(), name: name.to_owned() })
    }

    /// `module.name` of what made an object.
    pub(super) fn class(&self, object: &Object) -> String {
        match object.class.map(|class| self.get(class)) {
            Some(Node::Global { module, name }) => format!("{module}.{name}"),
            _ => "an unnamed class".to_owned(),
        }
    }

    fn object(&mut self, callable: Id) -> Id {
        let class = match self.get(callable) {
            Node::Global { .. } => Some(callable),
            Node::Object(object) => object.class,
            _ => None,
        };
        self.push(Node::Object(Object { class, ..Object::default() }))
    }

    /// What a call in the pickle stands for. Nothing is called: the few functions that PyTorch uses to rebuild tensors
    /// and containers are recognised by name, and everything else becomes an [`Object`].
    pub(super) fn call(&mut self, callable: Id, arguments: Id) -> Id {
        let (module, name) = match self.get(callable) {
            Node::Global { module, name } => (module.clone(), name.clone()),
            _ => return self.object(callable),
        };
        let arguments = self.arguments(arguments);
        match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => {
                let pairs = match arguments.first() {
                    Some(list) => self.pair_list(*list),
                    None => Some(Vec::new()),
                };
                self.push(pairs.map_or(Node::Broken("it is not made of pairs".to_owned()), Node::Dict))
            }
            ("collections", "defaultdict" | "Counter") => self.push(Node::Dict(Vec::new())),
            ("builtins", "set" | "frozenset") => self.push(Node::Set),
            ("torch", "Size") => arguments.first().copied().unwrap_or_else(|| self.push(Node::Tuple(Vec::new()))),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => self.tensor(&arguments, None),
            ("torch._utils", "_rebuild_tensor_v3") => {
                let dtype = arguments.get(6).and_then(|id| match self.get(*id) {
                    Node::Global { name, .. } => Dtype::from_torch_name(name),
                    _ => None,
                });
                match dtype {
                    Some(dtype) => self.tensor(&arguments, Some(dtype)),
                    None => self.object(callable),
                }
            }
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")
            | ("torch.nn.parameter", "Parameter") => match arguments.first() {
                Some(data) => *data,
                None => self.push(Node::Broken("a parameter without data".to_owned())),
            },
            ("torch._tensor", "_rebuild_from_type_v2") => match arguments[..] {
                [function, _, inner, ..] if matches!(self.get(function), Node::Global { name, .. } if name != "_rebuild_from_type_v2") => {
                    self.call(function, inner)
                }
                _ => self.object(callable),
            },
            ("copyreg", "_reconstructor") => {
                let class = arguments.first().copied().unwrap_or(callable);
                self.object(class)
            }
            _ => self.object(callable),
        }
    }

    /// An instance of a class without a call, as opcode `NEWOBJ` asks for.
    pub(super) fn instance(&mut self, class: Id, arguments: Id) -> Id {
        match self.get(class) {
            Node::Global { module, .. } if module == "collections" || module == "torch" => self.call(class, arguments),
            _ => self.object(class),
        }
    }

    fn pair_list(&mut self, list: Id) -> Option<Vec<(Id, Id)>> {
        self.copied_pairs = self.copied_pairs.saturating_add(self.sequence(list)?.len());
        if self.copied_pairs > MAX_COPIED_PAIRS {
            return None;
        }
        let pair = |member: &Id| match self.sequence(*member) {
            Some(&[key, value]) => Some((key, value)),
            _ => None,
        };
        self.sequence(list)?.iter().map(pair).collect()
    }

    fn tensor(&mut self, arguments: &[Id], dtype: Option<Dtype>) -> Id {
        let node = match *arguments {
            [storage, offset, shape, strides, ..] => {
                match (self.unsigned(offset), self.unsigned_sequence(shape), self.unsigned_sequence(strides)) {
                    (Some(offset), Some(shape), Some(strides)) if shape.len() == strides.len() => {
                        Node::Tensor(TensorNode { storage, dtype, offset, shape, strides })
                    }
                    _ => {
                        Node::Broken("its offset, shape or strides are not (up to 64) whole numbers from 0".to_owned())
                    }
                }
            }
            _ => Node::Broken(format!("{} arguments describe it, expected at least 4", arguments.len())),
        };
        self.push(node)
    }

    /// What a persistent id stands for: `('storage', class, key, location, elements[, view])`, or the class of a whole
    /// module, whose source old versions of PyTorch kept beside it.
    pub(super) fn persistent(&mut self, id: Id) -> Id {
        let members = self.arguments(id);
        let kind = members.first().and_then(|kind| self.text(*kind)).unwrap_or_default();
        if kind == "module" && members.len() >= 2 {
            return members[1];
        }
        let storage = if kind == "storage" { self.storage(&members) } else { None };
        let broken = || Node::Broken("its storage is described in an unknown way".to_owned());
        self.push(storage.unwrap_or_else(broken))
    }

    fn storage(&self, members: &[Id]) -> Option<Node> {
        let &[_, class, key, _, elements, ..] = members else { return None };
        let Node::Global { module, name } = self.get(class) else { return None };
        let (dtype, element_size) = storage_class(module, name)?;
        let (view_offset, elements) = match members.get(5).map(|view| self.get(*view)) {
            None | Some(Node::None) => (0, elements),
            Some(Node::Tuple(view)) => (self.unsigned(*view.get(1)?)?, *view.get(2)?),
            Some(_) => return None,
        };
        Some(Node::Storage(Storage {
            key: self.text(key).filter(|key| key.len() <= MAX_NAME_BYTES)?.to_owned(),
            dtype,
            element_size,
            class: name.clone(),
            elements: self.unsigned(elements)?,
            view_offset,
        }))
    }

    /// Every storage that any persistent id named.
    pub(super) fn storages(&self) -> impl Iterator<Item = &Storage> {
        self.nodes.iter().filter_map(|node| if let Node::Storage(storage) = node { Some(storage) } else { None })
    }
}
