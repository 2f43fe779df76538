//! Several processes that train one student together: who they are, and what they tell each other.
//!
//! Built with the feature `mpi`, a training may be started by an MPI launcher. It then makes the losses, up to rounding, of one
//! process with the same options: every rank (process) computes an equal share of the rows of each batch.
//!
//! # Launching
//! ```text
//! cargo build --release -p student-train --features mpi        needs an MPI library with its headers, and libclang
//!
//! # one machine, 2 ranks of 8 threads each
//! mpirun -n 2 --bind-to none student-train distill --threads 8 ...
//! # two nodes of 32 cores, a rank on each
//! mpirun -n 2 --host node1,node2 --map-by ppr:1:node --bind-to none student-train distill ...
//! # the same under Slurm
//! srun --mpi=pmix --nodes 2 --ntasks-per-node 1 --cpus-per-task 32 student-train distill ...
//! ```
//! Open MPI gives each rank a single core unless told otherwise: hence `--bind-to none`. Without a launcher the same binary is
//! one process that never starts MPI.
//!
//! # What is global, and what belongs to a rank
//! | global, the same for any number of ranks | of each rank |
//! |---|---|
//! | `--batch-size`, `--bn-groups`: the ranks must divide both | rows `[r * B / R, (r + 1) * B / R)` of each batch |
//! | learning rate, epochs, seed, order of the samples, shuffles | `--threads`; by default the node's cores, shared out evenly |
//! | the queue, the parameters, the state of the optimiser | `--accumulate`: pieces of the rank's rows |
//!
//! The number of ranks is no part of a run's identity: what 4 ranks saved goes on with 2, or with one process. The shards, the
//! embeddings and the run's directory must have the same paths on all nodes; copies of the inputs on local disks will do, since
//! their fingerprints are compared. Only the first rank writes, and only it talks.
//!
//! # When something fails
//! The rank that failed says why, and all end with its exit status. A rank that dies takes the job with it, which is the
//! launcher's doing. `mpirun` kills what it is told to end after a second: `--mca odls_base_sigkill_timeout 60` leaves time for a
//! checkpoint.
//!
//! # Rounding
//! Sums over ranks are added in an order that the MPI library chooses, so that runs of different numbers of ranks differ in their
//! last bits, as ever in floating point. All ranks receive the same bits and, computing with the same instruction set, stay equal.

mod launch;
#[cfg(feature = "mpi")]
mod mpi;
mod seats;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

pub use self::launch::run_main;

/// How ranks exchange tensors and messages. Every method but `rank`, `size` and `abort` is called by all ranks at the same place.
///
/// A library for tensors on other devices comes in here.
pub trait Collectives: Debug + Send + Sync {
    /// Which of the ranks this process is, counted from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Replaces every tensor by its mean over the ranks. All ranks receive the same bits.
    ///
    /// # Errors
    /// [`Error::Tensor`] for tensors that are not f32.
    fn mean(&self, tensors: &mut [&mut Tensor]) -> Result<()>;

    /// The rows of all ranks in their order.
    ///
    /// # Shapes
    /// - `rows`: `(B / R, ...)` f32, the same on all ranks
    /// - returns: `(B, ...)`
    ///
    /// # Errors
    /// [`Error::Tensor`] for tensors that are not f32.
    fn gather_rows(&self, rows: &Tensor) -> Result<Tensor>;

    /// The messages of all ranks in their order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a message that is too long.
    fn gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Ends the processes of all ranks at once.
    fn abort(&self, status: u8) -> !;
}

/// The processes that train together, as one of them sees it; often there is only this one.
#[derive(Debug, Clone, Default)]
pub struct World {
    collectives: Option<Arc<dyn Collectives>>,
    /// Whether all ranks know that one of them failed.
    failed_together: Arc<AtomicBool>,
}

impl World {
    /// This process and no other.
    pub fn alone() -> Self {
        Self::default()
    }

    /// The ranks behind a way to reach them.
    pub fn new(collectives: Arc<dyn Collectives>) -> Self {
        Self { collectives: Some(collectives), failed_together: Arc::default() }
    }

    /// Which of the ranks this process is, counted from 0.
    pub fn rank(&self) -> usize {
        self.collectives.as_ref().map_or(0, |collectives| collectives.rank())
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.collectives.as_ref().map_or(1, |collectives| collectives.size())
    }

    /// Whether this process is the only one.
    pub fn is_alone(&self) -> bool {
        self.size() == 1
    }

