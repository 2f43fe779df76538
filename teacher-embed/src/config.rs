//! What a command line asks for, validated.

use std::path::{Path, PathBuf};

use shared::embedding::EmbeddingDtype;
use shared::models::Arch;
use shared::transforms::normalize::Normalization;
use shared::weights::names::Method;
use shared::{Error, Result, cli};

use crate::args::{EmbedArgs, EmbedOptions, VerifyArgs};

/// Images that the teacher computes at a time: part of what decides the bytes, so it is no option.
pub const TEACHER_BATCH: usize = 16;
/// Images prepared at a time unless the user says otherwise.
const DEFAULT_BATCH_SIZE: u32 = 64;

/// What is done to the teacher's outputs before they are scaled to unit length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProjectionKind {
    /// Their mean is taken off.
    Center,
    /// And this many principal components are kept, at least 1.
    Pca(usize),
}

impl ProjectionKind {
    fn resolve(center: Option<bool>, pca: Option<u32>) -> Result<Option<Self>> {
        match (center, pca) {
            (_, Some(0)) => Err(Error::usage("`pca` must keep at least 1 component")),
            (Some(false), Some(_)) => {
                Err(Error::usage("`pca` always takes the mean off first: leave `center = false` out"))
            }
            (_, Some(dim)) => Ok(Some(Self::Pca(dim as usize))),
            (center, None) => Ok(center.unwrap_or(false).then_some(Self::Center)),
        }
    }

    /// D, where it differs from F.
    pub fn components(self) -> Option<usize> {
        match self {
            Self::Center => None,
            Self::Pca(dim) => Some(dim),
        }
    }

    /// Checks the projection against the outputs that it would be fitted to, `samples` times `views` rows of `width`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a single sample, whose views have no mean worth taking off, and for more components than outputs
    /// have numbers, or than rows span.
    pub(crate) fn check(self, width: usize, samples: usize, views: usize) -> Result<()> {
        let rows = samples * views;
        match self {
            _ if samples < 2 => {
                let flag = if self == Self::Center { "--center" } else { "--pca" };
                Err(Error::usage(format!("`{flag}` needs 2 samples at least, the shard set holds {samples}")))
            }
            Self::Pca(dim) if dim > width => {
                Err(Error::usage(format!("`--pca {dim}` is more than the width of the teacher's outputs, {width}")))
            }
            Self::Pca(dim) if dim >= rows => Err(Error::usage(format!(
                "`--pca {dim}` needs more than {dim} rows to be fitted to, {samples} samples x {views} views give {rows}"
            ))),
            _ => Ok(()),
        }
    }
}

/// What `embed` does.
#[derive(Debug, Clone)]
pub struct EmbedConfig {
    /// The shard set.
    pub shards: PathBuf,
    /// The checkpoint or run.
    pub weights: PathBuf,
    /// The directory to write.
    pub output: PathBuf,
    /// The architecture, where the user gave one.
    pub arch: Option<Arch>,
    /// The method, where the user gave one.
    pub method: Option<Method>,
    /// Where the state dict is, where the user said so.
    pub state_key: Option<String>,
    /// How pixels become the teacher's input, where the user said so.
    pub pixel_normalization: Option<Normalization>,
    /// What is done to the outputs before they are scaled to unit length; none for nothing.
    pub projection: Option<ProjectionKind>,
    /// Element type of the stored embeddings.
    pub dtype: EmbeddingDtype,
    /// Images prepared at a time, a multiple of [`TEACHER_BATCH`].
    pub batch_size: usize,
    /// Worker threads; none for all cores.
    pub threads: Option<u16>,
    /// Print the summary as JSON.
    pub json: bool,
    /// Show no progress.
    pub quiet: bool,
    /// Start again.
    pub overwrite: bool,
}

impl EmbedConfig {
    /// The defaults, for a program that calls [`crate::embed()`].
    pub fn new(shards: impl Into<PathBuf>, weights: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            shards: shards.into(),
            weights: weights.into(),
            output: output.into(),
            arch: None,
            method: None,
            state_key: None,
            pixel_normalization: None,
            projection: None,
            dtype: EmbeddingDtype::default(),
            batch_size: DEFAULT_BATCH_SIZE as usize,
            threads: None,
            json: false,
            quiet: true,
            overwrite: false,
        }
    }

    /// Lays the flags over the configuration file and checks them.
    ///
    /// # Errors
    /// [`Error::Usage`] for a missing option or one that makes no sense, [`Error::Invalid`] for a device that this
    /// program cannot use, [`Error::Missing`] for a path that is not there.
    pub fn resolve(args: &EmbedArgs) -> Result<Self> {
        let options: EmbedOptions = cli::with_config_file(args.config.as_deref(), &args.options)?;
        check_device(options.device.as_deref().unwrap_or("cpu"))?;
        let batch_size = options.batch_size.unwrap_or(DEFAULT_BATCH_SIZE);
        if batch_size == 0 {
            return Err(Error::usage("`batch-size` must be at least 1"));
        }
        let config = Self {
            pixel_normalization: options.pixel_normalization,
            projection: ProjectionKind::resolve(options.center, options.pca)?,
            arch: options.arch,
            method: options.method,
            state_key: options.state_key,
            dtype: options.dtype.unwrap_or_default(),
            batch_size: (batch_size as usize).next_multiple_of(TEACHER_BATCH),
            threads: args.common.threads,
            json: args.common.json,
            quiet: args.common.quiet,
            overwrite: args.common.overwrite,
            ..Self::new(
                required("shards", options.shards)?,
                required("weights", options.weights)?,
                required("output", options.output)?,
            )
        };
        weights_must_exist(&config.weights)?;
        Ok(config)
    }

    /// D of `--pca`.
    pub(crate) fn components(&self) -> Option<usize> {
        self.projection.and_then(ProjectionKind::components)
    }
}

