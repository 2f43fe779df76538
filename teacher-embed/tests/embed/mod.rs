//! `embed` and `verify` in process: alignment, determinism, resuming, the chain, and every refusal.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::fixture::{HEAD, SAMPLES, VIEWS, network, write, write_moco, write_run, write_run_with, write_shards};
use candle_core::{DType, Device, Tensor};
use shared::cli::with_threads;
use shared::data_loader::normalized_batch;
use shared::embedding::{EmbeddingDtype, EmbeddingSet, HEAD_FILE, embedding_file_name};
use shared::io::write_json;
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};
use shared::models::{Arch, Encoder, HeadConfig, HeadKind};
use shared::ops::Mode;
use shared::output::UNFINISHED_FILE;
use shared::shard::ShardSet;
use shared::transforms::normalize::Normalization;
use shared::weights::names::Method;
use shared::{Error, Fault};
use teacher_embed::config::{EmbedConfig, ProjectionKind, VerifyConfig};
use teacher_embed::{describe, embed, verify};

struct Bench {
    directory: tempfile::TempDir,
    config: EmbedConfig,
}

/// A shard set, a teacher, and the configuration that embeds them into `embeddings`.
fn bench() -> Bench {
    let directory = tempfile::tempdir().unwrap();
    write_shards(&directory.path().join("shards"), 1).unwrap();
    let weights = write_moco(directory.path(), 1).unwrap();
    let config = EmbedConfig::new(directory.path().join("shards"), weights, directory.path().join("embeddings"));
    Bench { directory, config }
}

impl Bench {
    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn writing_to(&self, name: &str) -> EmbedConfig {
        EmbedConfig { output: self.path().join(name), ..self.config.clone() }
    }
}

/// The files of an embedding set.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = (0..SAMPLES.len()).map(embedding_file_name).chain([MANIFEST_FILE.to_owned()]);
    names.map(|name| (name.clone(), fs::read(path.join(&name)).unwrap())).collect()
}

fn rows(config: &EmbedConfig) -> Vec<Vec<f32>> {
    let shards = ShardSet::open(&config.shards).unwrap();
    let set = EmbeddingSet::open(&config.output, &shards).unwrap();
    let row = |index: usize| {
        let mut row = vec![0.0; set.embedding_dim()];
        set.read(index / VIEWS, index % VIEWS, &mut row).unwrap();
        row
    };
    (0..shards.len() * VIEWS).map(row).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    1.0 - a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()
}

#[test]
fn every_row_is_the_teachers_embedding_of_its_own_view() {
    let bench = bench();
    let config = EmbedConfig { dtype: EmbeddingDtype::F32, ..bench.config };
    let embedded = embed(&config).unwrap();
    assert_eq!((embedded.samples, embedded.views, embedded.shards), (14, 2, 2));
    assert_eq!((embedded.teacher.arch, embedded.teacher.method), (Arch::ResNet18, Method::MocoV2));
    let teacher = Encoder::new(Arch::ResNet18, Some(HEAD), 1).unwrap();
    let shards = ShardSet::open(&config.shards).unwrap();
    for (index, row) in rows(&config).iter().enumerate() {
        let xs = normalized_batch(&shards, &[(index / VIEWS, index % VIEWS)], Normalization::Imagenet).unwrap();
        let expected = teacher.embeddings(&xs, Mode::Eval).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(distance(row, &expected) < 1e-5, "row {index}");
    }
    let distinct = rows(&config).windows(2).all(|pair| distance(&pair[0], &pair[1]) > 1e-4);
    assert!(distinct, "rows of different views must differ, or the test shows nothing");
}

