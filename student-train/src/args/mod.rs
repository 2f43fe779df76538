//! The command line of `student-train`.

mod files;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Deserializer, Serialize};
use shared::cli::{CommonArgs, ComputeArgs};
use shared::data_loader::Order;
use shared::models::Arch;
use shared::optim::NoDecay;

pub use self::files::{ExportArgs, ExportFormat, ExportedWeights, ImportArgs, TensorNames};
use crate::config::{
    CurveName, DistillTerms, DistillViews, Ensemble, HeadSource, MethodName, OptimizerName, TimeLimit,
};

/// Trains small vision models without labels, alone or under a teacher
#[derive(Debug, Clone, Parser)]
#[command(name = "student-train", version, about, long_about = None)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Train a student that agrees with a teacher's cached embeddings (DisCo)
    #[command(
        after_help = "Example: student-train distill --shards shards --embeddings embeddings --student resnet18 \
        --output runs/disco\n\nEvery option may also stand in a TOML file given by `--config`, under the flag's name."
    )]
    Distill(TrainArgs),
    /// Train an encoder without a teacher (MoCo v2, MoCo v1, SwAV): a baseline, or a teacher for others
    #[command(
        mut_arg("embeddings", |arg| arg.hide(true)),
        mut_arg("ensemble", |arg| arg.hide(true)),
        mut_arg("head", |arg| arg.hide(true)),
        mut_arg("distill", |arg| arg.hide(true)),
        mut_arg("distill_weight", |arg| arg.hide(true)),
        mut_arg("distill_views", |arg| arg.hide(true)),
        mut_arg("seed_queue_size", |arg| arg.hide(true)),
        mut_arg("seed_temperature", |arg| arg.hide(true)),
        mut_arg("seed_teacher_temperature", |arg| arg.hide(true)),
        after_help = "Example: student-train pretrain --shards shards --student resnet50 --output runs/teacher\n\n\
        Every option may also stand in a TOML file given by `--config`, under the flag's name.",
    )]
    Pretrain(TrainArgs),
    /// Write the student of a finished run as one file for other programs
    ///
    /// The file holds the backbone alone, without the projection head, as it was at the end of the training, or its moving average
    /// where the run kept one; an ONNX graph can have both backbone and head. The same run and options give the same bytes.
    Export(ExportArgs),
    /// Write the backbone of a checkpoint of timm, torchvision or others as a student's file
    Import(ImportArgs),
}

/// Arguments of `distill` and `pretrain`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TrainArgs {
    /// Read options from a TOML file; flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What the file may hold too.
    #[command(flatten)]
    pub options: Options,
    /// What all stages take.
    #[command(flatten)]
    pub common: CommonArgs,
    /// How to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Print the resolved configuration, what the run needs and how its directory would be found; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Stop after this many steps as if killed, leaving the run unfinished (to test resuming)
    #[arg(long, value_name = "N", hide = true)]
    pub stop_after_steps: Option<u64>,
}

/// What the learning rate follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LrUnit {
    /// One rate for all steps of an epoch, as the official code.
    #[default]
    Epoch,
    /// A rate of its own for every step.
    Step,
}

