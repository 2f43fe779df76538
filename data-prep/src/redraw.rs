//! Other views of a set of source images: a manifest that names the set and how its views are redrawn.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;
use shared::io::create_directory;
use shared::manifest::{Identity, Input, Manifest, Stage, short};
use shared::output::{Begun, OutputDir};
use shared::shard::{BASE_ROLE, ShardConfig, ShardSet, Store};
use shared::transforms::Recipe;
use shared::{Error, Result};

use crate::args::RedrawArgs;
use crate::config::{resolve_size, resolve_views};
use crate::pack::details_json;
use crate::verify::shard_config;

/// What redrawing came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RedrawSummary {
    /// The new set.
    pub output: PathBuf,
    /// Whether it was there before.
    pub already_finished: bool,
    /// The set that holds the source images.
    pub source: PathBuf,
    /// Recipe by name.
    pub recipe: String,
    /// Number of samples.
    pub samples: u64,
    /// Views of each.
    pub views: usize,
    /// Fingerprint of the set.
    pub fingerprint: String,
}

impl fmt::Display for RedrawSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.already_finished { "is already finished" } else { "redraws" };
        write!(f, "`{}` {verb}: {} samples x {} views", self.output.display(), self.samples, self.views)?;
        write!(f, " by `{}` of `{}`", self.recipe, self.source.display())?;
        write!(f, ", fingerprint {}", short(&self.fingerprint))
    }
}

/// Makes a set of other views.
///
/// # Errors
/// As [`ShardSet::open`] and [`OutputDir::begin`]; [`Error::Invalid`] when the set does not hold source images; [`Error::Usage`]
/// for a recipe, a size or a number of views that makes no sense.
pub fn redraw(args: &RedrawArgs) -> Result<RedrawSummary> {
    let base = ShardSet::open(&args.shards)?;
    if base.store() != Store::Source {
        return Err(Error::invalid(
            format!("`{}` holds ready-made views, which cannot be redrawn", args.shards.display()),
            "pack the images with `--store source`",
        ));
    }
    let recipe = Recipe::named_or_file(&args.recipe)?;
    let (views, size) = (resolve_views(args.views, &recipe)? as usize, resolve_size(args.size)? as usize);
    let config = ShardConfig { recipe, views, size, ..shard_config(&base)? };
    let input = Input {
        role: BASE_ROLE.into(),
        path: path_between(&args.output, base.files_directory())?,
        fingerprint: base.files_manifest().fingerprint.clone(),
    };
    let identity = Identity::new(Stage::DataPrep, &config, args.seed.unwrap_or(0), vec![input])?;
    let summary = |manifest: &Manifest, already_finished| RedrawSummary {
        output: args.output.clone(),
        already_finished,
        source: base.files_directory().into(),
        recipe: config.recipe.name.clone(),
        samples: manifest.count("samples"),
        views,
        fingerprint: manifest.fingerprint.clone(),
    };
    let dir = match OutputDir::begin(&args.output, &identity, args.common.overwrite)? {
        Begun::Finished(manifest) => return Ok(summary(&manifest, true)),
        Begun::Writing(dir) => dir,
    };
    let counts = BTreeMap::from([
        ("samples".to_string(), base.len() as u64),
        ("views".to_string(), views as u64),
        ("shards".to_string(), 0),
    ]);
    let details = details_json(&config.details(base.classes().to_vec()))?;
    Ok(summary(&dir.finish(counts, details, Vec::new())?, false))
}

/// The way from one directory to another, so that both can be moved together; absolute where no relative one leads there.
fn path_between(from: &Path, to: &Path) -> Result<String> {
    create_directory(from)?;
    let real = |path: &Path| path.canonicalize().map_err(Error::io("read", path));
    let (from, to) = (real(from)?, real(to)?);
    let parts = |path: &Path| path.components().map(|part| part.as_os_str().to_owned()).collect::<Vec<_>>();
    let (here, there) = (parts(&from), parts(&to));
    let common = here.iter().zip(&there).take_while(|(a, b)| a == b).count();
    let path = if common == 0 {
        to
    } else {
        let up = here[common..].iter().map(|_part| Component::ParentDir.as_os_str());
        up.chain(there[common..].iter().map(AsRef::as_ref)).collect()
    };
    Ok(path.display().to_string())
}
