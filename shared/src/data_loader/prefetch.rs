//! Work done ahead of time by threads, handed over in order, with bounded memory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::error::{Error, Result};

/// Makes the pieces `0..total` ahead of their use on threads of its own and hands them over in order.
///
/// Worker `w` of `n` makes the pieces `w, w + n, ...` into a channel of its own, so the order needs no sorting and does not
/// depend on timing. At most `depth` finished pieces wait, and each worker may hold one more. Dropping the value stops the
/// workers and waits for them. Once a piece failed, nothing follows it.
///
/// # Examples
/// ```
/// let squares = shared::data_loader::Prefetcher::new(2, 4, 0..10, |i| Ok(i * i))?;
/// let squares = squares.collect::<shared::Result<Vec<u64>>>()?;
/// assert_eq!(squares[9], 81);
/// # Ok::<(), shared::Error>(())
/// ```
#[derive(Debug)]
pub struct Prefetcher<T> {
    /// Emptied when the value is dropped, which is what ends the workers.
    channels: Vec<Receiver<Result<T>>>,
    workers: Vec<JoinHandle<()>>,
    start: u64,
    next: u64,
    end: u64,
}

impl<T: Send + 'static> Prefetcher<T> {
    /// Starts `workers` threads, at least one, that make `pieces` by `make`, at most `depth` of them ahead.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the system refuses a thread.
    pub fn new(
        workers: usize,
        depth: usize,
        pieces: std::ops::Range<u64>,
        make: impl Fn(u64) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let workers = workers.max(1);
        let make = Arc::new(make);
        let std::ops::Range { start, end } = pieces;
        let mut loader = Self { channels: Vec::new(), workers: Vec::new(), start, next: start, end };
        for worker in 0..workers as u64 {
            let (sender, receiver) = sync_channel(depth.div_ceil(workers));
            let make = Arc::clone(&make);
            let mine = (start + worker..end).step_by(workers);
            let thread = Builder::new()
                .name(format!("loader-{worker}"))
                .spawn(move || work(mine, &*make, &sender))
                .map_err(|e| Error::invalid(format!("cannot start a loader thread: {e}"), ""))?;
            loader.channels.push(receiver);
            loader.workers.push(thread);
        }
        Ok(loader)
    }
}

fn work<T>(pieces: impl Iterator<Item = u64>, make: &dyn Fn(u64) -> Result<T>, sender: &SyncSender<Result<T>>) {
    for piece in pieces {
        // A panic in a thread would only show as a closed channel; the message is worth more.
        let made = catch_unwind(AssertUnwindSafe(|| make(piece))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(Error::invalid(format!("a loader thread panicked at piece {piece}: {text}"), "please report this"))
        });
        let failed = made.is_err();
        // A closed channel means that nobody wants more.
        if sender.send(made).is_err() || failed {
            return;
        }
    }
}

impl<T> Iterator for Prefetcher<T> {
    type Item = Result<T>;

    /// The next piece, waiting for it when it is not made yet.
    fn next(&mut self) -> Option<Result<T>> {
        if self.next >= self.end {
            return None;
        }
        let channel = (self.next - self.start) as usize % self.channels.len();
        let piece = self.channels[channel]
            .recv()
            .unwrap_or_else(|_closed| Err(Error::invalid("a loader thread ended early", "please report this")));
        self.next = if piece.is_ok() { self.next + 1 } else { self.end };
        Some(piece)
    }
}

impl<T> Drop for Prefetcher<T> {
    fn drop(&mut self) {
        self.channels.clear();
        for worker in self.workers.drain(..) {
            // Workers catch their panics, so there is nothing to hear from them.
            drop(worker.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pieces_come_in_order(workers in 0usize..5, depth in 0usize..5, start in 0u64..5, count in 0u64..40) {
            let pieces = Prefetcher::new(workers, depth, start..start + count, Ok).unwrap();
            let got: Vec<u64> = pieces.map(Result::unwrap).collect();
            prop_assert_eq!(got, (start..start + count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn memory_is_bounded() {
        let made = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&made);
        let mut pieces = Prefetcher::new(2, 4, 0..1000, move |i| {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok(i)
        })
        .unwrap();
        pieces.next().unwrap().unwrap();
        // Workers run until they block; what they can make in all is the depth, one piece each in hand, and the one taken.
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        assert!(made.load(Ordering::SeqCst) <= 4 + 2 + 1);
    }

    #[test]
    fn error_comes_at_its_place_and_ends_the_sequence() {
        let fail = |i| if i == 3 { Err(Error::invalid("broken", "")) } else { Ok(i) };
        let mut pieces = Prefetcher::new(2, 8, 0..100, fail).unwrap();
        for i in 0..3 {
            assert_eq!(pieces.next().unwrap().unwrap(), i);
        }
        assert_eq!(pieces.next().unwrap().unwrap_err().to_string(), "broken");
        assert!(pieces.next().is_none());
    }

    #[test]
    fn panic_becomes_an_error_with_its_message() {
        let mut pieces = Prefetcher::new(1, 2, 0..10, |i| {
            assert!(i != 1, "piece is {i}");
            Ok(i)
        })
        .unwrap();
        assert_eq!(pieces.next().unwrap().unwrap(), 0);
        let error = pieces.next().unwrap().unwrap_err().to_string();
        assert!(error.contains("piece is 1"), "{error}");
        assert!(pieces.next().is_none());
    }

    #[test]
    fn dropping_early_ends_the_threads() {
        let held = Arc::new(());
        let inside = Arc::clone(&held);
        let mut pieces = Prefetcher::new(3, 2, 0..u64::MAX, move |i| {
            assert!(Arc::strong_count(&inside) > 1);
            Ok(i)
        })
        .unwrap();
        pieces.next().unwrap().unwrap();
        drop(pieces);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
