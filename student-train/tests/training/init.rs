//! Weights of others: imported as a file, and as the start of a run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use clap::Parser as _;
use shared::models::{Arch, Encoder, HeadConfig};
use shared::run::Run;
use shared::tensor_file::{TensorFile, write_tensors};
use shared::{Error, Result};
use student_train::{Args, Imported, Summary};

use crate::train;
use crate::workspace::{EMBEDDING_DIM, Workspace};

/// The head of the tiny runs.
const HEAD: HeadConfig = HeadConfig::mlp(16, EMBEDDING_DIM);

/// A network whose batch-norm statistics are not those of a drawn one.
fn network(arch: Arch, head: Option<HeadConfig>, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = Encoder::new(arch, head, seed)?.store().to_tensors()?;
    for (name, tensor) in &mut tensors {
        if name.ends_with("running_var") {
            *tensor = (&*tensor * 2.0)?;
        } else if name.ends_with("num_batches_tracked") {
            *tensor = Tensor::new(7i64, &Device::Cpu)?;
        }
    }
    Ok(tensors)
}

/// A classifier as timm and torchvision save it.
fn classifier(arch: Arch, layer: &str, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = network(arch, None, seed)?;
    let width = arch.feature_width();
    tensors.insert(format!("{layer}.weight"), Tensor::zeros((10, width), DType::F32, &Device::Cpu)?);
    tensors.insert(format!("{layer}.bias"), Tensor::zeros(10, DType::F32, &Device::Cpu)?);
    Ok(tensors)
}

fn write(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    write_tensors(path, &BTreeMap::new(), tensors).map(drop)
}

fn import(workspace: &Workspace, checkpoint: &str, output: &str, more: &[&str]) -> Result<Imported> {
    let path = |name: &str| workspace.path(name).display().to_string();
    let mut arguments: Vec<String> =
        vec!["student-train".into(), "import".into(), path(checkpoint), "--output".into(), path(output)];
    arguments.extend(more.iter().map(|word| (*word).to_string()));
    match student_train::run(&Args::parse_from(arguments))? {
        Summary::Imported(imported) => Ok(imported),
        other => Err(Error::usage(format!("not an import: {other}"))),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io("read", path))
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

fn assert_same_tensors(expected: &BTreeMap<String, Tensor>, found: &BTreeMap<String, Tensor>) -> Result<()> {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, tensor) in expected {
        assert_eq!(tensor.dims(), found[name].dims(), "{name}");
        assert!(floats(tensor)? == floats(&found[name])?, "{name}");
    }
    Ok(())
}

fn flag(workspace: &Workspace, name: &str) -> String {
    format!("--init={}", workspace.path(name).display())
}

/// A checkpoint that cannot be imported: its name, its tensors, more arguments, a part of the message.
type Refusal<'a> = (&'a str, &'a BTreeMap<String, Tensor>, &'a [&'a str], &'a str);

/// A rate at which nothing moves: what a run ends with is what it began with, but for the batch-norm statistics.
const STILL: [&str; 3] = ["--lr=1e-30", "--weight-decay=0", "--epochs=1"];

fn is_weight(tensor: &Tensor) -> bool {
    tensor.rank() > 1
}

#[test]
fn a_classifier_becomes_a_students_file() -> Result<()> {
    let workspace = Workspace::new()?;
    for (arch, layer) in [(Arch::ResNet18, "fc"), (Arch::EfficientNetLite0, "classifier")] {
        let name = format!("{arch}.safetensors");
        write(&workspace.path(&name), &classifier(arch, layer, 1)?)?;
        let output = format!("{arch}-imported.safetensors");
        let imported = import(&workspace, &name, &output, &[])?;
        let backbone = network(arch, None, 1)?;
        assert_eq!((imported.student.as_str(), imported.used), (arch.name(), backbone.len()));
        assert_eq!((imported.missing_counters, imported.unexpected.len()), (0, 0));
        assert_eq!(imported.left_over.iter().map(|left| left.tensors).collect::<Vec<_>>(), [2]);
        let file = TensorFile::open(workspace.path(&output))?;
        assert_same_tensors(&backbone, &file.tensors()?)?;
        let metadata = file.metadata();
        assert_eq!((metadata["arch"].as_str(), metadata["format"].as_str()), (arch.name(), "pt"));
        assert!(!metadata.contains_key("mean"), "it is not known");
        let text = imported.to_string();
        for part in [&format!("wrote {arch}"), "used ", "left over "] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("missing"), "{text}");
    }
    Ok(())
}

