//! Shard and embedding sets from the outside: round trips, the manifest chain, and one test per way a file can be damaged.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail loudly")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::Dtype;
use shared::embedding::{EmbeddingDtype, EmbeddingSet, EmbeddingSetDetails, embedding_file_name, write_embeddings};
use shared::manifest::{Identity, Manifest, Stage};
use shared::output::{Begun, OutputDir};
use shared::shard::{ShardSet, ShardSetDetails, ShardWriter, VIEW_PARAMETERS, shard_file_name};
use shared::tensor_file::{GrowingTensorFile, TensorFile, TensorSpec};
use shared::{Error, Fault, Result};

/// Type, shape and bytes of the tensors of a file.
type Parts = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;
type Change = fn(&mut Parts);
type Check = fn(&Fault) -> bool;

const VIEWS: usize = 2;
const SIZE: usize = 3;
const ROW: usize = VIEWS * SIZE * SIZE * 3;

fn begin(path: &Path, stage: Stage, inputs: Vec<shared::manifest::Input>, seed: u64) -> Result<OutputDir> {
    match OutputDir::begin(path, &Identity::new(stage, &serde_json::json!({}), seed, inputs)?, false)? {
        Begun::Writing(dir) => Ok(dir),
        Begun::Finished(_) => Err(Error::invalid("already finished", "")),
    }
}

fn pixels(id: u64) -> Vec<u8> {
    (0..ROW).map(|i| (i as u64 * 7 + id) as u8).collect()
}

/// Two shards of 3 and 2 samples; both announced 3.
fn write_shards(path: &Path, seed: u64) -> Result<Manifest> {
    let dir = begin(path, Stage::DataPrep, Vec::new(), seed)?;
    let mut files = Vec::new();
    for (index, ids) in [vec![10u64, 11, 12], vec![13, 14]].iter().enumerate() {
        let mut writer = ShardWriter::create(path.join(shard_file_name(index)), 3, VIEWS, SIZE, SIZE)?;
        for &id in ids {
            let params: Vec<f32> = (0..VIEWS * VIEW_PARAMETERS.len()).map(|i| i as f32 + id as f32).collect();
            writer.push(id, id as i64 % 2, &pixels(id), &params)?;
        }
        files.push(writer.finish()?);
    }
    let details = ShardSetDetails {
        views: VIEWS,
        height: SIZE,
        width: SIZE,
        classes: vec!["a".into(), "b".into()],
        ..ShardSetDetails::default()
    };
    dir.finish(BTreeMap::from([("samples".into(), 5)]), serde_json::to_value(details).unwrap(), files)
}

fn write_embedding_set(path: &Path, shards: &ShardSet, dtype: EmbeddingDtype) -> Result<Manifest> {
    let input = shards.manifest().as_input("shards", shards.directory());
    let dir = begin(path, Stage::TeacherEmbed, vec![input], 0)?;
    let details = EmbeddingSetDetails { views: VIEWS, embedding_dim: 4, dtype };
    let mut files = Vec::new();
    for (index, shard) in shards.shards().iter().enumerate() {
        let rows: Vec<f32> = shard
            .sample_ids()
            .iter()
            .flat_map(|&id| (0..VIEWS * 4).map(move |i| if i % 4 == (id % 4) as usize { 1.0 } else { 0.0 }))
            .collect();
        files.push(write_embeddings(path.join(embedding_file_name(index)), &details, shard.sample_ids(), &rows)?);
    }
    dir.finish(BTreeMap::new(), serde_json::to_value(details).unwrap(), files)
}

/// Replaces tensors of a shard, keeping the manifest's lengths honest so that the shard's own checks are reached.
fn patch(set: &Path, file: &str, stage: Stage, change: impl FnOnce(&mut Parts)) {
    let path = set.join(file);
    let mut parts = parts_of(&path);
    change(&mut parts);
    let mut writer = GrowingTensorFile::create(&path).unwrap();
    let mut specs = Vec::new();
    for (name, (dtype, shape, bytes)) in &parts {
        writer.append(bytes).unwrap();
        specs.push(TensorSpec::new(name, *dtype, shape));
    }
    let entry = writer.finish(&specs).unwrap();
    let manifest = Manifest::read(set, stage).unwrap();
    let files = manifest.files.iter().map(|f| if f.path == file { entry.clone() } else { f.clone() }).collect();
    Manifest::new(manifest.identity, manifest.counts, manifest.details, files).write(set).unwrap();
}

fn parts_of(path: &Path) -> Parts {
    let file = TensorFile::open(path).unwrap();
    let part = |name: String| {
        let shape = file.shape(&name).unwrap().to_vec();
        let bytes = file.bytes(&name).unwrap().to_vec();
        (name.clone(), (file.dtype(&name).unwrap(), shape, bytes))
    };
    file.names().into_iter().map(part).collect()
}

/// Gives a tensor another shape of as many elements.
fn reshape(parts: &mut Parts, name: &str, shape: &[usize]) {
    parts.get_mut(name).unwrap().1 = shape.to_vec();
}

