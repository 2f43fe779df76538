//! Checkpoints of other programs as files of this one: the reverse of `export`.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use shared::Result;
use shared::cli::may_write;
use shared::models::Encoder;
use shared::weights::names::LeftOver;

use crate::args::ImportArgs;
use crate::export::write_backbone;
use crate::weights::Weights;

/// Text entries of a source that describe its input; they are kept, and never guessed.
const INPUT_ENTRIES: [&str; 3] = ["image_size", "mean", "std"];

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Imported {
    /// The file that was written.
    pub output: PathBuf,
    /// Architecture, by timm's name.
    pub student: String,
    /// The file that was read.
    pub source: PathBuf,
    /// How that is written.
    pub format: String,
    /// Where the state dict is in it; empty for the top.
    pub state_key: String,
    /// What stands before every name of the backbone in it.
    pub prefix: String,
    /// Tensors that were taken.
    pub used: usize,
    /// Batch norms whose counter of batches is not in it and starts at 0.
    pub missing_counters: usize,
    /// Tensors that are no part of the backbone.
    pub left_over: Vec<LeftOver>,
    /// Tensors that nothing accounts for; they were left aside too.
    pub unexpected: Vec<String>,
    /// Length of the file.
    pub bytes: u64,
    /// Its hash.
    pub blake3: String,
}

/// Writes the backbone of a checkpoint as a student's file: weights and batch-norm buffers under the names of timm, f32.
///
/// # Errors
/// As [`Weights::open`] and [`Weights::backbone`]; [`shared::Error::Usage`] when the file exists and `--overwrite` is not
/// given; [`shared::Error::Io`].
pub fn import(args: &ImportArgs) -> Result<Imported> {
    may_write(&args.output, args.overwrite)?;
    let weights = Weights::open(&args.checkpoint, args.student, args.state_key.as_deref())?;
    let tensors = weights.backbone()?;
    let encoder = Encoder::new(weights.arch(), None, 0)?;
    encoder.store().load(&tensors)?;
    let metadata = weights.checkpoint().metadata();
    let kept = INPUT_ENTRIES.into_iter().filter_map(|key| Some((key, metadata.get(key)?.as_str()?.to_owned())));
    let entry = write_backbone(&args.output, &encoder, kept)?;
    Ok(Imported {
        output: args.output.clone(),
        student: weights.arch().name().into(),
        source: weights.checkpoint().path().to_path_buf(),
        format: weights.checkpoint().format().to_string(),
        state_key: weights.checkpoint().state_key().into(),
        prefix: weights.prefix().into(),
        used: tensors.len(),
        missing_counters: encoder.store().names_and_shapes().len() - tensors.len(),
        left_over: weights.left_over().to_vec(),
        unexpected: weights.unexpected().to_vec(),
        bytes: entry.bytes,
        blake3: entry.blake3,
    })
}

impl fmt::Display for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 6;
        writeln!(f, "wrote {} to `{}` ({} bytes)", self.student, self.output.display(), self.bytes)?;
        let place = |what: &str, name: &str| {
            if name.is_empty() { String::new() } else { format!(", {what} `{}`", name.escape_debug()) }
        };
        writeln!(
            f,
            "used        {} tensors of `{}` ({}{}{})",
            self.used,
            self.source.display(),
            self.format,
            place("at", &self.state_key),
            place("under", &self.prefix)
        )?;
        if self.missing_counters > 0 {
            writeln!(f, "missing     {} counters of batches, which start at 0", self.missing_counters)?;
        }
        for left in &self.left_over {
            writeln!(f, "left over   {}: {} tensors", left.what, left.tensors)?;
        }
        for name in self.unexpected.iter().take(SHOWN) {
            writeln!(f, "unexpected  {}", name.escape_debug())?;
        }
        let more = self.unexpected.len().saturating_sub(SHOWN);
        if more > 0 { writeln!(f, "unexpected  and {more} more") } else { Ok(()) }
    }
}