/// Options of a training, on the command line or in a TOML file.
#[derive(Debug, Clone, Default, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Options {
    /// Shard set to train on
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<PathBuf>,

    /// Embedding set that the teacher made of these shards; several make an ensemble of teachers
    ///
    /// Give the flag once for every teacher, or a list in the file; `--ensemble` says how they are used together. Every set must be
    /// made from exactly these shards.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "one_or_more")]
    pub embeddings: Option<Vec<PathBuf>>,

    /// Directory of the run
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<PathBuf>,

    /// Architecture to train [default: resnet18]
    #[arg(long, value_name = "ARCH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student: Option<Arch>,

    /// Continue from a timm or torchvision checkpoint, an imported file or a finished run [default: drawn weights]
    ///
    /// The backbone of the query encoder starts with these weights and batch-norm statistics, and the key encoder as its copy;
    /// the projection head is drawn, the queue and the optimiser start as ever. The file must hold all of `--student`;
    /// PyTorch's two formats and safetensors are read, and a classifier is left aside. If its weights are under an
    /// unusual key, run `student-train import --state-key` first. The weights become part of the run: the same command
    /// with other weights is refused, and once the run has a checkpoint the file is not needed to go on.
    #[arg(long, value_name = "CKPT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,

    /// Take the projection head from `--init` too; it must have exactly the widths of this run's
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_head: Option<bool>,

    /// Passes over the shard set [default: 200]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,

    /// Samples in a step; those left over at the end of an epoch are dropped [default: 256]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,

    /// Pieces in which a batch is computed, one after the other, to save memory [default: 1]
    ///
    /// Gradients are those of the whole batch; the batch-norm groups are shared out among the pieces.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<usize>,

    /// Groups of a batch that have batch-norm statistics of their own [default: one for every 32 samples; swav: 1]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bn_groups: Option<usize>,

    /// How gradients become steps [default: sgd; swav: larc]
    ///
    /// Batches of thousands want lars or larc; transformers adamw. Method swav trains by larc, and then begins at the rate 0.6, moves
    /// it every step, ends at a thousandth of it and decays by 0.000001 unless told otherwise.
    #[arg(long, value_name = "RULE", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<OptimizerName>,

    /// Learning rate, after the warm-up; it is never scaled [default: 0.03, for sgd and batches of 256]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,

    /// How the rate goes on after the warm-up [default: cosine]
    #[arg(long, value_name = "CURVE", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<CurveName>,

    /// When the rate moves along its cosine [default: epoch]
    #[arg(long, value_name = "UNIT", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_unit: Option<LrUnit>,

    /// Rate at the end of the cosine [default: 0]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_lr: Option<f64>,

    /// Epochs, separated by commas, at whose start `--schedule steps` multiplies the rate
    #[arg(long, value_name = "EPOCHS", help_heading = "Optimisation", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub milestones: Option<Vec<u64>>,

    /// What `--schedule steps` multiplies the rate by [default: 0.1]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_factor: Option<f64>,

    /// Epochs in which the rate grows linearly, step by step, up to `--lr` [default: 0]
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_epochs: Option<u64>,

    /// Rate in the first step of the warm-up [default: 0]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_start_lr: Option<f64>,

    /// Momentum of sgd, lars and larc [default: 0.9]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,

    /// Nesterov's momentum, for sgd and larc
    #[arg(long, value_name = "BOOL", help_heading = "Optimisation", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,

    /// Length of a step of lars and larc relative to a parameter's, at rate 1 [default: 0.001]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust_coefficient: Option<f64>,

    /// What adamw keeps of the mean gradient in a step [default: 0.9]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,

    /// What adamw keeps of the mean squared gradient in a step [default: 0.999]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,

    /// What adamw adds to its divisor [default: 1e-8]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adam_epsilon: Option<f64>,

    /// Weight decay [default: 0.0001]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,

    /// Parameters without weight decay; lars does not adapt the rate of these [default: none; for lars norm-and-bias]
    #[arg(long, value_name = "WHICH", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_decay: Option<NoDecay>,

    /// Shorten the gradients of a step, over all networks, to this norm [default: as they are]
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,

    /// Keep a moving average of the student's parameters, which keeps this much of itself in a step [default: no average]
    ///
    /// The average is the student that the run exports and that is evaluated; batch-norm statistics are copied, not averaged. The
    /// last weights stay in the checkpoint: `student-train export --weights last`.
    #[arg(long, value_name = "X", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,

    /// Order in which an epoch takes the samples [default: random]
    ///
    /// quasi reads runs of 64 neighbouring samples and shuffles within 16 of them, so that a disk reads long stretches once an
    /// epoch: for shard sets larger than memory. Shards are packed in random order, so neighbours have nothing in common.
    #[arg(long, value_name = "ORDER", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,

    /// Seed of everything random [default: 0]
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// Self-supervised method; `distill` can do without any (`none`) [default: moco-v2]
    #[arg(long, value_name = "METHOD", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<MethodName>,

    /// Whose projection head makes embeddings [default: own]
    ///
    /// retro: an adapter of one linear layer learns to feed the teacher's own head, which stays frozen; contrast and distance act on
    /// what it gives. The embedding set must carry that head along, as `teacher-embed embed` writes it for every teacher with a head,
    /// unless `--center` or `--pca` is given. Such a run can be evaluated, exported, embedded with and continued from; an ONNX graph of
    /// it has no `--head`, and its embeddings lend no head to further students.
    #[arg(long, value_name = "WHOSE", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadSource>,

    /// Hidden width of the projection head [default: 2048; moco-v1 has none]
    ///
    /// The narrow heads of the paper's distilling bottleneck, to compare with: 512 for MobileNetV3, 1280 for other students.
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_hidden: Option<usize>,

    /// Width of an embedding [default: 128; `distill` takes the teacher's]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_dim: Option<usize>,

    /// Keys in the queue of negatives [default: 65536]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<usize>,

    /// Temperature of the method's loss [default: 0.2; moco-v1: 0.07; swav: 0.1]
    #[arg(long, value_name = "X", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,

    /// What the key encoder keeps of itself in a step [default: 0.999]
    #[arg(long, value_name = "X", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_momentum: Option<f64>,

    /// Prototypes that swav assigns embeddings to [default: 3000]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prototypes: Option<usize>,

    /// What swav divides scores by before the Sinkhorn-Knopp algorithm assigns them: the smaller, the sharper [default: 0.05]
    #[arg(long, value_name = "X", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,

    /// Turns of the Sinkhorn-Knopp algorithm [default: 3]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sinkhorn_iterations: Option<usize>,

    /// Earlier embeddings that swav assigns along with a batch; 0 for none, rounded down to whole batches [default: 3840]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swav_queue_size: Option<usize>,

    /// Epoch, counted from 0, in which swav's queue begins to fill; it is used once it is full [default: 15]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_from_epoch: Option<u64>,

    /// Steps in which swav's prototypes stay as they were drawn [default: 313]
    #[arg(long, value_name = "N", help_heading = "Objective")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freeze_prototypes_steps: Option<u64>,

    /// Terms of the teacher and their weights, as `mse=32,rkd=1@query` [default: mse=32]
    ///
    /// mse: squared distance of the embeddings (DisCo), whose weight 32 is the official code's effective one.
    /// rkd: distances and angles between samples (RKD); `rkd=W` is `rkd-distance=W,rkd-angle=W`, as in DisCo. Samples of one batch-norm group
    /// have relations with each other.
    /// seed: cross entropy of similarities to a queue of the teacher's embeddings (SEED).
    /// simreg: a predictor regresses the teacher's embeddings from the student's features; it is no part of the student.
    /// A term acts on the views of `--distill-views` unless `@both` or `@query` follows its weight. In a file, a table does too:
    /// `[distill]`, then `mse = 32` and `rkd = "1@query"`.
    #[arg(long, value_name = "TERM=WEIGHT,...", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillTerms>,

    /// Weight of the squared distance to the teacher, per view: short for `--distill mse=X`
    #[arg(long, value_name = "X", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distill_weight: Option<f64>,

    /// Views on which the teacher's terms act [default: both]
    #[arg(long, value_name = "VIEWS", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distill_views: Option<DistillViews>,

    /// What several `--embeddings` become [default: mean]
    #[arg(long, value_name = "HOW", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ensemble: Option<Ensemble>,

    /// Teacher embeddings in the queue of the term seed [default: 65536]
    #[arg(long, value_name = "N", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed_queue_size: Option<usize>,

    /// Temperature of the student's distribution in the term seed [default: 0.2]
    #[arg(long, value_name = "X", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed_temperature: Option<f64>,

    /// Temperature of the teacher's distribution in the term seed [default: 0.01]
    #[arg(long, value_name = "X", help_heading = "Teacher")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed_teacher_temperature: Option<f64>,

    /// Write a checkpoint when the last one is so many minutes old [default: 10]
    ///
    /// A thread writes it while the training goes on. A run that is killed goes on from its last checkpoint, one that is asked to
    /// stop (Ctrl-C, `kill`, pre-emption by Slurm) writes one first. None of these options changes a byte of the result.
    #[arg(long, value_name = "X", help_heading = "Checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_minutes: Option<f64>,

    /// Write a checkpoint every so many steps too
    #[arg(long, value_name = "N", help_heading = "Checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_steps: Option<u64>,

    /// Write a checkpoint every so many epochs too
    #[arg(long, value_name = "N", help_heading = "Checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_epochs: Option<u64>,

    /// Checkpoints to keep [default: 2]
    #[arg(long, value_name = "N", help_heading = "Checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,

    /// Stop with a checkpoint before this call has run so long: `11h30m`, `45m`, or plain minutes
    ///
    /// The same command goes on. Leave the batch system's limit some minutes more, for the last step and the checkpoint.
    #[arg(long, value_name = "TIME", help_heading = "Checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_limit: Option<TimeLimit>,

    /// Labelled shard set in which a probe looks for nearest neighbours while the student learns [default: no probe]
    ///
    /// The probe classifies the samples of `--probe-val`, or each sample of this set by the others, by the features of the student as
    /// `student-eval knn` does. It changes nothing of the training. Its accuracy goes to `metrics.jsonl` and `TensorBoard`, and the best
    /// student so far to `student-best.safetensors`.
    #[arg(long, value_name = "DIR", help_heading = "Probe")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_train: Option<PathBuf>,

    /// Labelled shard set that the probe classifies; not the one that the results are reported on
    #[arg(long, value_name = "DIR", help_heading = "Probe")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_val: Option<PathBuf>,

    /// Epochs between probes; there is one at the end of the run [default: 10]
    #[arg(long, value_name = "N", help_heading = "Probe")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_epochs: Option<u64>,

    /// Neighbours that vote in the probe [default: 20]
    #[arg(long, value_name = "N", help_heading = "Probe")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_k: Option<usize>,

    /// Steps between points of the curves in `tensorboard/` [default: 10]
    #[arg(long, value_name = "N", help_heading = "Common options")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_steps: Option<u64>,
}

