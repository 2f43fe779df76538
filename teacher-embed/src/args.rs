//! The command line of `teacher-embed`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use serde::{Deserialize, Serialize};
use shared::cli::{CommonArgs, ComputeArgs};
use shared::embedding::EmbeddingDtype;
use shared::models::Arch;
use shared::ops::Isa;
use shared::transforms::normalize::Normalization;
use shared::weights::names::Method;

/// Computes a frozen teacher's embeddings of every view of a shard set, once for many students
///
/// The usual order: `describe CKPT` to see what a checkpoint is, `embed` to compute, `verify` when in doubt.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Debug, Clone, Parser)]
#[command(name = "teacher-embed", version, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Compute the embeddings of a shard set
    ///
    /// Writes OUTPUT/embeddings-00000.safetensors and so on, one for each shard and row for row with it: `embeddings`
    /// of shape (n, V, D), rows of unit length, and `sample_ids`; then OUTPUT/manifest.json, which ties the set to the
    /// fingerprints of the shards and the weights. The teacher is in evaluation mode: batch normalisation uses its
    /// running statistics. The summary tells how different the embeddings are; a warning says when their mean dominates.
    ///
    /// The bytes do not depend on `--threads` or `--batch-size`; their last bits depend on `--isa`. An interrupted run resumes
    /// with the first unfinished shard when the same command is given again; a finished one is left as it is.
    Embed(Box<EmbedArgs>),
    /// Tell what a checkpoint holds: its tensors, and the architecture and method they belong to
    ///
    /// Reads PyTorch files (.pth, .pth.tar, .pt; both the zip format and the one before PyTorch 1.6), safetensors files,
    /// and run directories of `student-train`. Nothing in a pickle is ever executed; what it asks for beyond weights is
    /// listed. Only descriptions are read, so that this is quick for any size.
    Describe(DescribeArgs),
    /// Check a finished embedding set
    ///
    /// Reads every file again and compares its hash with the manifest; checks that the set belongs to its shards, sample
    /// for sample; and with `--weights` computes some rows again and tells how well they agree. A set that was moved belongs
    /// to any shard set of the same images, recipe and seed, wherever that was packed: name it by `--shards`.
    Verify(VerifyArgs),
}

/// `teacher-embed embed`.
#[derive(Debug, Clone, ClapArgs)]
pub struct EmbedArgs {
    /// What decides the result; the same words are keys of `--config`.
    #[command(flatten)]
    pub options: EmbedOptions,

    /// TOML file with any of the options of this command as keys (`weights = "r50.pth.tar"`); flags override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Flags of every stage.
    #[command(flatten)]
    pub common: CommonArgs,

    /// How to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// The options of `embed` that a file may hold as well.
#[derive(Debug, Clone, Default, ClapArgs, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct EmbedOptions {
    /// Shard set made by `data-prep pack`
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<PathBuf>,

    /// The teacher: a PyTorch or safetensors file, or a finished run of `student-train`
    ///
    /// Of a run, the query encoder with its head is taken from the last checkpoint.
    #[arg(long, value_name = "CKPT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<PathBuf>,

    /// Directory to write
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<PathBuf>,

    /// Architecture of the teacher [default: what `describe` recognises]
    #[arg(long, value_name = "ARCH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arch: Option<Arch>,

    /// What the teacher's embedding is [default: what `describe` recognises]
    #[arg(long, value_name = "METHOD")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,

    /// Where the weights are in a PyTorch file: keys joined by dots [default: the usual places, such as `state_dict`]
    #[arg(long, value_name = "KEY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_key: Option<String>,

    /// How pixels become the teacher's input [default: what its weights say, else what its architecture was published with]
    ///
    /// The default is `inception` for EfficientNet-Lite and `imagenet` for every other architecture, and for runs of
    /// `student-train` and what they export. Weights that were trained otherwise, such as timm's augreg vision
    /// transformers, need this flag: the wrong one raises no error, it only makes the embeddings worse.
    #[arg(long, value_name = "PIXELS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pixel_normalization: Option<Normalization>,