/// What `verify` does.
#[derive(Debug, Clone)]
pub struct VerifyConfig {
    /// The embedding set.
    pub embeddings: PathBuf,
    /// The shard set, where the user gave one.
    pub shards: Option<PathBuf>,
    /// The weights to compute rows with.
    pub weights: Option<PathBuf>,
    /// How many rows to compute.
    pub sample: usize,
    /// What draws them.
    pub seed: u64,
    /// Worker threads; none for all cores.
    pub threads: Option<u16>,
    /// Print the result as JSON.
    pub json: bool,
    /// Show no progress.
    pub quiet: bool,
}

impl VerifyConfig {
    /// Checks the flags.
    ///
    /// # Errors
    /// [`Error::Missing`] for weights that are not there.
    pub fn resolve(args: &VerifyArgs) -> Result<Self> {
        if let Some(weights) = &args.weights {
            weights_must_exist(weights)?;
        }
        Ok(Self {
            embeddings: args.embeddings.clone(),
            shards: args.shards.clone(),
            weights: args.weights.clone(),
            sample: args.sample as usize,
            seed: args.seed,
            threads: args.threads,
            json: args.json,
            quiet: args.quiet,
        })
    }
}

fn weights_must_exist(path: &Path) -> Result<()> {
    cli::must_exist("checkpoint", path).map(drop)
}

fn required(flag: &str, value: Option<PathBuf>) -> Result<PathBuf> {
    value
        .ok_or_else(|| Error::usage(format!("`--{flag}` is required, as a flag or as `{flag}` in the `--config` file")))
}

fn check_device(device: &str) -> Result<()> {
    let index = device.strip_prefix("cuda").map(|rest| rest.strip_prefix(':').unwrap_or(rest));
    match (device, index) {
        ("cpu", _) => Ok(()),
        (_, Some(index)) if index.is_empty() || index.parse::<u16>().is_ok() => Err(Error::invalid(
            "this build of `teacher-embed` has no CUDA",
            "leave `--device` out to compute on the CPU",
        )),
        _ => Err(Error::usage(format!("`{device}` is no device, expected `cpu` or `cuda:N`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projections_follow_from_both_options() {
        let resolve = ProjectionKind::resolve;
        assert_eq!(resolve(None, None).unwrap(), None);
        assert_eq!(resolve(Some(false), None).unwrap(), None);
        assert_eq!(resolve(Some(true), None).unwrap(), Some(ProjectionKind::Center));
        for center in [None, Some(true)] {
            assert_eq!(resolve(center, Some(7)).unwrap(), Some(ProjectionKind::Pca(7)));
            assert_eq!(resolve(center, Some(0)).unwrap_err().exit_status(), 2);
        }
        assert_eq!(resolve(Some(false), Some(7)).unwrap_err().exit_status(), 2);
    }

    #[test]
    fn projections_that_the_rows_do_not_allow_are_refused() {
        let refusal = |kind: ProjectionKind, width, samples, views| {
            kind.check(width, samples, views).err().map_or_else(String::new, |error| error.to_string())
        };
        assert_eq!(refusal(ProjectionKind::Pca(8), 8, 5, 2), "");
        assert_eq!(refusal(ProjectionKind::Center, 8, 2, 1), "");
        assert!(
            refusal(ProjectionKind::Pca(9), 8, 50, 2)
                .contains("`--pca 9` is more than the width of the teacher's outputs, 8")
        );
        assert!(refusal(ProjectionKind::Pca(8), 8, 4, 2).contains("4 samples x 2 views give 8"));
        assert!(refusal(ProjectionKind::Pca(1), 8, 1, 9).contains("`--pca` needs 2 samples at least"));
        assert!(refusal(ProjectionKind::Center, 8, 1, 9).contains("`--center` needs 2 samples at least"));
    }

    #[test]
    fn devices_are_told_apart() {
        assert!(check_device("cpu").is_ok());
        for device in ["cuda", "cuda:0", "cuda:12"] {
            let error = check_device(device).unwrap_err();
            assert_eq!((error.exit_status(), error.to_string().contains("no CUDA")), (1, true), "{device}");
        }
        for device in ["gpu", "cuda:x", "cpu:0", ""] {
            assert_eq!(check_device(device).unwrap_err().exit_status(), 2, "{device}");
        }
    }
}
