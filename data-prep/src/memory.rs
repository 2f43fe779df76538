//! The memory that pictures take while they are decoded: a budget that all workers share, so that large pictures wait for room
//! instead of filling the machine.
//!
//! Packing holds, besides the list of samples: what the budget allows for pictures being decoded (or one picture, if that is
//! larger), each worker's encoded file, its kept buffers (at most [`LARGEST_SPARE_BYTES`] and the intermediate rows of one
//! view), and the finished samples that wait for their turn.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use shared::transforms::decode::dimensions;

/// What a budget has for each worker: a baseline JPEG of 44 million pixels.
const BYTES_PER_THREAD: u64 = 128 << 20;
/// And what it has for all of them together.
const COMMON_BYTES: u64 = 256 << 20;

/// A worker keeps the memory of its last picture for the next one, unless it is larger than this.
pub(crate) const LARGEST_SPARE_BYTES: usize = 32 << 20;

/// Bytes that the workers may use at once.
#[derive(Debug, Clone)]
pub(crate) struct MemoryBudget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    capacity: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    /// Whose turn it is, and the number that the next one who asks gets: who came first is served first, so that a large
    /// request is not overtaken for ever by small ones.
    turn: u64,
    next: u64,
}

impl MemoryBudget {
    /// The budget of a number of workers.
    pub(crate) fn of_threads(threads: usize) -> Self {
        Self::new(COMMON_BYTES + BYTES_PER_THREAD * threads as u64)
    }

    fn new(capacity: u64) -> Self {
        Self { shared: Arc::new(Shared { capacity, state: Mutex::default(), changed: Condvar::new() }) }
    }

    /// Waits until there is room for `bytes`, or until nothing else is in use, and takes it until the value is dropped.
    pub(crate) fn reserve(&self, bytes: u64) -> Reserved {
        let Shared { capacity, changed, .. } = &*self.shared;
        let mut state = self.shared.lock();
        let number = state.next;
        state.next += 1;
        while state.turn != number || (state.used > 0 && state.used.saturating_add(bytes) > *capacity) {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.turn += 1;
        state.used = state.used.saturating_add(bytes);
        drop(state);
        changed.notify_all();
        Reserved { shared: Arc::clone(&self.shared), bytes }
    }
}

impl Default for MemoryBudget {
    /// The budget of one worker.
    fn default() -> Self {
        Self::of_threads(1)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a budget.
#[derive(Debug)]
pub(crate) struct Reserved {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.used = state.used.saturating_sub(self.bytes);
        drop(state);
        self.shared.changed.notify_all();
    }
}

/// The most that decoding an image file takes, by its header; 0 for what no decoder is going to read.
///
/// A baseline JPEG is decoded line by line into 3 bytes per pixel; a progressive one keeps its coefficients besides, up to 3
/// times 2 bytes. Other formats may have 4 channels of 16 bits, which are then turned into 8-bit RGB.
pub(crate) fn decoding_bytes(file: &[u8]) -> u64 {
    let (pixels, bytes_per_pixel) = match jpeg_frame(file) {
        Some((pixels, false)) => (pixels, 3),
        Some((pixels, true)) => (pixels, 9),
        None => (dimensions(file).map_or(0, |(height, width)| height as u64 * width as u64), 16),
    };
    pixels * bytes_per_pixel
}

/// Number of pixels of a JPEG file, and whether it is progressive.
fn jpeg_frame(file: &[u8]) -> Option<(u64, bool)> {
    let mut rest = file.strip_prefix(&[0xff, 0xd8])?;
    loop {
        let marker_at = rest.windows(2).position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff))?;
        let marker = rest[marker_at + 1];
        rest = &rest[marker_at + 2..];
        match marker {
            0x01 | 0xd0..=0xd8 => {}
            // start of frame: length, precision, height, width
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                let side = |at: usize| Some(u64::from(u16::from_be_bytes([*rest.get(at)?, *rest.get(at + 1)?])));
                return Some((side(3)? * side(5)?, marker & 3 == 2));
            }
            _ => rest = rest.get(usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])).max(2)..)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn workers_together_stay_within_the_budget() {
        let budget = MemoryBudget::new(1000);
        let (used, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for worker in 0..8u64 {
                let (budget, used, most) = (budget.clone(), &used, &most);
                scope.spawn(move || {
                    for i in 0..200 {
                        let bytes = (worker * 131 + i * 71) % 900;
                        let reserved = budget.reserve(bytes);
                        most.fetch_max(used.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                        std::thread::yield_now();
                        used.fetch_sub(bytes, Ordering::SeqCst);
                        drop(reserved);
                    }
                });
            }
        });
        assert!((500..=1000).contains(&most.into_inner()));
        assert_eq!(budget.shared.lock().used, 0);
    }

    #[test]
    fn picture_larger_than_the_budget_is_alone() {
        let budget = MemoryBudget::new(10);
        let small = budget.reserve(1);
        std::thread::scope(|scope| {
            let large = scope.spawn(|| budget.reserve(u64::MAX));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!large.is_finished());
            // one that came later does not overtake it, though there is room
            let later = scope.spawn(|| budget.reserve(1));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!later.is_finished());
            drop(small);
            let large = large.join().unwrap();
            assert!(!later.is_finished());
            drop(large);
            drop(later.join().unwrap());
        });
    }

    #[test]
    fn headers_tell_the_memory() {
        let encoded = |format| {
            let mut file = Vec::new();
            image::RgbImage::new(70, 30).write_to(&mut Cursor::new(&mut file), format).unwrap();
            file
        };
        let jpeg = encoded(image::ImageFormat::Jpeg);
        assert_eq!(decoding_bytes(&jpeg), 70 * 30 * 3);
        assert_eq!(decoding_bytes(&encoded(image::ImageFormat::Png)), 70 * 30 * 16);
        let progressive = include_bytes!("../../tests/golden/images/progressive.jpg");
        let (height, width) = {
            let image = shared::transforms::decode::decode(progressive).unwrap();
            (image.height() as u64, image.width() as u64)
        };
        assert_eq!(decoding_bytes(progressive), height * width * 9);
        for end in 0..200 {
            assert!([0, 70 * 30 * 3].contains(&decoding_bytes(&jpeg[..end])), "cut at {end}");
        }
        assert_eq!(decoding_bytes(b"no picture"), 0);
    }
}
