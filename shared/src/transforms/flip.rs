//! Horizontal flip. The resize does it for free by reversing its weights, since a flip commutes with every later step; the function
//! here is the plain form of it.

use super::Planes;
use crate::rng::KeyedRng;

/// Whether a view is flipped: a uniform draw lies below `probability`.
pub fn draw(rng: &mut KeyedRng, probability: f32) -> bool {
    rng.unit_f32() < probability
}

/// Mirrors every row left to right.
pub fn apply(planes: &mut Planes) {
    let width = planes.width();
    for row in planes.bytes_mut().chunks_exact_mut(width.max(1)) {
        row.reverse();
    }
}
