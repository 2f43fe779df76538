//! Embedding with a projection, in two passes: the teacher's outputs of every view go to working files, the projection is
//! fitted to all of them, and each shard's embeddings are made from its working file, which is then removed.
//!
//! Every file appears whole, and each is a function of those before it, so a run that was killed goes on with the first file
//! that is not there. The projection decides: embeddings beside it were made with it, without it none count.

use std::fs;
use std::path::Path;

use rayon::prelude::*;
use shared::embedding::{PROJECTION_FILE, Projection, embedding_file_name, open_file};
use shared::io::hash_file;
use shared::progress::{Progress, note};
use shared::tensor_file::TensorFile;
use shared::{Error, Result};

use crate::projection::fit;
use crate::rows::{Job, Written, output_file_name, rows_of};

/// A direction with less than this part of the largest variance holds rounding only.
const NO_VARIANCE: f64 = 1e-12;

/// Writes every file that is not there yet.
pub(crate) fn write_projected(job: &Job<'_>, directory: &Path, resuming: bool) -> Result<Written> {
    let path = directory.join(PROJECTION_FILE);
    let known =
        (resuming && path.exists()).then(|| Projection::open(&path).ok().filter(|known| fits(known, job))).flatten();
    let shards = job.shards.shards().len();
    let embedded = |index| directory.join(embedding_file_name(index));
    let finished: Vec<bool> =
        (0..shards).map(|index| known.is_some() && job.is_complete(index, &embedded(index), &job.details)).collect();

    let resumed = compute_outputs(job, directory, resuming, &finished)?;
    let projection = if let Some(known) = known {
        known
    } else {
        let fitted = fit_outputs(job, directory)?;
        fitted.write(&path)?;
        fitted
    };
    note_idle_directions(job, &projection);
    let progress = Progress::new("projecting", "images", job.images(), job.config.quiet);
    let mut files = vec![hash_file(&path)?];
    for (index, finished) in finished.iter().enumerate() {
        let outputs = directory.join(output_file_name(index));
        if *finished {
            files.push(hash_file(embedded(index))?);
        } else {
            let file = open_outputs(job, directory, index)?;
            let rows = file.view::<f32>("embeddings")?;
            let (first, width) = (job.first_sample(index), job.outputs.embedding_dim);
            let compute = |pairs: &[(usize, usize)]| {
                let (sample, view) = pairs[0];
                let start = ((sample - first) * job.views() + view) * width;
                project(&projection, &rows[start..start + pairs.len() * width], pairs)
            };
            files.push(job.write_shard(index, &embedded(index), &job.details, &progress, compute)?);
        }
        // After the embeddings are safely there; a run that was killed in between left it.
        remove_if_there(&outputs)?;
        progress.start_at(((job.first_sample(index) + job.shards.shards()[index].len()) * job.views()) as u64);
    }
    progress.finish();
    Ok(Written { files, resumed })
}

/// Embeddings of outputs `(n, F)` of the given `(sample, view)` pairs.
///
/// # Errors
/// [`Error::Invalid`] when one has no direction.
pub(crate) fn project(projection: &Projection, outputs: &[f32], pairs: &[(usize, usize)]) -> Result<Vec<f32>> {
    let rows: Vec<Option<Vec<f32>>> =
        outputs.par_chunks_exact(projection.feature_width()).map(|row| projection.embedding(row)).collect();
    let mut values = Vec::with_capacity(rows.len() * projection.embedding_dim());
    for (row, (sample, view)) in rows.into_iter().zip(pairs) {
        let Some(row) = row else {
            let what =
                if projection.reduction.is_some() { "in the directions that `--pca` keeps" } else { "of all views" };
            return Err(Error::invalid(
                format!(
                    "the teacher's output of sample {sample}, view {view} equals the mean {what}: it has no direction"
                ),
                "embed without `--center` and `--pca`, and check the checkpoint: its outputs hardly vary",
            ));
        };
        values.extend(row);
    }
    Ok(values)
}

fn fits(projection: &Projection, job: &Job<'_>) -> bool {
    projection.feature_width() == job.outputs.embedding_dim
        && projection.embedding_dim() == job.details.embedding_dim
        && projection.reduction.is_some() == job.config.components().is_some()
}

/// Runs the teacher for every shard that has neither embeddings nor outputs; returns how many had.
fn compute_outputs(job: &Job<'_>, directory: &Path, resuming: bool, finished: &[bool]) -> Result<usize> {
    let progress = Progress::new("embedding", "images", job.images(), job.config.quiet);
    let mut resumed = 0;
    for (index, finished) in finished.iter().enumerate() {
        let path = directory.join(output_file_name(index));
        if *finished || (resuming && job.is_complete(index, &path, &job.outputs)) {
            resumed += 1;
            progress.start_at(((job.first_sample(index) + job.shards.shards()[index].len()) * job.views()) as u64);
        } else {
            let compute =
                |rows: &[(usize, usize)]| rows_of(job.shards, rows, job.normalization, |xs| job.teacher.outputs(xs));
            job.write_shard(index, &path, &job.outputs, &progress, compute)?;
        }
    }
    progress.finish();
    Ok(resumed)
}

fn fit_outputs(job: &Job<'_>, directory: &Path) -> Result<Projection> {
    let files =
        (0..job.shards.shards().len()).map(|index| open_outputs(job, directory, index)).collect::<Result<Vec<_>>>()?;
    let parts = files.iter().map(|file| file.view::<f32>("embeddings")).collect::<Result<Vec<_>>>()?;
    let passes = if job.config.components().is_some() { 2 } else { 1 };
    let progress = Progress::new("fitting", "rows", passes * job.images(), job.config.quiet);
    progress.message(if passes == 2 { "the components follow after the last row" } else { "" });
    let projection = fit(&parts, job.outputs.embedding_dim, job.config.components(), &|rows| progress.inc(rows))?;
    progress.finish();
    Ok(projection)
}

fn open_outputs(job: &Job<'_>, directory: &Path, index: usize) -> Result<TensorFile> {
    open_file(&directory.join(output_file_name(index)), &job.outputs, job.shards.shards()[index].sample_ids())
}

/// Says when `--pca` keeps directions that hold rounding only.
fn note_idle_directions(job: &Job<'_>, projection: &Projection) {
    let Some(reduction) = projection.reduction.as_ref().filter(|_| !job.config.quiet) else { return };
    let largest = reduction.variances.first().copied().unwrap_or(0.0);
    let used = reduction.variances.iter().filter(|variance| **variance > NO_VARIANCE * largest).count();
    if used < reduction.variances.len() {
        note(&format!("the outputs vary in {used} directions only: `--pca {used}` keeps as much as a larger one"));
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    if path.exists() { fs::remove_file(path).map_err(Error::io("remove", path)) } else { Ok(()) }
}
