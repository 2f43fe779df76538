//! The format of `torch.save` before PyTorch 1.6: five pickles in a row, then the storages one after the other.
//!
//! The pickles are a magic number, a protocol version, a note on the machine, the object itself, and the list of
//! storage keys. Each storage then is a 64-bit count of elements and their bytes, in the order of that list.

use std::collections::BTreeMap;

use super::object::Node;
use super::pickle::{self, Pickle};
use super::{Archive, Record};
use crate::error::Fault;

/// `0x1950a86a20f9469cfc6c`, as the pickle holds it.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// The version of this layout.
const PROTOCOL: i64 = 1001;

/// Reads the pickles and finds the storages, without touching what they hold.
pub(super) fn open(bytes: &[u8]) -> Result<(Pickle, Archive), Fault> {
    let mut at = 0;
    let mut next = || {
        let pickle = pickle::load(&bytes[at..]).map_err(|fault| match fault {
            Fault::Syntax(message) if at > 0 => Fault::Syntax(format!("from byte {at}: {message}")),
            other => other,
        })?;
        at += pickle.length;
        Ok((pickle, at))
    };
    let (magic, _) = next()?;
    if !matches!(magic.arena.get(magic.root), Node::BigInt(number) if number[..] == MAGIC) {
        let message = "it is a pickle, but not of `torch.save`: the magic number is missing";
        return Err(Fault::Syntax(message.to_owned()));
    }
    let (protocol, _) = next()?;
    if protocol.arena.get(protocol.root) != &Node::Int(PROTOCOL) {
        return Err(Fault::Value(format!("its protocol version is not {PROTOCOL}")));
    }
    let (machine, _) = next()?;
    let order = machine.arena.pairs(machine.root).unwrap_or_default();
    let order = order.iter().find(|(key, _)| machine.arena.text(*key) == Some("little_endian"));
    let big_endian = order.is_some_and(|(_, value)| machine.arena.get(*value) == &Node::Bool(false));
    let (object, _) = next()?;
    let (keys, start) = next()?;
    let keys = match keys.arena.sequence(keys.root) {
        Some(list) => list.iter().map(|key| keys.arena.text(*key).map(str::to_owned)).collect::<Option<Vec<_>>>(),
        None => None,
    };
    let keys = keys.ok_or_else(|| Fault::Value("its list of storage keys is not a list of text".to_owned()))?;
    let sizes: BTreeMap<&str, usize> =
        object.arena.storages().map(|storage| (storage.key.as_str(), storage.element_size)).collect();
    let records = walk(bytes, start as u64, &keys, &sizes, big_endian)?;
    Ok((object, Archive { records, big_endian }))
}

/// Follows the counts from storage to storage.
fn walk(
    bytes: &[u8],
    mut at: u64,
    keys: &[String],
    sizes: &BTreeMap<&str, usize>,
    big_endian: bool,
) -> Result<BTreeMap<String, Record>, Fault> {
    let found = bytes.len() as u64;
    let mut records = BTreeMap::new();
    for key in keys {
        let size = sizes.get(key.as_str()).ok_or_else(|| {
            Fault::Value(format!("storage `{}` is listed but nothing says what it holds", key.escape_debug()))
        })?;
        let count = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).and_then(|rest| rest.first_chunk::<8>());
        let count = count.ok_or(Fault::Length { expected: at.saturating_add(8), found })?;
        let count = if big_endian { u64::from_be_bytes(*count) } else { u64::from_le_bytes(*count) };
        let length = count.checked_mul(*size as u64);
        let end = length.and_then(|length| length.checked_add(at)?.checked_add(8));
        match (length, end) {
            (Some(length), Some(end)) if end <= found => {
                if records.insert(key.clone(), Record::Plain { start: at + 8, length }).is_some() {
                    return Err(Fault::Value(format!("storage `{}` is there twice", key.escape_debug())));
                }
                at = end;
            }
            _ => return Err(Fault::Length { expected: end.unwrap_or(u64::MAX), found }),
        }
    }
    if at != found {
        return Err(Fault::Length { expected: at, found });
    }
    Ok(records)
}
