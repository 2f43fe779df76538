//! The flags that say what the input is and which of its samples are taken.

use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use serde::{Deserialize, Serialize};
use shared::{Error, Result};

/// How the input is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputFormat {
    /// One directory of images per class
    ClassFolders,
    /// A folder of images without classes
    Flat,
    /// The official archives of ImageNet: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz
    Ilsvrc2012,
    /// ImageNet as Kaggle gives it: ILSVRC/Data/CLS-LOC, LOC_synset_mapping.txt, LOC_val_solution.csv
    Kaggle,
    /// Tars in which members of one key make a sample: 0001.jpg with 0001.cls or 0001.json
    Webdataset,
    /// Parquet as Hugging Face writes it: columns `image` and `label`
    Parquet,
    /// CIFAR-10, binary version: data_batch_1.bin, test_batch.bin, batches.meta.txt
    Cifar10,
    /// CIFAR-100, binary version: train.bin, test.bin, fine_label_names.txt
    Cifar100,
    /// A text file that names an image, and its label, in each line
    List,
}

impl InputFormat {
    /// Its name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
    }
}

/// A part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// For training
    Train,
    /// For validation
    Val,
    /// For the final test
    Test,
}

impl Split {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        }
    }

    /// The part that a path belongs to by the words in its last part that has one: `data/train-00000-of-00002.parquet`.
    pub(super) fn of_path(path: &str) -> Option<Self> {
        path.rsplit('/').find_map(|part| {
            part.split(|c: char| !c.is_ascii_alphanumeric()).find_map(|word| match word.to_ascii_lowercase().as_str() {
                "train" | "training" => Some(Self::Train),
                "val" | "valid" | "validation" => Some(Self::Val),
                "test" => Some(Self::Test),
                _ => None,
            })
        })
    }
}

/// What the input is, and which of its samples are taken: flags of every command that reads images, and keys of `--config`.
#[derive(Debug, Clone, Default, PartialEq, ClapArgs, Serialize, Deserialize)]
#[command(next_help_heading = "Input options")]
#[serde(rename_all = "kebab-case", default)]
pub struct SourceOptions {
    /// How the input is laid out [default: told by looking]
    ///
    /// Archives, Parquet files and CIFAR files are read in place: nothing is unpacked. A sample is known by a name that does not
    /// depend on the packaging, so ImageNet gives the same set from its official archives, from Kaggle's folders and from
    /// extracted class folders.
    #[arg(long, value_enum, value_name = "FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_format: Option<InputFormat>,

    /// Which part to take [default: train, or the only one there is]
    ///
    /// Parts are those of ImageNet and CIFAR (whose `val` is the test file), files of WebDataset and Parquet with `train`,
    /// `validation` or `test` in their names, directories `train` and `val` of class folders, or those that `--split-fraction`
    /// makes.
    #[arg(long, value_enum, value_name = "PART")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,

    /// Set this share of each class of the training samples aside: `--split val` takes it, `--split train` the rest
    ///
    /// Which samples are set aside depends on `--split-seed` and their names alone. Of a class of n samples it is n times the share,
    /// rounded to the nearest whole number, halves up.
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split_fraction: Option<f64>,

    /// Seed of `--split-fraction` and `--subset-fraction`; the seed of the views has no part in them [default: 0]
    #[arg(long, value_name = "SEED")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split_seed: Option<u64>,

    /// Take only the samples that this text file names, one in each line, by their whole name or its last part
    ///
    /// SimCLR's lists of 1 % and 10 % of ImageNet are such files. Applied after the split.
    #[arg(long, value_name = "FILE", conflicts_with = "subset_fraction")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subset: Option<PathBuf>,

    /// Take only this share of each class, chosen by `--split-seed`, rounded as `--split-fraction`, at least one; applied after the
    /// split
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subset_fraction: Option<f64>,

    /// Folder that the paths of a list are relative to [default: the list's own]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
}

impl SourceOptions {
    /// Refuses what makes no sense whatever the input is.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        let share = |flag: &str, share: Option<f64>, most: f64| match share {
            Some(share) if !(share > 0.0 && share <= most) => {
                Err(Error::usage(format!("`--{flag}` must be a share between 0 and 1, such as 0.1, found {share}")))
            }
            _ => Ok(()),
        };
        share("split-fraction", self.split_fraction, 1.0 - f64::EPSILON)?;
        share("subset-fraction", self.subset_fraction, 1.0)?;
        if self.subset.is_some() && self.subset_fraction.is_some() {
            return Err(Error::usage("`subset` and `subset-fraction` exclude each other"));
        }
        if self.split_fraction.is_some() && self.split == Some(Split::Test) {
            return Err(Error::usage("`--split-fraction` makes parts `train` and `val`, there is no `test`"));
        }
        Ok(())
    }

    /// The part that the input itself must give.
    pub(super) fn own_split(&self) -> Option<Split> {
        self.split.filter(|_| self.split_fraction.is_none())
    }
}
