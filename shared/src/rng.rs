//! Random numbers that depend only on what they are for: a generator is keyed by (domain, seed, indices), never by thread,
//! rank, position or time, so that any draw can be repeated anywhere.
//!
//! A key is hashed by BLAKE3 into the seed of a `ChaCha8` stream. All floating point here is exact or comes from `libm`, so the
//! draws are the same bits on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

/// A generator for one purpose.
///
/// # Examples
/// ```
/// use shared::rng::KeyedRng;
/// let mut a = KeyedRng::new("view", 7, &[0xfeed, 3]);
/// let mut b = KeyedRng::new("view", 7, &[0xfeed, 3]);
/// assert_eq!(a.next_u64(), b.next_u64());
/// assert_ne!(a.next_u64(), KeyedRng::new("view", 8, &[0xfeed, 3]).next_u64());
/// ```
#[derive(Debug, Clone)]
pub struct KeyedRng {
    stream: ChaCha8Rng,
    spare_normal: Option<f64>,
}

impl KeyedRng {
    /// The generator for `(seed, indices)` within `domain`, a name that keeps unrelated uses apart.
    pub fn new(domain: &str, seed: u64, indices: &[u64]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(domain.len() as u64).to_le_bytes());
        hasher.update(domain.as_bytes());
        hasher.update(&seed.to_le_bytes());
        for index in indices {
            hasher.update(&index.to_le_bytes());
        }
        Self { stream: ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()), spare_normal: None }
    }

    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        self.stream.next_u32()
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.stream.next_u64()
    }

    /// Uniform in `[0, 1)` with 24 random bits, as PyTorch draws its f32 uniforms.
    pub fn unit_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in `[low, high)`, scaled in f32.
    pub fn uniform_f32(&mut self, low: f32, high: f32) -> f32 {
        self.unit_f32() * (high - low) + low
    }

    /// Uniform in `[0, 1)` with 53 random bits.
    pub fn unit_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// A uniform integer below `n`, without bias (rejection).
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no integer is below 0");
        let n = n as u64;
        let zone = u64::MAX - u64::MAX % n;
        loop {
            let draw = self.next_u64();
            if draw < zone {
                return (draw % n) as usize;
            }
        }
    }

    /// A standard normal number (Box and Muller's method, f64).
    pub fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare_normal.take() {
            return spare;
        }
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.unit_f64()));
        let angle = std::f64::consts::TAU * self.unit_f64();
        self.spare_normal = Some(radius * libm::sin(angle));
        radius * libm::cos(angle)
    }

    /// Puts `items` into a uniformly random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_different_domains_and_indices_give_different_streams() {
        let first = |domain, seed, indices: &[u64]| KeyedRng::new(domain, seed, indices).next_u64();
        let draws = [
            first("a", 1, &[2]),
            first("b", 1, &[2]),
            first("a", 2, &[2]),
            first("a", 1, &[3]),
            first("a", 1, &[2, 0]),
        ];
        for (i, a) in draws.iter().enumerate() {
            assert!(draws[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn stream_is_pinned() {
        // A change here changes every view of every shard set: it needs a new format version.
        assert_eq!(KeyedRng::new("view", 0, &[1, 2]).next_u64(), 17_212_375_587_351_169_038);
    }

    #[test]
    fn normal_has_zero_mean_and_unit_variance() {
        let mut rng = KeyedRng::new("test", 0, &[]);
        let draws: Vec<f64> = (0..20_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / 20_000.0;
        let variance = draws.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04, "{mean} {variance}");
    }

    #[test]
    fn shuffle_is_a_permutation() {
        let mut items: Vec<usize> = (0..100).collect();
        KeyedRng::new("test", 1, &[]).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn below_covers_its_range() {
        let mut rng = KeyedRng::new("test", 2, &[]);
        let mut seen = [0; 5];
        for _ in 0..1000 {
            seen[rng.below(5)] += 1;
        }
        assert!(seen.iter().all(|&count| count > 120), "{seen:?}");
    }
}
