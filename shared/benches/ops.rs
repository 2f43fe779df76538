//! Times of the CPU engine: every operator at the sizes of `ResNet`-18, `ResNet`-50, `EfficientNet`-B0, `ViT`-Tiny and `XCiT`-Tiny, and
//! whole networks.
//!
//! The pool has as many threads as the machine has cores unless `RAYON_NUM_THREADS` says otherwise. Names carry the sizes.

use candle_core::{DType, Device, Tensor, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use shared::models::{Arch, Encoder};
use shared::ops::{
    self, Activation, Attention, AttentionBlock, BasicBlock, Bottleneck, Builder, ClassAttentionBlock, Engine, Gate,
    Geometry, HiddenLayer, Init, LocalBlock, LocalPatchInteraction, MbConv, MlpBlock, Mode, Padding, Parameter,
    ParameterStore, Pass, PatchEmbedding, PositionResampling, Positions, ProjectionHead, SqueezeExcite, Stem,
    WeightLayout,
};
use shared::{Result, losses};

const TRAIN: Mode = Mode::Train { bn_groups: 1 };
const BATCH: usize = 32;
const FITS: &str = "the benchmark's tensors fit its operations";

#[global_allocator]
static ALLOCATOR: ops::TensorAllocator = ops::TensorAllocator;

fn pixels(shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product::<usize>();
    Ok(Tensor::arange(0u32, count as u32, &Device::Cpu)?.to_dtype(DType::F32)?.sin()?.reshape(shape)?)
}

/// Times an operator in training forward, the same with its backward pass, and in inference.
fn operator(
    criterion: &mut Criterion,
    name: &str,
    shape: &[usize],
    store: &ParameterStore,
    run: impl Fn(&Tensor, &Pass) -> Result<Tensor>,
) -> Result<()> {
    let train = Pass { mode: TRAIN, record: true, engine: Engine::Cpu };
    let infer = Pass { mode: Mode::Eval, record: false, engine: Engine::Cpu };
    let pixels = pixels(shape)?;
    let xs = Var::from_tensor(&pixels)?;
    let mut group = criterion.benchmark_group(format!("{name}, {shape:?}"));
    group.bench_function("forward", |bencher| bencher.iter(|| run(&xs, &train).expect(FITS)));
    let out = run(&xs, &train)?;
    // The gradient that comes back is a tensor of its own, as from the operator that follows.
    let weights = self::pixels(out.dims())?;
    drop(out);
    group.bench_function("forward and backward", |bencher| {
        let step = || store.backward(&(run(&xs, &train)? * &weights)?.sum_all()?);
        bencher.iter(|| step().expect(FITS));
    });
    group.bench_function("inference", |bencher| bencher.iter(|| run(&pixels, &infer).expect(FITS)));
    group.finish();
    Ok(())
}

fn convolutions(criterion: &mut Criterion) -> Result<()> {
    for (geometry, side, act) in [
        (Geometry::same(3, 64, 7, 2), 224, Activation::Relu),
        (Geometry::same(3, 32, 3, 2), 224, Activation::Silu),
        (Geometry::same(64, 64, 3, 1), 56, Activation::Relu),
        (Geometry::same(64, 128, 3, 2), 56, Activation::Relu),
        (Geometry::same(256, 256, 3, 1), 14, Activation::Relu),
        (Geometry::same(512, 512, 3, 1), 7, Activation::Relu),
        (Geometry::same(64, 256, 1, 1), 56, Activation::Relu),
        (Geometry::same(1024, 256, 1, 1), 14, Activation::Relu),
        (Geometry::same(320, 1280, 1, 1), 7, Activation::Silu),
        (Geometry::depthwise(144, 3, 1), 56, Activation::Silu),
        (Geometry::depthwise(96, 3, 2), 112, Activation::Silu),
        (Geometry::depthwise(672, 5, 1), 14, Activation::HardSwish),
        (Geometry::depthwise(144, 5, 2), 56, Activation::Silu),
    ] {
        let mut builder = Builder::new(&Device::Cpu);
        let block = builder.conv_bn("conv", "bn", geometry)?;
        let store = builder.finish(0)?;
        let Geometry { in_channels, out_channels, kernel, stride, depthwise, .. } = geometry;
        let kind = if depthwise { "depthwise" } else { "conv_bn" };
        let name = format!("{kind} {kernel}x{kernel} stride {stride} {in_channels}->{out_channels} {act:?}");
        operator(criterion, &name, &[BATCH, side, side, in_channels], &store, |xs, pass| {
            ops::conv_bn(xs, &block, None, act, pass)
        })?;
    }
    Ok(())
}

fn residual_blocks(criterion: &mut Criterion) -> Result<()> {
    let mut builder = Builder::new(&Device::Cpu);
    let stem = Stem { conv: builder.conv_bn("conv1", "bn1", Geometry::same(3, 64, 7, 2))? };
    let store = builder.finish(0)?;
    operator(criterion, "stem 64", &[BATCH, 224, 224, 3], &store, |xs, pass| ops::stem(xs, &stem, pass))?;

    let mut builder = Builder::new(&Device::Cpu);
    let basic = BasicBlock {
        conv1: builder.conv_bn("conv1", "bn1", Geometry::same(128, 128, 3, 1))?,
        conv2: builder.conv_bn("conv2", "bn2", Geometry::same(128, 128, 3, 1))?,
        downsample: None,
    };
    let store = builder.finish(0)?;
    operator(criterion, "basic_block 128", &[BATCH, 28, 28, 128], &store, |xs, pass| {
        ops::basic_block(xs, &basic, pass)
    })?;

    let mut builder = Builder::new(&Device::Cpu);
    let bottleneck = Bottleneck {
        conv1: builder.conv_bn("conv1", "bn1", Geometry::same(512, 256, 1, 1))?,
        conv2: builder.conv_bn("conv2", "bn2", Geometry::same(256, 256, 3, 2))?,
        conv3: builder.conv_bn("conv3", "bn3", Geometry::same(256, 1024, 1, 1))?,
        downsample: Some(builder.conv_bn("downsample.0", "downsample.1", Geometry::same(512, 1024, 1, 2))?),
    };
    let store = builder.finish(0)?;
    operator(criterion, "bottleneck 512->1024 stride 2", &[BATCH, 28, 28, 512], &store, |xs, pass| {
        ops::bottleneck(xs, &bottleneck, pass)
    })
}

fn inverted_residual_blocks(criterion: &mut Criterion) -> Result<()> {
    for ([inputs, inner, outputs], kernel, stride, side) in [
        ([32, 32, 16], 3, 1, 112),
        ([16, 96, 24], 3, 2, 112),
        ([24, 144, 24], 3, 1, 56),
        ([40, 240, 40], 5, 1, 28),
        ([112, 672, 112], 5, 1, 14),
        ([192, 1152, 192], 5, 1, 7),
    ] {
        let mut builder = Builder::new(&Device::Cpu);
        let expand = (inner > inputs)
            .then(|| builder.conv_bn("expand", "bn1", Geometry::same(inputs, inner, 1, 1)))
            .transpose()?;
        let depthwise = builder.conv_bn("depthwise", "bn2", Geometry::depthwise(inner, kernel, stride))?;
        let squeezed = (inputs / 4).max(1);
        let squeeze_excite = Some(SqueezeExcite {
            reduce: builder.pointwise("se.reduce", inner, squeezed)?,
            expand: builder.pointwise("se.expand", squeezed, inner)?,
            act: Activation::Silu,
            gate: Gate::Sigmoid,
        });
        let project = builder.conv_bn("project", "bn3", Geometry::same(inner, outputs, 1, 1))?;
        let residual = inputs == outputs && stride == 1;
        let block = MbConv { expand, depthwise, squeeze_excite, project, act: Activation::Silu, residual };
        let store = builder.finish(0)?;
        let name = format!("mb_conv {inputs}-{inner}-{outputs} {kernel}x{kernel} stride {stride}");
        operator(criterion, &name, &[BATCH, side, side, inputs], &store, |xs, pass| ops::mb_conv(xs, &block, pass))?;
    }
    Ok(())
}

fn ones(builder: &mut Builder, name: &str, shape: &[usize]) -> Result<Parameter> {
    builder.add(name.into(), shape, WeightLayout::Plain, Init::Constant(1.0), true)
}

fn attention_block(builder: &mut Builder, channels: usize, cross_covariance: Option<usize>) -> Result<AttentionBlock> {
    Ok(AttentionBlock {
        norm: builder.layer_norm("norm", channels)?,
        qkv: builder.token_linear("qkv", channels, 3 * channels)?,
        attention: match cross_covariance {
            Some(heads) => Attention::CrossCovariance { temperature: ones(builder, "temperature", &[heads, 1, 1])? },
            None => Attention::Tokens { heads: channels / 64 },
        },
        projection: builder.token_linear("projection", channels, channels)?,
        layer_scale: cross_covariance.map(|_| ones(builder, "gamma", &[channels])).transpose()?,
    })
}

fn blocks_of_transformers(criterion: &mut Criterion) -> Result<()> {
    const CHANNELS: usize = 192;
    let (row, grid) = ([BATCH, 197, CHANNELS], [BATCH, 14, 14, CHANNELS]);

    let mut builder = Builder::new(&Device::Cpu);
    let geometry = Geometry::same(3, CHANNELS, 16, 16).with_padding(Padding::Symmetric(0));
    let embedding = PatchEmbedding {
        projection: builder.biased_conv("projection", geometry)?,
        class_token: ones(&mut builder, "class", &[1, 1, CHANNELS])?,
        positions: Positions {
            table: ones(&mut builder, "table", &[1, 197, CHANNELS])?,
            side: 14,
            resampling: PositionResampling::Timm,
        },
    };
    let store = builder.finish(0)?;
    operator(criterion, "embed_patches 192", &[BATCH, 224, 224, 3], &store, |xs, pass| {
        ops::embed_patches(xs, &embedding, pass)
    })?;

    let mut builder = Builder::new(&Device::Cpu);
    let norm = builder.layer_norm("norm", CHANNELS)?;
    let store = builder.finish(0)?;
    operator(criterion, "layer_norm 192", &row, &store, |xs, pass| ops::layer_norm(xs, &norm, pass))?;

    let mut builder = Builder::new(&Device::Cpu);
    let linear = builder.token_linear("fc", CHANNELS, 4 * CHANNELS)?;
    let store = builder.finish(0)?;
    operator(criterion, "linear 192->768 Gelu", &row, &store, |xs, pass| {
        ops::linear(xs, &linear, Activation::Gelu, pass)
    })?;

    let empty = Builder::new(&Device::Cpu).finish(0)?;
    let qkv = [BATCH, 197, 3 * CHANNELS];
    operator(criterion, "attention, 3 heads", &qkv, &empty, |xs, pass| ops::attention(xs, 3, pass))?;

    let mut builder = Builder::new(&Device::Cpu);
    let temperature = ones(&mut builder, "temperature", &[4, 1, 1])?;
    let store = builder.finish(0)?;
    operator(criterion, "cross_covariance_attention, 4 heads", &[BATCH, 196, 3 * CHANNELS], &store, |xs, pass| {
        ops::cross_covariance_attention(xs, &temperature, pass)
    })?;

    for (name, shape, heads) in
        [("attention_block 192", row.as_slice(), None), ("attention_block 192 between channels", &grid, Some(4))]
    {
        let mut builder = Builder::new(&Device::Cpu);
        let block = attention_block(&mut builder, CHANNELS, heads)?;
        let store = builder.finish(0)?;
        operator(criterion, name, shape, &store, |xs, pass| ops::attention_block(xs, &block, pass))?;
    }

    let mut builder = Builder::new(&Device::Cpu);
    let block = MlpBlock {
        norm: builder.layer_norm("norm", CHANNELS)?,
        hidden: builder.token_linear("hidden", CHANNELS, 4 * CHANNELS)?,
        output: builder.token_linear("output", 4 * CHANNELS, CHANNELS)?,
        layer_scale: None,
    };
    let store = builder.finish(0)?;
    operator(criterion, "mlp_block 192-768-192", &row, &store, |xs, pass| ops::mlp_block(xs, &block, pass))?;

    let mut builder = Builder::new(&Device::Cpu);
    let block = LocalBlock {
        norm: builder.layer_norm("norm", CHANNELS)?,
        interaction: LocalPatchInteraction {
            conv1: builder.biased_conv("conv1", Geometry::depthwise(CHANNELS, 3, 1))?,
            norm: builder.batch_norm("bn", CHANNELS)?,
            conv2: builder.biased_conv("conv2", Geometry::depthwise(CHANNELS, 3, 1))?,
        },
        layer_scale: ones(&mut builder, "gamma", &[CHANNELS])?,
    };
    let store = builder.finish(0)?;
    operator(criterion, "local_block 192", &grid, &store, |xs, pass| ops::local_block(xs, &block, pass))?;

    let mut builder = Builder::new(&Device::Cpu);
    let block = ClassAttentionBlock {
        norm1: builder.layer_norm("norm1", CHANNELS)?,
        query: builder.token_linear("query", CHANNELS, CHANNELS)?,
        key: builder.token_linear("key", CHANNELS, CHANNELS)?,
        value: builder.token_linear("value", CHANNELS, CHANNELS)?,
        projection: builder.token_linear("projection", CHANNELS, CHANNELS)?,
        heads: 4,
        layer_scale1: ones(&mut builder, "gamma1", &[CHANNELS])?,
        norm2: builder.layer_norm("norm2", CHANNELS)?,
        hidden: builder.token_linear("hidden", CHANNELS, 4 * CHANNELS)?,
        output: builder.token_linear("output", 4 * CHANNELS, CHANNELS)?,
        layer_scale2: ones(&mut builder, "gamma2", &[CHANNELS])?,
    };
    let store = builder.finish(0)?;
    operator(criterion, "class_attention_block 192", &row, &store, |xs, pass| {
        ops::class_attention_block(xs, &block, pass)
    })
}

fn pools_and_rows(criterion: &mut Criterion) -> Result<()> {
    let empty = Builder::new(&Device::Cpu).finish(0)?;
    operator(criterion, "max_pool", &[BATCH, 112, 112, 64], &empty, ops::max_pool)?;
    operator(criterion, "global_average_pool", &[BATCH, 7, 7, 1280], &empty, ops::global_average_pool)?;
    operator(criterion, "l2_normalise", &[256, 128], &empty, ops::l2_normalise)?;
    let mut builder = Builder::new(&Device::Cpu);
    let hidden = builder.linear("fc.0", 1280, 2048)?;
    let output = builder.linear("fc.2", 2048, 128)?;
    let head = ProjectionHead { hidden: Some(HiddenLayer { linear: hidden.clone(), norm: None }), output };
    let store = builder.finish(0)?;
    operator(criterion, "linear 1280->2048 Relu", &[BATCH, 1280], &store, |xs, pass| {
        ops::linear(xs, &hidden, Activation::Relu, pass)
    })?;
    operator(criterion, "projection_head 1280-2048-128", &[BATCH, 1280], &store, |xs, pass| {
        ops::projection_head(xs, &head, pass)
    })
}

/// What a step of SwAV does to scores: 256 samples against 3000 prototypes, behind a queue of 3840.
fn assignments(criterion: &mut Criterion) -> Result<()> {
    let scores = pixels(&[3840 + 256, 3000])?;
    criterion.bench_function("sinkhorn N=4096 P=3000", |bencher| {
        bencher.iter(|| losses::sinkhorn(&scores, 0.05, 3, 256).expect(FITS));
    });
    let logits = Var::from_tensor(&pixels(&[256, 3000])?)?;
    let targets = losses::sinkhorn(&logits, 0.05, 3, 256)?;
    criterion.bench_function("soft_cross_entropy B=256 P=3000, forward and backward", |bencher| {
        bencher.iter(|| {
            let loss = losses::soft_cross_entropy(&logits, &targets, 0.1).expect(FITS);
            loss.backward().expect(FITS)
        });
    });
    Ok(())
}

fn contrast_and_updates(criterion: &mut Criterion) -> Result<()> {
    let pass = Pass { mode: Mode::Eval, record: false, engine: Engine::Cpu };
    let rows = |count: usize| ops::l2_normalise(&pixels(&[count, 128])?, &pass);
    let (q, k, queue) = (Var::from_tensor(&rows(256)?)?, rows(256)?, rows(65_536)?);
    criterion.bench_function("info_nce B=256 D=128 K=65536, forward and backward", |bencher| {
        let step = || -> Result<_> { Ok(losses::info_nce(&q, &k, &queue, 0.2)?.loss.backward()?) };
        bencher.iter(|| step().expect(FITS));
    });
    let [parameter, gradient, momentum] = [pixels(&[5_000_000])?, pixels(&[5_000_000])?, pixels(&[5_000_000])?];
    let step = ops::DescentStep { momentum: 0.9, nesterov: false, weight_decay: 1e-4, scale: 1.0, lr: 1e-9 };
    criterion.bench_function("sgd of 5 million parameters", |bencher| {
        bencher.iter(|| ops::descend_in_place(&parameter, &gradient, &momentum, &step).expect(FITS));
    });
    let square = gradient.sqr()?;
    let step = ops::AdamStep { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-4, lr: 1e-9, step: 1 };
    criterion.bench_function("adamw of 5 million parameters", |bencher| {
        bencher.iter(|| ops::adamw_in_place(&parameter, &gradient, [&momentum, &square], &step).expect(FITS));
    });
    criterion.bench_function("ema of 5 million parameters", |bencher| {
        bencher.iter(|| ops::ema_in_place(&parameter, &gradient, 0.999).expect(FITS));
    });
    Ok(())
}

fn networks(criterion: &mut Criterion) -> Result<()> {
    let convolutional = [Arch::ResNet18, Arch::EfficientNetB0, Arch::MobileNetV3Large];
    for arch in convolutional.into_iter().chain([Arch::VitTinyPatch16, Arch::XcitTiny12Patch16]) {
        let encoder = Encoder::new(arch, None, 0)?;
        for side in [64, 224] {
            let xs = pixels(&[BATCH, side, side, 3])?;
            criterion.bench_function(&format!("{arch} at {side}, B={BATCH}, inference"), |bencher| {
                bencher.iter(|| encoder.features(&xs, Mode::Eval).expect(FITS));
            });
            criterion.bench_function(&format!("{arch} at {side}, B={BATCH}, forward and backward"), |bencher| {
                let step = || -> Result<_> {
                    let loss = encoder.features(&xs, TRAIN)?.sqr()?.mean_all()?;
                    encoder.store().backward(&loss)
                };
                bencher.iter(|| step().expect(FITS));
            });
        }
    }
    Ok(())
}

fn all(criterion: &mut Criterion) {
    ops::reserve_memory();
    for group in [
        convolutions,
        residual_blocks,
        inverted_residual_blocks,
        blocks_of_transformers,
        pools_and_rows,
        assignments,
        contrast_and_updates,
        networks,
    ] {
        group(criterion).expect(FITS);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = all
}
criterion_main!(benches);