#[test]
fn bytes_do_not_depend_on_threads_or_batch_size() {
    let bench = bench();
    let mut results = Vec::new();
    for (name, threads, batch_size) in [("a", 1, 64), ("b", 2, 16), ("c", 2, 48)] {
        let config = EmbedConfig { batch_size, ..bench.writing_to(name) };
        with_threads(Some(threads), || embed(&config)).unwrap();
        results.push(files(&config.output));
    }
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn resumed_run_gives_the_same_bytes_as_a_straight_one() {
    let bench = bench();
    embed(&bench.config).unwrap();
    let straight = files(&bench.config.output);
    let manifest = Manifest::read(&bench.config.output, Stage::TeacherEmbed).unwrap();
    let second = bench.config.output.join(embedding_file_name(1));
    for damage in [None, Some(&b"half a file"[..])] {
        fs::remove_file(bench.config.output.join(MANIFEST_FILE)).unwrap();
        fs::remove_file(&second).unwrap();
        if let Some(bytes) = damage {
            shared::io::write_atomic(&second, bytes).unwrap();
        }
        write_json(bench.config.output.join(UNFINISHED_FILE), &manifest.identity).unwrap();
        let embedded = embed(&bench.config).unwrap();
        assert_eq!((embedded.resumed_shards, embedded.already_finished), (1, false));
        assert!(files(&bench.config.output) == straight);
    }
}

#[test]
fn finished_set_is_left_alone_and_other_weights_are_refused() {
    let bench = bench();
    let first = embed(&bench.config).unwrap();
    let again = embed(&bench.config).unwrap();
    assert!(!first.already_finished && again.already_finished);
    assert_eq!((&again.fingerprint, again.statistics), (&first.fingerprint, first.statistics));
    let mut other = bench.config.clone();
    other.weights = write_moco(bench.path(), 2).unwrap();
    let error = embed(&other).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what.contains("weights")), "{error}");
    let wider = EmbedConfig { dtype: EmbeddingDtype::F32, ..bench.config };
    assert!(matches!(embed(&wider).unwrap_err(), Error::Chain { what, .. } if what.contains("dtype")));
    other.overwrite = true;
    assert_ne!(embed(&other).unwrap().fingerprint, first.fingerprint);
}

#[test]
fn narrow_types_round_the_wide_ones() {
    let bench = bench();
    let stored = |dtype, name| {
        let config = EmbedConfig { dtype, ..bench.writing_to(name) };
        embed(&config).unwrap();
        rows(&config)
    };
    let wide = stored(EmbeddingDtype::F32, "f32");
    for (narrow, relative) in
        [(stored(EmbeddingDtype::F16, "f16"), 1.0 / 2048.0), (stored(EmbeddingDtype::Bf16, "bf16"), 1.0 / 256.0)]
    {
        for (narrow, wide) in narrow.iter().flatten().zip(wide.iter().flatten()) {
            assert!((narrow - wide).abs() <= wide.abs() * relative + 1e-7, "{narrow} {wide}");
        }
    }
}

#[test]
fn classifier_and_bare_backbone_give_the_same_features() {
    let bench = bench();
    let mut tensors = network(Arch::ResNet18, None, "", 5).unwrap();
    let embedded = |name: &str, tensors: &BTreeMap<String, Tensor>, method: Option<Method>| {
        let weights = write(bench.path(), &format!("{name}.safetensors"), tensors).unwrap();
        let config = EmbedConfig { weights, method, ..bench.writing_to(name) };
        (embed(&config).unwrap().teacher, rows(&config))
    };
    let (teacher, bare) = embedded("bare", &tensors, None);
    assert_eq!((teacher.method, teacher.embedding_dim), (Method::Backbone, 512));
    tensors.insert("fc.weight".into(), Tensor::ones((7, 512), DType::F32, &Device::Cpu).unwrap());
    tensors.insert("fc.bias".into(), Tensor::ones(7, DType::F32, &Device::Cpu).unwrap());
    let (teacher, classifier) = embedded("classifier", &tensors, None);
    assert_eq!((teacher.method, teacher.embedding_dim), (Method::Supervised, 512));
    assert_eq!(bare, classifier);
    // The same file read as a linear projection: all seven outputs are equal but for rounding.
    let (teacher, linear) = embedded("linear", &tensors, Some(Method::MocoV1));
    assert_eq!((teacher.method, teacher.embedding_dim), (Method::MocoV1, 7));
    assert!(linear.iter().flatten().all(|value| (value - 1.0 / 7f32.sqrt()).abs() < 1e-3));
}

