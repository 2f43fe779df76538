//! The command line of `data-prep`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use serde::{Deserialize, Serialize};
use shared::cli::CommonArgs;
use shared::ops::Isa;
use shared::output::Part;
use shared::shard::{Codec, PackingOrder, Store};
use shared::transforms::built_in::BUILT_IN;

use crate::config::{NumberOrText, PassOrderFlag};
use crate::source::SourceOptions;

/// Packs images into shards of ready-made views, which the other stages read by memory map
///
/// The input is a folder of classes (one directory per class, as torchvision reads it: classes are sorted by
/// name), a flat folder without classes, ImageNet in its official archives or as Kaggle gives it, WebDataset tars, Parquet files of
/// Hugging Face, CIFAR, or a list of paths. JPEG, PNG, WebP, BMP, GIF, TIFF and PNM are told by their contents. What is packed is the
/// picture a person sees: grey, palette, 16-bit, CMYK and transparent images (laid over white) become 8-bit RGB. The EXIF orientation is
/// not applied, as in torchvision. Images that cannot be used are named in `rejects.jsonl` with the reason.
///
/// The same images, recipe and seed give the same bytes, with any number of threads, on one machine or on many, and however
/// often the work was interrupted: run the same command again to go on.
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
    /// Pack images into a shard set
    ///
    /// Every image is decoded once and gives `--views` augmented views. Samples are written in a random order that `--seed`
    /// fixes. Shards appear one by one, each complete; an interrupted run keeps those and goes on. A finished set is left alone.
    ///
    /// On many machines, every one runs the same command with another `--part i/n` and the same `--output` on a shared disk;
    /// `finish` then closes the set, which has the same bytes as one packed whole.
    ///
    /// Memory: pictures being decoded take at most 256 MiB and 128 MiB more for each thread, or what one picture takes if that is
    /// more; larger ones wait for each other. Finished samples that wait to be written take at most 256 MiB, and one sample for
    /// each thread on top.
    ///
    /// How inputs are read:
    ///
    /// * Class folders: every directory at the top is a class, its images lie at any depth. Directories `train` and `val` at the top
    ///   are parts. A link to a directory that holds it is an error; a broken link to an image is a reject.
    ///
    /// * ilsvrc2012: the directory with `ILSVRC2012_img_train.tar`, or `ILSVRC2012_img_val.tar` and `ILSVRC2012_devkit_t12.tar.gz` (or
    ///   the directory it unpacks to); class tars such as `n01440764.tar` will do for training. Labels count the sorted WordNet names, which are the class names.
    ///
    /// * kaggle: the directory that holds `ILSVRC` and the tables `LOC_...`. An image of `val` that has no line in `LOC_val_solution.csv`,
    ///   or no file, is a reject.
    ///
    /// * webdataset: tars whose members `KEY.jpg` (or png, webp, ...) come with `KEY.cls`, an
    ///   integer, or `KEY.json` with an integer `label`, `cls` or `class`. Without a label a sample gets -1. Classes are numbered up
    ///   to the largest label. Of several images of a key the first of jpg, jpeg, png, webp is taken. Samples are named by their members, or by `TAR/MEMBER` where members of two tars have one name.
    ///   Compressed tars must be decompressed first.
    ///
    /// * parquet: columns `image` (or `img`; bytes, or bytes and path) and `label` (or `labels`, `fine_label`); class names come from
    ///   the metadata of Hugging Face. Samples are named by `image.path` where every row has one of its own, otherwise
    ///   `FILE.parquet/ROW`. Pages compressed by Snappy, LZ4, gzip or Brotli are read, by Zstandard not. A worker reads a row group's
    ///   dictionary for a row in it: files with small row groups pack faster.
    ///
    /// * cifar10, cifar100: the directory of binary files; the pixels are taken as they are. Labels of CIFAR-100 are the fine ones.
    ///
    /// * list: lines `PATH`, or PATH and label after a tab, comma or space. Labels are integers up to 999999, or names, which are
    ///   sorted.
    ///
    /// A sample that is listed but cannot be used is a reject with a reason: a name that is not UTF-8 (told with escapes), a label
    /// that is no number or outside the classes, an archive's member that is a link, is stored sparsely or is cut off. Where a
    /// tar's headers are damaged, what comes before is used and the tar itself is named as a reject.
    ///
    /// Example: data-prep pack --input photos --output out/shards --recipe moco-v2 --views 4 --size 224
    Pack(PackArgs),
    /// Close a set that was packed in parts
    ///
    /// Checks that all parts are there and were packed with the same settings, judges their rejects together, and writes the
    /// manifest. A finished set is left alone.
    ///
    /// Example: data-prep finish --output out/shards
    Finish(FinishArgs),
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
    /// Describe a finished shard set, draw a contact sheet of its views or the picture of one sample
    ///
    /// Example: data-prep inspect out/shards --grid sheet.png --sample cat/007.jpg --picture one.png
    Inspect(InspectArgs),
    /// Give other views of a set of source images, without copying a pixel
    ///
    /// Writes a directory with a manifest alone, which names the source set and the views: every stage opens it like any shard
    /// set and redraws the views as it reads them. One set packed with `--store source` so serves training, linear probes and
    /// evaluation. The source set must stay where it is, seen from the new one.
    ///
    /// Example: data-prep redraw --shards out/source --recipe eval-center --output out/val
    Redraw(RedrawArgs),
    /// Measure how fast this machine reads a finished shard set, and say what that feeds
    ///
    /// Reads batches of two views of each sample, as training does, into normalised values: in the random order of `--order random`,
    /// in that of `--order quasi`, and front to back; first with the set's files dropped from the page cache, so that the disk is
    /// measured, then again from memory. A plain copy of as many values tells what memory allows.
    Bench(BenchArgs),
}