/// Calls the elements of a tensor something else of the same size.
fn retype(parts: &mut Parts, name: &str, dtype: Dtype) {
    parts.get_mut(name).unwrap().0 = dtype;
}

fn fault(error: Error) -> Fault {
    match error {
        Error::Damaged { fault, .. } => fault,
        other => panic!("not damage: {other}"),
    }
}

#[test]
fn shard_round_trip_gives_every_view_back() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), 0)?;
    let set = ShardSet::open(dir.path())?;
    assert_eq!((set.len(), set.views(), set.shards().len()), (5, VIEWS, 2));
    for index in 0..5 {
        let id = 10 + index as u64;
        assert_eq!((set.sample_id(index), set.label(index)), (id, id as i64 % 2));
        for view in 0..VIEWS {
            let bytes = SIZE * SIZE * 3;
            assert_eq!(set.pixels(index, view)?, &pixels(id)[view * bytes..(view + 1) * bytes]);
            let (shard, row) = set.locate(index);
            let params = set.shards()[shard].view_params(row, view)?;
            assert_eq!(params[1], (view * VIEW_PARAMETERS.len() + 1) as f32 + id as f32);
        }
    }
    Ok(())
}

#[test]
fn short_shard_leaves_no_spool_and_starts_pixels_on_a_page() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), 0)?;
    let names: Vec<String> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().all(|name| !name.starts_with(".tmp-")), "{names:?}");
    for index in 0..2 {
        let bytes = fs::read(dir.path().join(shard_file_name(index))).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!((header + 8) % 4096, 0);
    }
    Ok(())
}

#[test]
fn embeddings_round_trip_in_every_type() -> Result<()> {
    for dtype in [EmbeddingDtype::F16, EmbeddingDtype::Bf16, EmbeddingDtype::F32] {
        let dir = tempfile::tempdir().unwrap();
        write_shards(&dir.path().join("s"), 0)?;
        let shards = ShardSet::open(dir.path().join("s"))?;
        write_embedding_set(&dir.path().join("e"), &shards, dtype)?;
        let set = EmbeddingSet::open(dir.path().join("e"), &shards)?;
        let mut row = [9.0; 4];
        set.read(4, 1, &mut row)?;
        assert_eq!(row, [0.0, 0.0, 1.0, 0.0]);
    }
    Ok(())
}

#[test]
fn embeddings_of_other_shards_are_refused() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    write_shards(&dir.path().join("s"), 0)?;
    write_shards(&dir.path().join("other"), 1)?;
    let shards = ShardSet::open(dir.path().join("s"))?;
    let other = ShardSet::open(dir.path().join("other"))?;
    write_embedding_set(&dir.path().join("e"), &shards, EmbeddingDtype::F16)?;
    let error = EmbeddingSet::open(dir.path().join("e"), &other).unwrap_err();
    assert!(matches!(error, Error::Chain { .. }), "{error}");
    assert!(error.hint().unwrap().contains("teacher-embed embed"));
    Ok(())
}

#[test]
fn embeddings_in_place_of_shards_are_refused() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    write_shards(&dir.path().join("s"), 0)?;
    let shards = ShardSet::open(dir.path().join("s"))?;
    write_embedding_set(&dir.path().join("e"), &shards, EmbeddingDtype::F16)?;
    assert!(matches!(ShardSet::open(dir.path().join("e")).unwrap_err(), Error::Chain { .. }));
    assert!(matches!(EmbeddingSet::open(dir.path().join("s"), &shards).unwrap_err(), Error::Chain { .. }));
    Ok(())
}

#[test]
fn each_damage_to_a_shard_is_named() -> Result<()> {
    let cases: [(&str, Change, Check); 6] = [
        ("ids missing", |p| drop(p.remove("sample_ids")), |f| *f == Fault::MissingTensor("sample_ids".into())),
        ("ids of another type", |p| retype(p, "sample_ids", Dtype::I64), |f| matches!(f, Fault::Dtype { .. })),
        ("pixels missing", |p| drop(p.remove("pixels")), |f| matches!(f, Fault::MissingTensor(_))),
        ("pixels of another shape", |p| reshape(p, "pixels", &[2 * ROW]), |f| matches!(f, Fault::Shape { .. })),
        ("pixels of another type", |p| retype(p, "pixels", Dtype::I8), |f| matches!(f, Fault::Dtype { .. })),
        ("labels of another shape", |p| reshape(p, "labels", &[1, 2]), |f| matches!(f, Fault::Shape { .. })),
    ];
    for (name, change, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        write_shards(dir.path(), 0)?;
        patch(dir.path(), &shard_file_name(1), Stage::DataPrep, change);
        let found = fault(ShardSet::open(dir.path()).unwrap_err());
        assert!(expected(&found), "{name}: {found}");
    }
    Ok(())
}

#[test]
fn label_outside_the_classes_is_refused() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let manifest = write_shards(dir.path(), 0)?;
    let details = ShardSetDetails {
        views: VIEWS,
        height: SIZE,
        width: SIZE,
        classes: vec!["a".into()],
        ..ShardSetDetails::default()
    };
    let details = serde_json::to_value(details).unwrap();
    Manifest::new(manifest.identity, manifest.counts, details, manifest.files).write(dir.path())?;
    assert!(matches!(fault(ShardSet::open(dir.path()).unwrap_err()), Fault::Value(_)));
    Ok(())
}