#[test]
fn a_prefix_another_network_and_absent_counters_are_no_obstacle() -> Result<()> {
    let workspace = Workspace::new()?;
    let mut tensors = BTreeMap::new();
    for (prefix, seed) in [("module.encoder_k.", 2), ("module.encoder_q.", 1)] {
        let named = network(Arch::ResNet18, Some(HEAD), seed)?.into_iter();
        tensors.extend(named.map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
    }
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    tensors.insert("module.queue".into(), Tensor::zeros((8, 32), DType::F32, &Device::Cpu)?);
    write(&workspace.path("moco.safetensors"), &tensors)?;
    let imported = import(&workspace, "moco.safetensors", "imported.safetensors", &["--student", "resnet18"])?;
    assert_eq!((imported.prefix.as_str(), imported.missing_counters), ("module.encoder_q.", 20));
    let text = imported.to_string();
    assert!(text.contains("under `module.encoder_q.`") && text.contains("missing     20 counters"), "{text}");
    assert!(text.contains("key encoder: 104 tensors") && text.contains("queue of negatives: 1 tensors"), "{text}");
    let found = TensorFile::open(workspace.path("imported.safetensors"))?.tensors()?;
    let expected = network(Arch::ResNet18, None, 1)?;
    for name in ["layer4.1.conv2.weight", "bn1.running_var"] {
        assert!(floats(&found[name])? == floats(&expected[name])?, "{name}");
    }
    Ok(())
}

#[test]
fn a_students_file_and_its_run_are_imported_to_the_same_bytes() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "run", &["--epochs=1"])?;
    import(&workspace, "run/student.safetensors", "from-file.safetensors", &[])?;
    let same = read(&workspace.path("run/student.safetensors"))? == read(&workspace.path("from-file.safetensors"))?;
    assert!(same, "names, values, counters and text entries");
    import(&workspace, "run", "from-run.safetensors", &[])?;
    let tensors = |name: &str| TensorFile::open(workspace.path(name))?.tensors();
    assert_same_tensors(&tensors("from-file.safetensors")?, &tensors("from-run.safetensors")?)
}

#[test]
fn what_cannot_be_imported_is_one_sentence_and_no_file() -> Result<()> {
    let workspace = Workspace::new()?;
    let whole = classifier(Arch::ResNet18, "fc", 1)?;
    let mut incomplete = whole.clone();
    incomplete.remove("layer3.0.bn2.running_mean");
    let mut deeper = whole.clone();
    deeper.insert("layer4.2.conv1.weight".into(), Tensor::zeros((512, 512, 3, 3), DType::F32, &Device::Cpu)?);
    let mut diverged = whole.clone();
    diverged.insert("layer1.0.bn1.weight".into(), Tensor::full(f32::NAN, 64, &Device::Cpu)?);
    let foreign = BTreeMap::from([("embedding.weight".to_string(), Tensor::zeros((4, 4), DType::F32, &Device::Cpu)?)]);
    let cases: [Refusal<'_>; 6] = [
        ("whole", &whole, &["--student", "resnet34"], "holds the weights of resnet18, not those of resnet34"),
        ("whole", &whole, &["--state-key", "model"], "has no state dict at `model`"),
        ("incomplete", &incomplete, &[], "1 missing: `layer3.0.bn2.running_mean`"),
        ("deeper", &deeper, &[], "1 unexpected: `layer4.2.conv1.weight`"),
        ("diverged", &diverged, &[], "numbers in `layer1.0.bn1.weight` that are not finite"),
        ("foreign", &foreign, &[], "holds no network that is known here"),
    ];
    for (name, tensors, more, part) in cases {
        write(&workspace.path(name), tensors)?;
        let error = import(&workspace, name, "imported.safetensors", more).map(|_| ()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(part) && message.lines().count() == 1, "{message}");
        assert_eq!(error.exit_status(), 1);
        assert!(error.hint().is_some(), "{message}");
        assert!(!workspace.path("imported.safetensors").exists());
    }
    assert!(matches!(import(&workspace, "nowhere", "imported.safetensors", &[]), Err(Error::Missing { .. })));
    shared::io::write_atomic(workspace.path("taken"), b"")?;
    let error = import(&workspace, "whole", "taken", &[]).map(|_| ()).unwrap_err();
    assert!(error.exit_status() == 2 && error.to_string().contains("--overwrite"), "{error}");
    import(&workspace, "whole", "taken", &["--overwrite"])?;
    Ok(())
}

