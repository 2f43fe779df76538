//! `embed --center` and `--pca` in process: what is stored, determinism, resuming at every phase, and every refusal.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::fixture::{HEAD, SAMPLES, VIEWS, network, shards_of, write, write_moco, write_shards};
use candle_core::Tensor;
use shared::cli::with_threads;
use shared::data_loader::normalized_batch;
use shared::embedding::{EmbeddingDtype, EmbeddingSet, PROJECTION_FILE, Projection, embedding_file_name};
use shared::io::write_json;
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};
use shared::models::Arch;
use shared::output::UNFINISHED_FILE;
use shared::shard::ShardSet;
use shared::transforms::normalize::Normalization;
use shared::{Error, Fault};
use teacher_embed::config::{EmbedConfig, ProjectionKind, VerifyConfig};
use teacher_embed::teacher::Teacher;
use teacher_embed::{embed, verify};

/// All views of the test shards.
const ROWS: usize = (SAMPLES[0] + SAMPLES[1]) * VIEWS;

struct Bench {
    directory: tempfile::TempDir,
    config: EmbedConfig,
}

/// A shard set, a headless ResNet-18, and the configuration that reduces its features to five components.
fn bench() -> Bench {
    let directory = tempfile::tempdir().unwrap();
    write_shards(&directory.path().join("shards"), 1).unwrap();
    let tensors = network(Arch::ResNet18, None, "", 1).unwrap();
    let weights = write(directory.path(), "backbone.safetensors", &tensors).unwrap();
    let config = EmbedConfig {
        projection: Some(ProjectionKind::Pca(5)),
        dtype: EmbeddingDtype::F32,
        ..EmbedConfig::new(directory.path().join("shards"), weights, directory.path().join("embeddings"))
    };
    Bench { directory, config }
}

impl Bench {
    fn writing_to(&self, name: &str) -> EmbedConfig {
        EmbedConfig { output: self.directory.path().join(name), ..self.config.clone() }
    }
}

fn verifying(config: &EmbedConfig) -> VerifyConfig {
    VerifyConfig {
        embeddings: config.output.clone(),
        shards: None,
        weights: Some(config.weights.clone()),
        sample: 28,
        seed: 0,
        threads: None,
        json: false,
        quiet: true,
    }
}

/// Every file of a directory but its lock.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let visible = entries.filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.'));
    visible.map(|path| (path.file_name().unwrap().to_string_lossy().into(), fs::read(&path).unwrap())).collect()
}

fn rows(config: &EmbedConfig) -> Vec<Vec<f32>> {
    let shards = ShardSet::open(&config.shards).unwrap();
    let set = EmbeddingSet::open(&config.output, &shards).unwrap();
    let row = |index: usize| {
        let mut row = vec![0.0; set.embedding_dim()];
        set.read(index / VIEWS, index % VIEWS, &mut row).unwrap();
        row
    };
    (0..ROWS).map(row).collect()
}

/// The teacher's outputs of all views, one image at a time.
fn outputs(config: &EmbedConfig) -> Vec<Vec<f64>> {
    let shards = ShardSet::open(&config.shards).unwrap();
    let teacher = Teacher::load(&config.weights, None, None, None).unwrap();
    let output = |index: usize| {
        let xs = normalized_batch(&shards, &[(index / VIEWS, index % VIEWS)], Normalization::Imagenet).unwrap();
        teacher.outputs(&xs).unwrap().into_iter().map(f64::from).collect()
    };
    (0..ROWS).map(output).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Rows of the definition: `normalise(x - mean)`, or `normalise((x - mean) @ components^T)`.
fn expected(outputs: &[Vec<f64>], components: Option<&[Vec<f64>]>) -> Vec<Vec<f64>> {
    let mean: Vec<f64> =
        (0..outputs[0].len()).map(|c| outputs.iter().map(|row| row[c]).sum::<f64>() / outputs.len() as f64).collect();
    let embedding = |row: &Vec<f64>| {
        let centred: Vec<f64> = row.iter().zip(&mean).map(|(x, mean)| x - mean).collect();
        let row = components.map_or(centred.clone(), |c| c.iter().map(|c| dot(c, &centred)).collect());
        let norm = dot(&row, &row).sqrt();
        row.iter().map(|x| x / norm).collect()
    };
    outputs.iter().map(embedding).collect()
}

fn assert_rows(found: &[Vec<f32>], expected: &[Vec<f64>]) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let found: Vec<f64> = found.iter().map(|x| f64::from(*x)).collect();
        assert_eq!(found.len(), expected.len());
        assert!(1.0 - dot(&found, expected) < 1e-6, "row {index}: {}", dot(&found, expected));
    }
}

