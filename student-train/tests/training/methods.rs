//! Other methods than the usual one: whole runs of `SwAV` and `MoCo` v1, and what their readers make of them.

use std::fs;

use shared::models::{HeadConfig, HeadKind};
use shared::ops::Mode;
use shared::run::Run;
use shared::shard::{LocalDetails, ShardSet};
use shared::tensor_file::TensorFile;
use shared::{Error, Result};
use student_train::batches::Batches;

use crate::train;
use crate::workspace::{EMBEDDING_DIM, Workspace, write_crops, write_embedding_set};

/// A workspace whose sets have two global and five local views, and the flags that name them.
fn multi_crop() -> Result<(Workspace, Vec<String>)> {
    let workspace = Workspace::new()?;
    let [shards, embeddings] = ["crops", "crop-embeddings"].map(|name| workspace.path(name));
    write_crops(&shards, 10, 2, Some(LocalDetails { views: 5, size: 8 }), 0)?;
    write_embedding_set(&embeddings, &shards, 10, 2, 0)?;
    let flags = vec![format!("--shards={}", shards.display()), format!("--embeddings={}", embeddings.display())];
    Ok((workspace, flags))
}

/// Queue of one batch from the second epoch on: the last of the four steps uses it.
const SWAV: [&str; 7] = [
    "--method=swav",
    "--bn-groups=2",
    "--prototypes=12",
    "--swav-queue-size=4",
    "--queue-from-epoch=1",
    "--freeze-prototypes-steps=1",
    "--checkpoint-steps=1",
];

fn swav<'a>(command: &str, flags: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    // `pretrain` has no embeddings.
    let flags = flags.iter().map(String::as_str).take(if command == "distill" { 2 } else { 1 });
    flags.chain(SWAV).chain(more.iter().copied()).collect()
}

#[test]
fn killed_swav_run_resumes_to_the_bytes_of_a_straight_one() -> Result<()> {
    let (workspace, flags) = multi_crop()?;
    for command in ["distill", "pretrain"] {
        let straight = format!("{command} straight");
        assert!(train(&workspace, command, &straight, &swav(command, &flags, &["--threads=1"]))?.finished);
        let run = format!("{command} killed");
        for steps in ["--stop-after-steps=1", "--stop-after-steps=2"] {
            assert!(!train(&workspace, command, &run, &swav(command, &flags, &["--threads=2", steps]))?.finished);
        }
        assert!(train(&workspace, command, &run, &swav(command, &flags, &["--threads=2"]))?.finished);
        let (expected, found) = (workspace.contents(&straight), workspace.contents(&run));
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        for (name, contents) in &expected {
            assert!(*contents == found[name], "{command}: `{name}` differs");
        }
    }
    Ok(())
}

#[test]
fn swav_run_holds_its_prototypes_and_its_queue() -> Result<()> {
    let (workspace, flags) = multi_crop()?;
    train(&workspace, "pretrain", "run", &swav("pretrain", &flags, &["--keep=9"]))?;
    let prototypes = |step: u32| -> Result<Vec<f32>> {
        let name = format!("run/checkpoints/step-{step:08}.safetensors");
        let file = TensorFile::open(workspace.path(&name))?;
        // A network without gradients has no momenta.
        assert_eq!(file.names().iter().any(|name| name.ends_with(".prototypes.weight")), step > 1);
        file.expect_shape("prototypes.weight", &[12, 128], "[P, D]")?;
        Ok(file.view::<f32>("prototypes.weight")?.to_vec())
    };
    let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
    // Frozen in the first step: made unit length, nothing else. Then they move.
    let (frozen, moved) = (prototypes(1)?, prototypes(2)?);
    assert!(frozen.chunks(128).all(|row| (norm(row) - 1.0).abs() < 1e-6));
    assert_ne!(frozen, moved);
    let queue = |step: u32, view: u32| -> Result<Vec<f32>> {
        let name = format!("run/checkpoints/step-{step:08}.safetensors");
        Ok(TensorFile::open(workspace.path(&name))?.view::<f32>(&format!("swav_queue.{view}"))?.to_vec())
    };
    assert!(queue(2, 0)?.iter().chain(&queue(2, 1)?).all(|&x| x == 0.0));
    for view in 0..2 {
        assert!(queue(3, view)?.chunks(128).all(|row| (norm(row) - 1.0).abs() < 1e-5));
        assert_ne!(queue(3, view)?, queue(4, view)?);
    }
    assert_ne!(queue(4, 0)?, queue(4, 1)?);
    Ok(())
}