#[test]
fn another_architecture_is_one_error_that_lists_what_differs_and_writes_nothing() {
    let bench = bench();
    let config = EmbedConfig { arch: Some(Arch::ResNet34), ..bench.config.clone() };
    let error = embed(&config).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("does not hold the weights of resnet34 (moco-v2) under `module.encoder_q.`"), "{message}");
    assert!(message.contains("missing: `layer1.2.bn1.bias`"), "{message}");
    assert_eq!(error.hint().unwrap(), "it holds resnet18 (moco-v2): leave `--arch` and `--method` out");
    let weights = write(bench.path(), "r34.safetensors", &network(Arch::ResNet34, Some(HEAD), "", 1).unwrap()).unwrap();
    let config = EmbedConfig { weights, arch: Some(Arch::ResNet18), ..bench.config };
    let message = embed(&config).unwrap_err().to_string();
    assert!(message.contains("unexpected: `layer1.2.bn1.bias`"), "{message}");
    assert!(!config.output.exists());
}

#[test]
fn weights_that_are_no_network_or_damaged_are_refused() {
    let bench = bench();
    let with = |weights| embed(&EmbedConfig { weights, ..bench.config.clone() }).unwrap_err();
    let tensors = BTreeMap::from([("a".to_owned(), Tensor::ones(3, DType::F32, &Device::Cpu).unwrap())]);
    let error = with(write(bench.path(), "other.safetensors", &tensors).unwrap());
    assert!(error.to_string().contains("holds no architecture that is known here"), "{error}");

    let bytes = fs::read(&bench.config.weights).unwrap();
    let cut = bench.path().join("cut.safetensors");
    shared::io::write_atomic(&cut, &bytes[..bytes.len() - 5]).unwrap();
    assert!(matches!(with(cut), Error::Damaged { .. }));

    for (name, dtype) in [("layer1.0.bn1.weight", DType::I64), ("conv1.weight", DType::U8), ("fc.0.bias", DType::I64)] {
        let mut tensors = network(Arch::ResNet18, Some(HEAD), "", 1).unwrap();
        tensors.insert(name.into(), tensors[name].to_dtype(dtype).unwrap());
        let error = with(write(bench.path(), "whole.safetensors", &tensors).unwrap());
        let kind = if dtype == DType::I64 { "i64" } else { "u8" };
        assert!(error.to_string().contains(&format!("holds `{name}` as {kind}, weights are floats")), "{error}");
    }

    let mut tensors = network(Arch::ResNet18, Some(HEAD), "", 1).unwrap();
    let nan = (tensors["bn1.bias"].ones_like().unwrap() * f64::NAN).unwrap();
    tensors.insert("bn1.bias".into(), nan);
    let error = with(write(bench.path(), "nan.safetensors", &tensors).unwrap());
    assert!(error.to_string().contains("embeddings without a direction"), "{error}");
    assert!(!bench.config.output.join(MANIFEST_FILE).exists());
}

