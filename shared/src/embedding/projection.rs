//! The projection of an embedding set: what is taken off a teacher's outputs, and which directions of them are kept,
//! before they are scaled to unit length.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::Dtype;

use crate::error::{Error, Fault, Result};
use crate::io::FileEntry;
use crate::tensor_file::{TensorFile, TensorFileWriter, TensorSpec};

/// File name of an embedding set's projection.
pub const PROJECTION_FILE: &str = "projection.safetensors";

/// A projected row shorter than this part of its output is what rounding left over: it has no direction.
const SHORTEST: f64 = 1e-6;

/// `x` to `(x - mean)`, or to `(x - mean) @ components^T`, then to unit length.
///
/// # Examples
/// ```
/// use shared::embedding::Projection;
///
/// let centring = Projection { mean: vec![1.0, 1.0], reduction: None };
/// assert_eq!(centring.embedding(&[4.0, 5.0]), Some(vec![0.6, 0.8]));
/// assert_eq!(centring.embedding(&[1.0, 1.0]), None);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    /// Mean of the outputs: `(F,)`.
    pub mean: Vec<f32>,
    /// The directions that are kept; none keeps all, unturned.
    pub reduction: Option<Reduction>,
}

/// Principal components.
#[derive(Debug, Clone, PartialEq)]
pub struct Reduction {
    /// `(D, F)`, flattened: orthonormal rows, the direction of the largest variance first.
    pub components: Vec<f32>,
    /// Variance of the outputs along each component: `(D,)`, not increasing.
    pub variances: Vec<f64>,
    /// Variance of the outputs along all F directions together.
    pub total_variance: f64,
}

impl Reduction {
    /// The part of the variance that the components keep, between 0 and 1; 1 where there is no variance.
    pub fn kept(&self) -> f64 {
        let kept: f64 = self.variances.iter().sum();
        if self.total_variance > 0.0 { (kept / self.total_variance).min(1.0) } else { 1.0 }
    }
}

impl Projection {
    /// F: width of the outputs that it takes.
    pub fn feature_width(&self) -> usize {
        self.mean.len()
    }

    /// D: width of the embeddings that it gives.
    pub fn embedding_dim(&self) -> usize {
        self.reduction.as_ref().map_or(self.mean.len(), |reduction| reduction.variances.len())
    }

