//! Batches: views gathered from the shards, and the teacher's embeddings of the same views.

use std::cell::RefCell;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::embedding::EmbeddingSet;
use crate::error::Result;
use crate::shard::{ShardSet, ViewReader};
use crate::transforms::View;
use crate::transforms::normalize::Normalization;

thread_local! {
    /// What a thread needs to make views; kept, because its memory grows to the largest image.
    static READER: RefCell<ViewReader> = RefCell::default();
}

/// Gathers global views as one normalised batch: see [`normalized_views`].
///
/// # Errors
/// As [`normalized_views`].
///
/// # Panics
/// When an index or a view is out of range.
pub fn normalized_batch(shards: &ShardSet, rows: &[(usize, usize)], normalization: Normalization) -> Result<Tensor> {
    let rows: Vec<(usize, View)> = rows.iter().map(|&(index, view)| (index, View::Global(view))).collect();
    normalized_views(shards, &rows, normalization)
}

/// Gathers views of one size as one normalised batch.
///
/// Views that are decoded or redrawn are made by the threads of the current pool, a few views of consecutive rows at a time. Plain
/// views are copied by the calling thread.
///
/// # Shapes
/// - `rows`: `B` pairs of a sample's index and a view, all global or all local
/// - returns: `(B, H, W, 3)` or `(B, h, w, 3)` f32, normalised as the network expects them
///
/// # Errors
/// As [`ViewReader::read`]; [`crate::Error::Tensor`] when the memory cannot become a tensor.
///
/// # Panics
/// When an index or a view is out of range.
pub fn normalized_views(shards: &ShardSet, rows: &[(usize, View)], normalization: Normalization) -> Result<Tensor> {
    let (height, width) = shards.view_size(rows.first().map_or(View::Global(0), |row| row.1));
    let length = (height * width * 3).max(1);
    let mut values = vec![0f32; rows.len() * height * width * 3];
    if shards.makes_views() {
        // Views of one sample stay together, so that its image is decoded once.
        let run = rows.len().div_ceil(RUNS_PER_THREAD * rayon::current_num_threads()).max(1);
        let run = run.next_multiple_of(rows.iter().take_while(|row| row.0 == rows[0].0).count().max(1));
        values.par_chunks_mut(length * run).zip(rows.par_chunks(run)).try_for_each(|(values, rows)| {
            READER.with_borrow_mut(|reader| write_rows(reader, shards, rows, normalization, values))
        })?;
    } else {
        write_rows(&mut ViewReader::default(), shards, rows, normalization, &mut values)?;
    }
    Ok(Tensor::from_vec(values, (rows.len(), height, width, 3), &Device::Cpu)?)
}

/// Pieces of work for each thread: images take different times.
const RUNS_PER_THREAD: usize = 4;

fn write_rows(
    reader: &mut ViewReader,
    shards: &ShardSet,
    rows: &[(usize, View)],
    normalization: Normalization,
    values: &mut [f32],
) -> Result<()> {
    let length = (values.len() / rows.len().max(1)).max(1);
    for (&(index, view), row) in rows.iter().zip(values.chunks_exact_mut(length)) {
        normalization.write(reader.read(shards, index, view)?, row);
    }
    Ok(())
}

/// Gathers the teacher's embeddings of the same views.
///
/// # Shapes
/// - `rows`: `B` pairs of a sample's index and a view
/// - returns: `(B, D)` f32, as stored
///
/// # Errors
/// As [`EmbeddingSet::read`], and [`crate::Error::Tensor`].
///
/// # Panics
/// When an index or a view is out of range.
pub fn embedding_batch(embeddings: &EmbeddingSet, rows: &[(usize, usize)]) -> Result<Tensor> {
    let width = embeddings.embedding_dim();
    let mut values = vec![0f32; rows.len() * width];
    for (&(index, view), row) in rows.iter().zip(values.chunks_exact_mut(width)) {
        embeddings.read(index, view, row)?;
    }
    Ok(Tensor::from_vec(values, (rows.len(), width), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::manifest::{Identity, Manifest, Stage};
    use crate::shard::{ShardSetDetails, ShardWriter, VIEW_PARAMETERS, shard_file_name};

    #[test]
    fn rows_come_in_the_order_asked_across_shards() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Vec::new();
        for shard in 0..2u8 {
            let mut writer = ShardWriter::create(dir.path().join(shard_file_name(shard.into())), 1, 2, 1, 1).unwrap();
            let pixels: [u8; 6] = std::array::from_fn(|i| 10 * shard + i as u8);
            writer.push(shard.into(), -1, &pixels, &[0.0; 2 * VIEW_PARAMETERS.len()]).unwrap();
            files.push(writer.finish().unwrap());
        }
        let details = ShardSetDetails { views: 2, height: 1, width: 1, ..ShardSetDetails::default() };
        let identity = Identity::new(Stage::DataPrep, &serde_json::json!({}), 0, Vec::new()).unwrap();
        let counts = BTreeMap::from([("samples".to_string(), 2)]);
        Manifest::new(identity, counts, serde_json::json!(details), files).write(dir.path()).unwrap();
        let shards = ShardSet::open(dir.path()).unwrap();
        let bytes = [10, 11, 12, 3, 4, 5];
        for normalization in [Normalization::Imagenet, Normalization::Inception] {
            let batch = normalized_batch(&shards, &[(1, 0), (0, 1)], normalization).unwrap();
            assert_eq!(batch.dims(), [2, 1, 1, 3]);
            let (mean, std) = (normalization.mean(), normalization.std());
            let expected = |byte: u8, c: usize| (f32::from(byte) / 255.0 - mean[c]) / std[c];
            let values = batch.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected: Vec<f32> = bytes.iter().enumerate().map(|(i, &byte)| expected(byte, i % 3)).collect();
            assert_eq!(values, expected);
        }
    }
}
