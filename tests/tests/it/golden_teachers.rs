//! Teachers of every method against torchvision and timm (`tests/golden/teachers.py`): what is recognised, embeddings, and checkpoint files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::Tensor;
use serde::Deserialize;
use shared::embedding::{EmbeddingDtype, EmbeddingSet};
use shared::manifest::{Identity, Stage};
use shared::models::{Arch, names_and_shapes};
use shared::ops::PositionResampling;
use shared::output::{Begun, OutputDir};
use shared::shard::{ShardSet, ShardSetDetails, ShardWriter, VIEW_PARAMETERS, shard_file_name};
use shared::tensor_file::write_tensors;
use shared::weights::Checkpoint;
use shared::weights::names::{Method, Recognised, fit, recognise};
use teacher_embed::config::EmbedConfig;
use tests::formula;

const SAMPLES: usize = 3;
const VIEWS: usize = 2;
/// Against f64: relative to the length of a row, for rows of f32 arithmetic through 18 to 50 layers.
const RELATIVE_ERROR: f64 = 1e-4;
/// The least cosine of a row and its twin.
const COSINE: f64 = 0.99999;
/// What `nn.Sequential(*resnet.children())` calls the layers.
const NUMBERS: [(&str, &str); 6] =
    [("conv1.", "0."), ("bn1.", "1."), ("layer1.", "4."), ("layer2.", "5."), ("layer3.", "6."), ("layer4.", "7.")];

type Entries = Vec<(String, Vec<usize>)>;

#[derive(Deserialize)]
struct Golden {
    /// What multiplies the tensors whose last name begins so.
    scales: BTreeMap<String, f64>,
    layouts: Vec<Layout>,
    cases: Vec<Case>,
    files: Vec<GoldenFile>,
}

#[derive(Deserialize)]
struct Layout {
    name: String,
    method: String,
    alike: Vec<String>,
    /// How the names of the architectures begin that are laid out so.
    archs: String,
    networks: Vec<Network>,
    /// Tensors that are no backbone's; a size that is not given is the feature width.
    others: Vec<(String, Vec<Option<usize>>)>,
    left_over: BTreeMap<String, LeftOver>,
}

#[derive(Deserialize)]
struct Network {
    prefix: String,
    naming: Naming,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Naming {
    Usual,
    /// By the children of a residual network.
    Numbered,
    /// As the official code of `XCiT` does.
    Official,
}

impl Naming {
    /// The name and the shape in the file; `None` for what is part of another tensor there.
    fn of_file(self, name: &str, mut shape: Vec<usize>) -> Option<(String, Vec<usize>)> {
        let name = match self {
            Self::Usual => name.to_owned(),
            Self::Numbered => {
                let layer = NUMBERS.iter().find(|(layer, _)| name.starts_with(layer));
                layer.map_or(name.to_owned(), |(layer, number)| name.replacen(layer, number, 1))
            }
            Self::Official if name.contains(".attn.k.") || name.contains(".attn.v.") => return None,
            Self::Official if name.contains(".attn.q.") => {
                shape[0] *= 3;
                name.replace(".attn.q.", ".attn.qkv.")
            }
            Self::Official => name.replace("pos_embed.", "pos_embeder."),
        };
        Some((name, shape))
    }
}

/// How many tensors: those that are no backbone's, and how many backbones.
#[derive(Deserialize)]
struct LeftOver {
    others: usize,
    networks: usize,
}

#[derive(Deserialize)]
struct Case {
    #[serde(flatten)]
    layout: Layout,
    arch: Arch,
    asked: Option<Method>,
    side: usize,
    width: usize,
    rows: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct GoldenFile {
    file: String,
    state_key: String,
    metadata: BTreeMap<String, serde_json::Value>,
    /// Name, element type, shape, and the first two numbers of a fingerprint.
    tensors: Vec<(String, String, Vec<usize>, [f64; 2])>,
}

impl Layout {
    /// The names and shapes of a whole checkpoint.
    fn entries(&self, arch: Arch) -> Result<Entries> {
        let width = |size: &Option<usize>| size.unwrap_or_else(|| arch.feature_width());
        let others = self.others.iter().map(|(name, shape)| (name.clone(), shape.iter().map(width).collect()));
        let mut entries: Entries = others.collect();
        for network in &self.networks {
            let own = names_and_shapes(arch, None)?.into_iter();
            let own = own.filter_map(|(name, shape)| network.naming.of_file(&name, shape));
            entries.extend(own.map(|(name, shape)| (format!("{}{name}", network.prefix), shape)));
        }
        Ok(entries)
    }

    fn left_over(&self, arch: Arch) -> Result<Vec<(&str, usize)>> {
        let network = names_and_shapes(arch, None)?.len();
        let count = |left: &LeftOver| left.others + left.networks * network;
        Ok(self.left_over.iter().map(|(what, left)| (what.as_str(), count(left))).collect())
    }