#[test]
fn steps_see_all_local_views_of_their_samples_and_other_methods_none() -> Result<()> {
    let (workspace, flags) = multi_crop()?;
    let set = || ShardSet::open(workspace.path("crops"));
    let plain = Batches::new(set()?, None, 4, 5, shared::data_loader::Order::Random)?;
    assert!(plain.batch(0)?.locals.is_none());
    let batch = plain.with_local_views()?.batch(3)?;
    let locals = batch.locals.ok_or_else(|| Error::invalid("no local views", ""))?;
    assert_eq!((locals.dims(), batch.epoch), (&[4, 5, 8, 8, 3][..], 1));
    // Each is a stored view of its sample, and no two are the same.
    let set = set()?;
    let mut reader = shared::shard::ViewReader::default();
    for (row, id) in batch.sample_ids.iter().enumerate() {
        let index = (0..set.len()).find(|&index| set.sample_id(index) == *id).unwrap_or_default();
        let mut seen = std::collections::BTreeSet::new();
        for place in 0..5 {
            let found = locals.get(row)?.get(place)?.flatten_all()?.to_vec1::<f32>()?;
            for view in 0..5 {
                let mut stored = vec![0.0; 8 * 8 * 3];
                let pixels = reader.read(&set, index, shared::transforms::View::Local(view))?;
                shared::transforms::normalize::Normalization::Imagenet.write(pixels, &mut stored);
                if stored == found {
                    seen.insert(view);
                }
            }
        }
        assert_eq!(seen.len(), 5);
    }
    // Without local views the method works on the two global ones.
    let two = train(&workspace, "pretrain", "two", &SWAV)?.final_losses.unwrap_or_default();
    let all = train(&workspace, "pretrain", "all", &swav("pretrain", &flags, &[]))?.final_losses.unwrap_or_default();
    let ln = 12f32.ln();
    for losses in [&two, &all] {
        assert!(losses.loss > 0.3 * ln && losses.loss < 3.0 * ln, "{losses:?}");
    }
    assert_ne!(two, all);
    Ok(())
}

#[test]
fn runs_of_every_head_start_others_and_tell_their_widths() -> Result<()> {
    let workspace = Workspace::new()?;
    let heads = [("moco-v1", HeadKind::Linear, 0), ("swav", HeadKind::MlpBatchNorm, 16)];
    for (method, kind, hidden) in heads {
        let method = format!("--method={method}");
        let (first, second) = (format!("{kind:?} first"), format!("{kind:?} second"));
        train(&workspace, "distill", &first, &[&method])?;
        let run = Run::open(workspace.path(&first))?;
        assert_eq!(run.details().head(), HeadConfig { kind, hidden, embedding_dim: EMBEDDING_DIM });
        let (student, query) = (run.student()?.store().to_tensors()?, run.query_encoder()?.store().to_tensors()?);
        assert!(student.len() < query.len());
        assert!(student.keys().all(|name| !name.starts_with("fc") && !name.starts_with("projection_head")));
        let images = candle_core::Tensor::ones((3, 16, 16, 3), candle_core::DType::F32, &candle_core::Device::Cpu)?;
        assert_eq!(run.query_encoder()?.embeddings(&images, Mode::Eval)?.dims(), [3, EMBEDDING_DIM]);

        // Still: what it ends with is what it began with, but for the batch-norm statistics.
        let init = format!("--init={}", workspace.path(&first).display());
        let still = ["--lr=1e-30", "--weight-decay=0", "--epochs=1"];
        let more: Vec<&str> = [method.as_str(), &init, "--init-head"].into_iter().chain(still).collect();
        train(&workspace, "distill", &second, &more)?;
        let started = Run::open(workspace.path(&second))?.query_encoder()?.store().to_tensors()?;
        for (name, tensor) in query.iter().filter(|(_, tensor)| tensor.rank() > 1) {
            let values = |tensor: &candle_core::Tensor| tensor.flatten_all()?.to_vec1::<f32>();
            assert_eq!(values(tensor)?, values(&started[name])?, "{name}");
        }
        // Another method has another head.
        let error = train(&workspace, "distill", "other", &[&init, "--init-head"]).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("no projection head of 16 hidden and 8 final"), "{error}");
        assert!(fs::metadata(workspace.path("other")).is_err());
    }
    Ok(())
}