/// Reads a path or a list of paths.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<PathBuf>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Paths {
        One(PathBuf),
        More(Vec<PathBuf>),
    }
    Ok(Some(match Paths::deserialize(deserializer)? {
        Paths::One(path) => vec![path],
        Paths::More(paths) => paths,
    }))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_and_file_keys_are_the_same_words() {
        let keys: Vec<String> = Args::command()
            .find_subcommand("distill")
            .unwrap()
            .get_arguments()
            .filter_map(|arg| arg.get_long().map(String::from))
            .filter(|flag| {
                !["config", "threads", "isa", "json", "quiet", "overwrite", "stop-after-steps", "dry-run", "help"]
                    .contains(&flag.as_str())
            })
            .collect();
        assert!(keys.len() > 15);
        for key in keys {
            let values = [
                "1",
                "true",
                "[1]",
                "\"resnet18\"",
                "\"step\"",
                "\"quasi\"",
                "\"none\"",
                "\"1h\"",
                "\"mse=1\"",
                "\"query\"",
                "\"mean\"",
                "\"sgd\"",
                "\"cosine\"",
                "\"retro\"",
            ];
            let known = values.iter().any(|value| toml::from_str::<Options>(&format!("{key} = {value}")).is_ok());
            assert!(known, "`{key}` is a flag and no key");
        }
    }
}
