//! The architectures of backbones: their names, their feature widths, and what to say of them in a help text.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use clap::builder::PossibleValue;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::transforms::normalize::Normalization;
use crate::{Error, Result};

/// The architecture of a backbone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "`Arch::name` and `Arch::about` say it")]
#[non_exhaustive]
pub enum Arch {
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    ResNet50W2,
    EfficientNetB0,
    EfficientNetB1,
    MobileNetV3Large,
    EfficientNetLite0,
    EfficientNetLite1,
    EfficientNetLite2,
    EfficientNetLite3,
    EfficientNetLite4,
    VitTinyPatch16,
    VitSmallPatch16,
    VitBasePatch16,
    VitTinyPatch8,
    VitSmallPatch8,
    VitBasePatch8,
    XcitTiny12Patch16,
    XcitSmall12Patch16,
}

impl Arch {
    /// All architectures.
    pub const ALL: [Self; 22] = [
        Self::ResNet18,
        Self::ResNet34,
        Self::ResNet50,
        Self::ResNet101,
        Self::ResNet152,
        Self::ResNet50W2,
        Self::EfficientNetB0,
        Self::EfficientNetB1,
        Self::MobileNetV3Large,
        Self::EfficientNetLite0,
        Self::EfficientNetLite1,
        Self::EfficientNetLite2,
        Self::EfficientNetLite3,
        Self::EfficientNetLite4,
        Self::VitTinyPatch16,
        Self::VitSmallPatch16,
        Self::VitBasePatch16,
        Self::VitTinyPatch8,
        Self::VitSmallPatch8,
        Self::VitBasePatch8,
        Self::XcitTiny12Patch16,
        Self::XcitSmall12Patch16,
    ];

    /// The name in flags, files and timm: `resnet18`. timm has no `resnet50w2`, which `SwAV` calls so,
    /// and no `vit_tiny_patch8_224`.
    pub fn name(self) -> &'static str {
        match self {
            Self::ResNet18 => "resnet18",
            Self::ResNet34 => "resnet34",
            Self::ResNet50 => "resnet50",
            Self::ResNet101 => "resnet101",
            Self::ResNet152 => "resnet152",
            Self::ResNet50W2 => "resnet50w2",
            Self::EfficientNetB0 => "efficientnet_b0",
            Self::EfficientNetB1 => "efficientnet_b1",
            Self::MobileNetV3Large => "mobilenetv3_large_100",
            Self::EfficientNetLite0 => "tf_efficientnet_lite0",
            Self::EfficientNetLite1 => "tf_efficientnet_lite1",
            Self::EfficientNetLite2 => "tf_efficientnet_lite2",
            Self::EfficientNetLite3 => "tf_efficientnet_lite3",
            Self::EfficientNetLite4 => "tf_efficientnet_lite4",
            Self::VitTinyPatch16 => "vit_tiny_patch16_224",
            Self::VitSmallPatch16 => "vit_small_patch16_224",
            Self::VitBasePatch16 => "vit_base_patch16_224",
            Self::VitTinyPatch8 => "vit_tiny_patch8_224",
            Self::VitSmallPatch8 => "vit_small_patch8_224",
            Self::VitBasePatch8 => "vit_base_patch8_224",
            Self::XcitTiny12Patch16 => "xcit_tiny_12_p16_224",
            Self::XcitSmall12Patch16 => "xcit_small_12_p16_224",
        }
    }

    /// `F`, the width of the pooled features.
    pub fn feature_width(self) -> usize {
        match self {
            Self::ResNet18 | Self::ResNet34 => 512,
            Self::ResNet50 | Self::ResNet101 | Self::ResNet152 => 2048,
            Self::ResNet50W2 => 4096,
            Self::EfficientNetB0
            | Self::EfficientNetB1
            | Self::MobileNetV3Large
            | Self::EfficientNetLite0
            | Self::EfficientNetLite1
            | Self::EfficientNetLite2
            | Self::EfficientNetLite3
            | Self::EfficientNetLite4 => 1280,
            Self::VitTinyPatch16 | Self::VitTinyPatch8 | Self::XcitTiny12Patch16 => 192,
            Self::VitSmallPatch16 | Self::VitSmallPatch8 | Self::XcitSmall12Patch16 => 384,
            Self::VitBasePatch16 | Self::VitBasePatch8 => 768,
        }
    }

    /// How the pixels were normalised for the weights that are published under this name.
    ///
    /// # Source
    /// `mean` and `std` of timm's pretrained configurations.
    pub fn pixel_normalization(self) -> Normalization {
        match self {
            Self::EfficientNetLite0
            | Self::EfficientNetLite1
            | Self::EfficientNetLite2
            | Self::EfficientNetLite3
            | Self::EfficientNetLite4 => Normalization::Inception,
            _ => Normalization::Imagenet,
        }
    }

    /// What a help text says of it: millions of parameters, without a classifier, and the feature width.
    fn about(self) -> String {
        let millions = match self {
            Self::ResNet18 => "11.2",
            Self::ResNet34 => "21.3",
            Self::ResNet50 => "23.5",
            Self::ResNet101 => "42.5",
            Self::ResNet152 => "58.1",
            Self::ResNet50W2 => "93.9",
            Self::EfficientNetB0 => "4.0",
            Self::EfficientNetB1 | Self::XcitTiny12Patch16 => "6.5",
            Self::MobileNetV3Large => "4.2",
            Self::EfficientNetLite0 => "3.4",
            Self::EfficientNetLite1 => "4.1",
            Self::EfficientNetLite2 => "4.8",
            Self::EfficientNetLite3 => "6.9",
            Self::EfficientNetLite4 => "11.7",
            Self::VitTinyPatch16 | Self::VitTinyPatch8 => "5.5",
            Self::VitSmallPatch16 | Self::VitSmallPatch8 => "21.7",
            Self::VitBasePatch16 | Self::VitBasePatch8 => "85.8",
            Self::XcitSmall12Patch16 => "25.9",
        };
        format!("{millions} million parameters, {} features", self.feature_width())
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Arch {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|arch| arch.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|arch| arch.name()).collect();
            Error::usage(format!("`{name}` is no known architecture, these are: {}", known.join(", ")))
        })
    }
}

impl Serialize for Arch {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Arch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl ValueEnum for Arch {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()).help(self.about()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::VitOptions;
    use crate::ops::Builder;

    #[test]
    fn the_help_tells_the_true_number_of_parameters() {
        for arch in Arch::ALL {
            let mut builder = Builder::describing();
            crate::models::Backbone::new(&mut builder, arch, VitOptions::default()).unwrap();
            let trainable = builder.finish(0).unwrap().num_parameters();
            let told = format!("{:.1} million", trainable as f64 / 1e6);
            assert!(arch.about().starts_with(&told), "{arch}: {told}, {}", arch.about());
        }
    }
}
