//! What the backbones cost against `PyTorch`'s count, exactly: `tests/golden/costs.py`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use shared::models::{Arch, Cost, cost};

#[derive(Deserialize)]
struct Golden {
    costs: BTreeMap<Arch, ArchCost>,
}

#[derive(Deserialize)]
struct ArchCost {
    parameters: u64,
    /// By the side of the image.
    multiply_accumulates: BTreeMap<usize, u64>,
}

fn golden() -> Result<BTreeMap<Arch, ArchCost>> {
    let golden: Golden =
        serde_json::from_str(include_str!("../../golden/costs.json")).context("tests/golden/costs.json")?;
    Ok(golden.costs)
}

/// Prints the table of models for the README: `cargo test -p tests costs_are -- --nocapture`.
#[test]
fn costs_are_those_that_pytorch_counts() -> Result<()> {
    let golden = golden()?;
    assert!(golden.keys().eq(&Arch::ALL));
    println!(
        "| model | features | million parameters | billion multiply-accumulates at 224 x 224 |\n|---|--:|--:|--:|"
    );
    for (arch, expected) in golden {
        for (side, multiply_accumulates) in expected.multiply_accumulates {
            let found = cost(arch, [side, side])?;
            assert_eq!(found, Cost { multiply_accumulates, parameters: expected.parameters }, "{arch} at {side}");
            if side == 224 {
                let (millions, billions) = (found.parameters as f64 / 1e6, multiply_accumulates as f64 / 1e9);
                println!("| `{arch}` | {} | {millions:.1} | {billions:.2} |", arch.feature_width());
            }
        }
    }
    Ok(())
}

/// Billions of multiply-accumulates in torchvision's list of models, the classifier included.
#[test]
fn costs_are_those_that_torchvision_publishes() -> Result<()> {
    let published = [
        (Arch::ResNet18, 1.814),
        (Arch::ResNet34, 3.664),
        (Arch::ResNet50, 4.089),
        (Arch::ResNet101, 7.801),
        (Arch::ResNet152, 11.514),
        (Arch::EfficientNetB0, 0.386),
        (Arch::MobileNetV3Large, 0.217),
    ];
    for (arch, billions) in published {
        let classifier = arch.feature_width() as u64 * 1000;
        let found = (cost(arch, [224, 224])?.multiply_accumulates + classifier) as f64 / 1e9;
        assert!((found - billions).abs() < 0.000_51, "{arch}: {found}");
    }
    Ok(())
}
