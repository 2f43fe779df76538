//! What `pack` is asked to do: flags and configuration file, resolved and checked.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use shared::cli::{CommonArgs, with_config_file};
use shared::output::Part;
use shared::shard::{Codec, DEFAULT_QUALITY, ShardConfig, Store, StoredJpeg};
use shared::transforms::decode::DECODER;
use shared::transforms::recipe::MAX_SIDE;
use shared::transforms::{Level, PassOrder, Recipe};
use shared::{Error, Result};

use crate::args::PackOptions;
use crate::source::SourceOptions;

/// [`PassOrder`] as a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PassOrderFlag {
    /// As Pillow from 13.0 on
    Pillow13,
    /// As Pillow before 13.0
    Horizontal,
}

/// A value that may be written as a number or with a unit: `5`, `1%`, `500MB`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NumberOrText {
    /// A plain number.
    Number(u64),
    /// A number with a unit.
    Text(String),
}

impl FromStr for NumberOrText {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.parse().map_or_else(|_| Self::Text(text.into()), Self::Number))
    }
}

impl fmt::Display for NumberOrText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

/// How many images may be unusable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxRejects {
    /// This many.
    Count(u64),
    /// This share of all, in percent, rounded up.
    Percent(f64),
}

impl MaxRejects {
    /// How many of `samples` that is.
    pub fn of(self, samples: usize) -> u64 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => (samples as f64 * percent / 100.0).ceil() as u64,
        }
    }

    /// What `--max-rejects` says, or the default.
    ///
    /// # Errors
    /// [`Error::Usage`] when it says neither a number nor a share.
    pub(crate) fn resolve(flag: Option<&NumberOrText>) -> Result<Self> {
        flag.map_or(Ok(Self::Percent(1.0)), |text| {
            Self::parse(text).ok_or_else(|| {
                Error::usage(format!("`--max-rejects {text}` is neither a number nor a share such as 1%"))
            })
        })
    }

    fn parse(text: &NumberOrText) -> Option<Self> {
        match text {
            NumberOrText::Number(count) => Some(Self::Count(*count)),
            NumberOrText::Text(text) => {
                let percent: f64 = text.strip_suffix('%')?.trim().parse().ok()?;
                (0.0..=100.0).contains(&percent).then_some(Self::Percent(percent))
            }
        }
    }
}

/// A resolved request to pack.
#[derive(Debug, Clone, PartialEq)]
pub struct PackConfig {
    /// The folder of images.
    pub input: PathBuf,
    /// What the input is, and which of its samples are taken.
    pub source: SourceOptions,
    /// The shard set; `plan` may go without.
    pub output: Option<PathBuf>,
    /// What decides the bytes.
    pub shards: ShardConfig,
    /// Seed of the views and of the order.
    pub seed: u64,
    /// How many images may be unusable.
    pub max_rejects: MaxRejects,
    /// Worker threads.
    pub threads: usize,
    /// Whether to show no progress.
    pub quiet: bool,
    /// Whether to start again.
    pub overwrite: bool,
    /// The part of the set to pack; none for all of it.
    pub part: Option<Part>,
    /// Instruction set of the pixel kernels; it changes no byte.
    pub level: Level,
}

const DEFAULT_VIEWS: u32 = 4;
const DEFAULT_SIZE: u32 = 224;
/// A little more than the usual view, as most pipelines resize before they crop.
pub(crate) const DEFAULT_SHORT_SIDE: usize = 256;
const LARGEST_SIZE: u32 = 4096;
const LARGEST_SAMPLE_BYTES: u64 = 1 << 32;
const DEFAULT_SHARD_BYTES: u64 = 1 << 30;

impl PackConfig {
    /// The same request for one part of the set.
    ///
    /// # Errors
    /// [`Error::Usage`] together with `--overwrite`, which would delete what the other parts wrote.
    pub fn for_part(self, part: Option<Part>) -> Result<Self> {
        if part.is_some() && self.overwrite {
            let message =
                "`--overwrite` deletes the work of all parts: remove the directory before the first part starts";
            return Err(Error::usage(message));
        }
        Ok(Self { part, ..self })
    }

