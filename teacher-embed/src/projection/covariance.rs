//! Mean and covariance of many rows, in f64, in an order that no number of threads changes.
//!
//! Rows are read in blocks. Each element of the result belongs to one task, which adds the blocks in turn; a block's share is
//! summed over its rows in order.

use nalgebra::DMatrix;
use rayon::prelude::*;

/// Rows in a block.
const BLOCK: usize = 256;
/// Columns of the mean that one task sums.
const MEAN_COLUMNS: usize = 256;
/// Columns in a panel: what a kernel without vector extensions keeps in registers.
const PANEL: usize = 4;
/// Panels of the result's rows in a task: they share each panel of the columns while it is in cache.
const BAND: usize = 4;

/// Products of two panels' columns.
type Tile = [[f64; PANEL]; PANEL];

/// The mean row, `(F,)`.
pub(super) fn mean(parts: &[&[f32]], width: usize, progress: &(dyn Fn(u64) + Sync)) -> Vec<f64> {
    let mut sums = vec![0.0; width];
    let mut count = 0;
    for block in parts.iter().flat_map(|part| part.chunks(BLOCK * width)) {
        sums.par_chunks_mut(MEAN_COLUMNS).enumerate().for_each(|(task, sums)| {
            let first = task * MEAN_COLUMNS;
            for row in block.chunks_exact(width) {
                sums.iter_mut().zip(&row[first..]).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        });
        count += block.len() / width;
        progress((block.len() / width) as u64);
    }
    sums.into_iter().map(|sum| sum / count as f64).collect()
}

/// The covariance, `(F, F)`, over the number of rows less one; only its lower triangle is filled.
pub(super) fn covariance(parts: &[&[f32]], mean: &[f64], progress: &(dyn Fn(u64) + Sync)) -> DMatrix<f64> {
    let width = mean.len();
    let panels = width.div_ceil(PANEL);
    // Row p of tiles has the tiles of columns 0..=p.
    let mut tiles: Vec<Vec<Tile>> = (1..=panels).map(|count| vec![Tile::default(); count]).collect();
    let mut packed = vec![[0.0; PANEL]; panels * BLOCK];
    let mut count = 0;
    for block in parts.iter().flat_map(|part| part.chunks(BLOCK * width)) {
        let rows = block.len() / width;
        let packed = &mut packed[..panels * rows];
        pack(block, mean, rows, packed);
        tiles.par_chunks_mut(BAND).enumerate().for_each(|(band, tiles)| add_band(packed, rows, band * BAND, tiles));
        count += rows;
        progress(rows as u64);
    }
    let scale = count as f64 - 1.0;
    let mut covariance = DMatrix::zeros(width, width);
    for row in 0..width {
        for column in 0..=row {
            covariance[(row, column)] = tiles[row / PANEL][column / PANEL][row % PANEL][column % PANEL] / scale;
        }
    }
    covariance
}

/// Lays a block out panel after panel, centred; columns beyond the width are zero.
fn pack(block: &[f32], mean: &[f64], rows: usize, packed: &mut [[f64; PANEL]]) {
    let width = mean.len();
    packed.par_chunks_mut(rows.max(1)).enumerate().for_each(|(panel, packed)| {
        let columns = panel * PANEL..width.min((panel + 1) * PANEL);
        for (row, packed) in block.chunks_exact(width).zip(packed) {
            for ((x, value), mean) in packed.iter_mut().zip(&row[columns.clone()]).zip(&mean[columns.clone()]) {
                *x = f64::from(*value) - mean;
            }
        }
    });
}

/// Adds a block's products to the rows of tiles from `first` on.
fn add_band(packed: &[[f64; PANEL]], rows: usize, first: usize, tiles: &mut [Vec<Tile>]) {
    let panel = |index: usize| &packed[index * rows..(index + 1) * rows];
    for column in 0..first + tiles.len() {
        for (offset, tiles) in tiles.iter_mut().enumerate() {
            if let Some(tile) = tiles.get_mut(column) {
                add_products(panel(first + offset), panel(column), tile);
            }
        }
    }
}

/// Adds the products of all pairs of columns of two panels.
fn add_products(a: &[[f64; PANEL]], b: &[[f64; PANEL]], tile: &mut Tile) {
    let mut sums = Tile::default();
    for (a, b) in a.iter().zip(b) {
        for (sums, a) in sums.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
    }
    for (total, sum) in tile.iter_mut().flatten().zip(sums.iter().flatten()) {
        *total += sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of whole numbers, whose sums are exact.
    fn rows(count: usize, width: usize) -> Vec<f32> {
        (0..count * width).map(|i| ((i * 7919 + 13) % 1009) as f32 - 400.0).collect()
    }

    #[test]
    fn mean_and_covariance_are_those_of_the_definition() {
        // Widths around a panel and a band, counts around a block, parts that end inside a block.
        for (width, counts) in [(1, vec![2]), (5, vec![3, 1]), (16, vec![BLOCK]), (19, vec![BLOCK + 3, 1, 2 * BLOCK])] {
            let total: usize = counts.iter().sum();
            let values = rows(total, width);
            let mut rest = &values[..];
            let mut parts = Vec::new();
            for count in counts {
                let (part, after) = rest.split_at(count * width);
                parts.push(part);
                rest = after;
            }
            let means = mean(&parts, width, &|_| ());
            let column = |c: usize| values.iter().skip(c).step_by(width).map(|x| f64::from(*x));
            for (c, found) in means.iter().enumerate() {
                assert_eq!(*found, column(c).sum::<f64>() / total as f64, "{width} {c}");
            }
            let found = covariance(&parts, &means, &|_| ());
            for i in 0..width {
                for j in 0..width {
                    let products = column(i).zip(column(j)).map(|(a, b)| (a - means[i]) * (b - means[j]));
                    let expected = if j <= i { products.sum::<f64>() / (total as f64 - 1.0) } else { 0.0 };
                    assert!(
                        (found[(i, j)] - expected).abs() < 1e-9 * 1e5,
                        "{width} {i} {j}: {} {expected}",
                        found[(i, j)]
                    );
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let values: Vec<f32> = rows(700, 37).iter().map(|x| x * 0.1).collect();
        let at = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let means = mean(&[&values], 37, &|_| ());
                (covariance(&[&values], &means, &|_| ()), means)
            })
        };
        let one = at(1);
        for threads in [2, 5] {
            assert!(at(threads) == one, "{threads}");
        }
    }

    #[test]
    fn constant_columns_have_no_variance_at_all() {
        let values = [0.1f32, 3.3e7].repeat(1000);
        let means = mean(&[&values], 2, &|_| ());
        assert_eq!(means, [f64::from(0.1f32), f64::from(3.3e7f32)]);
        assert!(covariance(&[&values], &means, &|_| ()).iter().all(|x| *x == 0.0));
    }
}
