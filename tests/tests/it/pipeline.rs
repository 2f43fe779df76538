//! The four stages in sequence, as a user runs them, and the same bytes whatever the number of threads.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor};
use clap::Parser as _;
use serde_json::Value;
use shared::distributed::World;
use shared::models::{Arch, Encoder};
use shared::run::Run;
use shared::tensor_file::write_tensors;
use tests::{assert_same_contents, contents, write_photos};

/// Words of a command line.
fn words<'a>(program: &'a str, line: &'a str) -> impl Iterator<Item = &'a str> {
    std::iter::once(program).chain(line.split_whitespace())
}

pub(crate) fn data_prep(line: &str) -> Result<()> {
    data_prep::run(&data_prep::Args::try_parse_from(words("data-prep", line))?).with_context(|| line.to_string())
}

pub(crate) fn teacher_embed(line: &str) -> Result<()> {
    let args = teacher_embed::Args::try_parse_from(words("teacher-embed", line))?;
    teacher_embed::run(&args).with_context(|| line.to_string())
}

pub(crate) fn student_train(line: &str) -> Result<()> {
    let args = student_train::Args::try_parse_from(words("student-train", line))?;
    student_train::run_and_print(&args, &World::alone()).with_context(|| line.to_string())
}

pub(crate) fn student_eval(line: &str) -> Result<()> {
    eval::run(&eval::Args::try_parse_from(words("student-eval", line))?).with_context(|| line.to_string())
}

/// Options that make a training tiny.
pub(crate) const TINY: &str = "--student resnet18 --epochs 2 --batch-size 8 --bn-groups 2 --queue-size 16 \
                               --key-momentum 0.9 --head-hidden 32 --embedding-dim 16 --quiet";

/// Photos, shards and a pretrained teacher.
pub(crate) fn prepare(root: &Path, threads: u16) -> Result<()> {
    let at = root.display();
    write_photos(&root.join("photos/train"), 8, 1)?;
    write_photos(&root.join("photos/val"), 3, 2)?;
    let common = format!("--size 32 --shard-samples 9 --quiet --threads {threads}");
    data_prep(&format!("pack --input {at}/photos/train --output {at}/shards --recipe moco-v2 --views 3 {common}"))?;
    data_prep(&format!("pack --input {at}/photos/train --output {at}/probe --recipe linear-train --views 2 {common}"))?;
    data_prep(&format!("pack --input {at}/photos/val --output {at}/val --recipe eval-center {common}"))?;
    student_train(&format!("pretrain --shards {at}/shards --output {at}/teacher --threads {threads} {TINY}"))?;
    teacher_embed(&format!(
        "embed --shards {at}/shards --weights {at}/teacher --output {at}/embeddings --quiet --threads {threads}"
    ))
}

fn whole_pipeline(root: &Path, threads: u16) -> Result<()> {
    prepare(root, threads)?;
    let at = root.display();
    let common = format!("--quiet --threads {threads}");
    student_train(&format!(
        "distill --shards {at}/shards --embeddings {at}/embeddings --output {at}/student --threads {threads} {TINY}"
    ))?;
    student_train(&format!("export {at}/student --format safetensors --output {at}/exported.safetensors"))?;
    let sets = format!("--train {at}/probe --val {at}/val {at}/teacher {at}/student {common}");
    student_eval(&format!("knn {sets}"))?;
    student_eval(&format!("linear --epochs 10 --lr 0.1,1 {sets}"))?;
    student_eval(&format!("report {at}/teacher {at}/student --output {at}/report {common}"))
}

#[test]
fn four_stages_give_the_same_bytes_at_one_and_two_threads() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    // Manifests name their inputs' paths for people, so both runs use the same path.
    let (root, one) = (scratch.path().join("root"), scratch.path().join("one"));
    whole_pipeline(&root, 1)?;
    fs::rename(&root, &one)?;
    whole_pipeline(&root, 2)?;
    assert_same_contents(&one, &root)?;

    let report: Value = serde_json::from_slice(&fs::read(root.join("report/report.json"))?)?;
    let text = report.to_string();
    assert!(text.contains("linear") && text.contains("knn"), "{text}");
    let markdown = fs::read_to_string(root.join("report/report.md"))?;
    assert!(markdown.contains("teacher") && markdown.contains("student"), "{markdown}");
    let pictures = fs::read_dir(root.join("report"))?
        .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().extension().is_some_and(|kind| kind == "png")))
        .count();
    assert!(pictures >= 3, "{pictures} plots");
    Ok(())
}