    /// Lays flags over the configuration file, fills in defaults and checks everything that can be checked without the images.
    ///
    /// # Errors
    /// [`Error::Usage`] for a missing or senseless value; as [`with_config_file`] for the file.
    pub fn resolve(flags: &PackOptions, file: Option<&Path>, common: &CommonArgs) -> Result<Self> {
        let mut options = with_config_file(file, flags)?;
        // a flag of the pair replaces either key of the file
        if flags.shard_samples.is_some() {
            options.shard_bytes = None;
        } else if flags.shard_bytes.is_some() {
            options.shard_samples = None;
        }
        let required = |what: &str| Error::usage(format!("`--{what}` is required"));
        let input = options.input.ok_or_else(|| required("input"))?;
        let name = options.recipe.ok_or_else(|| required("recipe"))?;
        let mut recipe = Recipe::named_or_file(&name)?;
        match options.pass_order {
            Some(PassOrderFlag::Pillow13) => recipe.pass_order = PassOrder::Pillow13,
            Some(PassOrderFlag::Horizontal) => recipe.pass_order = PassOrder::Horizontal,
            None => {}
        }
        let views = resolve_views(options.views, &recipe)?;
        let size = resolve_size(options.size)?;
        let (store, codec) = (options.store.unwrap_or_default(), options.codec.unwrap_or_default());
        let mut shards = ShardConfig {
            recipe,
            views: views as usize,
            size: size as usize,
            store,
            codec,
            order: options.order.unwrap_or_default(),
            shard_samples: 1,
            decoder: DECODER.into(),
            short_side: resolve_short_side(store, options.short_side.as_ref())?,
            jpeg: resolve_jpeg(codec, options.quality)?,
        };
        let pixels = u64::from(views).saturating_mul(u64::from(size).pow(2) * 3);
        if store == Store::Views && pixels > LARGEST_SAMPLE_BYTES {
            return Err(Error::usage(format!("{views} views of {size} x {size} pixels are too much for one sample")));
        }
        shards.shard_samples = match (options.shard_samples, &options.shard_bytes) {
            (Some(_), Some(_)) => return Err(Error::usage("`shard-samples` and `shard-bytes` exclude each other")),
            (Some(0), None) => return Err(Error::usage("`--shard-samples` must be at least 1")),
            (Some(samples), None) => usize::try_from(samples).unwrap_or(usize::MAX),
            (None, bytes) => {
                let bytes = bytes.as_ref().map_or(Ok(DEFAULT_SHARD_BYTES), |text| {
                    parse_bytes(text).ok_or_else(|| {
                        Error::usage(format!("`--shard-bytes {text}` is not a size such as 500MB or 1GiB"))
                    })
                })?;
                usize::try_from((bytes / shards.sample_bytes()).max(1)).unwrap_or(usize::MAX)
            }
        };
        let max_rejects = MaxRejects::resolve(options.max_rejects.as_ref())?;
        let all_cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            input,
            source: options.source,
            output: options.output,
            shards,
            seed: options.seed.unwrap_or(0),
            max_rejects,
            threads: common.threads.map_or_else(all_cores, usize::from),
            quiet: common.quiet,
            overwrite: common.overwrite,
            part: None,
            level: Level::default(),
        })
    }
}

/// How many views a recipe is asked for.
pub(crate) fn resolve_views(asked: Option<u32>, recipe: &Recipe) -> Result<u32> {
    let views = asked.unwrap_or(if recipe.is_random() { DEFAULT_VIEWS } else { 1 });
    if views == 0 {
        return Err(Error::usage("`--views` must be at least 1"));
    }
    if views > 1 && !recipe.is_random() {
        return Err(Error::usage(format!(
            "recipe `{}` has no chance in it: {views} views would be equal, use `--views 1`",
            recipe.name
        )));
    }
    Ok(views)
}

/// Which size views are asked to have.
pub(crate) fn resolve_size(asked: Option<u32>) -> Result<u32> {
    let size = asked.unwrap_or(DEFAULT_SIZE);
    if size == 0 || size > LARGEST_SIZE {
        return Err(Error::usage(format!("`--size` must be 1 to {LARGEST_SIZE}, found {size}")));
    }
    Ok(size)
}

fn resolve_short_side(store: Store, asked: Option<&NumberOrText>) -> Result<Option<usize>> {
    let side = match asked {
        Some(_) if store == Store::Views => {
            return Err(Error::usage("`--short-side` is about stored source images: add `--store source`"));
        }
        None if store == Store::Views => return Ok(None),
        None => DEFAULT_SHORT_SIDE,
        Some(NumberOrText::Number(side)) => usize::try_from(*side).unwrap_or(usize::MAX),
        Some(NumberOrText::Text(text)) if text == "original" => 0,
        Some(other) => {
            return Err(Error::usage(format!("`--short-side {other}` is neither a number of pixels nor `original`")));
        }
    };
    if side > MAX_SIDE {
        return Err(Error::usage(format!("`--short-side` must be at most {MAX_SIDE}, found {side}")));
    }
    Ok(Some(side))
}