#[test]
fn centred_rows_are_those_of_the_definition_and_lose_the_mean() {
    let bench = bench();
    let plain = EmbedConfig { projection: None, ..bench.writing_to("plain") };
    let before = embed(&plain).unwrap();
    assert_eq!((before.embedding_dim, before.projection), (512, None));
    assert!(before.statistics.mean_cosine > 0.5, "or the test shows nothing: {}", before.statistics);

    let config = EmbedConfig { projection: Some(ProjectionKind::Center), ..bench.config };
    let after = embed(&config).unwrap();
    let summary = after.projection.unwrap();
    assert_eq!((after.embedding_dim, summary.feature_width, summary.kept_variance), (512, 512, None));
    assert!(after.to_string().contains("projection  512 outputs, centred\n"), "{after}");
    assert!(after.statistics.mean_cosine < 0.1, "{}", after.statistics);
    assert!(after.statistics.sample_similarity < before.statistics.sample_similarity);
    assert_rows(&rows(&config), &expected(&outputs(&config), None));
}

#[test]
fn reduced_rows_are_those_of_the_definition() {
    let bench = bench();
    let embedded = embed(&bench.config).unwrap();
    assert_eq!((embedded.embedding_dim, embedded.teacher.embedding_dim), (5, 512));
    let kept = embedded.projection.unwrap().kept_variance.unwrap();
    assert!(kept > 0.2 && kept < 1.0, "{kept}");

    let path = bench.config.output.join(PROJECTION_FILE);
    let reduction = Projection::open(&path).unwrap().reduction.unwrap();
    let components: Vec<Vec<f64>> =
        reduction.components.chunks(512).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect();
    let outputs = outputs(&bench.config);
    assert_rows(&rows(&bench.config), &expected(&outputs, Some(&components)));

    // Components are orthonormal, and along them the outputs have the variances and no covariances.
    let count = ROWS as f64;
    let along: Vec<Vec<f64>> = components
        .iter()
        .map(|component| {
            let values: Vec<f64> = outputs.iter().map(|row| dot(row, component)).collect();
            let mean = values.iter().sum::<f64>() / count;
            values.iter().map(|x| x - mean).collect()
        })
        .collect();
    for i in 0..5 {
        for j in 0..5 {
            let identity = if i == j { 1.0 } else { 0.0 };
            assert!((dot(&components[i], &components[j]) - identity).abs() < 1e-6, "{i} {j}");
            let variance = dot(&along[i], &along[j]) / (count - 1.0);
            assert!((variance - identity * reduction.variances[i]).abs() < 1e-4 * reduction.variances[0], "{i} {j}");
        }
    }
    assert!(reduction.variances.is_sorted_by(|a, b| a > b), "{:?}", reduction.variances);
}

#[test]
fn bytes_do_not_depend_on_threads_or_batch_size() {
    let bench = bench();
    let mut results = Vec::new();
    for (name, threads, batch_size) in [("a", 1, 64), ("b", 2, 16), ("c", 2, 48)] {
        let config = EmbedConfig { batch_size, dtype: EmbeddingDtype::F16, ..bench.writing_to(name) };
        with_threads(Some(threads), || embed(&config)).unwrap();
        results.push(files(&config.output));
    }
    assert!(results[0] == results[1] && results[0] == results[2]);
    let names: Vec<&str> = results[0].keys().map(String::as_str).collect();
    let projection = [MANIFEST_FILE, PROJECTION_FILE];
    assert_eq!(names, [&embedding_file_name(0)[..], &embedding_file_name(1), projection[0], projection[1]]);
}

