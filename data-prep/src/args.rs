//! The command line of `data-prep`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use serde::{Deserialize, Serialize};
use shared::cli::CommonArgs;
use shared::shard::{Codec, Store};
use shared::transforms::built_in::BUILT_IN;

use crate::config::{NumberOrText, PassOrderFlag};

/// Packs images into shards of ready-made views, which the other stages read by memory map
///
/// The input is a folder of classes (one directory per class, as torchvision reads it: classes are sorted by
/// name) or a flat folder without classes. JPEG, PNG, WebP, BMP, GIF, TIFF and PNM are told by their contents. What is packed is
/// the picture a person sees: grey, palette, 16-bit, CMYK and transparent images (laid over white) become 8-bit RGB. The EXIF
/// orientation is not applied, as in torchvision. Images that cannot be used are named in `rejects.jsonl` with the reason.
///
/// The same images, recipe and seed give the same bytes, with any number of threads and however often the work was interrupted:
/// run the same command again to go on.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Clone, Parser)]
#[command(name = "data-prep", version, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Pack a folder of images into a shard set
    ///
    /// Every image is decoded once and gives `--views` augmented views. Samples are written in a random order that `--seed`
    /// fixes. Shards appear one by one, each complete; an interrupted run keeps those and goes on. A finished set is left alone.
    ///
    /// Example: data-prep pack --input photos --output out/shards --recipe moco-v2 --views 4 --size 224
    Pack(PackArgs),
    /// Say what packing takes, before anything is written
    ///
    /// Lists the samples, measures the speed on a few of them, and compares the size with the free disk space.
    Plan(PlanArgs),
    /// Check a finished shard set
    ///
    /// Reads every byte and compares the recorded hashes, checks the counts, that no sample occurs twice, and that every view has
    /// the parameters that its recipe and seed draw. With `--source`, some samples are made again from their images and compared
    /// byte for byte.
    Verify(VerifyArgs),
    /// Describe a finished shard set, or draw a contact sheet of its views
    Inspect(InspectArgs),
}

/// `data-prep pack`.
#[derive(Debug, Clone, ClapArgs)]
pub struct PackArgs {
    /// What to pack.
    #[command(flatten)]
    pub pack: PackOptions,

    /// TOML file with these options as keys (input, output, recipe, shard-bytes, ...); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Common options.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// `data-prep plan`.
#[derive(Debug, Clone, ClapArgs)]
pub struct PlanArgs {
    /// What to pack.
    #[command(flatten)]
    pub pack: PackOptions,

    /// TOML file with these options as keys; flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Number of worker threads to plan for [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Print the plan as JSON
    #[arg(long)]
    pub json: bool,
}

impl PlanArgs {
    /// The options that `pack` has besides.
    pub fn common(&self) -> CommonArgs {
        CommonArgs { threads: self.threads, json: self.json, quiet: true, overwrite: false }
    }
}

/// What to pack, and how: flags and keys of `--config`.
#[derive(Debug, Clone, Default, ClapArgs, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PackOptions {
    /// Folder of class directories, or flat folder of images; symbolic links are followed, hidden files are not
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<PathBuf>,

    /// Directory of the shard set
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<PathBuf>,

    /// Augmentations: a built-in recipe or a TOML file
    #[arg(long, value_name = "RECIPE", long_help = recipe_help())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,

    /// Views per sample [default: 4, or 1 for a recipe without chance]
    #[arg(long, value_name = "V")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub views: Option<u32>,

    /// Height and width of a view in pixels [default: 224]
    #[arg(long, value_name = "PIXELS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u32>,

    /// What a shard holds: `views`, the augmented views of every sample [default: views]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<Store>,

    /// How pixels are stored: `raw`, as bytes to be mapped into memory [default: raw]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codec: Option<Codec>,

    /// Seed of the views and of the order of the samples [default: 0]
    #[arg(long, value_name = "SEED")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// Which resize pass runs first: `pillow13` as Pillow from 13.0 on, `horizontal` as Pillow before [default: that of the
    /// recipe, pillow13 for the built-in ones]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass_order: Option<PassOrderFlag>,

    /// Samples per shard [default: as many as fit `--shard-bytes`]
    #[arg(long, value_name = "N", conflicts_with = "shard_bytes")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_samples: Option<u64>,

    /// Size of a shard, for example 500MB or 1GiB [default: 1GiB]
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_bytes: Option<NumberOrText>,

    /// How many images may be unusable, as a number or as a share, rounded up [default: 1%]
    #[arg(long, value_name = "N|P%")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rejects: Option<NumberOrText>,
}

fn recipe_help() -> String {
    let width = BUILT_IN.iter().map(|built_in| built_in.name.len()).max().unwrap_or(0);
    let lines = BUILT_IN.map(|built_in| format!("  {:width$}  {}", built_in.name, built_in.summary));
    format!("Augmentations: a built-in recipe or a TOML file\n\n{}", lines.join("\n"))
}

/// `data-prep verify`.
#[derive(Debug, Clone, ClapArgs)]
pub struct VerifyArgs {
    /// The shard set
    #[arg(value_name = "SHARDS")]
    pub shards: PathBuf,

    /// The folder it was packed from: makes some samples again and compares every byte
    #[arg(long, value_name = "DIR")]
    pub source: Option<PathBuf>,

    /// How many samples to make again
    #[arg(long, value_name = "N", default_value_t = 100, requires = "source")]
    pub samples: usize,

    /// Show no progress on standard error
    #[arg(long)]
    pub quiet: bool,

    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// `data-prep inspect`.
#[derive(Debug, Clone, ClapArgs)]
pub struct InspectArgs {
    /// The shard set
    #[arg(value_name = "SHARDS")]
    pub shards: PathBuf,

    /// Draw a contact sheet into this PNG file: a row for each sample, a column for each view
    #[arg(long, value_name = "FILE.png")]
    pub grid: Option<PathBuf>,

    /// Rows of the contact sheet, spread evenly over the set
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub samples: u16,

    /// Columns of the contact sheet
    #[arg(long, value_name = "V", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub views: u16,

    /// Print the description as JSON
    #[arg(long)]
    pub json: bool,
}
