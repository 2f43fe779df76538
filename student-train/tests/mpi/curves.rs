//! The same losses, networks and queues for any number of ranks, also when it changes on the way.

use candle_core::DType;
use shared::Result;
use shared::run::{Losses, Metrics};
use shared::tensor_file::TensorFile;

use crate::workspace::Workspace;
use crate::{train, workspace};

/// How far losses may be apart.
const TOLERANCE: f64 = 1e-4;
/// How far networks, running statistics and queues may be apart, by their norms. Momenta are left out: those of single parameters
/// whose gradients cancel are nothing but rounding.
const TENSOR_TOLERANCE: f64 = 1e-3;
/// What the names of momenta begin with.
const MOMENTA: [&str; 2] = ["sgd.", "larc."];
/// Accuracies are shares of the batch: a single sample near a tie would change them by far more.
const SHARES: [&str; 1] = [Losses::TOP1];
/// A student without batch norm for many steps: with groups of a few samples and one pixel at the end, a convolutional network with
/// drawn weights makes as much of rounding within a few steps as of anything else.
const STEADY: [&str; 2] = ["--student=vit_tiny_patch16_224", "--lr=0.01"];

#[test]
fn one_two_and_four_ranks_distill_alike_over_fifty_steps() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    let steady = [&STEADY[..], &["--epochs=13"]].concat(); // 52 steps
    for ranks in [1, 2, 4] {
        let run = format!("{ranks} ranks");
        finishes(&workspace, Some(ranks), ("distill", &run), &steady)?;
        if ranks > 1 {
            assert_alike(&workspace, "1 ranks", &run, 52, true)?;
        }
    }
    Ok(())
}

#[test]
fn a_run_saved_by_four_ranks_goes_on_with_two_and_with_one() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    let steady = [&STEADY[..], &["--epochs=3"]].concat();
    finishes(&workspace, None, ("distill", "straight"), &steady)?;
    for (ranks, done) in [(Some(4), 4), (Some(2), 8)] {
        let more = [&steady[..], &["--checkpoint-steps=1", "--stop-after-steps=4"]].concat();
        let ended = train(&workspace, ranks, ("distill", "elastic"), &more)?;
        assert_eq!(ended.status, Some(0), "{ended:?}");
        assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
        assert!(ended.stdout.contains(&format!("after step {done}")), "{ended:?}");
    }
    finishes(&workspace, None, ("distill", "elastic"), &steady)?;
    assert_alike(&workspace, "straight", "elastic", 12, true)?;
    // A finished run is finished for any number of ranks.
    let ended = train(&workspace, Some(2), ("distill", "elastic"), &steady)?;
    assert!(ended.status == Some(0) && ended.stdout.contains("nothing to do"), "{ended:?}");
    Ok(())
}

#[test]
fn every_method_gives_the_losses_and_statistics_of_one_process() -> Result<()> {
    let Some(workspace) = workspace()? else { return Ok(()) };
    let swav = ["--method=swav", "--prototypes=12", "--swav-queue-size=32", "--queue-from-epoch=0"];
    let frozen = [&swav[..], &["--freeze-prototypes-steps=1"]].concat();
    let in_pieces = [&swav[..], &["--accumulate=2"]].concat();
    let cases: [(&str, &[&str]); 7] = [
        ("pretrain", &[]),
        ("distill", &["--method=none"]),
        ("pretrain", &["--accumulate=2"]),
        ("pretrain", &["--method=moco-v1"]),
        ("distill", &["--distill=mse=32,rkd=1,seed=1,simreg=1", "--seed-queue-size=64"]),
        ("distill", &frozen),
        ("pretrain", &in_pieces),
    ];
    for (case, (command, flags)) in cases.into_iter().enumerate() {
        let (alone, together) = (format!("alone {case}"), format!("together {case}"));
        let mut flags = [&["--epochs=1", "--lr=0.001", "--batch-size=32"], flags].concat();
        finishes(&workspace, None, (command, &alone), &flags)?;
        flags.push("--checkpoint-steps=1");
        finishes(&workspace, Some(2), (command, &together), &flags)?;
        // Pieces move the running statistics one after the other, in another order.
        let tensors = !flags.contains(&"--accumulate=2");
        assert_alike(&workspace, &alone, &together, 2, tensors)?;
    }
    Ok(())
}

fn finishes(workspace: &Workspace, ranks: Option<usize>, run: (&str, &str), more: &[&str]) -> Result<()> {
    let ended = train(workspace, ranks, run, more)?;
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert!(ended.errors().is_empty(), "{ended:?}");
    assert_eq!(ended.stdout.lines().filter(|line| line.starts_with("finished `")).count(), 1, "{ended:?}");
    Ok(())
}

/// Compares loss curves step by step, and the tensors of the last checkpoint.
fn assert_alike(workspace: &Workspace, expected: &str, found: &str, steps: usize, tensors: bool) -> Result<()> {
    let metrics = |run: &str| Metrics::read(workspace.path(run).join("metrics.jsonl"));
    let (expected_metrics, found_metrics) = (metrics(expected)?, metrics(found)?);
    assert_eq!((expected_metrics.steps.len(), found_metrics.steps.len()), (steps, steps));
    let mut furthest = 0f64;
    for (expected, found) in expected_metrics.steps.iter().zip(&found_metrics.steps) {
        assert_eq!((expected.step, expected.lr), (found.step, found.lr));
        let terms = |losses: &Losses| {
            let terms = losses.terms.iter().filter(|(name, _)| !SHARES.contains(&name.as_str()));
            terms.map(|(_, &term)| term).chain([losses.loss]).map(f64::from).collect::<Vec<_>>()
        };
        assert!(expected.losses.terms.keys().eq(found.losses.terms.keys()));
        for (expected, found) in terms(&expected.losses).into_iter().zip(terms(&found.losses)) {
            furthest = furthest.max((expected - found).abs() / expected.abs().max(1e-3));
        }
    }
    let file =
        |run: &str| TensorFile::open(workspace.path(run).join(format!("checkpoints/step-{steps:08}.safetensors")));
    let (expected_file, found_file) = (file(expected)?, file(found)?);
    assert_eq!(expected_file.names(), found_file.names());
    let mut furthest_tensor = (0f64, String::new());
    for name in expected_file
        .names()
        .into_iter()
        .filter(|name| tensors && !MOMENTA.iter().any(|prefix| name.starts_with(prefix)))
    {
        let values = |file: &TensorFile| {
            Ok::<_, shared::Error>(file.tensor(&name)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?)
        };
        let (expected, found) = (values(&expected_file)?, values(&found_file)?);
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let apart =
            norm(&mut expected.iter().zip(&found).map(|(a, b)| a - b)) / norm(&mut expected.into_iter()).max(0.1);
        if apart > furthest_tensor.0 {
            furthest_tensor = (apart, name.clone());
        }
    }
    shared::progress::note(&format!(
        "{found} is apart from {expected} by {furthest:.1e} in losses, {furthest_tensor:?} in tensors"
    ));
    assert!(furthest < TOLERANCE, "the losses of `{found}` are {furthest} apart from those of `{expected}`");
    assert!(furthest_tensor.0 < TENSOR_TOLERANCE, "`{found}` is apart from `{expected}` in {furthest_tensor:?}");
    Ok(())
}
