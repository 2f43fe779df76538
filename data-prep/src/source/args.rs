//! The flags that say what the input is and which of its samples are taken.

use clap::{Args as ClapArgs, ValueEnum};
use serde::{Deserialize, Serialize};

/// How the input is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputFormat {
    /// One directory of images per class
    ClassFolders,
    /// Images without classes
    Flat,
}

/// What the input is, and which of its samples are taken: flags of every command that reads images, and keys of `--config`.
#[derive(Debug, Clone, Default, PartialEq, ClapArgs, Serialize, Deserialize)]
#[command(next_help_heading = "Input options")]
#[serde(rename_all = "kebab-case", default)]
pub struct SourceOptions {
    /// How the input is laid out [default: told by looking]
    #[arg(long, value_enum, value_name = "FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_format: Option<InputFormat>,
}
