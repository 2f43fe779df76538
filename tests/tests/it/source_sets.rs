//! Sets of source images in the place of sets of views, through all stages, and caches that outlive the shards they were made from.

use std::fs;
use std::path::Path;

use anyhow::Result;
use shared::Error;
use shared::embedding::EmbeddingSet;
use shared::shard::ShardSet;
use tests::{contents, write_photos};

use crate::pipeline::{TINY, data_prep, student_eval, student_train, teacher_embed};

/// Every stored embedding, by sample.
fn embeddings(shards: &Path, embeddings: &Path) -> Result<Vec<(u64, Vec<f32>)>> {
    let shards = ShardSet::open(shards)?;
    let set = EmbeddingSet::open(embeddings, &shards)?;
    let mut rows = Vec::new();
    for index in 0..shards.len() {
        for view in 0..shards.views() {
            let mut row = vec![0.0; set.embedding_dim()];
            set.read(index, view, &mut row)?;
            rows.push((shards.sample_id(index), row));
        }
    }
    Ok(rows)
}

#[test]
fn source_sets_give_what_sets_of_views_give_in_every_stage() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let at = scratch.path().display();
    write_photos(&scratch.path().join("photos"), 8, 1)?;
    let pack = format!("pack --input {at}/photos --recipe moco-v2 --views 3 --size 32 --shard-samples 9 --quiet");
    data_prep(&format!("{pack} --output {at}/views"))?;
    data_prep(&format!("{pack} --output {at}/source --store source --short-side original"))?;
    data_prep(&format!("redraw --shards {at}/source --recipe eval-center --size 32 --output {at}/probe --quiet"))?;
    for set in ["views", "source"] {
        student_train(&format!("pretrain --shards {at}/{set} --output {at}/teacher-{set} {TINY}"))?;
        // One teacher for both, so that only the pixels could differ.
        teacher_embed(&format!(
            "embed --shards {at}/{set} --weights {at}/teacher-views --output {at}/embeddings-{set} --quiet"
        ))?;
        teacher_embed(&format!("verify {at}/embeddings-{set} --weights {at}/teacher-views --sample 7 --quiet"))?;
        student_train(&format!(
            "distill --shards {at}/{set} --embeddings {at}/embeddings-{set} --output {at}/student-{set} --order quasi {TINY}"
        ))?;
    }
    let of = |set: &str| embeddings(&scratch.path().join(set), &scratch.path().join(format!("embeddings-{set}")));
    assert!(of("views")? == of("source")?);
    for run in ["teacher", "student"] {
        let [views, source] =
            ["views", "source"].map(|set| fs::read(scratch.path().join(format!("{run}-{set}/student.safetensors"))));
        assert!(views? == source?, "{run}");
    }
    // The redrawn set serves the evaluation.
    student_eval(&format!("knn --train {at}/probe -k 1,5 {at}/student-source --quiet"))?;
    student_eval(&format!("report {at}/student-source --output {at}/report --quiet"))
}

#[test]
fn embeddings_verify_against_a_second_packing_elsewhere() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let at = scratch.path().display();
    write_photos(&scratch.path().join("here/photos"), 6, 1)?;
    let recipe = "--recipe moco-v2 --views 2 --size 32 --store source --short-side 40 --shard-samples 7 --quiet";
    data_prep(&format!("pack --input {at}/here/photos --output {at}/here/shards --threads 1 {recipe}"))?;
    student_train(&format!("pretrain --shards {at}/here/shards --output {at}/teacher {TINY}"))?;
    teacher_embed(&format!(
        "embed --shards {at}/here/shards --weights {at}/teacher --output {at}/here/embeddings --quiet"
    ))?;

    // The images, the packing and the embeddings reach the other machine each by its own way.
    let there = scratch.path().join("there/of/another");
    fs::create_dir_all(&there)?;
    for (name, bytes) in contents(&scratch.path().join("here/photos"))? {
        let path = there.join("pictures").join(name);
        fs::create_dir_all(path.parent().unwrap_or(&there))?;
        shared::io::write_atomic(path, &bytes)?;
    }
    let there = there.display();
    data_prep(&format!("pack --input {there}/pictures --output {there}/packed --threads 2 {recipe}"))?;
    fs::rename(scratch.path().join("here/embeddings"), scratch.path().join("there/of/another/cache"))?;
    fs::remove_dir_all(scratch.path().join("here"))?;
    let verify = |shards: &str| {
        teacher_embed(&format!(
            "verify {there}/cache --shards {there}/{shards} --weights {at}/teacher --sample 9 --quiet"
        ))
    };
    verify("packed")?;
    student_train(&format!(
        "distill --shards {there}/packed --embeddings {there}/cache --output {there}/student {TINY}"
    ))?;

    // Another recipe of the same images is another set.
    data_prep(&format!(
        "redraw --shards {there}/packed --recipe linear-train --views 2 --size 32 --output {there}/other --quiet"
    ))?;
    let error = verify("other").unwrap_err().downcast::<Error>()?;
    assert!(matches!(&error, Error::Chain { .. }), "{error}");
    Ok(())
}
