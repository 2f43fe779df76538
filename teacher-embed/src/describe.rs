//! What a checkpoint holds, for a person or a script.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use shared::Result;
use shared::models::VitOptions;
use shared::ops::PositionResampling;
use shared::weights::Checkpoint;
use shared::weights::names::{Method, Recognised, recognise};

use crate::teacher::{names_and_shapes, open_run};

/// The description of a checkpoint.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// The file.
    pub path: String,
    /// How it is written.
    pub format: String,
    /// Where the described state dict is in it; empty for the top.
    pub state_key: String,
    /// Other places with tensors, and how many.
    pub other_state_keys: BTreeMap<String, usize>,
    /// The networks it holds, the likeliest first: the first gives the defaults of `--arch` and `--method`.
    pub recognised: Vec<Recognised>,
    /// Scalars beside the weights.
    pub metadata: BTreeMap<String, Value>,
    /// Every tensor, in the order of the file.
    pub tensors: Vec<TensorDescription>,
    /// Entries of the state dict that are not read, and what they are.
    pub skipped: BTreeMap<String, String>,
    /// Names that the pickle asks Python to import, beyond those that weights need; none was.
    pub unknown_globals: Vec<String>,
}

/// One tensor.
#[derive(Debug, Clone, Serialize)]
pub struct TensorDescription {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: String,
    /// Its sizes.
    pub shape: Vec<usize>,
}

/// Describes a checkpoint, or the last checkpoint of a run.
///
/// # Errors
/// As [`Checkpoint::open_at`] and [`shared::run::Run::open`].
pub fn describe(path: &Path, state_key: Option<&str>) -> Result<Description> {
    let file = if path.is_dir() { path.join(&open_run(path)?.details().checkpoint) } else { path.to_path_buf() };
    let checkpoint = Checkpoint::open_at(&file, state_key)?;
    let tensors = checkpoint.entries().iter().map(|entry| TensorDescription {
        name: entry.name().to_owned(),
        dtype: entry.dtype().to_string(),
        shape: entry.shape().to_vec(),
    });
    Ok(Description {
        path: file.display().to_string(),
        format: checkpoint.format().to_string(),
        state_key: checkpoint.state_key().to_owned(),
        other_state_keys: checkpoint.other_state_keys().iter().cloned().collect(),
        recognised: recognise(&names_and_shapes(&checkpoint))?,
        metadata: checkpoint.metadata().clone(),
        tensors: tensors.collect(),
        skipped: checkpoint.skipped().iter().cloned().collect(),
        unknown_globals: checkpoint.unknown_globals().to_vec(),
    })
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path)?;
        let place =
            if self.state_key.is_empty() { String::new() } else { format!(", at `{}`", shown(&self.state_key)) };
        writeln!(f, "format      {}, {} tensors{place}", self.format, self.tensors.len())?;
        match self.recognised.first() {
            Some(first) => {
                let prefix =
                    if first.prefix.is_empty() { "no prefix".into() } else { format!("`{}`", shown(&first.prefix)) };
                writeln!(
                    f,
                    "recognised  {} ({}), embeddings of width {}, {prefix}",
                    first.arch,
                    first.method,
                    first.embedding_dim()
                )?;
                writeln!(
                    f,
                    "            {} tensors fit{}",
                    first.matched,
                    if first.is_complete() { ", none is missing" } else { "" }
                )?;
                if let Some(head) = &first.head {
                    writeln!(f, "head        {head}")?;
                }
                transformer(f, first)?;
                if !first.alike.is_empty() {
                    let others: Vec<&str> = first.alike.iter().map(|method| method.name()).collect();
                    writeln!(
                        f,
                        "alike       {}: such files look the same, and so do their embeddings",
                        others.join(", ")
                    )?;
                }
                for left in &first.left_over {
                    writeln!(f, "left over   {}: {} tensors", left.what, left.tensors)?;
                }
                list(f, "missing", &first.missing)?;
                list(f, "misshapen", &first.mismatched)?;
                list(f, "unexpected", &first.unexpected)?;
            }
            None => writeln!(f, "recognised  no architecture that is known here")?,
        }
        for other in self.recognised.iter().skip(1) {
            writeln!(f, "also        {} ({}) under `{}`", other.arch, other.method, shown(&other.prefix))?;
        }
        for (key, count) in &self.other_state_keys {
            writeln!(f, "elsewhere   {count} tensors at `{}` (`--state-key {}`)", shown(key), shown(key))?;
        }
        for (key, value) in &self.metadata {
            writeln!(f, "metadata    {} = {value}", shown(key))?;
        }
        for (name, what) in &self.skipped {
            writeln!(f, "skipped     `{}`: {}", shown(name), shown(what))?;
        }
        for name in &self.unknown_globals {
            writeln!(f, "not run     the pickle asks for `{}`", shown(name))?;
        }
        let width = self.tensors.iter().map(|tensor| shown(&tensor.name).len()).max().unwrap_or(0);
        for tensor in &self.tensors {
            writeln!(f, "  {:width$}  {:4}  {:?}", shown(&tensor.name), tensor.dtype, tensor.shape)?;
        }
        Ok(())
    }
}

/// What names and shapes alone do not tell of a vision transformer, and what is taken for it.
fn transformer(f: &mut fmt::Formatter<'_>, found: &Recognised) -> fmt::Result {
    if !found.arch.name().starts_with("vit_") {
        return Ok(());
    }
    let options = found.vit_options();
    if let Some(heads) = options.heads {
        writeln!(f, "attention   {heads} heads, as MoCo v3 has")?;
    }
    if options.positions == PositionResampling::Dino {
        writeln!(f, "positions   resampled as DINO does for images of other sizes")?;
    }
    if found.method == Method::Backbone && options == VitOptions::default() {
        writeln!(f, "unknown     how it was trained: give `--method dino` or `--method moco-v3` where that is so")?;
    }
    Ok(())
}

/// Text of a file as a terminal may see it.
fn shown(text: &str) -> String {
    text.escape_debug().to_string()
}

fn list(f: &mut fmt::Formatter<'_>, what: &str, names: &[String]) -> fmt::Result {
    const SHOWN: usize = 20;
    for name in names.iter().take(SHOWN) {
        writeln!(f, "{what:10}  {}", shown(name))?;
    }
    if names.len() > SHOWN {
        writeln!(f, "{what:10}  and {} more", names.len() - SHOWN)?;
    }
    Ok(())
}
