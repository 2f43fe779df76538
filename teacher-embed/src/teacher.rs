//! The teacher: its weights loaded, frozen, in evaluation mode.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::Serialize;
use serde_json::{Value, json};
use shared::io::hash_file;
use shared::manifest::Input;
use shared::models::{Arch, Encoder, HeadKind, MlpHead};
use shared::ops::{self, Engine, Mode, Pass};
use shared::run::Run;
use shared::weights::names::{Method, Recognised, fit, recognise};
use shared::weights::{Checkpoint, Entry};
use shared::{Error, Result};

/// The role under which an embedding set records its weights.
pub const WEIGHTS_ROLE: &str = "weights";

/// A frozen network and what its embedding is.
#[derive(Debug)]
pub struct Teacher {
    encoder: Encoder,
    output: Output,
    head: Option<MlpHead>,
    description: TeacherDescription,
    input: Input,
    unused: Vec<String>,
}

/// What is taken as the embedding.
#[derive(Debug)]
enum Output {
    /// The head of an encoder of our own.
    OwnHead,
    /// The pooled features.
    Features,
    /// The head of a checkpoint, on the pooled features.
    Head,
}

/// What the manifest says about the teacher.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TeacherDescription {
    /// The architecture.
    pub arch: Arch,
    /// The method.
    pub method: Method,
    /// D: the width of an embedding.
    pub embedding_dim: usize,
    /// Where the weights were found: format, state dict and prefix, or the checkpoint of a run.
    pub source: Value,
}

impl Teacher {
    /// Loads a checkpoint or the query encoder of a finished run; `arch` and `method` are recognised when not given.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the weights belong to no known architecture, or to another one than asked for: then it
    /// lists what is missing and unexpected. [`Error::Damaged`], [`Error::Missing`] and [`Error::Io`] as
    /// [`Checkpoint::open`].
    pub fn load(path: &Path, arch: Option<Arch>, method: Option<Method>, state_key: Option<&str>) -> Result<Self> {
        if path.is_dir() { Self::from_run(path, arch, method) } else { Self::from_file(path, arch, method, state_key) }
    }

    fn from_run(path: &Path, arch: Option<Arch>, method: Option<Method>) -> Result<Self> {
        let run = open_run(path)?;
        run.check_hash(&run.details().checkpoint)?;
        let encoder = run.encoder()?;
        let head = encoder.head();
        let known = (encoder.arch(), method_of(run.details().head));
        let asked = (arch.unwrap_or(known.0), method.unwrap_or(known.1));
        if asked != known && asked != (known.0, Method::Backbone) {
            return Err(Error::invalid(
                format!("the run `{}` holds {} ({}), not {} ({})", path.display(), known.0, known.1, asked.0, asked.1),
                "leave `--arch` and `--method` out: a run knows its own",
            ));
        }
        let (output, embedding_dim) = match (asked.1, head) {
            (Method::Backbone, _) | (_, None) => (Output::Features, asked.0.feature_width()),
            (_, Some(head)) => (Output::OwnHead, head.embedding_dim),
        };
        let details = run.details();
        let source = json!({ "objective": details.objective, "checkpoint": details.checkpoint });
        let description = TeacherDescription { arch: asked.0, method: asked.1, embedding_dim, source };
        let input = run.manifest().as_input(WEIGHTS_ROLE, path);
        let head = own_head(&encoder, details.adapter_width.is_some(), &output)?;
        Ok(Self { encoder, output, head, description, input, unused: Vec::new() })
    }

    fn from_file(path: &Path, arch: Option<Arch>, method: Option<Method>, state_key: Option<&str>) -> Result<Self> {
        let checkpoint = Checkpoint::open_at(path, state_key)?;
        let fitted = choose(&checkpoint, arch, method)?;
        let encoder = Encoder::with_vit_options(fitted.arch, None, fitted.vit_options(), 0, &Device::Cpu)?;
        encoder.store().load(&fitted.load(&checkpoint)?)?;
        let head = fitted.load_head(&checkpoint)?;
        let output = if head.is_some() { Output::Head } else { Output::Features };
        let description = TeacherDescription {
            arch: fitted.arch,
            method: fitted.method,
            embedding_dim: fitted.embedding_dim(),
            source: json!({
                "format": checkpoint.format().to_string(),
                "state-key": checkpoint.state_key(),
                "prefix": fitted.prefix,
            }),
        };
        let fingerprint = hash_file(path)?.blake3;
        let input = Input { role: WEIGHTS_ROLE.into(), path: path.display().to_string(), fingerprint };
        Ok(Self { encoder, output, head, description, input, unused: fitted.unexpected })
    }

    /// What the manifest says about it.
    pub fn description(&self) -> &TeacherDescription {
        &self.description
    }

    /// The weights as an input of the embedding set.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// Tensors of the file that neither the network nor its method accounts for, and that were left aside.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The head that makes embeddings of features, if there is one, it is known layer by layer, and it is the teacher's alone.
    pub fn head(&self) -> Option<&MlpHead> {
        self.head.as_ref()
    }

