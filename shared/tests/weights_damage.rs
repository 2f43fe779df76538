//! Damaged and malicious checkpoints: one test per rule, asserting what the reader says.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may fail loudly")]

use std::io::{Cursor, Write as _};
use std::path::Path;

use proptest::prelude::*;
use shared::weights::Checkpoint;
use shared::{Error, Fault};

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/weights").join(name)).unwrap()
}

/// Opens bytes as a checkpoint and reads every tensor.
fn read(bytes: &[u8]) -> Result<Vec<Vec<f32>>, Error> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let checkpoint = Checkpoint::open(file.path())?;
    checkpoint.entries().iter().map(|entry| checkpoint.values(entry.name())).collect()
}

/// The broken rule, in words.
fn fault(bytes: &[u8]) -> String {
    match read(bytes) {
        Err(Error::Damaged { fault, .. }) => fault.to_string(),
        other => panic!("not damaged: {other:?}"),
    }
}

fn refusal(bytes: &[u8]) -> String {
    match read(bytes) {
        Err(Error::Invalid { message, .. }) => message.split_once("` ").unwrap().1.to_owned(),
        other => panic!("not refused: {other:?}"),
    }
}

fn text(value: &str) -> Vec<u8> {
    [b"X", &(value.len() as u32).to_le_bytes()[..], value.as_bytes()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

fn tuple(values: &[i64]) -> Vec<u8> {
    [&b"("[..], &values.iter().flat_map(|value| int(*value)).collect::<Vec<_>>(), b"t"].concat()
}

/// A pickle `{"w": tensor}` of protocol 2.
fn tensor(elements: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let storage =
        [&b"("[..], &text("storage"), b"ctorch\nFloatStorage\n", &text("0"), &text("cpu"), &int(elements), b"tQ"];
    let rebuilt = [&int(offset)[..], &tuple(shape), &tuple(strides), b"\x89NtR"].concat();
    let call = [&b"ctorch._utils\n_rebuild_tensor_v2\n("[..], &storage.concat(), &rebuilt].concat();
    [&b"\x80\x02}"[..], &text("w"), &call, b"s."].concat()
}

fn archive(records: &[(&str, &[u8])], method: zip::CompressionMethod) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, data) in records {
        let options = zip::write::SimpleFileOptions::default().compression_method(method);
        writer.start_file(format!("archive/{name}"), options).unwrap();
        writer.write_all(data).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn stored(pickle: &[u8], storage: Option<&[u8]>) -> Vec<u8> {
    let mut records = vec![("data.pkl", pickle)];
    records.extend(storage.map(|bytes| ("data/0", bytes)));
    archive(&records, zip::CompressionMethod::Stored)
}

#[test]
fn crafted_tensor_is_read_when_nothing_is_wrong() {
    let storage: Vec<u8> = [1f32, 2., 3., 4.].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(read(&stored(&tensor(4, 1, &[3], &[1]), Some(&storage))).unwrap(), [[2., 3., 4.]]);
}

#[test]
fn truncated_zip_is_damaged_at_every_length() {
    let bytes = golden("moco_zip.pth.tar");
    for length in (4..bytes.len()).step_by(7) {
        assert!(fault(&bytes[..length]).starts_with("zip archive: "), "at {length}");
    }
}

#[test]
fn truncated_legacy_file_is_damaged_at_every_length() {
    let bytes = golden("moco_legacy.pth.tar");
    for length in 1..bytes.len() {
        let fault = fault(&bytes[..length]);
        assert!(fault.contains("bytes expected") || fault.contains("a line does not end"), "at {length}: {fault}");
    }
    let short = [bytes.len() as u64, bytes.len() as u64 - 1].map(|n| n.to_string());
    assert_eq!(fault(&bytes[..bytes.len() - 1]), format!("{} bytes expected, {} found", short[0], short[1]));
}

#[test]
fn legacy_file_that_goes_on_is_damaged() {
    let bytes = [golden("moco_legacy.pth.tar"), vec![0]].concat();
    assert!(fault(&bytes).ends_with("found"));
}

#[test]
fn pickle_without_the_magic_number_is_not_of_torch() {
    assert_eq!(fault(b"\x80\x02}."), "it is a pickle, but not of `torch.save`: the magic number is missing");
    let mut bytes = golden("moco_legacy.pth.tar");
    bytes[6] ^= 1;
    assert!(fault(&bytes).contains("the magic number is missing"));
}

#[test]
fn legacy_protocol_version_is_checked() {
    let mut bytes = golden("moco_legacy.pth.tar");
    let version = bytes.windows(4).position(|window| window == b"M\xe9\x03.").unwrap();
    bytes[version + 1] = 0;
    assert_eq!(fault(&bytes), "its protocol version is not 1001");
}

#[test]
fn missing_storage_is_named() {
    assert_eq!(fault(&stored(&tensor(4, 0, &[4], &[1]), None)), "tensor `w`: its storage `0` is missing");
}

#[test]
fn short_storage_is_damaged() {
    let bytes = stored(&tensor(4, 0, &[4], &[1]), Some(&[0; 12]));
    assert_eq!(fault(&bytes), "tensor `w`: its storage `0` claims 16 bytes, the file holds 12");
}

#[test]
fn huge_claims_are_refused_before_anything_is_allocated() {
    let claim = 1 << 40;
    let bytes = stored(&tensor(claim, 0, &[claim], &[1]), Some(&[0; 16]));
    assert_eq!(fault(&bytes), "tensor `w`: its storage `0` claims 4398046511104 bytes, the file holds 16");
    let bytes = stored(&tensor(4, 0, &[claim], &[0]), Some(&[0; 16]));
    assert!(fault(&bytes).ends_with("is 1099511627776 elements, more than the file can hold"));
    let bytes = stored(&tensor(i64::MAX, 0, &[4], &[1]), Some(&[0; 16]));
    assert!(fault(&bytes).contains("claims over 2^64 bytes"));
}

#[test]
fn legacy_storage_with_a_huge_count_is_damaged() {
    let mut bytes = golden("views_legacy.pth");
    let at = bytes.len() - 24 * 4 - 8;
    assert_eq!(bytes[at..at + 8], 24u64.to_le_bytes());
    bytes[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert!(fault(&bytes).starts_with("4398046"));
    bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(fault(&bytes).starts_with("18446744073709551615 bytes expected"));
}

#[test]
fn views_beyond_their_storage_are_damaged() {
    let view =
        |offset, shape: &[i64], strides: &[i64]| fault(&stored(&tensor(4, offset, shape, strides), Some(&[0; 16])));
    assert!(view(1, &[4], &[1]).ends_with("needs 5 elements, its storage has 4"));
    assert!(view(0, &[2, 2], &[3, 1]).ends_with("needs 5 elements, its storage has 4"));
    assert!(view(i64::MAX, &[4], &[1]).ends_with("its storage has 4"));
    assert!(view(1, &[3], &[i64::MAX]).ends_with("exceeds 64 bits"));
    assert!(view(-1, &[4], &[1]).contains("are not (up to 64) whole numbers from 0"));
    assert!(view(0, &[4], &[-1]).contains("are not (up to 64) whole numbers from 0"));
    assert!(view(0, &[2, 2], &[1]).contains("are not (up to 64) whole numbers from 0"));
    assert!(view(0, &[1; 65], &[1; 65]).contains("are not (up to 64) whole numbers from 0"));
}

#[test]
fn compressed_record_that_claims_too_much_is_damaged() {
    let pickle = tensor(4, 0, &[4], &[1]);
    let records: [(&str, &[u8]); 2] = [("data.pkl", &pickle), ("data/0", &[0; 16])];
    let mut bytes = archive(&records, zip::CompressionMethod::Deflated);
    assert_eq!(read(&bytes).unwrap(), [[0.; 4]]);
    let name = b"archive/data/0";
    let entry = bytes.windows(name.len()).rposition(|window| window == name).unwrap() - 46;
    assert_eq!(bytes[entry..entry + 4], *b"PK\x01\x02");
    bytes[entry + 24..entry + 28].copy_from_slice(&(1u32 << 30).to_le_bytes());
    assert!(fault(&bytes).contains("claims 1073741824 bytes in"));
    bytes[entry + 24..entry + 28].copy_from_slice(&17u32.to_le_bytes());
    assert!(read(&bytes).is_err());
}

#[test]
fn zip_of_something_else_is_refused() {
    let bytes = archive(&[("readme.txt", b"hello")], zip::CompressionMethod::Stored);
    assert_eq!(fault(&bytes), "a zip archive without `data.pkl` is not of `torch.save`");
    let bytes = archive(&[("data.pkl", b"\x80\x02N."), ("code/a.py", b"")], zip::CompressionMethod::Stored);
    assert!(fault(&bytes).starts_with("it is a TorchScript program"));
    let bytes = archive(&[("data.pkl", b"\x80\x02N."), ("byteorder", b"mixed")], zip::CompressionMethod::Stored);
    assert_eq!(fault(&bytes), "its byte order is neither `little` nor `big`");
}

#[test]
fn memo_miss_and_stack_underflow_are_damaged() {
    assert_eq!(fault(&stored(b"\x80\x02h\x05.", None)), "pickle, byte 2: memo entry 5 does not exist");
    assert_eq!(fault(&stored(b"\x80\x02R.", None)), "pickle, byte 2: the stack is empty");
}

#[test]
fn deep_nesting_is_walked_without_recursion() {
    let nested = |open: &[u8], close: &[u8]| {
        let body = [open.repeat(200_000), b"N".to_vec(), close.repeat(200_000)].concat();
        stored(&[b"\x80\x02", &body[..], b"."].concat(), None)
    };
    let key = [&b"}"[..], &text("state_dict")].concat();
    assert!(refusal(&nested(&key, b"s")).contains("without any tensors under names"));
    assert!(refusal(&nested(b"]", b"a")).contains("it holds a list without any tensors"));
    assert!(refusal(&nested(b"(", b"t")).contains("it holds a list without any tensors"));
}

#[test]
fn a_list_used_a_million_times_is_not_copied_a_million_times() {
    // A list of 100,000 pairs, then 100,000 ordered dicts made of it: 10^10 pairs if each were filled.
    let pairs = [&b"]q\x00("[..], &b"NN\x86".repeat(100_000), b"e0"].concat();
    let calls = [&b"("[..], &b"ccollections\nOrderedDict\nh\x00\x85R".repeat(100_000), b"l"].concat();
    let bytes = stored(&[&b"\x80\x02"[..], &pairs, &calls, b"."].concat(), None);
    assert!(refusal(&bytes).contains("it holds a list without any tensors"));
}

#[test]
fn whole_module_is_refused_with_its_class() {
    let pickle = b"\x80\x02cmy.models\nNet\n)\x81}X\x01\0\0\0aNsb.";
    assert!(refusal(&stored(pickle, None)).contains("it holds an object of `my.models.Net`, not a state dict"));
}

#[test]
fn other_kinds_of_file_are_named() {
    let mut tar = vec![0; 600];
    tar[257..262].copy_from_slice(b"ustar");
    assert!(refusal(&tar).contains("it is a tar archive, the format of PyTorch before"));
    assert!(refusal(b"").ends_with("it is empty"));
    assert!(refusal(b"\x1f\x8b\x08 compressed").ends_with("it is compressed by gzip"));
    assert!(refusal(b"\n<!DOCTYPE html>").ends_with("it is a web page"));
    assert!(refusal(b"version https://git-lfs.github.com/spec/v1").contains("Git LFS"));
    assert!(refusal(b"hello, world").contains("starts like neither"));
    assert!(matches!(Checkpoint::open("/nonexistent/x.pth"), Err(Error::Missing { .. })));
}

#[test]
fn fault_names_the_tensor_even_when_its_name_holds_control_characters() {
    let mut pickle = tensor(4, 0, &[4], &[1]);
    let at = pickle.windows(1).position(|byte| byte == b"w").unwrap();
    pickle[at] = 0x1b;
    let Err(Error::Damaged { fault: Fault::Value(message), .. }) = read(&stored(&pickle, None)) else { panic!() };
    assert_eq!(message, "tensor `\\u{1b}`: its storage `0` is missing");
}

/// Bytes with every occurrence of a name replaced by another of the same length.
fn renamed(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    let places: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
    assert!(places.len() == 2 && from.len() == to.len(), "the local and the central header");
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

#[test]
fn zip_entries_of_one_name_are_refused() {
    let pickle = tensor(4, 0, &[4], &[1]);
    let storages: [(&str, &[u8]); 3] = [("data.pkl", &pickle), ("data/0", &[0; 16]), ("data/1", &[1; 16])];
    let bytes = archive(&storages, zip::CompressionMethod::Stored);
    assert_eq!(read(&bytes).unwrap(), [[0.; 4]]);
    let twice = "zip archive: 3 entries have 2 names, one is there twice";
    assert_eq!(fault(&renamed(bytes, b"archive/data/1", b"archive/data/0")), twice);
    let pickles: [(&str, &[u8]); 3] = [("data.pkl", &pickle), ("data.pkm", b"\x80\x02N."), ("data/0", &[0; 16])];
    let bytes = archive(&pickles, zip::CompressionMethod::Stored);
    assert_eq!(fault(&renamed(bytes, b"archive/data.pkm", b"archive/data.pkl")), twice);
}

#[test]
fn names_of_a_state_dict_that_are_there_twice_are_refused() {
    let once = tensor(4, 0, &[4], &[1]);
    let entry = &once[3..once.len() - 1];
    let bytes = stored(&[&b"\x80\x02}"[..], entry, entry, b"."].concat(), Some(&[0; 16]));
    assert!(refusal(&bytes).ends_with("its state dict holds `w` twice"));
}

#[test]
fn storages_of_a_legacy_file_that_are_there_twice_are_refused() {
    // The fifth pickle lists the keys, a storage of four floats follows.
    let object = tensor(4, 0, &[4], &[1]);
    let keys = [&b"\x80\x02]("[..], &text("0"), &text("0"), b"e."].concat();
    let storage = [&4u64.to_le_bytes()[..], &[0; 16]].concat();
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
    let head = [&magic[..], b"\x80\x02M\xe9\x03.", b"\x80\x02}.", &object].concat();
    assert_eq!(fault(&[&head[..], &keys, &storage, &storage].concat()), "storage `0` is there twice");
    let keys = [&b"\x80\x02]("[..], &text("0"), b"e."].concat();
    assert_eq!(read(&[&head[..], &keys, &storage].concat()).unwrap(), [[0.; 4]]);
}

/// A safetensors file with a header of our own.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn safetensors_names_that_are_there_twice_are_refused() {
    let one = r#""w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#;
    assert_eq!(read(&safetensors(&format!("{{{one}}}"), 16)).unwrap(), [[0.; 4]]);
    let found = fault(&safetensors(&format!("{{{one},{one}}}"), 16));
    assert!(found.starts_with("safetensors: `w` is there twice"), "{found}");
}

#[test]
fn safetensors_that_claim_too_much_are_damaged() {
    let claims = [
        r#"{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}"#,
        r#"{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}"#,
        r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,16]}}"#,
        r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#,
        r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[18446744073709551600,18446744073709551615]}}"#,
        r#"{"w":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#,
    ];
    for header in claims {
        let found = fault(&safetensors(header, 16));
        assert!(found.starts_with("safetensors: "), "{header}: {found}");
    }
    let mut bytes = safetensors(r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, 16);
    bytes[..8].copy_from_slice(&99_999_999u64.to_le_bytes());
    assert!(fault(&bytes).starts_with("safetensors: "));
}

