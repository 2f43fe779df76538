//! Work in parallel, results in order, in bounded memory: workers take the next item as soon as they are free, and the caller gets
//! the results one by one in the order of the items.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use shared::Result;

struct State<T> {
    /// The next item to be taken.
    next: usize,
    /// Items whose result was consumed.
    consumed: usize,
    /// Results that wait for their turn.
    done: BTreeMap<usize, T>,
    /// Their size together.
    waiting_bytes: usize,
    /// Nobody is to take another item: the consumer failed or a worker panicked.
    stop: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops everybody when its thread ends, normally or by a panic.
struct StopOnDrop<'a, T> {
    shared: &'a Shared<T>,
    only_on_panic: bool,
}

impl<T> Drop for StopOnDrop<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() || !self.only_on_panic {
            self.shared.lock().stop = true;
            self.shared.changed.notify_all();
        }
    }
}

/// How much may wait between the workers and the consumer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    /// Items that are taken but not consumed.
    pub items: usize,
    /// Bytes of results that wait for their turn; when there are more, no item is taken, so that those at hand come on top.
    pub bytes: usize,
}

/// Runs `work` for the items `0..count` on `threads` threads and `consume` on the calling one, in order, within `window`. `worker`
/// makes what each thread keeps; `size` tells the bytes of a result.
///
/// # Errors
/// The first error of `consume`; no item is taken after it.
pub(crate) fn ordered<W, T: Send>(
    (count, threads, window): (usize, usize, Window),
    worker: impl Fn() -> W + Sync,
    work: impl Fn(&mut W, usize) -> T + Sync,
    size: impl Fn(&T) -> usize + Sync,
    mut consume: impl FnMut(usize, T) -> Result<()>,
) -> Result<()> {
    let state = State { next: 0, consumed: 0, done: BTreeMap::new(), waiting_bytes: 0, stop: false };
    let shared = Shared { state: Mutex::new(state), changed: Condvar::new() };
    let run = || {
        let _stop = StopOnDrop { shared: &shared, only_on_panic: true };
        let mut kept = worker();
        loop {
            let mut state = shared.lock();
            // The item whose turn it is may always be taken: nothing that waits can be consumed before it.
            let is_full = |state: &State<T>| {
                state.next > state.consumed
                    && (state.next >= state.consumed + window.items || state.waiting_bytes > window.bytes)
            };
            while !state.stop && state.next < count && is_full(&state) {
                state = shared.wait(state);
            }
            if state.stop || state.next >= count {
                return;
            }
            let item = state.next;
            state.next += 1;
            drop(state);
            let result = work(&mut kept, item);
            let mut state = shared.lock();
            state.waiting_bytes += size(&result);
            state.done.insert(item, result);
            drop(state);
            shared.changed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, count.max(1)) {
            scope.spawn(run);
        }
        let _stop = StopOnDrop { shared: &shared, only_on_panic: false };
        for item in 0..count {
            let mut state = shared.lock();
            let result = loop {
                if let Some(result) = state.done.remove(&item) {
                    state.waiting_bytes -= size(&result);
                    break result;
                }
                if state.stop {
                    return Ok(()); // a worker panicked: the scope passes it on
                }
                state = shared.wait(state);
            };
            drop(state);
            consume(item, result)?;
            shared.lock().consumed = item + 1;
            shared.changed.notify_all();
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::Error;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    fn few(items: usize) -> Window {
        Window { items, bytes: usize::MAX }
    }

    #[test]
    fn large_results_wait_in_small_numbers() {
        let (taken, consumed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (threads, large) = (3, 1000);
        let most = AtomicUsize::new(0);
        let work = |(): &mut (), item: usize| {
            let ahead = taken.fetch_add(1, Ordering::SeqCst) + 1 - consumed.load(Ordering::SeqCst);
            most.fetch_max(ahead, Ordering::SeqCst);
            // the first of every ten is slow: the others would pile up behind it
            std::thread::sleep(Duration::from_millis(if item.is_multiple_of(10) { 5 } else { 0 }));
        };
        let consume = |_, ()| {
            consumed.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let window = Window { items: 100, bytes: 2 * large };
        ordered((100, threads, window), || (), work, |()| large, consume).unwrap();
        // waiting: more than two thousand bytes stop the workers, each of which may hold one more; one is being consumed
        assert!(most.into_inner() <= 3 + threads + 1);
    }

    #[test]
    fn results_larger_than_the_window_pass_one_by_one() {
        let window = Window { items: 10, bytes: 0 };
        ordered((50, 4, window), || (), |(): &mut (), item| item, |_| usize::MAX / 100, |_, _| Ok(())).unwrap();
    }

    #[test]
    fn results_come_in_order_within_the_window() {
        for (threads, items) in [(1, 1), (2, 1), (3, 4), (8, 100)] {
            let (taken, consumed) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let mut seen = Vec::new();
            let work = |(): &mut (), item: usize| {
                taken.fetch_add(1, Ordering::SeqCst);
                assert!(item < consumed.load(Ordering::SeqCst) + items);
                item * 3
            };
            let consume = |item, result| {
                seen.push((item, result));
                consumed.fetch_add(1, Ordering::SeqCst);
                Ok(())
            };
            ordered((200, threads, few(items)), || (), work, |_| 0, consume).unwrap();
            assert_eq!(seen, (0..200).map(|i| (i, i * 3)).collect::<Vec<_>>());
            assert_eq!(taken.load(Ordering::SeqCst), 200);
        }
    }

    #[test]
    fn no_items_is_nothing_to_do() {
        ordered((0, 4, few(4)), || (), |(), _| (), |()| 0, |_, ()| Ok(())).unwrap();
    }

    #[test]
    fn error_of_the_consumer_stops_the_workers() {
        let taken = AtomicUsize::new(0);
        let work = |(): &mut (), _| taken.fetch_add(1, Ordering::SeqCst);
        let consume = |item, _| if item == 5 { Err(Error::invalid("full", "")) } else { Ok(()) };
        assert!(ordered((10_000, 2, few(8)), || (), work, |_| 0, consume).is_err());
        assert!(taken.load(Ordering::SeqCst) <= 5 + 8);
    }

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn panic_of_a_worker_is_passed_on() {
        let work = |(): &mut (), item| assert!(item != 3, "third");
        ordered((100, 2, few(4)), || (), work, |()| 0, |_, ()| Ok(())).unwrap();
    }
}