#[test]
fn verify_finds_changed_files_other_shards_and_other_weights() {
    let bench = bench();
    embed(&bench.config).unwrap();
    let config = VerifyConfig {
        embeddings: bench.config.output.clone(),
        shards: None,
        weights: Some(bench.config.weights.clone()),
        sample: 10,
        seed: 0,
        threads: None,
        json: false,
        quiet: true,
    };
    let verified = verify(&config).unwrap();
    assert_eq!((verified.files, verified.recomputed_rows, verified.shards_checked), (3, 10, true));
    assert!(verified.max_cosine_distance.unwrap() < 1e-6, "{verified}");

    let other = write_moco(bench.path(), 2).unwrap();
    let error = verify(&VerifyConfig { weights: Some(other), ..config.clone() }).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what.contains("weights")), "{error}");

    let shards = bench.path().join("other shards");
    write_shards(&shards, 2).unwrap();
    let error = verify(&VerifyConfig { shards: Some(shards), ..config.clone() }).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what.contains("shard set")), "{error}");

    let path = config.embeddings.join(embedding_file_name(1));
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    shared::io::write_atomic(&path, &bytes).unwrap();
    let error = verify(&config).unwrap_err();
    assert!(matches!(error, Error::Damaged { fault: Fault::Hash { .. }, .. }), "{error}");
}

#[test]
fn verify_finds_rows_that_are_not_the_teachers() {
    let bench = bench();
    embed(&bench.config).unwrap();
    // Exchange the two views of every sample in the last file, and make the manifest agree.
    let shards = ShardSet::open(&bench.config.shards).unwrap();
    let set = EmbeddingSet::open(&bench.config.output, &shards).unwrap();
    let mut swapped = Vec::new();
    for sample in SAMPLES[0]..SAMPLES[0] + SAMPLES[1] {
        for view in (0..VIEWS).rev() {
            let mut row = vec![0.0; set.embedding_dim()];
            set.read(sample, view, &mut row).unwrap();
            swapped.extend(row);
        }
    }
    let details = serde_json::from_value(set.manifest().details.clone()).unwrap();
    let path = bench.config.output.join(embedding_file_name(1));
    let entry =
        shared::embedding::write_embeddings(&path, &details, shards.shards()[1].sample_ids(), &swapped).unwrap();
    let manifest = set.manifest().clone();
    let files = vec![manifest.files[0].clone(), entry];
    Manifest::new(manifest.identity, manifest.counts, manifest.details, files).write(&bench.config.output).unwrap();
    let config = VerifyConfig {
        embeddings: bench.config.output.clone(),
        shards: None,
        weights: None,
        sample: 28,
        seed: 0,
        threads: None,
        json: false,
        quiet: true,
    };
    assert!(verify(&config).is_ok(), "the hashes agree");
    let error = verify(&VerifyConfig { weights: Some(bench.config.weights), ..config }).unwrap_err();
    let first = format!("view 0 of sample {:016x} by", shards.sample_id(SAMPLES[0]));
    assert!(error.to_string().contains("6 of 28 rows") && error.to_string().contains(&first), "{error}");
    assert!(error.to_string().ends_with(", ..."), "{error}");
}

