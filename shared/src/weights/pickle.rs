//! A pickle interpreter that builds plain values and never runs anything.
//!
//! It reads protocols 0 to 5 as far as `torch.save` and Python 2 and 3 use them. Names that Python would import stay
//! names, calls become [`Node::Object`]s or, for the handful of functions that rebuild tensors, descriptions of
//! tensors. Memory is bounded by the length of the pickle, and there is no recursion.

use std::collections::BTreeMap;

use super::object::{Arena, Id, MAX_NAME_BYTES, Node};
use crate::error::Fault;

/// Values that one pickle may build, some 100 bytes each; a large checkpoint has some ten thousand.
const MAX_VALUES: usize = 1 << 22;

/// One finished pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    pub(super) arena: Arena,
    pub(super) root: Id,
    /// Bytes it took, its `STOP` included.
    pub(super) length: usize,
}

/// Reads the pickle at the start of `bytes`; what follows its `STOP` is left alone.
///
/// # Errors
/// [`Fault::Syntax`] naming the position, when the bytes end early or an opcode cannot be carried out.
pub(super) fn load(bytes: &[u8]) -> Result<Pickle, Fault> {
    let mut machine =
        Machine { bytes, at: 0, arena: Arena::default(), stack: Vec::new(), marks: Vec::new(), memo: BTreeMap::new() };
    loop {
        let at = machine.at;
        let fault = |message: String| Fault::Syntax(format!("pickle, byte {at}: {message}"));
        if let Some(root) = machine.step().map_err(fault)? {
            return Ok(Pickle { length: machine.at, arena: machine.arena, root });
        }
        if machine.arena.len() > MAX_VALUES {
            return Err(fault(format!("more than {MAX_VALUES} values, no checkpoint has as many")));
        }
    }
}

/// The state between two opcodes.
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    arena: Arena,
    stack: Vec<Id>,
    /// Stack heights at the open marks.
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
}

type Step<T> = Result<T, String>;