#[test]
fn truncated_and_lost_shards_are_named() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), 0)?;
    let path = dir.path().join(shard_file_name(1));
    let bytes = fs::read(&path).unwrap();
    shared::io::write_atomic(&path, &bytes[..bytes.len() - 1])?;
    let error = ShardSet::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("shard-00001"), "{error}");
    assert!(matches!(fault(error), Fault::Length { .. }));
    fs::remove_file(&path).unwrap();
    assert!(matches!(ShardSet::open(dir.path()).unwrap_err(), Error::Missing { .. }));
    Ok(())
}

#[test]
fn sample_count_must_agree_with_the_manifest() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let manifest = write_shards(dir.path(), 0)?;
    let counts = BTreeMap::from([("samples".to_string(), 6)]);
    Manifest::new(manifest.identity, counts, manifest.details, manifest.files).write(dir.path())?;
    assert!(matches!(fault(ShardSet::open(dir.path()).unwrap_err()), Fault::Value(_)));
    Ok(())
}

#[test]
fn each_damage_to_an_embedding_file_is_named() -> Result<()> {
    let cases: [(&str, Change, Check); 3] = [
        ("ids missing", |p| drop(p.remove("sample_ids")), |f| matches!(f, Fault::MissingTensor(_))),
        ("another shape", |p| reshape(p, "embeddings", &[3 * VIEWS, 4]), |f| matches!(f, Fault::Shape { .. })),
        ("another type", |p| retype(p, "embeddings", Dtype::BF16), |f| matches!(f, Fault::Dtype { .. })),
    ];
    for (name, change, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        write_shards(&dir.path().join("s"), 0)?;
        let shards = ShardSet::open(dir.path().join("s"))?;
        write_embedding_set(&dir.path().join("e"), &shards, EmbeddingDtype::F16)?;
        patch(&dir.path().join("e"), &embedding_file_name(0), Stage::TeacherEmbed, change);
        let found = fault(EmbeddingSet::open(dir.path().join("e"), &shards).unwrap_err());
        assert!(expected(&found), "{name}: {found}");
    }
    Ok(())
}

#[test]
fn embeddings_of_other_samples_are_refused() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    write_shards(&dir.path().join("s"), 0)?;
    let shards = ShardSet::open(dir.path().join("s"))?;
    let set = dir.path().join("e");
    let manifest = write_embedding_set(&set, &shards, EmbeddingDtype::F32)?;
    let details = EmbeddingSetDetails { views: VIEWS, embedding_dim: 4, dtype: EmbeddingDtype::F32 };
    let entry = write_embeddings(set.join(embedding_file_name(0)), &details, &[10, 12, 11], &[0.0; 24])?;
    let files = vec![entry, manifest.files[1].clone()];
    Manifest::new(manifest.identity, manifest.counts, manifest.details, files).write(&set)?;
    assert!(matches!(fault(EmbeddingSet::open(&set, &shards).unwrap_err()), Fault::Value(_)));
    Ok(())
}

#[test]
fn writer_refuses_rows_of_the_wrong_length() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::create(dir.path().join("s"), 1, VIEWS, SIZE, SIZE)?;
    let params = vec![0.0; VIEWS * VIEW_PARAMETERS.len()];
    assert!(matches!(writer.push(1, 0, &[0; 5], &params).unwrap_err(), Error::Shape { .. }));
    assert!(matches!(writer.push(1, 0, &pixels(1), &params[1..]).unwrap_err(), Error::Shape { .. }));
    writer.push(1, 0, &pixels(1), &params)?;
    assert!(matches!(writer.push(2, 0, &pixels(2), &params).unwrap_err(), Error::Invalid { .. }));
    Ok(())
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn any_shard_size_round_trips(samples in 0usize..5, extra in 0usize..3, height in 1usize..6, width in 1usize..6) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("shard-00000.safetensors");
            let mut writer = ShardWriter::create(&path, samples + extra, 1, height, width).unwrap();
            let row = |i: usize| vec![i as u8 + 1; height * width * 3];
            for i in 0..samples {
                writer.push(i as u64, -1, &row(i), &[i as f32; 18]).unwrap();
            }
            writer.finish().unwrap();
            let details = ShardSetDetails { views: 1, height, width, ..ShardSetDetails::default() };
            let shard = shared::shard::Shard::open(&path, &details).unwrap();
            prop_assert_eq!(shard.len(), samples);
            for i in 0..samples {
                prop_assert_eq!(shard.view(i, 0).unwrap(), row(i));
                prop_assert_eq!(shard.view_params(i, 0).unwrap(), [i as f32; 18]);
            }
        }

        #[test]
        fn random_bytes_never_open(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f");
            shared::io::write_atomic(&path, &bytes).unwrap();
            prop_assert!(TensorFile::open(&path).is_err());
        }
    }
}