#[test]
fn description_tells_the_network_and_what_is_left_over() {
    let bench = bench();
    let description = describe(&bench.config.weights, None).unwrap();
    let found = &description.recognised[0];
    assert_eq!((found.arch, found.method, found.embedding_dim()), (Arch::ResNet18, Method::MocoV2, 8));
    let text = description.to_string();
    for line in [
        "recognised  resnet18 (moco-v2), embeddings of width 8, `module.encoder_q.`",
        "head        linear 512 to 24, ReLU, linear 24 to 8",
        "left over   key encoder: 1 tensors",
        "left over   queue of negatives: 1 tensors",
        "fc.0.weight",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn description_tells_what_is_taken_for_a_transformer() {
    let directory = tempfile::tempdir().unwrap();
    let told = |prefix: &str| {
        let tensors = network(Arch::VitSmallPatch16, None, prefix, 1).unwrap();
        describe(&write(directory.path(), "vit.safetensors", &tensors).unwrap(), None).unwrap().to_string()
    };
    let unknown = "unknown     how it was trained: give `--method dino` or `--method moco-v3` where that is so";
    let twelve = "attention   12 heads, as MoCo v3 has";
    let (bare, wrapped) = (told(""), told("module.base_encoder."));
    assert!(bare.contains(unknown) && !bare.contains(twelve), "{bare}");
    assert!(wrapped.contains(twelve) && !wrapped.contains(unknown), "{wrapped}");
}

#[test]
fn a_run_and_its_checkpoint_give_the_query_encoder() {
    let bench = bench();
    let run = bench.path().join("run");
    let checkpoint = run.join(write_run(&run, 1).unwrap());
    embed(&bench.config).unwrap();
    let expected = rows(&bench.config);
    for (name, weights) in [("of_run", &run), ("of_file", &checkpoint)] {
        let config = EmbedConfig { weights: weights.clone(), ..bench.writing_to(name) };
        let embedded = embed(&config).unwrap();
        assert_eq!(embedded.teacher.method, Method::MocoV2);
        assert_eq!(rows(&config), expected, "{name}");
    }
    assert_eq!(describe(&run, None).unwrap().recognised[0].prefix, "query.");

    let config = EmbedConfig { weights: run.clone(), arch: Some(Arch::ResNet50), ..bench.writing_to("other") };
    let message = embed(&config).unwrap_err().to_string();
    assert!(message.contains("holds resnet18 (moco-v2), not resnet50 (moco-v2)"), "{message}");

    let mut bytes = fs::read(&checkpoint).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    shared::io::write_atomic(&checkpoint, &bytes).unwrap();
    let error = embed(&EmbedConfig { arch: None, ..config.clone() }).unwrap_err();
    assert!(matches!(error, Error::Damaged { fault: Fault::Hash { .. }, .. }), "{error}");

    fs::remove_file(run.join(MANIFEST_FILE)).unwrap();
    let hint = embed(&EmbedConfig { arch: None, ..config }).unwrap_err().hint().unwrap();
    assert!(hint.contains("student-train") && hint.contains("step-00000004.safetensors"), "{hint}");
}

#[test]
fn runs_with_other_heads_are_teachers_too() {
    let bench = bench();
    let heads = [
        (HeadConfig { kind: HeadKind::Linear, hidden: 0, ..HEAD }, Method::MocoV1),
        (HeadConfig { kind: HeadKind::MlpBatchNorm, ..HEAD }, Method::Swav),
    ];
    for (head, method) in heads {
        let run = bench.path().join(format!("run of {method}"));
        let checkpoint = run.join(write_run_with(head, &run, 1).unwrap());
        // The run's own head, and the layers that are read from the file.
        let [of_run, of_file] = [("run", &run), ("file", &checkpoint)].map(|(name, weights)| {
            let config = EmbedConfig {
                weights: weights.clone(),
                ..bench.writing_to(&format!("embeddings of {name} of {method}"))
            };
            assert_eq!(embed(&config).unwrap().teacher.method, method);
            rows(&config)
        });
        assert_eq!(of_run[0].len(), HEAD.embedding_dim);
        for (a, b) in of_run.iter().zip(&of_file) {
            assert!(distance(a, b) < 1e-3, "{method}: {a:?} {b:?}");
        }
        let features = EmbedConfig {
            weights: run,
            method: Some(Method::Backbone),
            ..bench.writing_to(&format!("features of {method}"))
        };
        embed(&features).unwrap();
        assert_eq!(rows(&features)[0].len(), 512);
    }
}

#[test]
fn pixels_are_normalised_as_asked_and_as_the_architecture_was_published() {
    let bench = bench();
    let lite = Encoder::new(Arch::EfficientNetLite0, None, 1).unwrap();
    let write = |name: &str, mean: &str| {
        let metadata = BTreeMap::from([("mean".to_owned(), mean.to_owned())]);
        let path = bench.path().join(name);
        shared::tensor_file::write_tensors(&path, &metadata, &lite.store().to_tensors().unwrap()).unwrap();
        path
    };
    let (published, exported) = (write("a.safetensors", "unknown"), write("b.safetensors", "[0.485, 0.456, 0.406]"));
    let shards = ShardSet::open(&bench.config.shards).unwrap();
    let imagenet = Normalization::Imagenet;
    for (name, weights, asked, expected) in [
        ("published", &published, None, Normalization::Inception),
        ("asked", &published, Some(imagenet), imagenet),
        ("exported", &exported, None, imagenet),
    ] {
        let config = EmbedConfig {
            weights: weights.clone(),
            pixel_normalization: asked,
            dtype: EmbeddingDtype::F32,
            ..bench.writing_to(name)
        };
        let embedded = embed(&config).unwrap();
        assert_eq!(embedded.pixel_normalization, expected, "{name}");
        assert!(embedded.to_string().contains(&format!("width 1280, {expected} pixels")), "{embedded}");
        let xs = normalized_batch(&shards, &[(13, 1)], expected).unwrap();
        let features: Vec<f32> = lite.features(&xs, Mode::Eval).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let norm = features.iter().map(|x| x * x).sum::<f32>().sqrt();
        let unit: Vec<f32> = features.iter().map(|x| x / norm).collect();
        assert!(distance(&rows(&config)[13 * VIEWS + 1], &unit) < 1e-6, "{name}");

        let verify_config = VerifyConfig {
            embeddings: config.output.clone(),
            shards: None,
            weights: Some(weights.clone()),
            sample: 10,
            seed: 0,
            threads: None,
            json: false,
            quiet: true,
        };
        assert!(verify(&verify_config).unwrap().max_cosine_distance.unwrap() < 1e-6, "{name}");
    }
    let (first, second) = (rows(&bench.writing_to("published")), rows(&bench.writing_to("asked")));
    assert!(distance(&first[0], &second[0]) > 1e-4, "or the test shows nothing");
    let config =
        EmbedConfig { weights: published, pixel_normalization: Some(imagenet), ..bench.writing_to("published") };
    let config = EmbedConfig { dtype: EmbeddingDtype::F32, ..config };
    let error = embed(&config).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what == "`pixel-normalization`"), "{error}");
}

