//! The names that Detectron2 gives to the tensors of a residual network, and the file it reads them from.
//!
//! Source: Detectron2's `modeling/backbone/resnet.py` (modules), `checkpoint/detection_checkpoint.py` (file); `MoCo`'s
//! `detection/convert-pretrain-to-detectron2.py` (names).

use shared::models::Arch;
use shared::{Error, Result};

use super::pth::Object;

/// The name of one of torchvision's tensors in Detectron2.
///
/// # Errors
/// [`Error::Usage`] for an architecture that Detectron2 does not have.
pub(super) fn name(arch: Arch, name: &str) -> Result<String> {
    if !is_residual(arch) {
        let message = format!(
            "`--names detectron2` is for ResNets, and the student is {arch}: leave it out for the names of timm"
        );
        return Err(Error::usage(message));
    }
    let (stage, rest) = match name.strip_prefix("layer").and_then(|rest| rest.split_once('.')) {
        Some((stage, rest)) => (format!("res{}", stage.parse().map_or(0, |stage: u32| stage + 1)), rest),
        None => ("stem".to_string(), name),
    };
    let parts = rest.split('.').map(|part| match part.strip_prefix("bn") {
        Some(index) => format!("conv{index}.norm"),
        None => part.to_string(),
    });
    let joined = parts.collect::<Vec<_>>().join(".");
    let joined = joined.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm");
    Ok(format!("{stage}.{joined}"))
}

/// What the file holds: the tensors, who made them, and that they are a part of a larger model.
pub(super) fn checkpoint(state: Object) -> Object {
    Object::Dict(vec![
        ("model".into(), state),
        ("__author__".into(), Object::Text("student-train".into())),
        ("matching_heuristics".into(), Object::True),
    ])
}

fn is_residual(arch: Arch) -> bool {
    matches!(
        arch,
        Arch::ResNet18 | Arch::ResNet34 | Arch::ResNet50 | Arch::ResNet101 | Arch::ResNet152 | Arch::ResNet50W2
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_detectron2s_modules() {
        let cases = [
            ("conv1.weight", "stem.conv1.weight"),
            ("bn1.running_mean", "stem.conv1.norm.running_mean"),
            ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
            ("layer2.3.bn3.bias", "res3.3.conv3.norm.bias"),
            ("layer3.10.bn2.running_var", "res4.10.conv2.norm.running_var"),
            ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
            ("layer4.0.downsample.1.weight", "res5.0.shortcut.norm.weight"),
        ];
        for (ours, theirs) in cases {
            assert_eq!(name(Arch::ResNet50, ours).unwrap(), theirs);
        }
    }

    #[test]
    fn other_networks_are_refused() {
        let error = name(Arch::EfficientNetB0, "conv_stem.weight").unwrap_err();
        assert_eq!(error.exit_status(), 2);
        assert!(error.to_string().contains("efficientnet_b0"), "{error}");
    }
}
