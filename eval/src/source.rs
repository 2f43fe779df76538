//! What is evaluated: a finished run of `student-train`, or a file of weights.

use std::path::{Path, PathBuf};

use candle_core::Device;
use shared::io::hash_file;
use shared::manifest::{Input, Manifest, Stage};
use shared::models::{Arch, Encoder};
use shared::run::{Run, STUDENT_FILE};
use shared::shard::ShardSet;
use shared::transforms::normalize::Normalization;
use shared::weights::Checkpoint;
use shared::weights::names::{self, Recognised};
use shared::{Error, Result};

use crate::args::SourceArgs;
use crate::features::{FeatureSet, WEIGHTS_ROLE, directory_for, extract};

/// A backbone that can be evaluated.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    home: PathBuf,
    kind: Kind,
    weights: Input,
}

#[derive(Debug)]
enum Kind {
    Run(Box<Run>),
    File { arch: Option<Arch>, normalization: Option<Normalization> },
}

/// Opens everything that was named on the command line, before any work is done.
///
/// # Errors
/// [`Error::Usage`] for flags that do not fit what was named, [`Error::Missing`], and as [`Run::open`].
pub fn open_all(args: &SourceArgs) -> Result<Vec<Source>> {
    if args.output.is_some() && args.runs.len() > 1 {
        return Err(Error::usage("`--output` takes the results of one run: name one RUN, or leave it out"));
    }
    args.runs.iter().map(|path| Source::open(path, args)).collect()
}

impl Source {
    fn open(path: &Path, args: &SourceArgs) -> Result<Self> {
        if path.is_file() {
            let Some(home) = args.output.clone() else {
                let message =
                    format!("`{}` is a file of weights: say with `--output` where its results go", path.display());
                return Err(Error::usage(message));
            };
            let fingerprint = hash_file(path)?.blake3;
            let weights = Input { role: WEIGHTS_ROLE.into(), path: path.display().to_string(), fingerprint };
            let kind = Kind::File { arch: args.arch, normalization: args.pixel_normalization };
            return Ok(Self { path: path.into(), home, kind, weights });
        }
        let run = Run::open(path)?;
        let arch = run.details().arch;
        if args.arch.is_some_and(|asked| asked != arch) {
            return Err(Error::usage(format!("`{}` is a run of {arch}: leave `--arch` out", path.display())));
        }
        if args.pixel_normalization.is_some_and(|asked| asked != Normalization::default()) {
            let message = format!("`{}` is a run: leave `--pixel-normalization` out", path.display());
            return Err(Error::usage(message));
        }
        let home = args.output.clone().unwrap_or_else(|| path.into());
        let weights = weights_of(run.manifest(), path)?;
        Ok(Self { path: path.into(), home, kind: Kind::Run(Box::new(run)), weights })
    }

    /// As it was named on the command line.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory that holds `features/` and `eval/`.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The backbone's weights, by hash.
    pub fn weights(&self) -> &Input {
        &self.weights
    }

    /// The features of a shard set: cached, or extracted.
    ///
    /// # Errors
    /// As [`extract`] and [`Run::student`]; for a weight file, what loading it says.
    pub fn features(&self, shards: &ShardSet, overwrite: bool, quiet: bool) -> Result<FeatureSet> {
        let directory = directory_for(&self.home, &shards.manifest().fingerprint);
        let normalization = self.pixel_normalization()?;
        if !overwrite && let Some(cached) = self.cached(&directory, shards, normalization)? {
            return Ok(cached);
        }
        extract(&self.encoder()?, self.weights.clone(), normalization, shards, &directory, (overwrite, quiet))
    }

    /// A finished feature set of these weights, pixels and shards; avoids loading the weights.
    fn cached(&self, directory: &Path, shards: &ShardSet, normalization: Normalization) -> Result<Option<FeatureSet>> {
        let Ok(manifest) = Manifest::read(directory, Stage::StudentEval) else { return Ok(None) };
        let matches =
            |role: &str, fingerprint: &str| manifest.input(role).is_some_and(|input| input.fingerprint == fingerprint);
        let current = matches(WEIGHTS_ROLE, &self.weights.fingerprint)
            && matches(crate::features::SHARDS_ROLE, &shards.manifest().fingerprint);
        if !current {
            return Ok(None);
        }
        let set = FeatureSet::open(directory)?;
        Ok((set.pixel_normalization()? == normalization).then_some(set))
    }

    /// How pixels become the network's input: as asked, as its weights say, or as its architecture was published.
    fn pixel_normalization(&self) -> Result<Normalization> {
        match &self.kind {
            Kind::Run(_) => Ok(Normalization::default()),
            Kind::File { normalization: Some(asked), .. } => Ok(*asked),
            Kind::File { arch, normalization: None } => {
                let checkpoint = Checkpoint::open(&self.path)?;
                match Normalization::recorded(checkpoint.metadata()) {
                    Some(recorded) => Ok(recorded),
                    None => Ok(recognised(&checkpoint, *arch)?.arch.pixel_normalization()),
                }
            }
        }
    }

    fn encoder(&self) -> Result<Encoder> {
        match &self.kind {
            Kind::Run(run) => run.student(),
            Kind::File { arch, .. } => load_backbone(&self.path, *arch),
        }
    }
}

/// The hash of a run's backbone, from its manifest.
///
/// # Errors
/// [`Error::Missing`] when the run has none.
pub fn weights_of(manifest: &Manifest, run: &Path) -> Result<Input> {
    let path = run.join(STUDENT_FILE);
    let Some(file) = manifest.files.iter().find(|file| file.path == STUDENT_FILE) else {
        return Err(Error::Missing {
            what: "the run's backbone",
            path,
            hint: "finish the run with `student-train`, or start it again with `--overwrite`".into(),
        });
    };
    let path = path.display().to_string();
    Ok(Input { role: WEIGHTS_ROLE.into(), path, fingerprint: file.blake3.clone() })
}

/// The backbone of a weight file, without the head that the file may have.
fn load_backbone(path: &Path, arch: Option<Arch>) -> Result<Encoder> {
    let checkpoint = Checkpoint::open(path)?;
    let fitted = recognised(&checkpoint, arch)?;
    let tensors = fitted.load(&checkpoint)?;
    let encoder = Encoder::with_vit_options(fitted.arch, None, fitted.vit_options(), 0, &Device::Cpu)?;
    encoder.store().load(&tensors)?;
    Ok(encoder)
}

/// The network of a weight file; the architecture is told by its tensors unless given.
fn recognised(checkpoint: &Checkpoint, arch: Option<Arch>) -> Result<Recognised> {
    let entries: Vec<(String, Vec<usize>)> =
        checkpoint.entries().iter().map(|entry| (entry.name().to_string(), entry.shape().to_vec())).collect();
    let fitted = match arch {
        Some(arch) => Some(names::fit(&entries, arch, None)?),
        None => names::recognise(&entries)?.into_iter().next(),
    };
    fitted.ok_or_else(|| {
        let path = checkpoint.path().display();
        Error::invalid(
            format!("`{path}` holds no network that is known here"),
            format!("`teacher-embed describe {path}` tells what it holds"),
        )
    })
}
