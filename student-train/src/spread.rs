//! How far embeddings spread over the sphere, and a warning when they have collapsed to a point.

use std::cell::{Cell, RefCell};

use candle_core::{DType, Tensor};
use shared::Result;

/// A spread below this is taken for a collapse: the mean cosine of two samples is 0.99 then.
const COLLAPSED_SPREAD: f32 = 0.1;
/// A mean cosine of keys and queue above this is taken for a collapse: every negative is a positive.
const COLLAPSED_SIMILARITY: f32 = 0.95;
/// Steps before anything is called a collapse: drawn weights give similar embeddings to all images.
const FIRST_STEPS: u64 = 100;
/// Epochs between warnings.
const WARNING_EPOCHS: u64 = 10;

/// What is seen of the embeddings of a step that is looked at.
#[derive(Debug, Default)]
pub struct Observed {
    on: Cell<bool>,
    /// The student's of every view and piece, `(B, D)`.
    embeddings: RefCell<Vec<Tensor>>,
    queue_similarity: Cell<Option<f32>>,
}

/// How the embeddings of a step are spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Mean over the D entries of their standard deviation in the batch, times sqrt(D): 1 is evenly spread, 0 a single point.
    ///
    /// # Source
    /// `SimSiam`, arXiv 2011.10566, section 4.1: the deviation per channel, close to 1 / sqrt(D) when outputs do not collapse.
    pub embeddings: f32,
    /// Mean cosine of the step's keys with the queue of negatives, if the method has one.
    pub queue_similarity: Option<f32>,
}

impl Observed {
    /// Looks at the next step, or not; forgets what was seen.
    pub fn look(&self, on: bool) {
        self.on.set(on);
        self.embeddings.borrow_mut().clear();
        self.queue_similarity.set(None);
    }

    /// Takes note of the student's embeddings, unit rows.
    ///
    /// # Shapes
    /// - `embeddings`: `(B, D)` f32
    pub fn embeddings(&self, embeddings: &Tensor) {
        if self.on.get() {
            self.embeddings.borrow_mut().push(embeddings.detach());
        }
    }

    /// Takes note of the keys of a step before they enter the queue.
    ///
    /// # Shapes
    /// - `keys`: `(B, D)`, `queue`: `(K, D)`; f32, unit rows
    ///
    /// # Errors
    /// [`shared::Error::Tensor`] when the shapes do not fit together.
    pub fn keys(&self, keys: &Tensor, queue: &Tensor) -> Result<()> {
        if self.on.get() {
            // The mean of all products is the product of the means.
            let similarity = (keys.mean(0)? * queue.mean(0)?)?.sum_all()?;
            self.queue_similarity.set(Some(similarity.to_dtype(DType::F32)?.to_scalar()?));
        }
        Ok(())
    }

    /// What was seen of the last step; none when it was not looked at.
    ///
    /// # Errors
    /// [`shared::Error::Tensor`] when pieces have different widths.
    pub fn spread(&self) -> Result<Option<Spread>> {
        let embeddings = std::mem::take(&mut *self.embeddings.borrow_mut());
        if embeddings.is_empty() {
            return Ok(None);
        }
        let rows = Tensor::cat(&embeddings, 0)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        Ok(Some(Spread { embeddings: spread(&rows), queue_similarity: self.queue_similarity.get() }))
    }
}

fn spread(rows: &[Vec<f32>]) -> f32 {
    let width = rows.first().map_or(0, Vec::len);
    let deviation = |entry: usize| {
        let values = || rows.iter().map(|row| f64::from(row[entry]));
        let mean = values().sum::<f64>() / rows.len() as f64;
        (values().map(|value| (value - mean).powi(2)).sum::<f64>() / rows.len() as f64).sqrt()
    };
    let mean = (0..width).map(deviation).sum::<f64>() / (width as f64).max(1.0);
    (mean * (width as f64).sqrt()) as f32
}

/// Remembers when it has warned.
#[derive(Debug, Default)]
pub struct CollapseWatch {
    warned: Option<u64>,
}

impl CollapseWatch {
    /// A sentence when the embeddings have collapsed, not more often than every few epochs.
    pub fn warning(&mut self, epoch: u64, step: u64, spread: Spread) -> Option<String> {
        let Spread { embeddings, queue_similarity } = spread;
        let alike = queue_similarity.filter(|&similarity| similarity > COLLAPSED_SIMILARITY);
        let recently = self.warned.is_some_and(|warned| epoch < warned + WARNING_EPOCHS);
        if step < FIRST_STEPS || recently || (embeddings >= COLLAPSED_SPREAD && alike.is_none()) {
            return None;
        }
        self.warned = Some(epoch);
        let what = match alike {
            Some(similarity) => format!("keys and queue have a mean cosine of {similarity:.3}"),
            None => format!("the spread of the embeddings is {embeddings:.3}, where 1 is even and 0 a single point"),
        };
        Some(format!(
            "warning: the student seems to collapse in step {step}: {what}; consider a lower `--lr`, or start again"
        ))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn tensor<const N: usize>(rows: &[[f32; 2]; N]) -> Tensor {
        Tensor::new(rows, &Device::Cpu).unwrap()
    }

    #[test]
    fn even_rows_spread_by_1_and_equal_rows_by_0() {
        let observed = Observed::default();
        observed.look(true);
        observed.embeddings(&tensor(&[[1.0, 0.0], [-1.0, 0.0]]));
        observed.embeddings(&tensor(&[[0.0, 1.0], [0.0, -1.0]]));
        observed.keys(&tensor(&[[1.0, 0.0], [0.0, 1.0]]), &tensor(&[[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])).unwrap();
        let spread = observed.spread().unwrap().unwrap();
        assert!((spread.embeddings - 1.0).abs() < 1e-6, "{spread:?}");
        // (1 + 0 + 1 + 0 + 0.6 + 0.8) / 6
        assert!((spread.queue_similarity.unwrap() - 3.4 / 6.0).abs() < 1e-6, "{spread:?}");
        observed.look(true);
        observed.embeddings(&tensor(&[[0.6, 0.8]; 3]));
        let spread = observed.spread().unwrap().unwrap();
        assert!(spread.embeddings < 1e-6 && spread.queue_similarity.is_none(), "{spread:?}");
        observed.look(false);
        observed.embeddings(&tensor(&[[0.6, 0.8]]));
        assert_eq!(observed.spread().unwrap(), None);
    }

    #[test]
    fn a_collapse_is_told_now_and_then() {
        let mut watch = CollapseWatch::default();
        let healthy = Spread { embeddings: 0.9, queue_similarity: Some(0.1) };
        let collapsed = Spread { embeddings: 0.05, ..healthy };
        assert_eq!(watch.warning(0, 99, collapsed), None);
        assert_eq!(watch.warning(0, 100, healthy), None);
        let warning = watch.warning(1, 200, collapsed).unwrap();
        assert!(warning.contains("step 200") && warning.contains("0.050"), "{warning}");
        assert_eq!(watch.warning(10, 300, collapsed), None);
        let alike = Spread { queue_similarity: Some(0.99), ..healthy };
        assert!(watch.warning(11, 400, alike).unwrap().contains("cosine of 0.990"));
    }
}
