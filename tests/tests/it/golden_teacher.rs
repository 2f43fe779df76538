//! Teacher embeddings against PyTorch (`tests/golden/teacher.py`): from stored pixels and a checkpoint to stored rows.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use shared::embedding::{EmbeddingDtype, EmbeddingSet};
use shared::manifest::{Identity, Stage};
use shared::models::{Arch, HeadConfig, names_and_shapes};
use shared::output::{Begun, OutputDir};
use shared::shard::{ShardSet, ShardSetDetails, ShardWriter, VIEW_PARAMETERS, shard_file_name};
use shared::tensor_file::write_tensors;
use teacher_embed::config::EmbedConfig;
use tests::formula;

const SAMPLES: usize = 3;
const VIEWS: usize = 2;
const SIDE: usize = 40;
const HEAD: HeadConfig = HeadConfig { hidden: 48, embedding_dim: 16 };
/// Against f64: a row of f32 arithmetic through 50 layers is off by some 1e-6 of its length.
const TOLERANCE: f64 = 2e-5;

fn write_shards(path: &Path) -> Result<()> {
    let identity = Identity::new(Stage::DataPrep, &serde_json::json!({}), 0, Vec::new())?;
    let Begun::Writing(output) = OutputDir::begin(path, &identity, false)? else { bail!("already finished") };
    let row = VIEWS * SIDE * SIDE * 3;
    let pixels: Vec<u8> = formula::unit("pixels", SAMPLES * row).map(|u| (u * 256.0) as u8).collect();
    let mut writer = ShardWriter::create(path.join(shard_file_name(0)), SAMPLES, VIEWS, SIDE, SIDE)?;
    for (id, pixels) in pixels.chunks(row).enumerate() {
        writer.push(id as u64, -1, pixels, &[0.0; VIEWS * VIEW_PARAMETERS.len()])?;
    }
    let details = ShardSetDetails { views: VIEWS, height: SIDE, width: SIDE, classes: Vec::new() };
    let counts = BTreeMap::from([("samples".into(), SAMPLES as u64)]);
    output.finish(counts, serde_json::to_value(details)?, vec![writer.finish()?])?;
    Ok(())
}

fn write_weights(path: &Path, arch: Arch, method: &str) -> Result<()> {
    let mut names = names_and_shapes(arch, (method == "moco-v2").then_some(HEAD))?;
    if method == "moco-v1" {
        names.push(("fc.weight".into(), vec![HEAD.embedding_dim, arch.feature_width()]));
        names.push(("fc.bias".into(), vec![HEAD.embedding_dim]));
    }
    let prefixed = formula::parameters(&names)?.into_iter().map(|(name, x)| (format!("module.encoder_q.{name}"), x));
    write_tensors(path, &BTreeMap::new(), &prefixed.collect())?;
    Ok(())
}

#[test]
fn teacher_embeddings_equal_those_of_pytorch() -> Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/teacher.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden)?)?;
    let directory = tempfile::tempdir()?;
    let path = directory.path();
    write_shards(&path.join("shards"))?;
    let shards = ShardSet::open(path.join("shards"))?;
    let cases = golden["cases"].as_array().context("no cases")?;
    assert_eq!(cases.len(), 4);
    for (index, case) in cases.iter().enumerate() {
        let (arch, method) = (case["arch"].as_str().context("arch")?, case["method"].as_str().context("method")?);
        let weights = path.join(format!("{index}.safetensors"));
        write_weights(&weights, arch.parse()?, method)?;
        let mut config = EmbedConfig::new(path.join("shards"), weights, path.join(index.to_string()));
        config.dtype = EmbeddingDtype::F32;
        let embedded = teacher_embed::embed(&config)?;
        assert_eq!(Value::from(embedded.teacher.embedding_dim), case["width"], "{arch} {method}");
        assert_eq!(embedded.teacher.method.name(), method);
        let set = EmbeddingSet::open(&config.output, &shards)?;
        let mut row = vec![0.0; set.embedding_dim()];
        for (number, expected) in case["rows"].as_array().context("rows")?.iter().enumerate() {
            set.read(number / VIEWS, number % VIEWS, &mut row)?;
            for (found, expected) in row.iter().zip(expected.as_array().context("row")?) {
                let expected = expected.as_f64().context("number")?;
                assert!(
                    (f64::from(*found) - expected).abs() < TOLERANCE,
                    "{arch} {method}, row {number}: {found} {expected}"
                );
            }
        }
    }
    Ok(())
}