/// A run that ends at each step, as a directory in the way of a file ends it, and is then given again.
#[test]
fn resumed_run_gives_the_same_bytes_as_a_straight_one_at_every_phase() {
    let bench = bench();
    embed(&bench.config).unwrap();
    let straight = files(&bench.config.output);
    let identity = Manifest::read(&bench.config.output, Stage::TeacherEmbed).unwrap().identity;
    let (first, second) = ("outputs-00000.safetensors".to_owned(), "outputs-00001.safetensors".to_owned());
    let (one, two) = (embedding_file_name(0), embedding_file_name(1));
    let projection = PROJECTION_FILE.to_owned();
    let left = |names: &[&String]| names.iter().map(|name| (*name).clone()).collect::<Vec<_>>();
    let phases = [
        (&first, left(&[]), 0),
        (&second, left(&[&first]), 1),
        (&projection, left(&[&first, &second]), 2),
        (&one, left(&[&first, &second, &projection]), 2),
        (&two, left(&[&one, &second, &projection]), 2),
    ];
    for (index, (obstacle, left, resumed)) in phases.into_iter().enumerate() {
        let config = bench.writing_to(&format!("phase {index}"));
        fs::create_dir(&config.output).unwrap();
        write_json(config.output.join(UNFINISHED_FILE), &identity).unwrap();
        fs::create_dir(config.output.join(obstacle)).unwrap();
        let error = embed(&config).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path.ends_with(obstacle)), "{error}");
        fs::remove_dir(config.output.join(obstacle)).unwrap();
        let mut found: Vec<String> = files(&config.output).into_keys().collect();
        found.retain(|name| name != UNFINISHED_FILE);
        assert_eq!(found, left, "what {obstacle} leaves");

        let embedded = embed(&config).unwrap();
        assert_eq!(embedded.resumed_shards, resumed, "{obstacle}");
        assert!(files(&config.output) == straight, "{obstacle}");
    }
}

#[test]
fn damaged_leftovers_are_made_again() {
    let bench = bench();
    embed(&bench.config).unwrap();
    let straight = files(&bench.config.output);
    let identity = Manifest::read(&bench.config.output, Stage::TeacherEmbed).unwrap().identity;
    // What a killed run may leave: everything but the manifest, with a working file that was not removed yet.
    for damaged in [PROJECTION_FILE, "embeddings-00000.safetensors", "outputs-00001.safetensors"] {
        let path = &bench.config.output;
        fs::remove_file(path.join(MANIFEST_FILE)).unwrap();
        write_json(path.join(UNFINISHED_FILE), &identity).unwrap();
        shared::io::write_atomic(path.join(damaged), b"half a file").unwrap();
        let embedded = embed(&bench.config).unwrap();
        let kept = match damaged {
            // Without the projection, no embedding counts.
            PROJECTION_FILE => 0,
            "embeddings-00000.safetensors" => 1,
            _ => 2,
        };
        assert_eq!(embedded.resumed_shards, kept, "{damaged}");
        assert!(files(path) == straight, "{damaged}");
    }
}

#[test]
fn another_projection_is_another_set() {
    let bench = bench();
    let first = embed(&bench.config).unwrap();
    assert!(embed(&bench.config).unwrap().already_finished);
    assert_eq!(embed(&bench.config).unwrap().projection, first.projection);
    for (projection, key) in
        [(None, "`center`, `pca`"), (Some(ProjectionKind::Center), "`pca`"), (Some(ProjectionKind::Pca(6)), "`pca`")]
    {
        let error = embed(&EmbedConfig { projection, ..bench.config.clone() }).unwrap_err();
        assert!(matches!(&error, Error::Chain { what, .. } if what == key), "{error}");
    }
}

#[test]
fn verify_projects_what_it_computes() {
    let bench = bench();
    for (name, projection) in [("center", ProjectionKind::Center), ("pca", ProjectionKind::Pca(5))] {
        let config = EmbedConfig { projection: Some(projection), ..bench.writing_to(name) };
        embed(&config).unwrap();
        let verified = verify(&verifying(&config)).unwrap();
        assert_eq!((verified.files, verified.recomputed_rows), (3, ROWS));
        assert!(verified.max_cosine_distance.unwrap() < 1e-6, "{verified}");
    }
}

