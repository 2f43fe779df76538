//! Centring and principal components against numpy and scikit-learn (`tests/golden/pca.py`).

use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use shared::embedding::Projection;
use teacher_embed::projection::fit;
use tests::formula::{fingerprint_distance, values};

/// Of the mean and the variances, relative: both are sums in f64, the mean is stored in f32.
const TOLERANCE: f64 = 1e-6;
/// Of components and rows, which are stored in f32; the components of the smallest variances are the least certain.
const ROW_TOLERANCE: f64 = 1e-5;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    rows: usize,
    width: usize,
    components: usize,
    mean: Vec<f64>,
    variances: Vec<f64>,
    total_variance: f64,
    component_fingerprint: Vec<f64>,
    centred_fingerprint: Vec<f64>,
    reduced_fingerprint: Vec<f64>,
}

/// The rows of the script.
fn rows(count: usize, width: usize) -> Result<Vec<f32>> {
    let wide = |name: &str, shape: &[usize], low, high| -> Result<Tensor> {
        Ok(values(name, shape, low, high)?.to_dtype(DType::F64)?)
    };
    let fading: Vec<f64> = (0..width).map(|column| 0.8f64.powf(column as f64)).collect();
    let fading = Tensor::from_vec(fading, width, &Device::Cpu)?;
    let factors = wide("pca factors", &[count, width], -1.0, 1.0)?.broadcast_mul(&fading)?;
    let rows = factors.matmul(&wide("pca loadings", &[width, width], -1.0, 1.0)?)?;
    let rows = rows.broadcast_add(&wide("pca mean", &[width], 1.0, 4.0)?)?;
    Ok(rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn check_rows(name: &str, data: Vec<f32>, width: usize, golden: &[f64]) -> Result<()> {
    let count = data.len() / width;
    let distance = fingerprint_distance(name, &Tensor::from_vec(data, (count, width), &Device::Cpu)?, golden)?;
    ensure!(distance < ROW_TOLERANCE, "{name}: {distance:.2e}");
    Ok(())
}

fn projected(projection: &Projection, rows: &[f32]) -> Vec<f32> {
    rows.chunks(projection.feature_width()).flat_map(|row| projection.embedding(row).unwrap_or_default()).collect()
}

fn check_relative(name: &str, found: &[f64], golden: &[f64]) -> Result<()> {
    ensure!(found.len() == golden.len(), "{name}: {} numbers expected, {} found", golden.len(), found.len());
    for (found, expected) in found.iter().zip(golden) {
        ensure!((found - expected).abs() < TOLERANCE * expected.abs() + 1e-12, "{name}: {found}, expected {expected}");
    }
    Ok(())
}

#[test]
fn projections_equal_those_of_numpy() -> Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/pca.json");
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(golden)?)?;
    ensure!(golden.cases.len() == 3, "{} cases", golden.cases.len());
    for case in &golden.cases {
        let rows = rows(case.rows, case.width)?;
        // In parts of unequal length, as shards are.
        let (first, rest) = rows.split_at(case.rows / 3 * case.width);
        let centring = fit(&[first, rest], case.width, None, &|_| ())?;
        let mean: Vec<f64> = centring.mean.iter().map(|x| f64::from(*x)).collect();
        check_relative("mean", &mean, &case.mean)?;
        check_rows("centred", projected(&centring, &rows), case.width, &case.centred_fingerprint)?;

        let reducing = fit(&[first, rest], case.width, Some(case.components), &|_| ())?;
        ensure!(reducing.mean == centring.mean, "the mean does not depend on the components");
        check_rows("reduced", projected(&reducing, &rows), case.components, &case.reduced_fingerprint)?;
        let Some(reduction) = reducing.reduction else { anyhow::bail!("no components") };
        check_relative("variances", &reduction.variances, &case.variances)?;
        check_relative("total variance", &[reduction.total_variance], &[case.total_variance])?;
        check_rows("components", reduction.components, case.width, &case.component_fingerprint)?;
    }
    Ok(())
}