    /// What the teacher gives, before it is scaled to unit length.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, 3)` f32, normalised images
    /// - returns: `(B, D)` f32, flattened
    ///
    /// # Errors
    /// [`Error::Invalid`] when a number is not finite.
    pub fn outputs(&self, xs: &Tensor) -> Result<Vec<f32>> {
        let rows = self.raw(xs)?.flatten_all()?.to_vec1::<f32>()?;
        if rows.iter().all(|value| value.is_finite()) { Ok(rows) } else { Err(self.without_direction()) }
    }

    /// The final embeddings.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, 3)` f32, normalised images
    /// - returns: `(B, D)` f32, rows of unit length
    ///
    /// # Errors
    /// [`Error::Invalid`] when a row has no direction: the weights hold numbers that are not finite, or are all zero.
    pub fn embeddings(&self, xs: &Tensor) -> Result<Vec<f32>> {
        let rows = ops::l2_normalise(&self.raw(xs)?, &pass(xs))?.flatten_all()?.to_vec1::<f32>()?;
        let dim = self.description.embedding_dim.max(1);
        let sound = rows.chunks_exact(dim).all(|row| {
            let norm: f32 = row.iter().map(|value| value * value).sum();
            (norm - 1.0).abs() < 1e-2
        });
        if sound { Ok(rows) } else { Err(self.without_direction()) }
    }

    fn raw(&self, xs: &Tensor) -> Result<Tensor> {
        match (&self.output, &self.head) {
            (Output::OwnHead, _) => self.encoder.head_outputs(xs, Mode::Eval),
            (Output::Head, Some(head)) => head.forward(&self.encoder.features(xs, Mode::Eval)?),
            (Output::Features | Output::Head, _) => self.encoder.features(xs, Mode::Eval),
        }
    }

    fn without_direction(&self) -> Error {
        Error::invalid(
            format!("the teacher of `{}` gives embeddings without a direction", self.input.path),
            "its weights hold zeros only or numbers that are not finite: check the checkpoint",
        )
    }
}

/// The head of a run's encoder; none where its embeddings are features, or the head is partly another network's.
fn own_head(encoder: &Encoder, reused: bool, output: &Output) -> Result<Option<MlpHead>> {
    match (encoder.head(), output) {
        (Some(head), Output::OwnHead) if !reused => {
            let layers = head.layers(encoder.arch().feature_width())?;
            MlpHead::new(&layers, &encoder.store().to_tensors()?).map(Some)
        }
        _ => Ok(None),
    }
}

/// The method whose head a run has.
fn method_of(head: HeadKind) -> Method {
    match head {
        HeadKind::Linear => Method::MocoV1,
        HeadKind::Mlp => Method::MocoV2,
        HeadKind::MlpBatchNorm => Method::Swav,
    }
}

fn pass(xs: &Tensor) -> Pass {
    Pass { mode: Mode::Eval, record: false, engine: Engine::for_device(xs.device()) }
}

/// Opens a finished run; of an unfinished one, the advice names the newest checkpoint.
pub(crate) fn open_run(path: &Path) -> Result<Run> {
    Run::open(path).map_err(|error| match error {
        Error::Missing { what, path: manifest, hint } => {
            let newest =
                newest_checkpoint(path).map(|newest| format!(", or give its checkpoint `{}`", newest.display()));
            Error::Missing { what, path: manifest, hint: hint + &newest.unwrap_or_default() }
        }
        other => other,
    })
}

fn newest_checkpoint(run: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(run.join("checkpoints")).ok()?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).max()
}

/// Names and shapes of a checkpoint's tensors.
pub(crate) fn names_and_shapes(checkpoint: &Checkpoint) -> Vec<(String, Vec<usize>)> {
    let pair = |entry: &Entry| (entry.name().to_owned(), entry.shape().to_vec());
    checkpoint.entries().iter().map(pair).collect()
}

/// The network to take from a checkpoint.
fn choose(checkpoint: &Checkpoint, arch: Option<Arch>, method: Option<Method>) -> Result<Recognised> {
    let entries = names_and_shapes(checkpoint);
    let fitted = if let Some(arch) = arch {
        fit(&entries, arch, method)?
    } else {
        let likeliest = recognise(&entries)?.into_iter().next().ok_or_else(|| {
            let hint = "give `--state-key` if the weights are elsewhere in the file; `describe` lists what it holds";
            Error::invalid(format!("`{}` holds no architecture that is known here", checkpoint.path().display()), hint)
        })?;
        match method {
            Some(method) if method != likeliest.method => fit(&entries, likeliest.arch, Some(method))?,
            _ => likeliest,
        }
    };
    if fitted.is_complete() && !fitted.has_further_layers() {
        return Ok(fitted);
    }
    let mut error = fitted.refusal(checkpoint);
    let holds = recognise(&entries)?.into_iter().next().filter(Recognised::is_complete);
    if let (Error::Invalid { hint, .. }, Some(holds)) = (&mut error, holds) {
        *hint = format!("it holds {} ({}): leave `--arch` and `--method` out", holds.arch, holds.method);
    }
    Err(error)
}