impl<'a> Machine<'a> {
    fn take(&mut self, count: u64) -> Step<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(count).ok().and_then(|count| rest.get(..count));
        let taken = taken.ok_or_else(|| format!("{count} bytes expected, {} found", rest.len()))?;
        self.at += taken.len();
        Ok(taken)
    }

    /// A little-endian unsigned integer of `N` bytes.
    fn unsigned<const N: usize>(&mut self) -> Step<u64> {
        let mut word = [0; 8];
        word[..N].copy_from_slice(self.take(N as u64)?);
        Ok(u64::from_le_bytes(word))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or("a line does not end")?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|error| format!("a line is not UTF-8: {error}"))
    }

    /// Text of a given length; byte strings of Python 2 that are not UTF-8 are taken as Latin-1.
    fn text(&mut self, count: u64, latin1: bool) -> Step<Node> {
        let bytes = self.take(count)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Node::Str(text.to_owned())),
            Err(_) if latin1 => Ok(Node::Str(bytes.iter().map(|byte| char::from(*byte)).collect())),
            Err(error) => Err(format!("text is not UTF-8: {error}")),
        }
    }

    fn push(&mut self, node: Node) {
        let id = self.arena.push(node);
        self.stack.push(id);
    }

    fn pop(&mut self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the stack is empty".to_owned());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".to_owned())
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.get(floor..).and_then(<[Id]>::last).copied().ok_or_else(|| "the stack is empty".to_owned())
    }

    /// Everything above the last mark, which it closes.
    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, members: Vec<Id>) -> Step<()> {
        let target = self.top()?;
        match self.arena.get_mut(target) {
            Some(Node::List(list)) => list.extend(members),
            Some(Node::Set | Node::Object(_)) => {}
            _ => return Err("members are added to something that is not a list".to_owned()),
        }
        Ok(())
    }

    fn set_items(&mut self, flat: &[Id]) -> Step<()> {
        let (pairs, rest) = flat.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key has no value".to_owned());
        }
        let target = self.top()?;
        let items = match self.arena.get_mut(target) {
            Some(Node::Dict(items)) => items,
            Some(Node::Object(object)) => &mut object.items,
            _ => return Err("entries are added to something that is not a dict".to_owned()),
        };
        items.extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let target = self.top()?;
        if let Some(Node::Object(object)) = self.arena.get_mut(target) {
            object.state = Some(state);
        }
        Ok(())
    }

    fn remember(&mut self, index: u64) -> Step<()> {
        let index = u32::try_from(index).map_err(|_error| format!("memo index {index} is out of range"))?;
        let top = self.top()?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u64) -> Step<()> {
        let found = u32::try_from(index).ok().and_then(|index| self.memo.get(&index).copied());
        self.stack.push(found.ok_or_else(|| format!("memo entry {index} does not exist"))?);
        Ok(())
    }

    fn long(&mut self, count: u64) -> Step<Node> {
        let bytes = self.take(count)?;
        if bytes.len() > 8 {
            return Ok(Node::BigInt(bytes.to_vec()));
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut word = if negative { [0xff; 8] } else { [0; 8] };
        word[..bytes.len()].copy_from_slice(bytes);
        Ok(Node::Int(i64::from_le_bytes(word)))
    }

    /// Members of a textual protocol 0 literal.
    fn quoted(line: &str) -> Step<Node> {
        let inner = ['\'', '"'].iter().find_map(|quote| line.strip_prefix(*quote)?.strip_suffix(*quote));
        match inner {
            Some(text) if !text.contains('\\') => Ok(Node::Str(text.to_owned())),
            _ => Err("a quoted string is not closed or holds escapes, which are not read".to_owned()),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Step<Id> {
        if module.len().max(name.len()) > MAX_NAME_BYTES {
            return Err(format!("a global has a name of over {MAX_NAME_BYTES} bytes"));
        }
        Ok(self.arena.global(module, name))
    }

    /// Carries out one opcode; the root when it was `STOP`.
    fn step(&mut self) -> Step<Option<Id>> {
        let opcode = self.take(1)?[0];
        match opcode {
            b'.' => return self.pop().map(Some),
            0x80 => {
                let protocol = self.unsigned::<1>()?;
                if protocol > 5 {
                    return Err(format!("protocol {protocol} is not known, expected 0 to 5"));
                }
            }
            0x95 => {
                let frame = self.unsigned::<8>()?;
                let rest = (self.bytes.len() - self.at) as u64;
                if frame > rest {
                    return Err(format!("a frame of {frame} bytes expected, {rest} found"));
                }
            }
            // Stack and memo.
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => self.stack.push(self.top()?),
            b'q' => {
                let index = self.unsigned::<1>()?;
                self.remember(index)?;
            }
            b'r' => {
                let index = self.unsigned::<4>()?;
                self.remember(index)?;
            }
            b'p' => {
                let index = parse(self.line()?)?;
                self.remember(index)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' => {
                let index = self.unsigned::<1>()?;
                self.recall(index)?;
            }
            b'j' => {
                let index = self.unsigned::<4>()?;
                self.recall(index)?;
            }
            b'g' => {
                let index = parse(self.line()?)?;
                self.recall(index)?;
            }
            _ => {
                let node = self.literal(opcode)?;
                if let Some(node) = node {
                    self.push(node);
                } else {
                    self.compound(opcode)?;
                }
            }
        }
        Ok(None)
    }

    /// Opcodes that push a value standing by itself.
    fn literal(&mut self, opcode: u8) -> Step<Option<Node>> {
        Ok(Some(match opcode {
            b'N' => Node::None,
            0x88 => Node::Bool(true),
            0x89 => Node::Bool(false),
            b'K' => Node::Int(self.unsigned::<1>()? as i64),
            b'M' => Node::Int(self.unsigned::<2>()? as i64),
            b'J' => Node::Int(i64::from(self.unsigned::<4>()? as u32 as i32)),
            b'I' => match self.line()? {
                "00" => Node::Bool(false),
                "01" => Node::Bool(true),
                line => Node::Int(parse(line)?),
            },
            b'L' => Node::Int(parse(self.line()?.trim_end_matches('L'))?),
            0x8a => {
                let count = self.unsigned::<1>()?;
                self.long(count)?
            }
            0x8b => {
                let count = self.unsigned::<4>()?;
                self.long(count)?
            }
            b'F' => Node::Float(parse(self.line()?)?),
            b'G' => Node::Float(f64::from_bits(self.unsigned::<8>()?.swap_bytes())),
            b'S' => Self::quoted(self.line()?)?,
            b'V' => match self.line()? {
                line if line.contains('\\') => return Err("escapes in text are not read".to_owned()),
                line => Node::Str(line.to_owned()),
            },
            b'U' => {
                let count = self.unsigned::<1>()?;
                self.text(count, true)?
            }
            b'T' => {
                let count = self.unsigned::<4>()?;
                self.text(count, true)?
            }
            0x8c => {
                let count = self.unsigned::<1>()?;
                self.text(count, false)?
            }
            b'X' => {
                let count = self.unsigned::<4>()?;
                self.text(count, false)?
            }
            0x8d => {
                let count = self.unsigned::<8>()?;
                self.text(count, false)?
            }
            b'C' => {
                let count = self.unsigned::<1>()?;
                Node::Bytes(self.take(count)?.to_vec())
            }
            b'B' => {
                let count = self.unsigned::<4>()?;
                Node::Bytes(self.take(count)?.to_vec())
            }
            0x8e | 0x96 => {
                let count = self.unsigned::<8>()?;
                Node::Bytes(self.take(count)?.to_vec())
            }
            b')' => Node::Tuple(Vec::new()),
            b']' => Node::List(Vec::new()),
            b'}' => Node::Dict(Vec::new()),
            0x8f => Node::Set,
            b'l' => Node::List(self.pop_mark()?),
            b't' => Node::Tuple(self.pop_mark()?),
            0x91 => {
                self.pop_mark()?;
                Node::Set
            }
            0x85 => Node::Tuple(vec![self.pop()?]),
            0x86 => {
                let second = self.pop()?;
                Node::Tuple(vec![self.pop()?, second])
            }
            0x87 => {
                let (third, second) = (self.pop()?, self.pop()?);
                Node::Tuple(vec![self.pop()?, second, third])
            }
            _ => return Ok(None),
        }))
    }

    /// Opcodes that combine what is on the stack.
    fn compound(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            b'd' => {
                let members = self.pop_mark()?;
                self.push(Node::Dict(Vec::new()));
                self.set_items(&members)?;
            }
            b'a' => {
                let member = self.pop()?;
                self.append(vec![member])?;
            }
            b'e' | 0x90 => {
                let members = self.pop_mark()?;
                self.append(members)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let members = self.pop_mark()?;
                self.set_items(&members)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                let id = self.global(module, name)?;
                self.stack.push(id);
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let named = match (self.arena.text(module), self.arena.text(name)) {
                    (Some(module), Some(name)) => (module.to_owned(), name.to_owned()),
                    _ => return Err("a global is not named by two strings".to_owned()),
                };
                let id = self.global(&named.0, &named.1)?;
                self.stack.push(id);
            }
            b'R' => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                let id = self.arena.call(callable, arguments);
                self.stack.push(id);
            }
            0x81 => {
                let (arguments, class) = (self.pop()?, self.pop()?);
                let id = self.arena.instance(class, arguments);
                self.stack.push(id);
            }
            0x92 => {
                let (_named, arguments, class) = (self.pop()?, self.pop()?, self.pop()?);
                let id = self.arena.instance(class, arguments);
                self.stack.push(id);
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                self.pop_mark()?;
                let class = self.global(module, name)?;
                let none = self.arena.push(Node::Tuple(Vec::new()));
                let id = self.arena.instance(class, none);
                self.stack.push(id);
            }
            b'o' => {
                let members = self.pop_mark()?;
                let class = *members.first().ok_or("an object has no class")?;
                let none = self.arena.push(Node::Tuple(Vec::new()));
                let id = self.arena.instance(class, none);
                self.stack.push(id);
            }
            b'b' => self.build()?,
            b'Q' => {
                let id = self.pop()?;
                let id = self.arena.persistent(id);
                self.stack.push(id);
            }
            b'P' => return Err("storages named by a line of text are not read".to_owned()),
            0x82..=0x84 => return Err("codes of Python's extension registry are not read".to_owned()),
            0x97 | 0x98 => return Err("out-of-band buffers are not read".to_owned()),
            _ => return Err(format!("opcode {opcode:#04x} is not known")),
        }
        Ok(())
    }
}

