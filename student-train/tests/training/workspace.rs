//! What the tests of this crate share: small shard and embedding sets of noise, and commands on them.

#![allow(dead_code, reason = "each of the test programs uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use shared::Result;
use shared::embedding::{EmbeddingDtype, EmbeddingSetDetails, HEAD_FILE, embedding_file_name, write_embeddings};
use shared::manifest::{Identity, Manifest, Stage};
use shared::models::{MlpConfig, MlpHead, MlpLayer};
use shared::rng::KeyedRng;
use shared::shard::{
    LocalDetails, Pieces, SampleViews, ShardSetDetails, ShardWriter, VIEW_PARAMETERS, shard_file_name,
};

/// D of the teacher's embeddings.
pub(crate) const EMBEDDING_DIM: usize = 8;

/// Side of the images, in pixels.
const SIZE: usize = 16;

/// A shard set of noise: two shards, `views` views each.
pub(crate) fn write_shards(directory: &Path, samples: usize, views: usize, seed: u64) -> Result<()> {
    write_shards_of(directory, samples, views, None, seed, SIZE)
}

/// The same with small views beside them.
pub(crate) fn write_crops(
    directory: &Path,
    samples: usize,
    views: usize,
    local: Option<LocalDetails>,
    seed: u64,
) -> Result<()> {
    write_shards_of(directory, samples, views, local, seed, SIZE)
}

/// The same with images of another size, in pixels.
pub(crate) fn write_shards_of(
    directory: &Path,
    samples: usize,
    views: usize,
    local: Option<LocalDetails>,
    seed: u64,
    size: usize,
) -> Result<()> {
    let details = ShardSetDetails { views, height: size, width: size, local, ..ShardSetDetails::default() };
    fs::create_dir_all(directory).map_err(shared::Error::io("create", directory))?;
    let mut files = Vec::new();
    for (index, ids) in split(samples).into_iter().enumerate() {
        let mut writer = ShardWriter::with_layout(directory.join(shard_file_name(index)), ids.len(), &details)?;
        for id in ids {
            let mut rng = KeyedRng::new("test pixels", seed, &[id]);
            let mut pieces = |views: usize, size: usize| Pieces {
                bytes: (0..views * size * size * 3).map(|_| rng.below(256) as u8).collect(),
                lengths: vec![size * size * 3; views],
                params: vec![0.0; views * VIEW_PARAMETERS.len()],
            };
            let global = pieces(views, size);
            let local = local.map(|local| pieces(local.views, local.size)).unwrap_or_default();
            writer.push_sample(id, -1, &SampleViews { global, local, ..SampleViews::default() })?;
        }
        files.push(writer.finish()?);
    }
    let identity = Identity::new(Stage::DataPrep, &serde_json::json!({}), seed, Vec::new())?;
    let counts = BTreeMap::from([("samples".to_string(), samples as u64)]);
    Manifest::new(identity, counts, serde_json::json!(details), files).write(directory)
}

/// Embeddings of such a set: random unit rows, other ones for every teacher.
pub(crate) fn write_embedding_set(
    directory: &Path,
    shards: &Path,
    samples: usize,
    views: usize,
    teacher: u64,
) -> Result<()> {
    fs::create_dir_all(directory).map_err(shared::Error::io("create", directory))?;
    let details = EmbeddingSetDetails { views, embedding_dim: EMBEDDING_DIM, dtype: EmbeddingDtype::F16 };
    let mut files = Vec::new();
    for (index, ids) in split(samples).into_iter().enumerate() {
        let mut rows = Vec::new();
        for &id in &ids {
            for view in 0..views as u64 {
                let mut rng = KeyedRng::new("test embedding", teacher, &[id, view]);
                let row: Vec<f64> = (0..EMBEDDING_DIM).map(|_| rng.normal()).collect();
                let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                rows.extend(row.into_iter().map(|x| (x / norm) as f32));
            }
        }
        files.push(write_embeddings(directory.join(embedding_file_name(index)), &details, &ids, &rows)?);
    }
    let input = Manifest::read(shards, Stage::DataPrep)?.as_input("shards", shards);
    let identity = Identity::new(Stage::TeacherEmbed, &serde_json::json!({}), 0, vec![input])?;
    Manifest::new(identity, BTreeMap::new(), serde_json::json!(details), files).write(directory)
}