fn resolve_jpeg(codec: Codec, asked: Option<u32>) -> Result<Option<StoredJpeg>> {
    match (codec, asked) {
        (Codec::Raw, Some(_)) => Err(Error::usage("`--quality` is about stored JPEGs: add `--codec jpeg`")),
        (Codec::Raw, None) => Ok(None),
        (Codec::Jpeg, asked) => match u8::try_from(asked.unwrap_or(DEFAULT_QUALITY.into())) {
            Ok(quality @ 1..=100) => Ok(Some(StoredJpeg::new(quality))),
            _ => Err(Error::usage(format!("`--quality` must be 1 to 100, found {}", asked.unwrap_or(0)))),
        },
    }
}

fn parse_bytes(text: &NumberOrText) -> Option<u64> {
    const UNITS: [(&str, u64); 9] = [
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("tib", 1 << 40),
        ("kb", 1000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("tb", 1_000_000_000_000),
        ("b", 1),
    ];
    match text {
        NumberOrText::Number(bytes) => Some(*bytes),
        NumberOrText::Text(text) => {
            let text = text.trim().to_lowercase();
            let (number, unit) = UNITS.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, scale)))?;
            let bytes = number.trim().parse::<f64>().ok()? * *unit as f64;
            (1.0..1e18).contains(&bytes).then_some(bytes as u64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(change: impl FnOnce(&mut PackOptions)) -> Result<PackConfig> {
        let mut options =
            PackOptions { input: Some("in".into()), recipe: Some("moco-v2".into()), ..PackOptions::default() };
        change(&mut options);
        PackConfig::resolve(&options, None, &CommonArgs::default())
    }

    #[test]
    fn defaults_are_those_of_the_help() {
        let config = resolve(|_| ()).unwrap();
        assert_eq!((config.shards.views, config.shards.size, config.seed), (4, 224, 0));
        assert_eq!(config.shards.shard_samples as u64, (1 << 30) / config.shards.sample_bytes());
        assert_eq!(config.max_rejects, MaxRejects::Percent(1.0));
        assert_eq!(resolve(|o| o.recipe = Some("eval-center".into())).unwrap().shards.views, 1);
    }

    #[test]
    fn senseless_values_are_usage_errors() {
        let text = |text: &str| Some(text.parse().unwrap());
        let wrong: [&dyn Fn(&mut PackOptions); 18] = [
            &|o| o.short_side = text("100"),
            &|o| (o.store, o.short_side) = (Some(Store::Source), text("half")),
            &|o| (o.store, o.short_side) = (Some(Store::Source), text("99999999")),
            &|o| o.quality = Some(80),
            &|o| (o.codec, o.quality) = (Some(Codec::Jpeg), Some(0)),
            &|o| (o.codec, o.quality) = (Some(Codec::Jpeg), Some(101)),
            &|o| o.input = None,
            &|o| o.recipe = None,
            &|o| o.recipe = Some("no-such".into()),
            &|o| o.views = Some(0),
            &|o| (o.recipe, o.views) = (Some("eval-center".into()), Some(2)),
            &|o| o.size = Some(0),
            &|o| o.size = Some(5000),
            &|o| (o.size, o.views) = (Some(4096), Some(u32::MAX)),
            &|o| o.shard_samples = Some(0),
            &|o| o.shard_bytes = text("1 parsec"),
            &|o| o.max_rejects = text("many"),
            &|o| o.max_rejects = text("101%"),
        ];
        for (i, change) in wrong.iter().enumerate() {
            assert_eq!(resolve(change).unwrap_err().exit_status(), 2, "case {i}");
        }
    }

    #[test]
    fn sizes_and_shares_are_read() {
        let bytes = |text: &str| parse_bytes(&text.parse().unwrap());
        assert_eq!(bytes("500MB"), Some(500_000_000));
        assert_eq!(bytes("1.5 GiB"), Some(3 << 29));
        assert_eq!(bytes("4096"), Some(4096));
        assert_eq!((bytes("GB"), bytes("0.1b"), bytes("-1MB"), bytes("nanMB")), (None, None, None, None));
        assert_eq!(MaxRejects::Percent(1.0).of(5), 1);
        assert_eq!(MaxRejects::Percent(0.0).of(500), 0);
        assert_eq!(MaxRejects::Count(7).of(5), 7);
    }

    #[test]
    fn flag_of_a_pair_replaces_the_other_key_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        shared::io::write_atomic(&path, b"input = 'a'\nrecipe = 'moco-v2'\nshard-bytes = '2MB'\nmax-rejects = 3\n")
            .unwrap();
        let resolve =
            |options: PackOptions| PackConfig::resolve(&options, Some(&path), &CommonArgs::default()).unwrap();
        let from_file = resolve(PackOptions::default());
        assert_eq!((from_file.shards.shard_samples, from_file.max_rejects), (3, MaxRejects::Count(3)));
        let with_flag = resolve(PackOptions { shard_samples: Some(9), ..PackOptions::default() });
        assert_eq!(with_flag.shards.shard_samples, 9);
    }
}