    /// Whether an architecture can be laid out like this.
    fn suits(&self, arch: Arch) -> bool {
        arch.name().starts_with(&self.archs)
    }

    fn check(&self, arch: Arch, found: &Recognised) -> Result<()> {
        let what = format!("{} on {arch}: {found:?}", self.name);
        ensure!(found.arch == arch && found.method.name() == self.method, "{what}");
        ensure!(found.prefix == self.networks[0].prefix, "{what}");
        ensure!(found.alike.iter().map(|method| method.name()).collect::<Vec<_>>() == self.alike, "{what}");
        ensure!(found.is_complete() && found.unexpected.is_empty() && !found.has_further_layers(), "{what}");
        let left: Vec<_> = found.left_over.iter().map(|left| (left.what, left.tensors)).collect();
        ensure!(left == self.left_over(arch)?, "{what}");
        let headless = ["supervised", "backbone"].contains(&self.method.as_str());
        ensure!(headless == found.head.is_none(), "{what}");
        let twelve = self.method == "moco-v3" && arch.name().starts_with("vit_small");
        ensure!(found.vit_options().heads == twelve.then_some(12), "{what}");
        let resampling = if self.method == "dino" { PositionResampling::Dino } else { PositionResampling::Timm };
        ensure!(found.vit_options().positions == resampling, "{what}");
        Ok(())
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn golden() -> Result<Golden> {
    Ok(serde_json::from_str(&std::fs::read_to_string(folder().join("teachers.json"))?)?)
}

#[test]
fn every_layout_of_every_architecture_is_recognised() -> Result<()> {
    let golden = golden()?;
    let methods: BTreeSet<&str> = golden.layouts.iter().map(|layout| layout.method.as_str()).collect();
    let reachable = Method::ALL.iter().filter(|method| **method != Method::SelaV2);
    assert_eq!(methods, reachable.map(|method| method.name()).collect(), "a method has no layout");
    for layout in &golden.layouts {
        for arch in Arch::ALL.into_iter().filter(|arch| layout.suits(*arch)) {
            let entries = layout.entries(arch)?;
            let found = recognise(&entries)?;
            layout.check(arch, &found[0])?;
            assert_eq!(found.len(), layout.networks.len(), "{} on {arch}", layout.name);
            layout.check(arch, &fit(&entries, arch, None)?)?;
        }
    }
    Ok(())
}

#[test]
fn every_layout_gives_its_backbone_and_alike_methods_give_the_same_head() -> Result<()> {
    for layout in &golden()?.layouts {
        for arch in [Arch::ResNet50, Arch::VitSmallPatch16, Arch::XcitSmall12Patch16] {
            if !layout.suits(arch) {
                continue;
            }
            let what = format!("{} on {arch}", layout.name);
            let entries = layout.entries(arch)?;
            let backbone = fit(&entries, arch, Some(Method::Backbone))?;
            ensure!(backbone.is_complete() && backbone.unexpected.is_empty(), "{what}: {backbone:?}");
            let width = arch.feature_width();
            assert_eq!((backbone.head.as_ref(), backbone.embedding_dim()), (None, width), "{what}");
            let told = fit(&entries, arch, None)?;
            assert_eq!(backbone.vit_options(), told.vit_options(), "{what}: the features are another network's");
            for method in &told.alike {
                let alike = fit(&entries, arch, Some(*method))?;
                assert_eq!((&alike.head, alike.vit_options()), (&told.head, told.vit_options()), "{what} as {method}");
            }
        }
    }
    Ok(())
}

fn write_shards(path: &Path, side: usize) -> Result<()> {
    let identity = Identity::new(Stage::DataPrep, &serde_json::json!({}), 0, Vec::new())?;
    let Begun::Writing(output) = OutputDir::begin(path, &identity, false)? else { bail!("already finished") };
    let row = VIEWS * side * side * 3;
    let pixels: Vec<u8> = formula::unit("pixels", SAMPLES * row).map(|u| (u * 256.0) as u8).collect();
    let mut writer = ShardWriter::create(path.join(shard_file_name(0)), SAMPLES, VIEWS, side, side)?;
    for (id, pixels) in pixels.chunks(row).enumerate() {
        writer.push(id as u64, -1, pixels, &[0.0; VIEWS * VIEW_PARAMETERS.len()])?;
    }
    let details = ShardSetDetails { views: VIEWS, height: side, width: side, ..ShardSetDetails::default() };
    let counts = BTreeMap::from([("samples".into(), SAMPLES as u64)]);
    output.finish(counts, serde_json::to_value(details)?, vec![writer.finish()?])?;
    Ok(())
}

/// Weights by their names in the file, as `teachers.py` gives them.
fn weights(entries: &Entries, scales: &BTreeMap<String, f64>) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = formula::parameters(entries)?;
    for (name, tensor) in &mut tensors {
        let last = name.rsplit('.').next().unwrap_or_default();
        if let Some((_, scale)) = scales.iter().find(|(start, _)| last.starts_with(start.as_str())) {
            *tensor = (&*tensor * *scale)?;
        }
    }
    Ok(tensors)
}

#[test]
fn teacher_embeddings_equal_those_of_pytorch() -> Result<()> {
    let golden = golden()?;
    let directory = tempfile::tempdir()?;
    let path = directory.path();
    let mut written = BTreeSet::new();
    let embedded_layouts: BTreeSet<&str> = golden.cases.iter().map(|case| case.layout.name.as_str()).collect();
    assert_eq!(embedded_layouts.len(), golden.layouts.len(), "a layout is never embedded");
    for (index, case) in golden.cases.iter().enumerate() {
        let shards = path.join(format!("shards of {}", case.side));
        if written.insert(case.side) {
            write_shards(&shards, case.side)?;
        }
        let entries = case.layout.entries(case.arch)?;
        case.layout.check(case.arch, recognise(&entries)?.first().context("nothing is recognised")?)?;
        let file = path.join(format!("{index}.safetensors"));
        write_tensors(&file, &BTreeMap::new(), &weights(&entries, &golden.scales)?)?;
        let mut config = EmbedConfig::new(shards, file, path.join(index.to_string()));
        config.dtype = EmbeddingDtype::F32;
        config.method = case.asked;
        let embedded = teacher_embed::embed(&config)?;
        std::fs::remove_file(&config.weights)?;
        assert_eq!(embedded.teacher.embedding_dim, case.width, "{}", case.layout.name);
        compare(&EmbeddingSet::open(&config.output, &ShardSet::open(&config.shards)?)?, case)?;
    }
    Ok(())
}

fn compare(set: &EmbeddingSet, case: &Case) -> Result<()> {
    let what = format!("{} on {}", case.layout.name, case.arch);
    let mut row = vec![0.0; set.embedding_dim()];
    let mut first = Vec::new();
    for (number, expected) in case.rows.iter().enumerate() {
        set.read(number / VIEWS, number % VIEWS, &mut row)?;
        let found: Vec<f64> = row.iter().take(expected.len()).map(|value| f64::from(*value)).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let error: Vec<f64> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
        let relative = (dot(&error, &error) / dot(expected, expected)).sqrt();
        let cosine = dot(&found, expected) / (dot(&found, &found) * dot(expected, expected)).sqrt();
        assert!(
            relative <= RELATIVE_ERROR && cosine >= COSINE,
            "{what}, row {number}: {relative:.1e}, cosine {cosine}"
        );
        first = if number == 0 { found } else { first };
        let distance = expected.iter().zip(&first).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        let length = dot(expected, expected).sqrt();
        assert!(
            number == 0 || distance > 20.0 * RELATIVE_ERROR * length,
            "{what}: rows that hardly differ show nothing"
        );
    }
    Ok(())
}

#[test]
fn checkpoints_of_both_formats_are_listed_exactly_and_the_right_weights_chosen() -> Result<()> {
    let files = golden()?.files;
    assert_eq!(files.len(), 32);
    for golden in files {
        let checkpoint = Checkpoint::open(folder().join("teachers").join(&golden.file))?;
        let what = &golden.file;
        assert_eq!(checkpoint.state_key(), golden.state_key, "{what}");
        assert!(checkpoint.unknown_globals().is_empty() && checkpoint.skipped().is_empty(), "{what}");
        let told = golden.metadata.iter().filter(|(key, value)| checkpoint.metadata().get(*key) == Some(value));
        assert_eq!(told.count(), golden.metadata.len(), "{what}: {:?}", checkpoint.metadata());
        assert_eq!(checkpoint.entries().len(), golden.tensors.len(), "{what}");
        for (entry, (name, dtype, shape, numbers)) in checkpoint.entries().iter().zip(&golden.tensors) {
            let label = format!("{what}: {name}");
            assert_eq!(
                (entry.name(), &entry.dtype().to_string(), entry.shape()),
                (name.as_str(), dtype, shape.as_slice())
            );
            let found = formula::fingerprint(name, &checkpoint.tensor(name)?)?;
            for (found, expected) in found.iter().zip(numbers) {
                assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{label}: {found} {expected}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_student_of_a_dino_checkpoint_is_there_for_the_asking() -> Result<()> {
    for form in ["zip", "legacy"] {
        let path = folder().join(format!("teachers/dino_{form}.pth"));
        let elsewhere = Checkpoint::open(&path)?.other_state_keys().to_vec();
        assert_eq!(elsewhere, [("student".to_owned(), 14), ("dino_loss".to_owned(), 1)]);
        let student = Checkpoint::open_at(&path, Some("student"))?;
        assert!(student.entries().iter().all(|entry| entry.name().starts_with("module.")));
    }
    Ok(())
}
