//! Times of the CPU engine: single layers at the sizes of a `ResNet`, whole networks forward and forward with backward.
//!
//! The pool has as many threads as the machine has cores unless `RAYON_NUM_THREADS` says otherwise. Names carry the sizes.

use candle_core::{DType, Device, Tensor, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use shared::models::{Arch, Encoder};
use shared::ops::{self, Activation, Builder, Engine, Geometry, Mode, Pass};
use shared::{Result, losses};

const TRAIN: Mode = Mode::Train { bn_groups: 1 };
const BATCH: usize = 32;
const FITS: &str = "the benchmark's tensors fit its operations";

fn pixels(shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product::<usize>();
    Ok(Tensor::arange(0u32, count as u32, &Device::Cpu)?.to_dtype(DType::F32)?.sin()?.reshape(shape)?)
}

fn layers(criterion: &mut Criterion) -> Result<()> {
    let pass = Pass { mode: TRAIN, record: true, engine: Engine::Cpu };
    for (geometry, side) in [
        (Geometry::same(64, 64, 3, 1), 56),
        (Geometry::same(64, 128, 3, 2), 56),
        (Geometry::same(256, 256, 3, 1), 14),
        (Geometry::same(512, 512, 3, 1), 7),
        (Geometry::same(64, 256, 1, 1), 56),
    ] {
        let mut builder = Builder::new(&Device::Cpu);
        let block = builder.conv_bn("conv", "bn", geometry)?;
        let store = builder.finish(0)?;
        let xs = Var::from_tensor(&pixels(&[BATCH, side, side, geometry.in_channels])?)?;
        let Geometry { in_channels, out_channels, kernel, stride, .. } = geometry;
        let name =
            format!("conv_bn_relu {kernel}x{kernel}/{stride} {in_channels}->{out_channels} at {side}, B={BATCH}");
        criterion.bench_function(&format!("{name}, forward"), |bencher| {
            bencher.iter(|| ops::conv_bn(&xs, &block, None, Activation::Relu, &pass).expect(FITS));
        });
        criterion.bench_function(&format!("{name}, forward and backward"), |bencher| {
            let step = || -> Result<_> {
                let out = ops::conv_bn(&xs, &block, None, Activation::Relu, &pass)?;
                store.backward(&ops::global_average_pool(&out, &pass)?.sum_all()?)
            };
            bencher.iter(|| step().expect(FITS));
        });
    }
    Ok(())
}

fn networks(criterion: &mut Criterion) -> Result<()> {
    let encoder = Encoder::new(Arch::ResNet18, None, 0)?;
    for side in [64, 224] {
        let xs = pixels(&[BATCH, side, side, 3])?;
        criterion.bench_function(&format!("resnet18 at {side}, B={BATCH}, evaluation"), |bencher| {
            bencher.iter(|| encoder.features(&xs, Mode::Eval).expect(FITS));
        });
        criterion.bench_function(&format!("resnet18 at {side}, B={BATCH}, forward and backward"), |bencher| {
            let step = || -> Result<_> {
                let loss = encoder.features(&xs, TRAIN)?.sqr()?.mean_all()?;
                encoder.store().backward(&loss)
            };
            bencher.iter(|| step().expect(FITS));
        });
    }
    Ok(())
}

fn contrast(criterion: &mut Criterion) -> Result<()> {
    let pass = Pass { mode: Mode::Eval, record: false, engine: Engine::Cpu };
    let rows = |count: usize| ops::l2_normalise(&pixels(&[count, 128])?, &pass);
    let (q, k, queue) = (Var::from_tensor(&rows(256)?)?, rows(256)?, rows(65_536)?);
    criterion.bench_function("info_nce B=256 D=128 K=65536, forward and backward", |bencher| {
        let step = || -> Result<_> { Ok(losses::info_nce(&q, &k, &queue, 0.2)?.loss.backward()?) };
        bencher.iter(|| step().expect(FITS));
    });
    Ok(())
}

#[global_allocator]
static ALLOCATOR: ops::TensorAllocator = ops::TensorAllocator;

fn all(criterion: &mut Criterion) {
    ops::reserve_memory();
    for group in [layers, networks, contrast] {
        group(criterion).expect(FITS);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = all
}
criterion_main!(benches);
