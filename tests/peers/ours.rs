//! This project's side of `tests/peers/run.sh`: sets one row up, then makes a timed step for every line `step` on standard input.
//!
//! The first line of output is a JSON object: the number of trainable parameters, the shape of the result, the threads and the
//! instruction set that compute, the memory that the process held before the model was made; or why the row is not available. Every later line answers a `step` with its
//! milliseconds. `quit` or the end of the input ends it. `torch_worker.py` is the twin.

use std::io::BufRead as _;
use std::process::ExitCode;
use std::str::FromStr as _;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use serde_json::json;
use shared::cli::{ComputeArgs, print, run_main, with_threads};
use shared::models::{Arch, Encoder};
use shared::ops::{self, Mode};
use shared::run::Objective;
use shared::{Error, Result};
use student_train::method::Queue;
use student_train::step::{Batch, TrainingState, batch_shuffle};
use student_train::{Config, Options};

const SEED: u64 = 0;
/// `D`.
const EMBEDDING_DIM: usize = 128;
/// One group, as `PyTorch`'s batch norm.
const TRAIN: Mode = Mode::Train { bn_groups: 1 };
const DISCO_STUDENT: &str = "efficientnet_b0";

/// Makes timed steps of one row on request
#[derive(Debug, Parser)]
#[command(name = "peer")]
struct Args {
    /// `ARCH-train`, `ARCH-eval`, `disco-step` or `disco-live`
    #[arg(long)]
    row: String,
    /// Worker threads
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// Images in a step
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=65_536))]
    batch: u32,
    /// Sides of an image
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(u32).range(1..=4096))]
    size: u32,
    /// How to compute.
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Something to time: returns the shape of its result.
type Step = Box<dyn FnMut() -> Result<Vec<usize>>>;

/// A step and the trainable parameters of what it runs.
struct Row {
    step: Step,
    parameters: usize,
}

#[global_allocator]
static ALLOCATOR: ops::TensorAllocator = ops::TensorAllocator;

fn main() -> ExitCode {
    ops::reserve_memory();
    let args = Args::parse();
    run_main(|| {
        args.compute.apply()?;
        with_threads(Some(args.threads), || serve(&args))
    })
}

fn serve(args: &Args) -> Result<()> {
    let idle_mib = resident_mib()?;
    let (name, kind) = match args.row.rsplit_once('-') {
        // The cache has done the teacher's work before the step: with a live teacher on the other side ours is the same.
        Some(("disco", "step" | "live")) => (DISCO_STUDENT, "disco"),
        Some((name, kind @ ("train" | "eval"))) => (name, kind),
        _ => return Err(Error::usage(format!("`{}` is no row: see `--help`", args.row))),
    };
    let arch = match Arch::from_str(name) {
        Ok(arch) => arch,
        Err(unknown) => return print(&json!({ "unavailable": unknown.to_string() }).to_string()),
    };
    let Row { mut step, parameters } = match kind {
        "disco" => disco_row(arch, args)?,
        "train" => train_row(arch, args)?,
        _ => eval_row(arch, args)?,
    };
    let output = step()?;
    let about = json!({
        "parameters": parameters, "output": output, "threads": rayon::current_num_threads(), "isa": ops::isa(),
        "idle_mib": idle_mib,
    });
    print(&about.to_string())?;
    for line in std::io::stdin().lock().lines() {
        match line.map_err(Error::io("read", "standard input"))?.trim() {
            "step" => {
                let start = Instant::now();
                step()?;
                print(&format!("{}", start.elapsed().as_secs_f64() * 1e3))?;
            }
            "quit" => break,
            other => return Err(Error::usage(format!("`{other}` is no request: `step` or `quit`"))),
        }
    }
    Ok(())
}

/// Forward and backward in training mode; the loss is the mean of the squared features.
fn train_row(arch: Arch, args: &Args) -> Result<Row> {
    let encoder = Encoder::new(arch, None, SEED)?;
    let xs = images(args, 0)?;
    let parameters = encoder.store().num_parameters();
    let step = move || {
        let features = encoder.features(&xs, TRAIN)?;
        encoder.store().backward(&features.sqr()?.mean_all()?)?;
        Ok(features.dims().to_vec())
    };
    Ok(Row { step: Box::new(step), parameters })
}

/// Inference in evaluation mode.
fn eval_row(arch: Arch, args: &Args) -> Result<Row> {
    let encoder = Encoder::new(arch, None, SEED)?;
    let xs = images(args, 0)?;
    let parameters = encoder.store().num_parameters();
    let step = move || Ok(encoder.features(&xs, Mode::Eval)?.dims().to_vec());
    Ok(Row { step: Box::new(step), parameters })
}

/// The step of `student-train distill` at its default settings, but for one batch-norm group.
fn disco_row(arch: Arch, args: &Args) -> Result<Row> {
    let batch_size = args.batch as usize;
    let options = Options {
        student: Some(arch),
        batch_size: Some(batch_size),
        bn_groups: Some(1),
        seed: Some(SEED),
        ..Options::default()
    };
    let config = Config::new(Objective::Distill, &options, Some(EMBEDDING_DIM))?;
    let mut state = TrainingState::new(&config)?;
    let parameters = state.query().store().num_parameters();
    let teacher = |seed| Ok::<_, Error>(Queue::random(batch_size, EMBEDDING_DIM, seed)?.keys().clone());
    let query_view = images(args, 0)?;
    let key_view = images(args, query_view.elem_count())?;
    let mut batch = Batch {
        step: 0,
        epoch: 0,
        sample_ids: (0..u64::from(args.batch)).collect(),
        views: [query_view, key_view],
        locals: None,
        teacher: Some([teacher(SEED + 1)?, teacher(SEED + 2)?]),
        shuffled_keys: None,
    };
    let step = move || {
        let shuffle = batch_shuffle(batch_size, SEED, batch.step);
        state.step(&batch, &shuffle, config.optimisation.lr)?;
        batch.step += 1;
        Ok(vec![batch_size, EMBEDDING_DIM])
    };
    Ok(Row { step: Box::new(step), parameters })
}

/// The same values on both sides: the sine of the place in memory, counted from `first`.
///
/// # Shapes
/// - returns: `(B, H, W, 3)` f32
fn images(args: &Args, first: usize) -> Result<Tensor> {
    let (batch, side) = (args.batch as usize, args.size as usize);
    let count = batch * side * side * 3;
    let place =
        |place: usize| u32::try_from(place).ok().ok_or_else(|| Error::usage("`--batch` and `--size` are too large"));
    let (start, end) = (place(first)?, place(first + count)?);
    Ok(Tensor::arange(start, end, &Device::Cpu)?.to_dtype(DType::F32)?.sin()?.reshape((batch, side, side, 3))?)
}

/// Memory of this process.
fn resident_mib() -> Result<u64> {
    let path = "/proc/self/status";
    let status = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.unwrap_or(0) / 1024)
}
