//! The command line of `student-eval`.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args as ClapArgs, Parser, Subcommand};
use shared::cli::{CommonArgs, ComputeArgs};
use shared::knn::{VOTE_TEMPERATURE, ViewChoice};
use shared::models::Arch;
use shared::transforms::normalize::Normalization;

use crate::linear_probe::{Normalize, ProbeConfig};

/// Measures what a student has learnt: k-NN and linear probes on cached features, and one report on many runs
///
/// A student's backbone runs once over each shard set; its features are cached in RUN/features, and every probe reads the
/// cache. Results are stored in RUN/eval and picked up by `report`.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Clone, Parser)]
#[command(name = "student-eval", version, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Extract the features of a shard set and cache them
    ///
    /// Every stored view of every sample goes through the backbone in evaluation mode. The result does not depend on the
    /// number of threads. An interrupted extraction resumes; a finished one is not repeated, not for another `--isa` either, unless
    /// `--overwrite` is given. `knn` and `linear` extract what they need by themselves; there `--isa` is that of the extraction, and
    /// the classifiers always use the best instructions of the machine.
    Features(FeaturesArgs),
    /// Classify by the nearest neighbours of frozen features
    ///
    /// Exact search by cosine similarity over all training samples; a neighbour votes for its class with the weight
    /// exp(similarity / temperature). Neighbours of equal similarity are taken in the order of the training set.
    Knn(KnnArgs),
    /// Train linear classifiers on frozen features
    ///
    /// Softmax regression by SGD with the schedule of the official DisCo code: the learning rate is halved at epochs 5, 10, 15,
    /// 20, 25, 30, 35, 40, 45, 60 and 80 of 100, scaled to `--epochs`. An epoch uses one stored view of each training sample,
    /// in turn; accuracy is measured on the first view of the validation samples after every epoch. All learning rates
    /// train in one pass. The last epoch is the figure to quote; the best epoch, chosen on the validation set as the official code
    /// does, is printed beside it.
    Linear(LinearArgs),
    /// Put many runs into one report: table, loss curves, accuracies, features in the plane, nearest neighbours
    ///
    /// Writes report.md, report.json and PNG pictures. Runs that were not probed are listed with the command that probes them.
    Report(ReportArgs),
}

/// Where features come from.
#[derive(Debug, Clone, ClapArgs)]
pub struct SourceArgs {
    /// Run directories of `student-train`, or files of weights (.safetensors, .pth, .pth.tar)
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,

    /// Architecture of a file of weights [default: told by its tensors]; a run knows its own
    #[arg(long, value_name = "ARCH")]
    pub arch: Option<Arch>,

    /// How pixels become the input of a file of weights [default: what it says, else what its architecture was published with]
    ///
    /// The default is `inception` for EfficientNet-Lite and `imagenet` for every other architecture, and for what runs export.
    /// Weights that were trained otherwise, such as timm's augreg vision transformers, need this flag: the wrong one raises no
    /// error. Runs are always `imagenet`.
    #[arg(long, value_name = "PIXELS")]
    pub pixel_normalization: Option<Normalization>,

    /// Directory that receives `features/` and `eval/` [default: RUN; needed for a file of weights]
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Whole numbers from 1 to `most`.
fn whole_number(most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=most)
}

/// `student-eval features`.
#[derive(Debug, Clone, ClapArgs)]
pub struct FeaturesArgs {
    /// Where features come from.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Shard set to extract the features of
    #[arg(long, value_name = "SHARDS")]
    pub shards: PathBuf,

    /// Common options.
    #[command(flatten)]
    pub common: CommonArgs,

    /// How to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// `student-eval knn`.
#[derive(Debug, Clone, ClapArgs)]
pub struct KnnArgs {
    /// Where features come from.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Shard set with the labelled neighbours
    #[arg(long, value_name = "SHARDS")]
    pub train: PathBuf,

    /// Shard set to classify [default: the training set, each sample by the others]
    #[arg(long, value_name = "SHARDS")]
    pub val: Option<PathBuf>,

    /// How many neighbours vote; one result for each number, at most as many as there are
    #[arg(short, value_name = "K,...", value_delimiter = ',', default_value = "1,5,10,20,200",
        value_parser = clap::value_parser!(u32).range(1..))]
    pub k: Vec<u32>,

    /// Temperature of the votes: smaller makes near neighbours count more
    #[arg(long, value_name = "T", default_value_t = VOTE_TEMPERATURE)]
    pub temperature: f64,

    /// What stands for a sample with several stored views
    #[arg(long, value_enum, default_value_t = ViewChoice::First)]
    pub view: ViewChoice,

    /// Common options.
    #[command(flatten)]
    pub common: CommonArgs,

    /// How to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// `student-eval linear`.
#[derive(Debug, Clone, ClapArgs)]
pub struct LinearArgs {
    /// Where features come from.
    #[command(flatten)]
    pub source: SourceArgs,

    /// Shard set to train on; recipe `linear-train` with several views is meant for this
    #[arg(long, value_name = "SHARDS")]
    pub train: PathBuf,

    /// Shard set to measure on; recipe `eval-center` is meant for this
    #[arg(long, value_name = "SHARDS")]
    pub val: PathBuf,

    /// Learning rates, trained side by side; used as given, not scaled by the batch size
    #[arg(long, value_name = "LR,...", value_delimiter = ',', default_value = "3")]
    pub lr: Vec<f64>,

    /// Passes over the training set
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = whole_number(1_000_000))]
    pub epochs: usize,

    /// Samples per update; the last batch of an epoch may be smaller
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = whole_number(1_000_000))]
    pub batch_size: usize,

    /// Momentum of SGD
    #[arg(long, value_name = "M", default_value_t = 0.9)]
    pub momentum: f64,

    /// Weight decay of SGD
    #[arg(long, value_name = "WD", default_value_t = 0.0)]
    pub weight_decay: f64,

    /// Scaling of the features; `standardize` makes the result less sensitive to the learning rate
    #[arg(long, value_enum, default_value_t = Normalize::None)]
    pub normalize: Normalize,

    /// Seed of the first weights and of the order of samples
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,

    /// Common options.
    #[command(flatten)]
    pub common: CommonArgs,

    /// How to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

impl LinearArgs {
    /// The probe's own settings.
    pub fn probe_config(&self) -> ProbeConfig {
        ProbeConfig {
            lr: self.lr.clone(),
            epochs: self.epochs,
            batch_size: self.batch_size,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
            normalize: self.normalize,
            seed: self.seed,
        }
    }
}

/// `student-eval report`.
#[derive(Debug, Clone, ClapArgs)]
pub struct ReportArgs {
    /// Run directories, in the order of the legends; the table ranks them by accuracy
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,

    /// Directory of the report; an earlier report there is replaced
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// Validation pictures shown with their nearest training pictures, per run; 0 for none
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u8).range(..=50))]
    pub neighbours: u8,

    /// Number of worker threads; the report does not depend on it [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Print report.json on standard output instead of the table
    #[arg(long)]
    pub json: bool,

    /// Show no progress on standard error
    #[arg(long)]
    pub quiet: bool,
}