#[test]
fn moco_v3s_small_transformer_is_no_students_file() -> Result<()> {
    let workspace = Workspace::new()?;
    let named = |(name, tensor)| (format!("module.base_encoder.{name}"), tensor);
    let mut tensors: BTreeMap<String, Tensor> =
        network(Arch::VitSmallPatch16, None, 1)?.into_iter().map(named).collect();
    // Its head: linear without bias, batch norm, activation, linear without bias, batch norm without scale.
    let head: [(&str, &[usize]); 8] = [
        ("0.weight", &[8, 384]),
        ("1.weight", &[8]),
        ("1.bias", &[8]),
        ("1.running_mean", &[8]),
        ("1.running_var", &[8]),
        ("3.weight", &[8, 8]),
        ("4.running_mean", &[8]),
        ("4.running_var", &[8]),
    ];
    for (name, shape) in head {
        tensors.insert(format!("module.base_encoder.head.{name}"), Tensor::ones(shape, DType::F32, &Device::Cpu)?);
    }
    write(&workspace.path("moco-v3"), &tensors)?;
    let error = import(&workspace, "moco-v3", "imported.safetensors", &[]).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("12 heads of attention"), "{error}");
    tensors.retain(|name, _| !name.contains(".head."));
    let bare = tensors.into_iter().map(|(name, tensor)| (name.replace("module.base_encoder.", ""), tensor)).collect();
    write(&workspace.path("timm"), &bare)?;
    assert_eq!(import(&workspace, "timm", "imported.safetensors", &[])?.student, "vit_small_patch16_224");
    Ok(())
}

#[test]
fn a_run_starts_from_the_weights_and_statistics_of_a_checkpoint() -> Result<()> {
    let workspace = Workspace::new()?;
    for (arch, layer) in
        [(Arch::ResNet18, "fc"), (Arch::MobileNetV3Large, "classifier"), (Arch::XcitTiny12Patch16, "head")]
    {
        let name = arch.name();
        write(&workspace.path(name), &classifier(arch, layer, 1)?)?;
        let student = format!("--student={name}");
        let (started, drawn) = (format!("{name} started"), format!("{name} drawn"));
        train(&workspace, "distill", &started, &[&STILL[..], &[&student, &flag(&workspace, name)]].concat())?;
        train(&workspace, "distill", &drawn, &[&STILL[..], &[&student]].concat())?;
        let (started, drawn) = (Run::open(workspace.path(&started))?, Run::open(workspace.path(&drawn))?);
        let init = network(arch, None, 1)?;
        let checkpoint = TensorFile::open(started.directory().join(&started.details().checkpoint))?;
        for (tensor_name, tensor) in init.iter().filter(|(_, tensor)| is_weight(tensor)) {
            let of = |encoder: &str| floats(&checkpoint.tensor(&format!("{encoder}.{tensor_name}"))?);
            let (expected, key) = (floats(tensor)?, of("key")?);
            assert!(expected == of("query")?, "{tensor_name}");
            // The key encoder follows a query encoder that stands still: its sums of 0.999 and 0.001 are rounded.
            assert!(expected.iter().zip(&key).all(|(a, b)| (a - b).abs() <= 1e-6 * a.abs()), "{tensor_name}");
        }
        // Two steps of two passes count on from the checkpoint's statistics, whose variances are 2 and not 1.
        let norm = init.keys().find_map(|name| name.strip_suffix("num_batches_tracked")).unwrap_or_default();
        let counter = floats(&checkpoint.tensor(&format!("query.{norm}num_batches_tracked"))?)?;
        assert!(counter[0] > 7.0, "{counter:?}");
        let encoder = |run: &Run| run.query_encoder()?.store().to_tensors();
        let (started, drawn) = (encoder(&started)?, encoder(&drawn)?);
        let variances = |tensors: &BTreeMap<String, Tensor>| floats(&tensors[&format!("{norm}running_var")]);
        assert_ne!(variances(&started)?, variances(&drawn)?);
        // The head is the drawn one.
        assert!(floats(&started["fc.2.weight"])? == floats(&drawn["fc.2.weight"])?);
    }
    Ok(())
}

