//! Filter weights of one axis of the antialiased resize, in the order of operations that Pillow uses.

use std::ops::Range;

use super::resize::Interpolation;

/// Fraction bits of a weight.
pub(super) const BITS: u32 = 22;

fn triangle(x: f64) -> f64 {
    if x < 1.0 { 1.0 - x } else { 0.0 }
}

/// Keys's cubic convolution with a = -0.5, in the order of operations of Pillow's `bicubic_filter`.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// For each output position the first source position and the weights of the samples from there on.
#[derive(Debug, Clone, Default)]
pub(super) struct Weights {
    start: Vec<u32>,
    count: Vec<u32>,
    weight: Vec<i32>,
    stride: usize,
    real: Vec<f64>,
}

impl Weights {
    /// Computes the weights for `source` samples shrunk or stretched to `target`, of which the outputs `from..from + len` are
    /// kept. Source positions are shifted so that the first one used is 0; returns the range of those used.
    ///
    /// # Source
    /// Pillow 13.0.0, `src/libImaging/Resample.c`: half-open windows from rounded ends, weights normalised in f64, then rounded to
    /// 22 bits.
    pub(super) fn fill(
        &mut self,
        interpolation: Interpolation,
        source: usize,
        target: usize,
        from: usize,
        len: usize,
    ) -> Range<usize> {
        match interpolation {
            Interpolation::Bilinear => self.fill_with(triangle, 1.0, source, target, from..from + len),
            Interpolation::Bicubic => self.fill_with(cubic, 2.0, source, target, from..from + len),
        }
    }

    /// As [`Weights::fill`] for the outputs `kept`, with a filter that is 0 from `radius` on.
    fn fill_with(
        &mut self,
        filter: impl Fn(f64) -> f64,
        radius: f64,
        source: usize,
        target: usize,
        kept: Range<usize>,
    ) -> Range<usize> {
        let scale = f64::from(source as f32) / target as f64;
        let stretch = scale.max(1.0);
        let support = radius * stretch;
        let inverse = 1.0 / stretch;
        self.stride = support.ceil() as usize * 2 + 2;
        self.start.clear();
        self.count.clear();
        self.weight.clear();
        self.weight.resize(kept.len() * self.stride, 0);
        self.real.resize(self.stride, 0.0);
        for (i, slot) in self.weight.chunks_exact_mut(self.stride).enumerate() {
            let center = ((kept.start + i) as f64 + 0.5) * scale;
            let low = ((center - support + 0.5) as i64).max(0) as usize;
            let high = ((center + support + 0.5) as i64).min(source as i64) as usize;
            let real = &mut self.real[..high - low];
            let mut sum = 0.0;
            for (t, w) in real.iter_mut().enumerate() {
                *w = filter((((t + low) as f64 - center + 0.5) * inverse).abs());
                sum += *w;
            }
            for (fixed, w) in slot.iter_mut().zip(real) {
                let w = if sum == 0.0 { *w } else { *w / sum };
                // rounded half away from 0: the cast truncates
                *fixed = (0.5f64.copysign(w) + w * f64::from(1u32 << BITS)) as i32;
            }
            self.start.push(low as u32);
            self.count.push((high - low) as u32);
        }
        // both ends rise with the output position
        let first = self.start.first().copied().unwrap_or(0);
        let end = self.start.last().copied().unwrap_or(0) + self.count.last().copied().unwrap_or(0);
        for start in &mut self.start {
            *start -= first;
        }
        first as usize..end as usize
    }

    /// Reverses the order of the outputs: a horizontal flip for free.
    pub(super) fn reverse(&mut self) {
        self.start.reverse();
        self.count.reverse();
        let n = self.start.len();
        for i in 0..n / 2 {
            let (head, tail) = self.weight.split_at_mut((n - 1 - i) * self.stride);
            head[i * self.stride..][..self.stride].swap_with_slice(&mut tail[..self.stride]);
        }
    }

    /// Number of outputs.
    pub(super) fn len(&self) -> usize {
        self.start.len()
    }

    /// First source position and weights of output `i`.
    pub(super) fn at(&self, i: usize) -> (usize, &[i32]) {
        (self.start[i] as usize, &self.weight[i * self.stride..][..self.count[i] as usize])
    }

    /// First source position and weights of every output, in order.
    #[expect(clippy::inline_always, reason = "it runs inside kernels, in their instruction set")]
    #[inline(always)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let counted = self.start.iter().zip(&self.count).zip(self.weight.chunks_exact(self.stride.max(1)));
        counted.map(|((start, count), weights)| (*start as usize, &weights[..*count as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILTERS: [Interpolation; 2] = [Interpolation::Bilinear, Interpolation::Bicubic];

    #[test]
    fn weights_of_every_output_sum_to_one() {
        for filter in FILTERS {
            for (source, target) in [(500, 224), (33, 224), (1, 7), (4000, 3), (224, 224)] {
                let mut weights = Weights::default();
                assert_eq!(weights.fill(filter, source, target, 0, target), 0..source);
                for (start, taps) in weights.iter() {
                    assert!(start + taps.len() <= source);
                    let sum: i32 = taps.iter().sum();
                    let off = (sum - (1 << BITS)).unsigned_abs() as usize;
                    assert!(off <= taps.len(), "{filter:?} {source} -> {target}: {sum}");
                    // a sum of bytes with these weights fits 32 bits
                    let size: i64 = taps.iter().map(|w| i64::from(w.abs())).sum();
                    assert!(size * 255 + (1 << (BITS - 1)) < i64::from(i32::MAX), "{filter:?} {source} -> {target}");
                }
            }
        }
    }

    #[test]
    fn equal_sizes_give_the_identity() {
        let mut weights = Weights::default();
        for filter in FILTERS {
            let used = weights.fill(filter, 9, 9, 2, 5);
            for (i, (start, taps)) in weights.iter().enumerate() {
                for (t, w) in taps.iter().enumerate() {
                    assert_eq!(*w, i32::from(used.start + start + t == i + 2) << BITS, "{i} {t}");
                }
            }
        }
    }

    #[test]
    fn window_is_a_part_of_the_whole() {
        let (mut whole, mut part) = (Weights::default(), Weights::default());
        whole.fill(Interpolation::Bicubic, 500, 341, 0, 341);
        let used = part.fill(Interpolation::Bicubic, 500, 341, 58, 224);
        for i in 0..224 {
            let (start, taps) = whole.at(i + 58);
            assert_eq!(part.at(i), (start - used.start, taps));
        }
    }
}