/// Takes `--flag value` or `--flag=value` out of arguments.
fn remove(arguments: &mut Vec<String>, flag: &str) {
    let same = |known: &String| known == flag || known.split_once('=').is_some_and(|(known, _)| known == flag);
    if let Some(at) = arguments.iter().position(same) {
        let joined = arguments[at].contains('=');
        arguments.drain(at..at + if joined { 1 } else { 2 });
    }
}

/// Width of the rows that [`add_teacher_head`]'s head takes.
pub(crate) const HEAD_INPUTS: usize = 12;

/// Adds a projection head to an embedding set, as a teacher that has one does.
pub(crate) fn add_teacher_head(directory: &Path) -> Result<()> {
    let layer = |name: &str, inputs, outputs| MlpLayer::Linear { name: name.into(), inputs, outputs, bias: false };
    let layers = vec![layer("head.0", HEAD_INPUTS, 20), MlpLayer::Relu, layer("head.2", 20, EMBEDDING_DIM)];
    let config = MlpConfig::new(layers).map_err(|why| shared::Error::invalid(why, ""))?;
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.names_and_shapes() {
        let mut rng = KeyedRng::new("test head", 0, &[shape[1] as u64]);
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| rng.normal() as f32 / 4.0).collect();
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    let file = MlpHead::new(&config, &tensors)?.write(directory.join(HEAD_FILE))?;
    let Manifest { identity, counts, details, mut files, .. } = Manifest::read(directory, Stage::TeacherEmbed)?;
    files.push(file);
    Manifest::new(identity, counts, details, files).write(directory)
}

fn split(samples: usize) -> [Vec<u64>; 2] {
    let ids: Vec<u64> = (0..samples as u64).map(|i| i * 7 + 1).collect();
    let (a, b) = ids.split_at(samples / 2);
    [a.to_vec(), b.to_vec()]
}

/// A temporary directory with shards of 10 samples and 3 views, their embeddings, and room for runs.
pub(crate) struct Workspace {
    root: tempfile::TempDir,
}

impl Workspace {
    /// Writes the inputs.
    pub(crate) fn new() -> Result<Self> {
        let root = tempfile::tempdir().map_err(shared::Error::io("create", "a temporary directory"))?;
        let workspace = Self { root };
        write_shards(&workspace.path("shards"), 10, 3, 0)?;
        write_embedding_set(&workspace.path("embeddings"), &workspace.path("shards"), 10, 3, 0)?;
        Ok(workspace)
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The arguments of a tiny run called `run`: 2 epochs of 2 steps of 4 samples.
    pub(crate) fn arguments(&self, command: &str, run: &str, more: &[&str]) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        let mut arguments: Vec<String> = ["student-train", command, "--shards"].map(String::from).into();
        arguments.extend([path("shards"), "--output".into(), path(run)]);
        if command == "distill" {
            arguments.extend(["--embeddings".into(), path("embeddings")]);
        }
        let tiny = "--epochs 2 --batch-size 4 --bn-groups 2 --queue-size 6 --head-hidden 16 --seed 5 --quiet";
        arguments.extend(tiny.split(' ').map(String::from));
        // `--flag=value` of a test replaces what stands above.
        for pair in more {
            remove(&mut arguments, pair.split('=').next().unwrap_or_default());
            arguments.push((*pair).to_string());
        }
        match more.iter().find_map(|pair| pair.strip_prefix("--method=")) {
            Some("swav" | "none") => remove(&mut arguments, "--queue-size"),
            Some("moco-v1") => remove(&mut arguments, "--head-hidden"),
            _ => {}
        }
        arguments
    }

    /// All files of a run by relative path, without the speeds and hidden files.
    pub(crate) fn contents(&self, run: &str) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let root = self.path(run);
        for directory in [root.clone(), root.join("checkpoints")] {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.path().is_file() && !name.starts_with('.') && name != "timing.jsonl" {
                    files.insert(name, fs::read(entry.path()).unwrap_or_default());
                }
            }
        }
        files
    }
}