    /// The embedding of one output, computed in f64; none when nothing of the output is left but rounding, so that there is no
    /// direction.
    ///
    /// The sums have one order, whatever the machine: equal outputs give equal bits.
    ///
    /// # Shapes
    /// - `output`: `(F,)`
    /// - returns: `(D,)`, of unit length
    ///
    /// # Panics
    /// When `output` is not F long.
    pub fn embedding(&self, output: &[f32]) -> Option<Vec<f32>> {
        assert_eq!(output.len(), self.mean.len(), "an output is as wide as the mean");
        let centred: Vec<f64> =
            output.iter().zip(&self.mean).map(|(x, mean)| f64::from(*x) - f64::from(*mean)).collect();
        let row = match &self.reduction {
            None => centred,
            Some(reduction) => {
                let width = self.mean.len().max(1);
                reduction.components.chunks_exact(width).map(|component| dot(component, &centred)).collect()
            }
        };
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        let original = output.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
        // Not `<=`: a row that is not finite has no direction either.
        let sound = length.is_finite() && length > SHORTEST * original;
        sound.then(|| row.iter().map(|x| (x / length) as f32).collect())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Shape`] when the parts do not fit together.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<FileEntry> {
        let (width, dim) = (self.feature_width(), self.embedding_dim());
        let mut specs = Vec::new();
        if let Some(reduction) = &self.reduction {
            if reduction.components.len() != dim * width {
                let got = format!("{} elements", reduction.components.len());
                let expected = format!("[D, F] = [{dim}, {width}]");
                return Err(Error::Shape { op: "writing a projection", expected, got });
            }
            specs.push(TensorSpec::new("variances", Dtype::F64, &[dim]));
            specs.push(TensorSpec::new("total_variance", Dtype::F64, &[1]));
        }
        specs.push(TensorSpec::new("mean", Dtype::F32, &[width]));
        if self.reduction.is_some() {
            specs.push(TensorSpec::new("components", Dtype::F32, &[dim, width]));
        }
        let last = specs.len() - 1;
        let mut writer = TensorFileWriter::create(path, specs, last, &BTreeMap::new())?;
        if let Some(reduction) = &self.reduction {
            writer.append(&reduction.variances)?;
            writer.append(&[reduction.total_variance])?;
        }
        writer.append(&self.mean)?;
        if let Some(reduction) = &self.reduction {
            writer.append(&reduction.components)?;
        }
        writer.finish()
    }

    /// Reads the file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when a tensor is missing, of another type or shape, or not finite.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let (width, mean) = vector(&file, "mean", "[F]")?;
        let reduction = if file.names().iter().any(|name| name == "components") {
            let dim = file.shape("components")?.first().copied().unwrap_or(0);
            file.expect_shape("components", &[dim, width], "[D, F]")?;
            file.expect_shape("variances", &[dim], "[D]")?;
            file.expect_shape("total_variance", &[1], "[1]")?;
            let components = finite(&file, "components")?;
            let variances = file.read::<f64>("variances")?.into_owned();
            let total_variance = file.read::<f64>("total_variance")?.first().copied().unwrap_or(0.0);
            if dim == 0 || !total_variance.is_finite() || !variances.iter().all(|x| x.is_finite()) {
                return Err(file.fault(Fault::Value("its variances are none or not finite".into())));
            }
            Some(Reduction { components, variances, total_variance })
        } else {
            None
        };
        Ok(Self { mean, reduction })
    }
}

fn vector(file: &TensorFile, name: &str, letters: &str) -> Result<(usize, Vec<f32>)> {
    let width = file.shape(name)?.first().copied().unwrap_or(0);
    file.expect_shape(name, &[width], letters)?;
    Ok((width, finite(file, name)?))
}

fn finite(file: &TensorFile, name: &str) -> Result<Vec<f32>> {
    let values = file.read::<f32>(name)?.into_owned();
    if values.is_empty() || !values.iter().all(|x| x.is_finite()) {
        return Err(file.fault(Fault::Value(format!("tensor `{name}` is empty or not finite"))));
    }
    Ok(values)
}

/// A product of rows, summed in eight lanes and then over the lanes.
fn dot(a: &[f32], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| f64::from(*a) * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Projection {
        let components = vec![0.6, 0.8, 0.0, 0.0, 0.0, 1.0];
        let reduction = Reduction { components, variances: vec![3.0, 1.0], total_variance: 5.0 };
        Projection { mean: vec![1.0, 2.0, 3.0], reduction: Some(reduction) }
    }

    #[test]
    fn rows_are_centred_turned_and_scaled() {
        let projection = example();
        assert_eq!((projection.feature_width(), projection.embedding_dim()), (3, 2));
        // (6, 8, 0) away from the mean is 10 along the first component, (0, 0, 7) is 7 along the second.
        assert_eq!(projection.embedding(&[7.0, 10.0, 3.0]), Some(vec![1.0, 0.0]));
        assert_eq!(projection.embedding(&[1.0, 2.0, 10.0]), Some(vec![0.0, 1.0]));
        assert_eq!(projection.reduction.unwrap().kept(), 0.8);
    }

    #[test]
    fn rows_without_a_direction_give_none() {
        let projection = example();
        // The mean itself, a row away from it in a direction that is not kept, rows that are not finite.
        for row in [[1.0, 2.0, 3.0], [1.8, 1.4, 3.0], [f32::NAN, 0.0, 0.0], [f32::INFINITY, 0.0, 0.0]] {
            assert_eq!(projection.embedding(&row), None, "{row:?}");
        }
    }

    #[test]
    fn long_rows_are_summed_whole() {
        for width in [7, 8, 9, 16, 23] {
            let components: Vec<f32> = (0..width).map(|i| (i % 5) as f32 - 1.0).collect();
            let row: Vec<f64> = (0..width).map(|i| (i % 7) as f64 - 2.0).collect();
            let expected: f64 = (0..width).map(|i| ((i % 5) as f64 - 1.0) * ((i % 7) as f64 - 2.0)).sum();
            assert_eq!(dot(&components, &row), expected, "{width}");
        }
    }

    #[test]
    fn round_trip_with_and_without_components() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(PROJECTION_FILE);
        for projection in [example(), Projection { reduction: None, ..example() }] {
            projection.write(&path).unwrap();
            assert_eq!(Projection::open(&path).unwrap(), projection);
        }
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(PROJECTION_FILE);
        let mut wrong = example();
        wrong.mean.push(0.0);
        assert!(matches!(wrong.write(&path), Err(Error::Shape { .. })));
        for (name, shape) in [("middle", vec![3]), ("mean", vec![3, 1]), ("mean", vec![0])] {
            let count = shape.iter().product();
            let spec = TensorSpec::new(name, Dtype::F32, &shape);
            let mut writer = TensorFileWriter::create(&path, vec![spec], 0, &BTreeMap::new()).unwrap();
            writer.append(&vec![0f32; count]).unwrap();
            writer.finish().unwrap();
            let error = Projection::open(&path).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }) && error.to_string().contains("mean"), "{error}");
        }
        let mut reduction = example().reduction.unwrap();
        reduction.components[3] = f32::NAN;
        Projection { reduction: Some(reduction), ..example() }.write(&path).unwrap();
        assert!(Projection::open(&path).unwrap_err().to_string().contains("`components` is empty or not finite"));
    }
}
