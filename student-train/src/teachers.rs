//! The teachers of a run: one embedding set, or an ensemble of several that were made from the same shards.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use shared::data_loader::embedding_batch;
use shared::embedding::EmbeddingSet;
use shared::manifest::Input;
use shared::models::MlpHead;
use shared::ops::{Engine, Mode, Pass, l2_normalise};
use shared::rng::KeyedRng;
use shared::shard::ShardSet;
use shared::{Error, Result};

use crate::config::Ensemble;

/// The role under which a run records its embedding set; a number follows in those of further sets.
pub const EMBEDDINGS_ROLE: &str = "embeddings";

/// Embedding sets of one shard set, and how they become one target.
#[derive(Debug)]
pub struct Teachers {
    sets: Vec<EmbeddingSet>,
    paths: Vec<PathBuf>,
    ensemble: Ensemble,
}

impl Teachers {
    /// Opens the sets and checks each against the shards; none for no paths.
    ///
    /// # Errors
    /// As [`EmbeddingSet::open`]; [`Error::Usage`] when a set is named twice, or their widths differ and must not.
    pub fn open(paths: &[PathBuf], shards: &ShardSet, ensemble: Option<Ensemble>) -> Result<Option<Self>> {
        if paths.is_empty() {
            return Ok(None);
        }
        let sets = paths.iter().map(|path| EmbeddingSet::open(path, shards)).collect::<Result<Vec<_>>>()?;
        let ensemble = ensemble.unwrap_or_default();
        let first = sets.first().map_or(0, EmbeddingSet::embedding_dim);
        for (index, (set, path)) in sets.iter().zip(paths).enumerate() {
            let fingerprint = &set.manifest().fingerprint;
            if sets.iter().take(index).any(|other| other.manifest().fingerprint == *fingerprint) {
                return Err(Error::usage(format!("the embedding set `{}` is given twice", path.display())));
            }
            if ensemble != Ensemble::Concat && set.embedding_dim() != first {
                return Err(Error::usage(format!(
                    "`{}` holds embeddings of width {}, `{}` of width {first}: use `--ensemble concat`",
                    path.display(),
                    set.embedding_dim(),
                    paths[0].display()
                )));
            }
        }
        Ok(Some(Self { sets, paths: paths.to_vec(), ensemble }))
    }

    /// D: the width of a target.
    pub fn embedding_dim(&self) -> usize {
        let widths = self.sets.iter().map(EmbeddingSet::embedding_dim);
        match self.ensemble {
            Ensemble::Concat => widths.sum(),
            Ensemble::Mean | Ensemble::Random => widths.take(1).sum(),
        }
    }

    /// The sets as inputs of a run.
    pub fn as_inputs(&self) -> Vec<Input> {
        let role = |index: usize| match index {
            0 => EMBEDDINGS_ROLE.to_string(),
            _ => format!("{EMBEDDINGS_ROLE}-{}", index + 1),
        };
        let sets = self.sets.iter().zip(&self.paths).enumerate();
        sets.map(|(index, (set, path))| set.manifest().as_input(&role(index), path)).collect()
    }

    /// The teacher's own projection head, for a student that feeds it.
    ///
    /// # Errors
    /// [`Error::Usage`] for several teachers; [`Error::Invalid`] when the set has no head; as [`EmbeddingSet::head`].
    pub fn head(&self) -> Result<MlpHead> {
        let ([set], [path]) = (self.sets.as_slice(), self.paths.as_slice()) else {
            return Err(Error::usage("`--head retro` takes one teacher: give `--embeddings` once"));
        };
        set.head()?.ok_or_else(|| {
            Error::invalid(
                format!(
                    "the embedding set `{}` carries no projection head, which `--head retro` reuses",
                    path.display()
                ),
                "embed again with `teacher-embed embed`, by a teacher that has a head, without `--center` and `--pca`",
            )
        })
    }

    /// The targets of some `(sample, view)` pairs in a step, a function of the seed and the step.
    ///
    /// # Shapes
    /// - returns: `(B, D)` f32, rows of unit length
    ///
    /// # Errors
    /// As [`embedding_batch`].
    pub fn batch(&self, rows: &[(usize, usize)], seed: u64, step: u64) -> Result<Tensor> {
        if let [set] = self.sets.as_slice() {
            return embedding_batch(set, rows);
        }
        if self.ensemble == Ensemble::Random {
            let drawn = KeyedRng::new("teacher", seed, &[step]).below(self.sets.len());
            return embedding_batch(&self.sets[drawn], rows);
        }
        let batches = self.sets.iter().map(|set| embedding_batch(set, rows)).collect::<Result<Vec<_>>>()?;
        combine(&batches, self.ensemble)
    }
}

/// The mean of several embeddings of the same samples, or all of them side by side, at unit length.
///
/// # Shapes
/// - `batches`: `(B, D_i)` f32 each, rows of unit length; equal widths for a mean
/// - returns: `(B, D)` f32, rows of unit length
///
/// # Errors
/// [`Error::Invalid`] without embeddings; [`Error::Tensor`] when their shapes do not fit together.
pub fn combine(batches: &[Tensor], ensemble: Ensemble) -> Result<Tensor> {
    let Some((first, others)) = batches.split_first() else { return Err(Error::invalid("there is no teacher", "")) };
    let joined = if ensemble == Ensemble::Concat {
        Tensor::cat(batches, 1)?
    } else {
        // The length of the sum does not matter.
        others.iter().try_fold(first.clone(), |sum, next| sum + next)?
    };
    l2_normalise(&joined, &Pass { mode: Mode::Eval, record: false, engine: Engine::for_device(&Device::Cpu) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_joins_have_unit_rows() {
        let a = Tensor::new(&[[1f32, 0.0], [0.6, 0.8]], &Device::Cpu).unwrap();
        let b = Tensor::new(&[[0f32, 1.0], [0.6, 0.8]], &Device::Cpu).unwrap();
        let half = 0.5f32.sqrt();
        let near = |found: Tensor, expected: &[&[f32]]| {
            for (found, expected) in found.to_vec2::<f32>().unwrap().iter().zip(expected) {
                assert_eq!(found.len(), expected.len());
                assert!(found.iter().zip(*expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
            }
        };
        let both = [a, b];
        near(combine(&both, Ensemble::Mean).unwrap(), &[&[half, half], &[0.6, 0.8]]);
        let joined: [&[f32]; 2] = [&[half, 0.0, 0.0, half], &[0.6 * half, 0.8 * half, 0.6 * half, 0.8 * half]];
        near(combine(&both, Ensemble::Concat).unwrap(), &joined);
    }
}
