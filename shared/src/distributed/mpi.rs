//! Ranks under MPI, which exchange tensors of main memory.

use std::ops::Range;

use candle_core::Tensor;
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::request;
use mpi::topology::{Communicator as _, SimpleCommunicator};
use mpi::traits::CommunicatorCollectives as _;

use super::Collectives;
use crate::error::{Error, Result};

/// Values that are reduced together: 25 MB.
const BUCKET_VALUES: usize = 25 * 1024 * 1024 / size_of::<f32>();

/// The processes that an MPI launcher started. MPI ends with the value.
pub(super) struct Mpi {
    /// Held, because dropping it ends MPI.
    _universe: Universe,
    rank: usize,
    size: usize,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Mpi {
    /// Joins the other processes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when MPI runs in this process already, or does not let another thread call it than the one that began.
    pub(super) fn start() -> Result<Self> {
        // The thread that trains is not the one that starts MPI, and the only one that calls it.
        let (universe, granted) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| Error::invalid("MPI runs in this process already", "please report this"))?;
        if !matches!(granted, Threading::Serialized | Threading::Multiple) {
            let message = "the MPI library cannot be called by several threads in turn (MPI_THREAD_SERIALIZED)";
            return Err(Error::invalid(message, "build with an MPI library that has support for threads"));
        }
        let world = SimpleCommunicator::world();
        Ok(Self {
            rank: world.rank().unsigned_abs() as usize,
            size: world.size().unsigned_abs() as usize,
            _universe: universe,
        })
    }
}

impl Collectives for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    /// Tensors are laid one behind the other into buckets. The sum of a bucket is under way while the next is filled.
    fn mean(&self, tensors: &mut [&mut Tensor]) -> Result<()> {
        let lengths: Vec<usize> = tensors.iter().map(|tensor| tensor.elem_count()).collect();
        let buckets = buckets(&lengths, BUCKET_VALUES);
        let mut sent: Vec<Vec<f32>> = vec![Vec::new(); buckets.len()];
        let mut sums: Vec<Vec<f32>> =
            buckets.iter().map(|bucket| vec![0.0; lengths[bucket.clone()].iter().sum()]).collect();
        let world = SimpleCommunicator::world();
        request::scope(|scope| {
            let mut requests = Vec::new();
            let mut filled = Ok(());
            for ((bucket, sent), sum) in buckets.iter().zip(&mut sent).zip(&mut sums) {
                filled = fill(sent, &tensors[bucket.clone()]);
                if filled.is_err() {
                    break;
                }
                let (sent, operation) = (sent.as_slice(), SystemOperation::sum());
                requests.push(world.immediate_all_reduce_into(scope, sent, sum.as_mut_slice(), operation));
            }
            // What was begun must end, or the memory would be freed under it.
            for request in requests {
                request.wait_without_status();
            }
            filled
        })?;
        let size = self.size as f32;
        for (bucket, mut sum) in buckets.into_iter().zip(sums) {
            for value in &mut sum {
                *value /= size;
            }
            let mut rest = sum.as_slice();
            for tensor in &mut tensors[bucket] {
                let (mean, after) = rest.split_at(tensor.elem_count());
                **tensor = Tensor::from_slice(mean, tensor.shape(), tensor.device())?;
                rest = after;
            }
        }
        Ok(())
    }

    fn gather_rows(&self, rows: &Tensor) -> Result<Tensor> {
        let mine = rows.flatten_all()?.to_vec1::<f32>()?;
        let mut all = vec![0f32; mine.len() * self.size];
        SimpleCommunicator::world().all_gather_into(mine.as_slice(), all.as_mut_slice());
        let mut shape = rows.dims().to_vec();
        match shape.first_mut() {
            Some(count) => *count *= self.size,
            None => return Err(Error::Shape { op: "gather", expected: "(B, ...)".into(), got: "()".into() }),
        }
        Ok(Tensor::from_vec(all, shape, rows.device())?)
    }

    fn gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let world = SimpleCommunicator::world();
        let mut lengths = vec![0u64; self.size];
        world.all_gather_into(&(mine.len() as u64), lengths.as_mut_slice());
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        if i32::try_from(longest).is_err() {
            return Err(Error::invalid(
                format!("a message of {longest} bytes is too long for MPI"),
                "please report this",
            ));
        }
        let mut padded = mine.to_vec();
        padded.resize(longest, 0);
        let mut all = vec![0u8; longest * self.size];
        world.all_gather_into(padded.as_slice(), all.as_mut_slice());
        let messages = all.chunks_exact(longest.max(1)).zip(lengths);
        let mut messages: Vec<Vec<u8>> = messages.map(|(bytes, length)| bytes[..length as usize].to_vec()).collect();
        messages.resize(self.size, Vec::new());
        Ok(messages)
    }

    fn abort(&self, status: u8) -> ! {
        SimpleCommunicator::world().abort(status.into())
    }
}

/// Neighbours that are reduced together: as many as fit, at least one.
fn buckets(lengths: &[usize], limit: usize) -> Vec<Range<usize>> {
    let mut buckets: Vec<Range<usize>> = Vec::new();
    let mut values = 0;
    for (index, &length) in lengths.iter().enumerate() {
        if let Some(bucket) = buckets.last_mut().filter(|_| values + length <= limit) {
            bucket.end = index + 1;
            values += length;
        } else {
            buckets.push(index..index + 1);
            values = length;
        }
    }
    buckets
}

fn fill(bucket: &mut Vec<f32>, tensors: &[&mut Tensor]) -> Result<()> {
    bucket.reserve_exact(tensors.iter().map(|tensor| tensor.elem_count()).sum());
    for tensor in tensors {
        bucket.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_all_in_order_and_no_more_than_fits() {
        assert_eq!(buckets(&[3, 4, 3, 20, 1, 1], 10), [0..3, 3..4, 4..6]);
        assert_eq!(buckets(&[20, 20], 10), [0..1, 1..2]);
        assert!(buckets(&[], 10).is_empty());
    }
}