#[test]
fn sets_carry_the_head_that_makes_their_embeddings() {
    let bench = bench();
    let run = bench.path().join("run");
    write_run(&run, 1).unwrap();
    let encoder = Encoder::new(Arch::ResNet18, Some(HEAD), 1).unwrap();
    let shards = ShardSet::open(&bench.config.shards).unwrap();
    let xs = normalized_batch(&shards, &[(0, 0), (3, 1)], Normalization::Imagenet).unwrap();
    let numbers = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected = numbers(encoder.head_outputs(&xs, Mode::Eval).unwrap());
    let embedded = |config: &EmbedConfig| {
        embed(config).unwrap();
        EmbeddingSet::open(&config.output, &shards).unwrap()
    };
    for (name, weights) in [("of_file", &bench.config.weights), ("of_run", &run)] {
        let config = EmbedConfig { weights: weights.clone(), ..bench.writing_to(name) };
        let head = embedded(&config).head().unwrap().unwrap();
        let found = numbers(head.forward(&encoder.features(&xs, Mode::Eval).unwrap()).unwrap());
        assert_eq!(found, expected, "{name}");
    }
    let plain = EmbedConfig { method: Some(Method::Backbone), ..bench.writing_to("features") };
    assert!(embedded(&plain).head().unwrap().is_none());
    let centred = EmbedConfig { projection: Some(ProjectionKind::Center), ..bench.writing_to("centred") };
    assert!(embedded(&centred).head().unwrap().is_none());

    let path = bench.path().join("of_file").join(HEAD_FILE);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    shared::io::write_atomic(&path, &bytes).unwrap();
    let set = EmbeddingSet::open(bench.path().join("of_file"), &shards).unwrap();
    assert!(matches!(set.head(), Err(Error::Damaged { fault: Fault::Hash { .. }, .. })));
}