#[test]
fn distillation_brings_the_student_closer_to_its_teacher() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    prepare(scratch.path(), 2)?;
    let at = scratch.path().display();
    let longer = TINY.replace("--epochs 2", "--epochs 6");
    student_train(&format!(
        "distill --shards {at}/shards --embeddings {at}/embeddings --output {at}/student {longer}"
    ))?;
    let run = Run::open(scratch.path().join("student"))?;
    let epochs = run.metrics()?.epochs;
    let distance = |epoch: usize| epochs[epoch].losses.term("distill_q").unwrap_or(f32::NAN);
    assert!(distance(5) < 0.7 * distance(0), "{} then {}", distance(0), distance(5));
    Ok(())
}

/// A classifier as timm saves it.
fn write_classifier(path: &Path, arch: Arch) -> Result<()> {
    let mut tensors = Encoder::new(arch, None, 1)?.store().to_tensors()?;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    tensors.insert("classifier.weight".into(), zeros(&[10, arch.feature_width()])?);
    tensors.insert("classifier.bias".into(), zeros(&[10])?);
    write_tensors(path, &BTreeMap::new(), &tensors)?;
    Ok(())
}

/// The contents of all feature files below a directory, by file name.
fn features(root: PathBuf) -> Result<BTreeMap<String, Vec<u8>>> {
    let named = |(path, bytes): (String, Vec<u8>)| {
        let name = Path::new(&path).file_name()?.to_string_lossy().into_owned();
        (name.starts_with("features-")).then_some((name, bytes))
    };
    Ok(contents(&root)?.into_iter().filter_map(named).collect())
}

#[test]
fn a_checkpoint_of_others_goes_through_all_stages() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let at = scratch.path().display();
    write_photos(&scratch.path().join("photos"), 4, 1)?;
    let pack = format!("pack --input {at}/photos --size 32 --quiet");
    data_prep(&format!("{pack} --output {at}/shards --recipe moco-v2 --views 2"))?;
    data_prep(&format!("{pack} --output {at}/probe --recipe eval-center"))?;
    write_classifier(&scratch.path().join("theirs.safetensors"), Arch::MobileNetV3Large)?;
    student_train(&format!("import {at}/theirs.safetensors --output {at}/imported.safetensors"))?;

    // The imported file is evaluated as the checkpoint itself.
    for name in ["theirs", "imported"] {
        let source = format!("{at}/{name}.safetensors --output {at}/of-{name} --quiet");
        student_eval(&format!("features --shards {at}/probe {source}"))?;
        student_eval(&format!("knn --train {at}/probe -k 1,5 {source}"))?;
    }
    let [theirs, imported] = ["of-theirs", "of-imported"].map(|name| features(scratch.path().join(name)));
    let (theirs, imported) = (theirs?, imported?);
    assert!(!theirs.is_empty() && theirs == imported);

    // It is a teacher, and the start of a student.
    teacher_embed(&format!(
        "embed --shards {at}/shards --weights {at}/imported.safetensors --output {at}/embeddings --quiet"
    ))?;
    let tiny = TINY.replace("--embedding-dim 16", "").replace("resnet18", "mobilenetv3_large_100");
    student_train(&format!(
        "distill --shards {at}/shards --embeddings {at}/embeddings --init {at}/imported.safetensors \
         --output {at}/student {tiny}"
    ))?;
    let run = Run::open(scratch.path().join("student"))?;
    let weights = shared::io::hash_file(scratch.path().join("imported.safetensors"))?.blake3;
    assert_eq!(run.manifest().input("init").map(|input| input.fingerprint.as_str()), Some(weights.as_str()));
    student_eval(&format!("report {at}/student --output {at}/report --quiet"))
}