fn parse<T: std::str::FromStr>(line: &str) -> Step<T> {
    line.trim().parse().map_err(|_error| format!("`{}` is not a number", line.escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(bytes: &[u8]) -> String {
        load(bytes).unwrap_err().to_string()
    }

    #[test]
    fn protocol_0_and_5_give_the_same_dict() {
        let textual = b"(dp0\nS'a'\np1\nI12\nsV b\nF0.5\ns.";
        let binary = b"\x80\x05\x95\x16\0\0\0\0\0\0\0}\x94(\x8c\x01a\x94K\x0c\x8c\x02 b\x94G?\xe0\0\0\0\0\0\0u.";
        for bytes in [&textual[..], &binary[..]] {
            let pickle = load(bytes).unwrap();
            let pairs = pickle.arena.pairs(pickle.root).unwrap();
            let read = |id| pickle.arena.get(id).clone();
            assert_eq!((read(pairs[0].0), read(pairs[0].1)), (Node::Str("a".into()), Node::Int(12)));
            assert_eq!((read(pairs[1].0), read(pairs[1].1)), (Node::Str(" b".into()), Node::Float(0.5)));
            assert_eq!(pickle.length, bytes.len());
        }
    }

    #[test]
    fn integers_of_every_width_keep_their_sign() {
        let cases: [(&[u8], i64); 6] = [
            (b"K\xff.", 255),
            (b"M\xff\xff.", 65_535),
            (b"J\xff\xff\xff\xff.", -1),
            (b"\x8a\0.", 0),
            (b"\x8a\x02\x00\x80.", -32_768),
            (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f.", i64::MAX),
        ];
        for (bytes, expected) in cases {
            let pickle = load(bytes).unwrap();
            assert_eq!(pickle.arena.get(pickle.root), &Node::Int(expected));
        }
    }

    #[test]
    fn a_dict_may_hold_itself() {
        let pickle = load(b"\x80\x02}q\0X\x04\0\0\0selfh\0s.").unwrap();
        assert_eq!(pickle.arena.pairs(pickle.root).unwrap()[0].1, pickle.root);
    }

    #[test]
    fn broken_streams_name_the_rule_and_the_byte() {
        assert_eq!(fault(b""), "pickle, byte 0: 1 bytes expected, 0 found");
        assert_eq!(fault(b"\x80\x09."), "pickle, byte 0: protocol 9 is not known, expected 0 to 5");
        assert_eq!(fault(b"h\x07."), "pickle, byte 0: memo entry 7 does not exist");
        assert_eq!(fault(b"."), "pickle, byte 0: the stack is empty");
        assert_eq!(fault(b"N(0t."), "pickle, byte 3: there is no mark");
        assert_eq!(fault(b"((K\x01}s."), "pickle, byte 5: the stack is empty");
        assert_eq!(fault(b"}(K\x01u."), "pickle, byte 4: a key has no value");
        assert_eq!(fault(b"K\x01K\x02a."), "pickle, byte 4: members are added to something that is not a list");
        assert_eq!(fault(b"\x82\x01."), "pickle, byte 0: codes of Python's extension registry are not read");
        assert_eq!(fault(b"X\xff\xff\xff\xffabc."), "pickle, byte 0: 4294967295 bytes expected, 4 found");
        assert_eq!(fault(b"\x95\xff\xff\xff\xff\xff\xff\xff\xff."), {
            "pickle, byte 0: a frame of 18446744073709551615 bytes expected, 1 found"
        });
    }

    #[test]
    fn calls_of_unknown_functions_are_noted_and_not_made() {
        let pickle = load(b"cposix\nsystem\n(S'touch pwned'\ntR.").unwrap();
        let Node::Object(object) = pickle.arena.get(pickle.root) else { panic!("not an object") };
        assert_eq!(pickle.arena.class(object), "posix.system");
        assert_eq!(pickle.arena.unknown_globals.iter().collect::<Vec<_>>(), ["posix.system"]);
    }
}
