//! Batches: views gathered from the shards, and the teacher's embeddings of the same views.

use candle_core::{Device, Tensor};

use crate::embedding::EmbeddingSet;
use crate::error::Result;
use crate::shard::ShardSet;
use crate::transforms::normalize::Normalization;

/// Gathers views as one normalised batch.
///
/// # Shapes
/// - `rows`: `B` pairs of a sample's index and a view
/// - returns: `(B, H, W, 3)` f32, normalised as the network expects them
///
/// # Errors
/// [`crate::Error::Tensor`] when the memory cannot become a tensor.
///
/// # Panics
/// When an index or a view is out of range.
pub fn normalized_batch(shards: &ShardSet, rows: &[(usize, usize)], normalization: Normalization) -> Result<Tensor> {
    let (height, width) = (shards.height(), shards.width());
    let mut values = vec![0f32; rows.len() * height * width * 3];
    for (&(index, view), row) in rows.iter().zip(values.chunks_exact_mut((height * width * 3).max(1))) {
        normalization.write(shards.pixels(index, view)?, row);
    }
    Ok(Tensor::from_vec(values, (rows.len(), height, width, 3), &Device::Cpu)?)
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