#[test]
fn compressed_zeros_that_would_fill_the_memory_are_refused() {
    // 64 MiB of zeros in 64 KiB: a thousandfold, which deflate can truly do.
    let zeros = vec![0; 1 << 26];
    let pickle = tensor(1 << 24, 0, &[1 << 24], &[1]);
    let records: [(&str, &[u8]); 2] = [("data.pkl", &pickle), ("data/0", &zeros)];
    let bytes = archive(&records, zip::CompressionMethod::Deflated);
    assert!(bytes.len() < 1 << 17);
    assert!(fault(&bytes).contains("claims 67108864 bytes in"));
}

#[test]
fn pickles_of_endless_values_are_refused() {
    let endless = [&b"\x80\x02("[..], &b"N".repeat((1 << 22) + 1), b"l."].concat();
    assert!(fault(&stored(&endless, None)).ends_with("more than 4194304 values, no checkpoint has as many"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(start in 0..5usize, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let magic = golden("moco_legacy.pth.tar")[..14].to_vec();
        let start: &[u8] = [&b""[..], b"\x80\x02", b"PK\x03\x04", &magic, b"\x80\0\0\0\0\0\0\0{\"w\":"][start];
        prop_assert!(read(&[start, &bytes].concat()).is_err());
    }

    #[test]
    fn random_pickles_never_panic(bytes in prop::collection::vec(
        prop::sample::select(b"()]}tldeausbRQN0122.qhK\x00\x01\x05\x81\x85\x86\x87\x88\x8f\x90\x93\x94c\nX".to_vec()), 0..200,
    )) {
        let _unread = read(&stored(&[&bytes[..], b"."].concat(), Some(&[0; 16])));
    }

    #[test]
    fn flipped_bytes_never_panic(
        which in 0..5usize,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let names = ["moco_zip.pth.tar", "moco_legacy.pth.tar", "objects_zip.pth", "views_legacy.pth", "deflated.pth"];
        let mut bytes = golden(names[which]);
        for (index, value) in flips {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        let _unread = read(&bytes);
    }
}
