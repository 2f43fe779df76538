//! Running a backbone over a shard set, shard by shard, so that an interrupted extraction loses one shard's work at most.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use shared::cli::note_cpu;
use shared::data_loader::normalized_batch;
use shared::feature_rows::EXTRACTION_BATCH;
use shared::io::{FileEntry, hash_file};
use shared::manifest::{Identity, Input, Stage};
use shared::matrix;
use shared::models::Encoder;
use shared::ops::Mode;
use shared::output::{Begun, OutputDir};
use shared::progress::{Progress, note};
use shared::shard::ShardSet;
use shared::tensor_file::{TensorFileWriter, TensorSpec};
use shared::transforms::normalize::Normalization;
use shared::{Error, Result};

use super::{
    FeatureSet, FeatureSetDetails, PIXEL_NORMALIZATION_KEY, SHARDS_ROLE, details_of, feature_file_name, is_complete,
};

/// Something that turns images into features.
pub trait Extractor {
    /// The architecture's name.
    fn arch(&self) -> String;

    /// F: width of a feature.
    fn feature_width(&self) -> usize;

    /// Features of a batch.
    ///
    /// # Shapes
    /// - `xs`: `(B, H, W, 3)` f32, normalised
    /// - returns: `(B, F)` f32
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn features(&self, xs: &Tensor) -> Result<Tensor>;
}

impl Extractor for Encoder {
    fn arch(&self) -> String {
        Self::arch(self).name().into()
    }

    fn feature_width(&self) -> usize {
        Self::arch(self).feature_width()
    }

    fn features(&self, xs: &Tensor) -> Result<Tensor> {
        Self::features(self, xs, Mode::Eval)
    }
}

/// Extracts the features of `shards` into `directory`, or finds them there.
///
/// `weights` is the input under which the extractor's weights are recorded, `normalization` how pixels become its input.
///
/// # Errors
/// As [`OutputDir::begin`]; [`Error::Invalid`] for an empty shard set or features that are not finite; [`Error::Io`].
pub fn extract(
    extractor: &impl Extractor,
    weights: Input,
    normalization: Normalization,
    shards: &ShardSet,
    directory: &Path,
    (overwrite, quiet): (bool, bool),
) -> Result<FeatureSet> {
    if shards.is_empty() {
        return Err(Error::invalid(format!("shard set `{}` holds no samples", shards.directory().display()), ""));
    }
    let details = details_of(shards, &extractor.arch(), extractor.feature_width());
    let inputs = vec![shards.manifest().as_input(SHARDS_ROLE, shards.directory()), weights];
    let named = (normalization != Normalization::default()).then_some(normalization);
    let config = serde_json::json!({ "arch": details.arch, PIXEL_NORMALIZATION_KEY: named });
    let identity = Identity::new(Stage::StudentEval, &config, 0, inputs)?;
    let output = match OutputDir::begin(directory, &identity, overwrite)? {
        Begun::Finished(_) => {
            if !quiet {
                note(&format!("features in `{}` are up to date", directory.display()));
            }
            return FeatureSet::open(directory);
        }
        Begun::Writing(output) => output,
    };
    if !quiet {
        note_cpu();
    }
    let images = (shards.len() * shards.views()) as u64;
    let progress = Progress::new("features", "images", images, quiet);
    let mut files = Vec::new();
    for index in 0..shards.shards().len() {
        let path = output.path().join(feature_file_name(index));
        let shard = &shards.shards()[index];
        if output.resumed() && is_complete(&path, &details, shard) {
            files.push(hash_file(&path)?);
            progress.start_at((files_end(shards, index) * shards.views()) as u64);
        } else {
            files.push(extract_shard(extractor, normalization, shards, index, &details, &path, &progress)?);
        }
    }
    progress.finish();
    let counts = BTreeMap::from([
        ("samples".to_string(), shards.len() as u64),
        ("views".to_string(), shards.views() as u64),
        ("shards".to_string(), files.len() as u64),
    ]);
    let details = serde_json::to_value(&details).map_err(|e| Error::invalid(format!("no JSON form: {e}"), ""))?;
    output.finish(counts, details, files)?;
    FeatureSet::open(directory)
}

/// The index behind the last sample of a shard.
fn files_end(shards: &ShardSet, index: usize) -> usize {
    shards.shards()[..=index].iter().map(shared::shard::Shard::len).sum()
}

fn extract_shard(
    extractor: &impl Extractor,
    normalization: Normalization,
    shards: &ShardSet,
    index: usize,
    details: &FeatureSetDetails,
    path: &Path,
    progress: &Progress,
) -> Result<FileEntry> {
    let shard = &shards.shards()[index];
    let (samples, views, width) = (shard.len(), details.views, details.feature_width);
    let specs = vec![
        TensorSpec::new("sample_ids", safetensors::Dtype::U64, &[samples]),
        TensorSpec::new("labels", safetensors::Dtype::I64, &[samples]),
        TensorSpec::new("features", safetensors::Dtype::F32, &[samples, views, width]),
    ];
    let mut writer = TensorFileWriter::create(path, specs, 2, &BTreeMap::new())?;
    writer.append(shard.sample_ids())?;
    writer.append(shard.labels())?;
    let first = files_end(shards, index) - samples;
    let images: Vec<(usize, usize)> =
        (first..first + samples).flat_map(|sample| (0..views).map(move |view| (sample, view))).collect();
    let mut ahead = images.chunks(EXTRACTION_BATCH).skip(1);
    for images in images.chunks(EXTRACTION_BATCH) {
        if let Some(next) = ahead.next() {
            shards.will_need(next)?;
        }
        let features = extractor.features(&normalized_batch(shards, images, normalization)?)?;
        if features.dims() != [images.len(), width] {
            return Err(Error::Shape {
                op: "features",
                expected: format!("({}, {width})", images.len()),
                got: format!("{:?}", features.dims()),
            });
        }
        matrix::with_slice(&features.contiguous()?, |values| -> Result<()> {
            if let Some(bad) = values.iter().position(|x| !x.is_finite()) {
                let (sample, view) = images[bad / width];
                return Err(Error::invalid(
                    format!("the features of sample {sample}, view {view} are not finite"),
                    "the student has diverged: train it again with a smaller `--lr`",
                ));
            }
            writer.append(values)
        })??;
        progress.inc(images.len() as u64);
    }
    writer.finish()
}