    /// Take the mean of all outputs off each, before they are scaled to unit length
    ///
    /// For a teacher without a projection head, whose features are often all positive and point the same way: `embed` warns
    /// when they do. A student would first learn that common part, a constant, and be told little about what differs.
    /// Without it, embeddings of different samples differ more, and so do those of two views of one sample: agreement that
    /// came from the mean alone is gone. Embeddings of a trained head (moco-v2) seldom need it.
    ///
    /// The mean is that of every view of every sample, as the teacher gives them; it is kept in
    /// OUTPUT/projection.safetensors. The teacher runs once: its outputs lie in OUTPUT until the mean is known, 4 bytes a
    /// number, and are removed at the end.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub center: Option<bool>,

    /// Reduce the outputs to their D principal components, before they are scaled to unit length; implies `--center`
    ///
    /// For a teacher with wide features: a student's head then has D outputs to learn, and the cache takes D/F of the space.
    /// Directions in which the outputs hardly vary are dropped; two views of one sample differ along them almost as much as
    /// two samples do, so agreement between views rises as D falls, until D is too small to tell samples apart. The summary
    /// says how much of the variance is kept; 128 to 512 is usual. Components are not scaled to equal variance (no whitening).
    ///
    /// An example, EfficientNet-Lite0 on 192 photos of five classes, 4 moco-v2 views each: cosine between views of one sample
    /// 0.68 as it is, 0.57 centred, 0.65 with 256 components, 0.77 with 64; between samples 0.24 as it is, 0.00 in all others.
    ///
    /// D is at most the width of the outputs and less than the number of views in the set. The components are kept in
    /// OUTPUT/projection.safetensors, so that they can be applied to further outputs.
    #[arg(long, value_name = "D", value_parser = clap::value_parser!(u32).range(1..))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pca: Option<u32>,

    /// Element type of the stored embeddings [default: f16]
    ///
    /// Unit rows lose less than 0.0000002 of their cosine similarity in f16.
    #[arg(long, value_name = "DTYPE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<EmbeddingDtype>,

    /// Images prepared at a time, rounded up to a multiple of 16 [default: 64]
    ///
    /// The teacher always computes 16 images at a time, so that the result does not depend on this.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<u32>,

    /// Where to compute: `cpu` [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// `teacher-embed describe`.
#[derive(Debug, Clone, ClapArgs)]
pub struct DescribeArgs {
    /// The checkpoint, or a run of `student-train`
    #[arg(value_name = "CKPT")]
    pub checkpoint: PathBuf,

    /// Where the weights are in a PyTorch file: keys joined by dots [default: the usual places, such as `state_dict`]
    #[arg(long, value_name = "KEY")]
    pub state_key: Option<String>,

    /// Print the description as JSON
    #[arg(long)]
    pub json: bool,
}

/// `teacher-embed verify`.
#[derive(Debug, Clone, ClapArgs)]
pub struct VerifyArgs {
    /// The embedding set
    #[arg(value_name = "EMBEDDINGS")]
    pub embeddings: PathBuf,

    /// The shard set it was made from [default: where it was then]
    #[arg(long, value_name = "DIR")]
    pub shards: Option<PathBuf>,

    /// The teacher's weights: compute some rows again and compare
    #[arg(long, value_name = "CKPT")]
    pub weights: Option<PathBuf>,

    /// How many rows, each a view of a sample, to compute again; views of a source set are redrawn
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub sample: u32,

    /// What draws these rows
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,

    /// Number of worker threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Instruction set to compute rows with [default: the best one that the machine has]
    #[arg(long, value_name = "SET")]
    pub isa: Option<Isa>,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// Show no progress on standard error
    #[arg(long)]
    pub quiet: bool,
}
