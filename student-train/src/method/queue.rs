//! The queue of negatives: the keys of past steps, the oldest replaced first.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use shared::rng::KeyedRng;
use shared::{Error, Result};

/// A ring of K unit rows.
#[derive(Debug)]
pub struct Queue {
    /// `(K, D)`, contiguous, changed in place.
    keys: Tensor,
    /// Where the next key goes.
    pointer: usize,
}

impl Queue {
    /// A queue of random unit rows, a function of the seed.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the memory cannot become a tensor.
    pub fn random(size: usize, width: usize, seed: u64) -> Result<Self> {
        let mut values = vec![0f32; size * width];
        values.par_chunks_exact_mut(width).enumerate().for_each(|(index, row)| {
            let mut rng = KeyedRng::new("queue", seed, &[index as u64]);
            let normals: Vec<f64> = (0..width).map(|_| rng.normal()).collect();
            let norm = normals.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
            for (value, normal) in row.iter_mut().zip(normals) {
                *value = (normal / norm) as f32;
            }
        });
        Self::from_keys(Tensor::from_vec(values, (size, width), &Device::Cpu)?, 0)
    }

    /// A queue that goes on from a checkpoint.
    ///
    /// # Shapes
    /// - `keys`: `(K, D)` f32, unit rows
    ///
    /// # Errors
    /// [`Error::Invalid`] when the pointer is outside; [`Error::Shape`] when `keys` is not of rank 2.
    pub fn from_keys(keys: Tensor, pointer: usize) -> Result<Self> {
        let &[size, _] = keys.dims() else {
            return Err(Error::Shape { op: "queue", expected: "(K, D)".into(), got: format!("{:?}", keys.dims()) });
        };
        if pointer >= size {
            return Err(Error::invalid(format!("queue pointer {pointer} is outside a queue of {size} keys"), ""));
        }
        Ok(Self { keys: keys.contiguous()?, pointer })
    }

    /// `(K, D)`: all keys. The tensor changes when keys enter.
    pub fn keys(&self) -> &Tensor {
        &self.keys
    }

    /// Where the next key goes.
    pub fn pointer(&self) -> usize {
        self.pointer
    }

    /// Replaces the oldest keys, going around the end where it falls inside a batch.
    ///
    /// # Shapes
    /// - `keys`: `(B, D)` f32, unit rows, `B <= K`
    ///
    /// # Errors
    /// [`Error::Shape`] for more keys than the queue holds or another width.
    pub fn enqueue(&mut self, keys: &Tensor) -> Result<()> {
        let (size, width) = self.keys.dims2()?;
        let count = keys.dims().first().copied().unwrap_or(0);
        if keys.dims() != [count, width] || count > size {
            let expected = format!("(B, {width}) with B at most {size}");
            return Err(Error::Shape { op: "enqueue", expected, got: format!("{:?}", keys.dims()) });
        }
        let before_end = count.min(size - self.pointer);
        self.keys.slice_set(&keys.narrow(0, 0, before_end)?.contiguous()?, 0, self.pointer)?;
        if before_end < count {
            self.keys.slice_set(&keys.narrow(0, before_end, count - before_end)?.contiguous()?, 0, 0)?;
        }
        self.pointer = (self.pointer + count) % size;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, (values.len(), 1), &Device::Cpu).unwrap()
    }

    fn values(queue: &Queue) -> Vec<f32> {
        queue.keys().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn oldest_keys_go_first_and_the_end_is_no_border() {
        let mut queue = Queue::from_keys(keys(&[0.0; 5]), 0).unwrap();
        queue.enqueue(&keys(&[1.0, 2.0, 3.0])).unwrap();
        assert_eq!((values(&queue), queue.pointer()), (vec![1.0, 2.0, 3.0, 0.0, 0.0], 3));
        queue.enqueue(&keys(&[4.0, 5.0, 6.0])).unwrap();
        assert_eq!((values(&queue), queue.pointer()), (vec![6.0, 2.0, 3.0, 4.0, 5.0], 1));
        queue.enqueue(&keys(&[7.0, 8.0, 9.0, 10.0, 11.0])).unwrap();
        assert_eq!((values(&queue), queue.pointer()), (vec![11.0, 7.0, 8.0, 9.0, 10.0], 1));
    }

    #[test]
    fn start_is_random_unit_rows_by_seed() {
        let queue = Queue::random(50, 16, 3).unwrap();
        let rows = queue.keys().to_vec2::<f32>().unwrap();
        for row in &rows {
            assert!((row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
        }
        assert_ne!(rows[0], rows[1]);
        assert_eq!(rows, Queue::random(50, 16, 3).unwrap().keys().to_vec2::<f32>().unwrap());
        assert_ne!(rows, Queue::random(50, 16, 4).unwrap().keys().to_vec2::<f32>().unwrap());
    }

    #[test]
    fn misfits_are_refused() {
        let mut queue = Queue::from_keys(keys(&[0.0; 2]), 0).unwrap();
        assert!(matches!(queue.enqueue(&keys(&[1.0; 3])), Err(Error::Shape { .. })));
        assert!(matches!(queue.enqueue(&Queue::random(1, 2, 0).unwrap().keys), Err(Error::Shape { .. })));
        assert!(matches!(Queue::from_keys(keys(&[0.0; 2]), 2), Err(Error::Invalid { .. })));
    }
}