/// `data-prep pack`.
#[derive(Debug, Clone, ClapArgs)]
pub struct PackArgs {
    /// What to pack.
    #[command(flatten)]
    pub pack: PackOptions,

    /// Pack only one of n parts, for example 2/4; parts run in any order, at the same time or not, and `finish` closes the set
    #[arg(long, value_name = "I/N")]
    pub part: Option<Part>,

    /// Instruction set of the pixels' arithmetic at the most: portable, avx2 or avx512; the bytes are the same [default: the best one
    /// that the machine has]
    #[arg(long, value_name = "SET")]
    pub isa: Option<Isa>,

    /// TOML file with these options as keys (input, output, recipe, shard-bytes, ...); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Common options.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// `data-prep finish`.
#[derive(Debug, Clone, ClapArgs)]
pub struct FinishArgs {
    /// Directory of the shard set
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// How many images of all parts together may be unusable, as a number or as a share, rounded up [default: 1%]
    #[arg(long, value_name = "N|P%")]
    pub max_rejects: Option<NumberOrText>,

    /// Print the summary as JSON on standard output
    #[arg(long)]
    pub json: bool,

    /// Say nothing on standard error
    #[arg(long)]
    pub quiet: bool,
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
    /// Folder, archive or list of images: see `--input-format`; symbolic links are followed, hidden files are not listed
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<PathBuf>,

    /// What the input is.
    #[command(flatten)]
    #[serde(flatten)]
    pub source: SourceOptions,

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

    /// What a shard holds [default: views]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<Store>,

    /// How pixels are stored [default: raw]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codec: Option<Codec>,

    /// With `--store source`: resize longer short sides to this many pixels, or `original` to keep every image as it is
    /// [default: 256]
    #[arg(long, value_name = "PIXELS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub short_side: Option<NumberOrText>,

    /// With `--codec jpeg`: 1 (smallest) to 100 (best) [default: 90]
    #[arg(long, value_name = "Q")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<u32>,

    /// Seed of the views and of the order of the samples [default: 0]
    #[arg(long, value_name = "SEED")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// Order of the samples [default: random]
    ///
    /// random: all samples are shuffled, so that every stretch of a shard holds all classes. quasi: for disks that are slow at
    /// jumping about, runs of 256 neighbours in the listing are taken in shuffled order, and samples are shuffled within windows
    /// of 16 runs; a stretch of a shard then holds only the classes of its window, so that readers should shuffle more.
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<PackingOrder>,

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

/// `data-prep redraw`.
#[derive(Debug, Clone, ClapArgs)]
pub struct RedrawArgs {
    /// Set of source images, made by `pack --store source`
    #[arg(long, value_name = "DIR")]
    pub shards: PathBuf,

    /// Augmentations, as for `pack`
    #[arg(long, value_name = "RECIPE")]
    pub recipe: String,

    /// Views per sample [default: 4, or 1 for a recipe without chance]
    #[arg(long, value_name = "V")]
    pub views: Option<u32>,

    /// Height and width of a view in pixels [default: 224]
    #[arg(long, value_name = "PIXELS")]
    pub size: Option<u32>,

    /// Seed of the views [default: 0]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,

    /// Directory of the new set
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// Common options; `--threads` does nothing here.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// `data-prep verify`.
#[derive(Debug, Clone, ClapArgs)]
pub struct VerifyArgs {
    /// The shard set
    #[arg(value_name = "SHARDS")]
    pub shards: PathBuf,

    /// The images it was packed from, packaged in any way: makes some samples again and compares every byte
    #[arg(long, value_name = "PATH")]
    pub source: Option<PathBuf>,

    /// What the source is.
    #[command(flatten)]
    pub options: SourceOptions,

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

    /// Draw a contact sheet into this PNG file: a row for each sample, a column for each view, with what was drawn for it
    #[arg(long, value_name = "FILE.png")]
    pub grid: Option<PathBuf>,

    /// Rows of the contact sheet, spread evenly over the set
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub samples: u16,

    /// Views of each sample to show, of either size
    #[arg(long, value_name = "V", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub views: u16,

    /// The sample to draw: its place in the set, its identity (16 hexadecimal digits) or its name as it was packed
    #[arg(long, value_name = "SAMPLE", requires = "picture")]
    pub sample: Option<String>,

    /// Draw the views of `--sample` into this PNG file; of a source set also the stored image with the outlines of the crops
    #[arg(long, value_name = "FILE.png", requires = "sample")]
    pub picture: Option<PathBuf>,

    /// Print the description as JSON
    #[arg(long)]
    pub json: bool,
}

/// `data-prep bench`.
#[derive(Debug, Clone, ClapArgs)]
pub struct BenchArgs {
    /// The shard set
    #[arg(value_name = "SHARDS")]
    pub shards: PathBuf,

    /// Samples in a batch, two views of each [default: 256, or all of a smaller set]
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch_size: Option<u32>,

    /// Seconds for each measurement
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    pub seconds: f64,

    /// Number of reading threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Samples per second that a training takes, as its progress line says: tells whether this disk feeds it
    #[arg(long, value_name = "RATE")]
    pub need: Option<f64>,

    /// Print the measurements as JSON
    #[arg(long)]
    pub json: bool,
}