#[test]
fn verify_finds_another_projection() {
    let bench = bench();
    embed(&bench.config).unwrap();
    let path = bench.config.output.join(PROJECTION_FILE);
    let projection = Projection::open(&path).unwrap();
    let mut changed = fs::read(&path).unwrap();
    *changed.last_mut().unwrap() ^= 1;
    shared::io::write_atomic(&path, &changed).unwrap();
    let error = verify(&verifying(&bench.config)).unwrap_err();
    assert!(matches!(error, Error::Damaged { fault: Fault::Hash { .. }, .. }), "{error}");

    // One that the manifest agrees with, but that the rows were not made with, or that is of another width.
    let manifest = Manifest::read(&bench.config.output, Stage::TeacherEmbed).unwrap();
    let mut turned = projection.clone();
    turned.reduction.as_mut().unwrap().components.rotate_right(512);
    let narrow = Projection { mean: vec![0.0; 5], reduction: None };
    let centred = Projection { reduction: None, ..projection };
    for (projection, message) in [
        (turned, "cosine distance"),
        (narrow, "it takes outputs of width 5, the teacher gives 512"),
        (centred, "it gives embeddings of width 512, those of the set have 5"),
    ] {
        let mut files = manifest.files.clone();
        let entry = projection.write(&path).unwrap();
        *files.iter_mut().find(|file| file.path == PROJECTION_FILE).unwrap() = entry;
        let manifest = manifest.clone();
        let manifest = Manifest::new(manifest.identity, manifest.counts, manifest.details, files);
        manifest.write(&bench.config.output).unwrap();
        let error = verify(&verifying(&bench.config)).unwrap_err();
        assert!(matches!(error, Error::Damaged { fault: Fault::Value(_), .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn outputs_that_do_not_vary_are_refused() {
    let bench = bench();
    let mut tensors = network(Arch::ResNet18, None, "", 1).unwrap();
    // The last norms give their biases for every image, and so does the shortcut.
    for name in ["layer4.1.bn2.weight", "layer4.1.bn2.bias", "layer4.0.bn2.weight", "layer4.0.downsample.1.weight"] {
        let value = if name.ends_with("bias") { 0.5 } else { 0.0 };
        let shape = tensors[name].shape().clone();
        tensors.insert(name.into(), Tensor::full(value as f32, shape, &candle_core::Device::Cpu).unwrap());
    }
    let weights = write(bench.directory.path(), "constant.safetensors", &tensors).unwrap();
    for (name, projection, words) in [
        ("a", ProjectionKind::Center, "the mean of all views"),
        ("b", ProjectionKind::Pca(3), "the mean in the directions"),
    ] {
        let config = EmbedConfig { weights: weights.clone(), projection: Some(projection), ..bench.writing_to(name) };
        let error = embed(&config).unwrap_err();
        assert_eq!(error.exit_status(), 1);
        let message = error.to_string();
        assert!(message.contains("output of sample 0, view 0 equals") && message.contains(words), "{message}");
        assert!(error.hint().unwrap().contains("embed without `--center` and `--pca`"));
        assert!(!config.output.join(MANIFEST_FILE).exists());
    }
}

#[test]
fn projections_that_the_set_does_not_allow_are_refused_before_anything_is_written() {
    let bench = bench();
    let single = bench.directory.path().join("single");
    shards_of(&single, 1, &[1]).unwrap();
    let head = write_moco(bench.directory.path(), 1).unwrap();
    let cases = [
        (&bench.config.weights, &bench.config.shards, ProjectionKind::Pca(28), "14 samples x 2 views give 28"),
        (&head, &bench.config.shards, ProjectionKind::Pca(HEAD.embedding_dim + 1), "more than the width"),
        (&head, &single, ProjectionKind::Pca(1), "`--pca` needs 2 samples at least"),
        (&head, &single, ProjectionKind::Center, "`--center` needs 2 samples at least"),
    ];
    for (weights, shards, projection, words) in cases {
        let config = EmbedConfig {
            weights: weights.clone(),
            shards: shards.clone(),
            projection: Some(projection),
            ..bench.config.clone()
        };
        let error = embed(&config).unwrap_err();
        assert!(error.exit_status() == 2 && error.to_string().contains(words), "{error}");
        assert!(!config.output.exists());
    }
    // The most that is allowed: all eight outputs of a head, turned.
    let config = EmbedConfig {
        weights: head,
        projection: Some(ProjectionKind::Pca(HEAD.embedding_dim)),
        ..bench.config.clone()
    };
    let kept = embed(&config).unwrap().projection.unwrap().kept_variance.unwrap();
    assert!((kept - 1.0).abs() < 1e-9, "{kept}");
}
