//! One test for each way in which sets that do not belong together can meet.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

use std::fs;
use std::path::Path;

use anyhow::Result;
use shared::Error;
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};

use crate::pipeline::{TINY, data_prep, prepare, student_train, teacher_embed};

/// The project's error behind a failed stage.
fn refused(result: Result<()>) -> Error {
    result.unwrap_err().downcast::<Error>().unwrap()
}

fn is_chain(error: &Error) -> bool {
    matches!(error, Error::Chain { .. })
}

fn distill(root: &Path, shards: &str, embeddings: &str, output: &str) -> Result<()> {
    let at = root.display();
    student_train(&format!(
        "distill --shards {at}/{shards} --embeddings {at}/{embeddings} --output {at}/{output} {TINY}"
    ))
}

fn pack(root: &Path, output: &str, more: &str) -> Result<()> {
    let at = root.display();
    data_prep(&format!(
        "pack --input {at}/photos/train --output {at}/{output} --recipe moco-v2 --views 3 --size 32 --quiet {more}"
    ))
}

fn rewrite(directory: &Path, stage: Stage, change: impl FnOnce(&mut Manifest)) {
    let mut manifest = Manifest::read(directory, stage).unwrap();
    change(&mut manifest);
    manifest.write(directory).unwrap();
}

#[test]
fn each_broken_chain_is_refused_before_any_work() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let root = scratch.path();
    let at = root.display();
    prepare(root, 2)?;

    // The same photos under another seed are other pixels.
    pack(root, "reseeded", "--seed 1")?;
    let error = refused(distill(root, "reseeded", "embeddings", "student"));
    assert!(is_chain(&error) && error.hint().unwrap().contains("teacher-embed embed"), "{error}");

    // Sets of the wrong kind.
    assert!(is_chain(&refused(distill(root, "embeddings", "embeddings", "student"))));
    assert!(is_chain(&refused(distill(root, "shards", "shards", "student"))));
    assert!(is_chain(&refused(pack(root, "embeddings", "--overwrite"))));

    // One view cannot be distilled.
    data_prep(&format!(
        "pack --input {at}/photos/train --output {at}/one-view --recipe moco-v2 --views 1 --size 32 --quiet"
    ))?;
    let error = refused(student_train(&format!("pretrain --shards {at}/one-view --output {at}/student {TINY}")));
    assert!(error.to_string().contains("view"), "{error}");

    // A batch larger than the set.
    let large = TINY.replace("--batch-size 8", "--batch-size 32");
    let error = refused(student_train(&format!("pretrain --shards {at}/shards --output {at}/student {large}")));
    assert!(error.to_string().contains("32"), "{error}");

    // Nothing was begun by any of these.
    assert!(!root.join("student").exists());

    // A finished run under other settings.
    let error = refused(student_train(&format!("pretrain --shards {at}/shards --output {at}/teacher --lr 0.1 {TINY}")));
    assert!(is_chain(&error) && error.to_string().contains("lr"), "{error}");
    // A finished run on other shards.
    let error = refused(student_train(&format!("pretrain --shards {at}/reseeded --output {at}/teacher {TINY}")));
    assert!(is_chain(&error) && error.to_string().contains("shards"), "{error}");
    // A finished embedding set of another teacher.
    let other = TINY.replace("--epochs 2", "--epochs 1");
    student_train(&format!("pretrain --shards {at}/shards --output {at}/teacher-2 --seed 5 {other}"))?;
    let embed = |weights: &str| {
        teacher_embed(&format!("embed --shards {at}/shards --weights {at}/{weights} --output {at}/embeddings --quiet"))
    };
    assert!(is_chain(&refused(embed("teacher-2"))));
    embed("teacher")?;

    // A changed manifest, a changed version, a lost manifest.
    let shards = root.join("shards");
    let intact = fs::read(shards.join(MANIFEST_FILE))?;
    rewrite(&shards, Stage::DataPrep, |manifest| manifest.identity.seed = 9);
    assert!(matches!(refused(distill(root, "shards", "embeddings", "student")), Error::Damaged { .. }));
    let newer = String::from_utf8(intact.clone())?.replacen("\"format_version\": 1", "\"format_version\": 2", 1);
    shared::io::write_atomic(shards.join(MANIFEST_FILE), newer.as_bytes())?;
    let error = refused(distill(root, "shards", "embeddings", "student"));
    assert!(error.to_string().contains("version 2"), "{error}");
    fs::remove_file(shards.join(MANIFEST_FILE))?;
    assert!(matches!(refused(distill(root, "shards", "embeddings", "student")), Error::Missing { .. }));
    shared::io::write_atomic(shards.join(MANIFEST_FILE), &intact)?;

    // A truncated shard.
    let shard = shards.join("shard-00000.safetensors");
    let bytes = fs::read(&shard)?;
    shared::io::write_atomic(&shard, &bytes[..bytes.len() / 2])?;
    let error = refused(distill(root, "shards", "embeddings", "student"));
    assert!(error.to_string().contains("shard-00000"), "{error}");
    shared::io::write_atomic(&shard, &bytes)?;

    assert!(!root.join("student").exists());
    distill(root, "shards", "embeddings", "student")
}