#[test]
fn the_head_of_a_run_comes_along_when_asked_for() -> Result<()> {
    let workspace = Workspace::new()?;
    train(&workspace, "pretrain", "teacher", &["--seed=9", "--epochs=1", "--embedding-dim=8"])?;
    let init = flag(&workspace, "teacher");
    let with_head = [&STILL[..], &[&init, "--init-head"]].concat();
    train(&workspace, "distill", "student", &with_head)?;
    let teacher = Run::open(workspace.path("teacher"))?.query_encoder()?.store().to_tensors()?;
    let student = Run::open(workspace.path("student"))?.query_encoder()?.store().to_tensors()?;
    for (name, tensor) in teacher.iter().filter(|(_, tensor)| is_weight(tensor)) {
        assert!(floats(tensor)? == floats(&student[name])?, "{name}");
    }
    assert!(student.contains_key("fc.0.weight"));

    write(&workspace.path("classifier"), &classifier(Arch::ResNet18, "fc", 1)?)?;
    for more in
        [vec![init.as_str(), "--init-head", "--head-hidden=17"], vec![&flag(&workspace, "classifier"), "--init-head"]]
    {
        let error = train(&workspace, "distill", "other", &more).map(|_| ()).unwrap_err();
        assert!(error.exit_status() == 1 && error.to_string().contains("has no projection head of 1"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("--init-head")));
        assert!(!workspace.path("other").exists());
    }
    Ok(())
}

#[test]
fn the_weights_are_part_of_the_run() -> Result<()> {
    let workspace = Workspace::new()?;
    for (name, seed) in [("a", 1), ("b", 2)] {
        write(&workspace.path(name), &network(Arch::ResNet18, None, seed)?)?;
    }
    let init = flag(&workspace, "a");
    let often = "--checkpoint-steps=1";
    train(&workspace, "pretrain", "straight", &[&init, often])?;
    let manifest = Run::open(workspace.path("straight"))?.manifest().clone();
    let recorded = manifest.input("init").map(|input| input.fingerprint.clone());
    assert_eq!(recorded, Some(shared::io::hash_file(workspace.path("a"))?.blake3));
    let resolved = read(&workspace.path("straight/config.toml"))?;
    assert!(String::from_utf8_lossy(&resolved).lines().next().is_some_and(|line| line.contains("--init INIT")));

    // Other weights, or none, are another run.
    train(&workspace, "pretrain", "killed", &[&init, often, "--stop-after-steps=1"])?;
    for more in [vec![flag(&workspace, "b")], vec![]] {
        let more: Vec<&str> = more.iter().map(String::as_str).chain([often]).collect();
        for run in ["killed", "straight"] {
            let error = train(&workspace, "pretrain", run, &more).map(|_| ()).unwrap_err();
            assert!(matches!(&error, Error::Chain { what, .. } if what == "input `init`"), "{error}");
        }
    }

    // Begun without a checkpoint of its own, a run needs the file; afterwards it does not.
    train(&workspace, "pretrain", "begun", &[&init, "--stop-after-steps=0"])?;
    fs::remove_file(workspace.path("a")).map_err(Error::io("remove", workspace.path("a")))?;
    let error = train(&workspace, "pretrain", "begun", &[&init]).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, Error::Missing { .. }) && error.hint().is_some_and(|hint| hint.contains("bring the file back"))
    );
    for run in ["killed", "straight"] {
        assert!(train(&workspace, "pretrain", run, &[&init, often])?.finished);
    }
    assert!(workspace.contents("straight") == workspace.contents("killed"), "resumed without the file");
    let error = train(&workspace, "pretrain", "straight", &[&init, "--overwrite"]).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert!(workspace.path("straight/manifest.json").exists(), "nothing was deleted");
    Ok(())
}

#[test]
fn weights_that_do_not_fit_the_student_are_refused_before_a_run_is_begun() -> Result<()> {
    let workspace = Workspace::new()?;
    write(&workspace.path("b0"), &classifier(Arch::EfficientNetB0, "classifier", 1)?)?;
    let error = train(&workspace, "pretrain", "run", &[&flag(&workspace, "b0")]).map(|_| ()).unwrap_err();
    assert!(error.to_string().ends_with("holds the weights of efficientnet_b0, not those of resnet18"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("--student efficientnet_b0")));
    let error = train(&workspace, "pretrain", "run", &[&flag(&workspace, "nowhere")]).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let error = train(&workspace, "pretrain", "run", &["--init-head"]).map(|_| ()).unwrap_err();
    assert!(error.exit_status() == 2 && error.to_string().contains("needs `--init`"), "{error}");
    assert!(!workspace.path("run").exists());
    Ok(())
}