    /// Whether this is the rank that writes and talks.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// This rank's share of the rows of a batch.
    pub fn share(&self, rows: usize) -> Range<usize> {
        let (rank, size) = (self.rank(), self.size());
        rank * rows / size..(rank + 1) * rows / size
    }

    /// Replaces tensors by their means over the ranks.
    ///
    /// # Errors
    /// As [`Collectives::mean`].
    pub fn all_reduce_mean(&self, mut tensors: Vec<&mut Tensor>) -> Result<()> {
        self.collectives.as_ref().map_or(Ok(()), |collectives| collectives.mean(&mut tensors))
    }

    /// The rows of all ranks in their order, without gradient.
    ///
    /// # Errors
    /// As [`Collectives::gather_rows`].
    pub fn all_gather(&self, rows: &Tensor) -> Result<Tensor> {
        match &self.collectives {
            None => Ok(rows.detach()),
            Some(collectives) => collectives.gather_rows(rows),
        }
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// As [`Collectives::gather_bytes`].
    pub fn any(&self, mine: bool) -> Result<bool> {
        let Some(collectives) = &self.collectives else { return Ok(mine) };
        Ok(collectives.gather_bytes(&[mine.into()])?.concat().contains(&1))
    }

    /// What the first rank has; the others give nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the first rank has nothing, or for a value without a JSON form.
    pub fn broadcast<T: Serialize + DeserializeOwned>(&self, value: Option<T>) -> Result<T> {
        let nothing = || Error::invalid("the first rank has nothing to tell", "please report this");
        let Some(collectives) = &self.collectives else { return value.ok_or_else(nothing) };
        let no_json = |e: serde_json::Error| Error::invalid(format!("a message has no JSON form: {e}"), "");
        let message = value.as_ref().map(serde_json::to_vec).transpose().map_err(no_json)?;
        let messages = collectives.gather_bytes(&message.unwrap_or_default())?;
        match (value, messages.first()) {
            (Some(value), _) => Ok(value),
            (None, Some(message)) => serde_json::from_slice(message).map_err(no_json),
            (None, None) => Err(nothing()),
        }
    }

    /// Goes on only if every rank can.
    ///
    /// # Errors
    /// What the first rank that failed failed with, and only there: elsewhere [`Error::Elsewhere`].
    pub fn agree<T>(&self, mine: Result<T>) -> Result<T> {
        let Some(collectives) = &self.collectives else { return mine };
        let status = mine.as_ref().err().map_or(0, Error::exit_status);
        let statuses = collectives.gather_bytes(&[status])?.concat();
        let failed = (0..).zip(&statuses).find(|(_, status)| **status != 0);
        let Some((rank, &status)) = failed else { return mine };
        self.failed_together.store(true, Ordering::Relaxed);
        match mine {
            Err(error) if rank != self.rank() => {
                Err(Error::Elsewhere { rank, status: error.exit_status().max(status) })
            }
            Err(error) if statuses.contains(&0) => Err(self.name(error)),
            Err(error) => Err(error),
            Ok(_) => Err(Error::Elsewhere { rank, status }),
        }
    }

    /// Makes sure that something is the same on all ranks.
    ///
    /// # Errors
    /// What `differs` makes of the first rank that has something else than rank 0, of what that is, and what rank 0 has.
    pub fn same(&self, mine: &str, differs: impl FnOnce(usize, &str, &str) -> Error) -> Result<()> {
        let Some(collectives) = &self.collectives else { return Ok(()) };
        let all = collectives.gather_bytes(mine.as_bytes())?;
        let all: Vec<_> = all.iter().map(|text| String::from_utf8_lossy(text)).collect();
        let other = all.iter().position(|text| text != &all[0]);
        self.agree(other.map_or(Ok(()), |rank| Err(differs(rank, &all[rank], &all[0]))))
    }

    /// Threads that each rank should use unless told otherwise; none for all cores.
    ///
    /// # Errors
    /// As [`Collectives::gather_bytes`].
    pub fn default_threads(&self) -> Result<Option<u16>> {
        match &self.collectives {
            None => Ok(None),
            Some(collectives) => seats::threads(collectives.as_ref()).map(Some),
        }
    }

    /// Says on which rank something failed.
    fn name(&self, error: Error) -> Error {
        Error::OnRank { rank: self.rank(), node: seats::node_name(), source: Box::new(error) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::Mutex;

    use super::*;

    /// Ranks that are threads of this process.
    #[derive(Debug)]
    struct Threads {
        rank: usize,
        size: usize,
        meeting: Arc<(Barrier, Mutex<Vec<Vec<u8>>>)>,
    }

    impl Collectives for Threads {
        fn rank(&self) -> usize {
            self.rank
        }

        fn size(&self) -> usize {
            self.size
        }

        fn mean(&self, _: &mut [&mut Tensor]) -> Result<()> {
            Ok(())
        }

        fn gather_rows(&self, rows: &Tensor) -> Result<Tensor> {
            Ok(rows.clone())
        }

        fn gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
            let (barrier, messages) = &*self.meeting;
            messages.lock().unwrap()[self.rank] = mine.to_vec();
            barrier.wait();
            let all = messages.lock().unwrap().clone();
            barrier.wait();
            Ok(all)
        }

        fn abort(&self, status: u8) -> ! {
            std::process::exit(status.into())
        }
    }

    /// What every rank of three makes of `work`.
    fn on_three<T: Send>(work: impl Fn(&World) -> T + Sync) -> Vec<T> {
        let meeting = Arc::new((Barrier::new(3), Mutex::new(vec![Vec::new(); 3])));
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|rank| {
                    let world = World::new(Arc::new(Threads { rank, size: 3, meeting: Arc::clone(&meeting) }));
                    let work = &work;
                    scope.spawn(move || work(&world))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn shares_are_the_batch_in_order() {
        let shares = on_three(|world| world.share(12));
        assert_eq!(shares, [0..4, 4..8, 8..12]);
        assert_eq!(World::alone().share(7), 0..7);
    }

    #[test]
    fn one_voice_is_enough() {
        for asking in 0..3 {
            assert_eq!(on_three(|world| world.any(world.rank() == asking).unwrap()), [true; 3]);
        }
        assert_eq!(on_three(|world| world.any(false).unwrap()), [false; 3]);
        assert!(World::alone().any(true).unwrap() && !World::alone().any(false).unwrap());
    }

    #[test]
    fn first_rank_is_heard_by_all() {
        let heard = on_three(|world| world.broadcast(world.is_first().then(|| Some(vec![1.5, 0.1]))).unwrap());
        assert_eq!(heard, vec![Some(vec![1.5, 0.1]); 3]);
        assert!(World::alone().broadcast::<u8>(None).is_err());
    }

    #[test]
    fn the_rank_that_failed_tells_and_the_others_know() {
        let outcomes = on_three(|world| {
            let mine = if world.rank() == 1 { Err(Error::invalid("no pixels", "look for them")) } else { Ok(()) };
            let error = world.agree(mine).unwrap_err();
            assert!(world.failed_together.load(Ordering::Relaxed));
            (matches!(error, Error::Elsewhere { rank: 1, .. }), error.exit_status(), error.to_string(), error.hint())
        });
        assert!(outcomes[0].0 && !outcomes[1].0 && outcomes[2].0);
        assert!(outcomes.iter().all(|outcome| outcome.1 == 1));
        assert!(
            outcomes[1].2.starts_with("rank 1 on `") && outcomes[1].2.ends_with("`: no pixels"),
            "{}",
            outcomes[1].2
        );
        assert_eq!(outcomes[1].3.as_deref(), Some("look for them"));
    }

    #[test]
    fn failing_together_is_told_once_and_plainly() {
        let outcomes = on_three(|world| {
            let error = world.agree::<()>(Err(Error::usage("no such flag"))).unwrap_err();
            (error.exit_status(), error.to_string())
        });
        assert!(outcomes.iter().all(|outcome| outcome.0 == 2));
        assert_eq!(outcomes[0].1, "no such flag");
        assert!(outcomes[1..].iter().all(|outcome| outcome.1 == "rank 0 failed"));
    }

    #[test]
    fn differences_are_named() {
        let check = |world: &World, odd: usize| {
            let mine = if world.rank() == odd { "b" } else { "a" };
            world.same(mine, |rank, found, expected| Error::invalid(format!("{rank}: {found}, not {expected}"), ""))
        };
        assert!(on_three(|world| check(world, 3)).into_iter().all(|outcome| outcome.is_ok()));
        let told: Vec<_> = on_three(|world| check(world, 2).unwrap_err().to_string());
        assert_eq!(told[0], "2: b, not a");
    }
}
