//! Every block of the CPU engine against its reference twin: results, all gradients, running statistics.
//!
//! The twin computes in f64, so that what differs is the engine's own rounding. Parameters are drawn, then moved so that no value lies
//! close to a kink, where rounding would decide which way a gradient goes.
//!
//! Two rules are looser than [`TOLERANCE`] of a tensor's own norm, for gradients that are sums in which little is left:
//!
//! - Where a channel has one weight, batch norm takes its size out of the result: its gradient is 0 but for the variance's offset. The
//!   yardstick is what cancels ([`cancelled`]). The same holds of a bias that moves all similarities of a query alike.
//! - Where the reference in f32 is off by more than an eighth of the tolerance, the engine may be off eight times as far, and never by
//!   more than [`WORST`]: a channel whose batch norm has next to no variance, a gradient that hardly passes a hard gate.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use shared::Error;
use shared::ops::{Activation, Engine, Gate, Geometry, Mode, Padding, ParameterStore, PositionResampling};

use crate::block::{Block, Spec, Squeeze, drawn};
use crate::support::{ACTIVATIONS, GROUPS, TRAIN, TestResult, difference, flat, norm, normal, pass};
use crate::token_block::{self, TokenSpec};

/// The bound on the L2 norm of a difference, as a part of the norm of what is right.
const TOLERANCE: f64 = 1e-5;

/// The same bound where the reference in f32 is inexact too.
const WORST: f64 = 1e-4;

/// What a block computes, by name.
pub(crate) type Results = BTreeMap<String, Tensor>;

/// Runs a block forward and, if its batch norm trains, backward from random weights of its outputs.
pub(crate) fn run(
    block: &Block,
    store: &ParameterStore,
    xs: &Tensor,
    extras: &[Tensor],
    engine: Engine,
    mode: Mode,
) -> Result<Results, Error> {
    let mut results = Results::new();
    let xs = Var::from_tensor(xs)?;
    // Of the contrastive loss only the query gets a gradient: keys and queue are not variables.
    let tracks_extras = matches!(block, Block::ConvBn(..));
    let extras: Vec<Tensor> = extras
        .iter()
        .map(|extra| if tracks_extras { Ok(Var::from_tensor(extra)?.into_inner()) } else { Ok(extra.clone()) })
        .collect::<Result<_, candle_core::Error>>()?;
    let out = block.forward(&xs, &extras, &pass(engine, mode))?;
    if mode != Mode::Eval {
        store.clear_deposits();
        let weights = normal(out.dims(), 99)?.to_dtype(out.dtype())?;
        let tracked = (&out * weights)?.sum_all()?.backward()?;
        for (name, gradient) in store.take_gradients(&tracked)?.iter() {
            results.insert(format!("gradient of {name}"), gradient.clone());
        }
        if let Some(gradient) = tracked.get(&xs) {
            results.insert("gradient of the input".into(), gradient.clone());
        }
        for extra in extras.iter().filter(|_| tracks_extras) {
            results.insert("gradient of the residual".into(), tracked.get(extra).expect("it is a variable").clone());
        }
    }
    results.insert("output".into(), out.detach());
    for (name, tensor) in store.to_tensors()? {
        if name.contains("running") || name.ends_with("num_batches_tracked") {
            results.insert(name, tensor);
        }
    }
    Ok(results)
}

/// What three engines compute with the same parameters and inputs.
struct Compared {
    /// Parameters and buffers.
    values: BTreeMap<String, Tensor>,
    /// By the reference in f64.
    exact: Results,
    /// By the reference in f32.
    rounded: Results,
    /// By the CPU engine.
    found: Results,
}

fn compared(spec: &Spec, size: [usize; 3], mode: Mode, seed: u64) -> Result<Compared, Error> {
    let xs = normal(&spec.input_shape(size), seed)?;
    let extras: Vec<Tensor> =
        spec.extra_shapes(size).iter().zip(1..).map(|(shape, i)| normal(shape, seed + i)).collect::<Result<_, _>>()?;
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64);
    let (wide_xs, wide_extras) = (wide(&xs)?, extras.iter().map(wide).collect::<Result<Vec<_>, _>>()?);

    let (twin, twin_store) = spec.build(DType::F64)?;
    let values = drawn(&twin_store, seed)?;
    twin_store.load(&values)?;
    twin.avoid_kinks(&wide_xs, &wide_extras, mode)?;
    let mut moved = twin_store.to_tensors()?;
    for (name, tensor) in &mut moved {
        if name.contains("running") || name.ends_with("num_batches_tracked") {
            *tensor = values[name].clone();
        } else {
            *tensor = tensor.to_dtype(DType::F32)?;
        }
    }
    twin_store.load(&moved)?;
    let exact = run(&twin, &twin_store, &wide_xs, &wide_extras, Engine::Reference, mode)?;
    let in_f32 = |engine: Engine| -> Result<Results, Error> {
        let (block, store) = spec.build(DType::F32)?;
        store.load(&moved)?;
        run(&block, &store, &xs, &extras, engine, mode)
    };
    let (rounded, found) = (in_f32(Engine::Reference)?, in_f32(Engine::Cpu)?);
    Ok(Compared { values: moved, exact, rounded, found })
}

/// Compares a block with its twin.
fn agree(spec: &Spec, size: [usize; 3], mode: Mode, seed: u64) -> TestResult {
    let Compared { values, exact, rounded, found } = compared(spec, size, mode, seed)?;
    assert_eq!(exact.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{spec:?}");
    for (name, expected) in &exact {
        let (apart, scale) = difference(expected, &found[name]);
        let (unavoidable, _) = difference(expected, &rounded[name]);
        let bound = match cancelled(spec, size, name, &values, &exact) {
            Some(cancelled) => TOLERANCE * cancelled.max(scale),
            None => (TOLERANCE * scale).max((8.0 * unavoidable).min(WORST * scale)),
        };
        assert!(
            apart <= bound,
            "{spec:?} {size:?} {mode:?}: {name} is off by {apart:.2e}, more than {bound:.2e}; its norm is {scale:.2e}, \
             the reference in f32 is off by {unavoidable:.2e}"
        );
    }
    Ok(())
}

/// The norm of what cancels in a gradient that is 0. A bias of keys is taken away by softmax; its yardstick is the gradient of their weights.
/// In the gradient of a convolution with one weight `w` for each channel: with statistics that do not follow
/// the weight, the gradient would be that of batch norm's scale, times the scale, divided by `w`.
fn cancelled(
    spec: &Spec,
    [_, height, width]: [usize; 3],
    name: &str,
    values: &BTreeMap<String, Tensor>,
    exact: &Results,
) -> Option<f64> {
    if name == "gradient of key.bias" {
        return Some(norm(&flat(&exact["gradient of key.weight"])));
    }
    let Spec::ConvBn { geometry, .. } = spec else { return None };
    // Of a kernel around the only pixel of an image, one tap counts.
    let taps = if height * width == 1 { 1 } else { geometry.kernel * geometry.kernel };
    if name != "gradient of conv.weight" || geometry.channels_per_group() * taps > 1 {
        return None;
    }
    let area = geometry.kernel * geometry.kernel;
    let weights = flat(&values["conv.weight"]).into_iter().skip(area / 2).step_by(area);
    let scales = flat(&values["conv.bn.weight"]).into_iter().zip(flat(&exact["gradient of conv.bn.weight"]));
    let terms: Vec<f64> = scales.zip(weights).map(|((scale, gradient), weight)| scale * gradient / weight).collect();
    Some(norm(&terms))
}

/// In training with one group and with two, where the batch can be cut, and in evaluation mode.
fn agree_in_all_modes(spec: &Spec, size: [usize; 3], seed: u64) -> TestResult {
    agree(spec, size, TRAIN, seed)?;
    if size[0].is_multiple_of(2) {
        agree(spec, size, GROUPS, seed + 100)?;
    }
    agree(spec, size, Mode::Eval, seed + 200)
}

fn same_padding(geometry: Geometry) -> Geometry {
    Geometry { padding: Padding::Same, ..geometry }
}

pub(crate) fn convolutions_of_every_kind_at_odd_sizes() -> TestResult {
    // Batch, height, width; inputs, outputs. One channel, one vector of channels, what is left beside vectors, several panels.
    let shapes = [
        ([4, 11, 9], [1, 1]),
        ([3, 8, 8], [3, 8]),
        ([2, 7, 13], [16, 17]),
        ([5, 6, 5], [9, 33]),
        ([2, 12, 10], [24, 50]),
        ([1, 17, 6], [40, 72]),
    ];
    let mut seed = 0;
    for (size, [inputs, outputs]) in shapes {
        for kernel in [1, 3, 5, 7] {
            for stride in [1, 2] {
                for padded in [|geometry| geometry, same_padding] {
                    seed += 1;
                    let act = ACTIVATIONS[seed as usize % ACTIVATIONS.len()];
                    let geometry = padded(Geometry::same(inputs, outputs, kernel, stride));
                    agree_in_all_modes(&Spec::ConvBn { geometry, act, residual: seed % 3 == 0 }, size, seed)?;
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn every_activation_with_and_without_a_residual() -> TestResult {
    for geometry in [Geometry::same(12, 20, 1, 1), Geometry::same(12, 20, 3, 1), Geometry::depthwise(20, 3, 1)] {
        for act in ACTIVATIONS {
            for residual in [false, true] {
                agree_in_all_modes(&Spec::ConvBn { geometry, act, residual }, [4, 6, 7], 7)?;
            }
        }
    }
    Ok(())
}

pub(crate) fn depthwise_convolutions_at_odd_sizes() -> TestResult {
    let mut seed = 300;
    for (size, channels) in
        [([4, 9, 7], 1), ([2, 8, 14], 16), ([3, 5, 5], 35), ([2, 15, 12], 48), ([1, 7, 8], 100), ([4, 3, 2], 18)]
    {
        for kernel in [3, 5, 7] {
            for stride in [1, 2] {
                for padded in [|geometry| geometry, same_padding] {
                    seed += 1;
                    let act = ACTIVATIONS[seed as usize % ACTIVATIONS.len()];
                    let geometry = padded(Geometry::depthwise(channels, kernel, stride));
                    agree_in_all_modes(&Spec::ConvBn { geometry, act, residual: false }, size, seed)?;
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn one_pixel() -> TestResult {
    for (index, kernel) in [1, 3, 5].into_iter().enumerate() {
        for geometry in
            [Geometry::same(5, 6, kernel, 1), Geometry::same(20, 34, kernel, 2), Geometry::depthwise(18, kernel, 1)]
        {
            let spec = Spec::ConvBn { geometry, act: Activation::Silu, residual: false };
            agree_in_all_modes(&spec, [8, 1, 1], 500 + index as u64)?;
        }
    }
    agree(&Spec::MaxPool { channels: 3 }, [2, 1, 1], TRAIN, 510)?;
    agree(&Spec::GlobalAveragePool { channels: 3 }, [2, 1, 1], TRAIN, 511)
}

/// 3x3 kernels over images that fill too little of the tiles of fast convolutions, and images of one row or column under every kernel.
pub(crate) fn small_and_thin_images() -> TestResult {
    let mut seed = 520;
    for size in [[4, 2, 2], [2, 1, 9], [3, 13, 1], [5, 2, 5], [4, 5, 2]] {
        for [inputs, outputs] in [[8, 16], [21, 40], [270, 300]] {
            seed += 1;
            let act = ACTIVATIONS[seed as usize % ACTIVATIONS.len()];
            let geometry = Geometry::same(inputs, outputs, 3, 1);
            agree_in_all_modes(&Spec::ConvBn { geometry, act, residual: seed % 2 == 0 }, size, seed)?;
        }
    }
    for size in [[4, 1, 9], [2, 13, 1]] {
        for kernel in [1, 3, 5, 7] {
            for stride in [1, 2] {
                for padded in [|geometry| geometry, same_padding] {
                    for geometry in
                        [Geometry::same(6, 20, kernel, stride), Geometry::depthwise(18, kernel.max(3), stride)]
                    {
                        seed += 1;
                        let spec = Spec::ConvBn { geometry: padded(geometry), act: Activation::Silu, residual: false };
                        agree_in_all_modes(&spec, size, seed)?;
                    }
                }
            }
        }
        agree_in_all_modes(&Spec::Stem { channels: 18 }, size, seed)?;
        agree(&Spec::MaxPool { channels: 18 }, size, TRAIN, seed)?;
        let silu = Squeeze { channels: 3, act: Activation::Silu, gate: Gate::Sigmoid };
        let inside = |channels| Geometry::depthwise(channels, 5, 1);
        agree_in_all_modes(&Spec::mb_conv([6, 4, 6], inside, Activation::Silu, Some(silu)), size, seed)?;
    }
    agree_in_all_modes(&Spec::BasicBlock { inputs: 20, outputs: 36, stride: 2 }, [4, 4, 3], 590)?;
    agree_in_all_modes(&Spec::BasicBlock { inputs: 260, outputs: 260, stride: 1 }, [4, 2, 2], 591)
}

pub(crate) fn sizes_that_are_cut_into_several_pieces() -> TestResult {
    for (geometry, size) in [
        (Geometry::same(64, 64, 3, 1), [2, 30, 29]),
        (Geometry::same(96, 130, 3, 1), [1, 14, 15]),
        (Geometry::same(256, 300, 1, 1), [2, 15, 14]),
        (Geometry::same(24, 144, 1, 1), [4, 28, 28]),
        (Geometry::same(48, 64, 3, 2), [2, 28, 27]),
        (Geometry::same(3, 32, 3, 2), [2, 64, 60]),
        (Geometry::depthwise(240, 5, 1), [2, 28, 28]),
        (Geometry::depthwise(600, 3, 2), [2, 14, 14]),
        (Geometry::same(320, 272, 3, 1), [3, 7, 7]),
        (Geometry::same(200, 330, 3, 2), [2, 9, 8]),
        (Geometry::same(520, 260, 1, 1), [3, 7, 7]),
        (Geometry::same(260, 512, 1, 2), [2, 8, 9]),
    ] {
        agree_in_all_modes(&Spec::ConvBn { geometry, act: Activation::Relu, residual: false }, size, 600)?;
    }
    Ok(())
}

pub(crate) fn residual_blocks() -> TestResult {
    let mut seed = 700;
    for size in [[4, 9, 8], [2, 7, 7]] {
        for (inputs, outputs, stride) in [(8, 8, 1), (8, 20, 1), (20, 12, 2), (33, 33, 1)] {
            seed += 1;
            agree_in_all_modes(&Spec::BasicBlock { inputs, outputs, stride }, size, seed)?;
            agree_in_all_modes(&Spec::Bottleneck { inputs, width: 10, outputs, stride }, size, seed)?;
        }
    }
    agree_in_all_modes(&Spec::BasicBlock { inputs: 264, outputs: 264, stride: 1 }, [2, 4, 4], 780)?;
    agree_in_all_modes(&Spec::Bottleneck { inputs: 260, width: 70, outputs: 520, stride: 2 }, [2, 6, 5], 781)?;
    for (channels, size, seed) in [(20, [2, 33, 30], 790), (1, [3, 9, 8], 791), (64, [2, 64, 61], 792)] {
        agree_in_all_modes(&Spec::Stem { channels }, size, seed)?;
    }
    Ok(())
}

pub(crate) fn inverted_residual_blocks() -> TestResult {
    let silu = Squeeze { channels: 3, act: Activation::Silu, gate: Gate::Sigmoid };
    let relu = Squeeze { channels: 8, act: Activation::Relu, gate: Gate::HardSigmoid };
    let mut seed = 800;
    for size in [[4, 8, 9], [2, 14, 13]] {
        for widths in [[8, 1, 8], [8, 3, 8], [12, 4, 20], [5, 6, 7], [24, 6, 24]] {
            for squeeze in [None, Some(silu), Some(relu)] {
                for (kernel, stride) in [(3, 1), (5, 1), (3, 2), (5, 2)] {
                    seed += 1;
                    let inside = |channels| {
                        let geometry = Geometry::depthwise(channels, kernel, stride);
                        if seed % 2 == 0 { geometry } else { same_padding(geometry) }
                    };
                    let act = ACTIVATIONS[1 + seed as usize % (ACTIVATIONS.len() - 1)];
                    agree_in_all_modes(&Spec::mb_conv(widths, inside, act, squeeze), size, seed)?;
                }
            }
        }
    }
    let wide = |channels| Geometry::depthwise(channels, 5, 1);
    agree_in_all_modes(&Spec::mb_conv([112, 6, 112], wide, Activation::Silu, Some(silu)), [2, 7, 7], 990)?;
    // Images that are widened a few rows at a time in evaluation mode.
    let high = |channels| Geometry::depthwise(channels, 3, 2);
    agree_in_all_modes(&Spec::mb_conv([16, 6, 24], high, Activation::Silu, Some(silu)), [1, 41, 37], 991)
}

pub(crate) fn pools_and_rows() -> TestResult {
    let mut seed = 1000;
    for channels in [1, 16, 21, 70] {
        for size in [[3, 8, 8], [2, 7, 5], [1, 2, 9]] {
            seed += 1;
            agree(&Spec::MaxPool { channels }, size, TRAIN, seed)?;
            agree(&Spec::GlobalAveragePool { channels }, size, TRAIN, seed)?;
        }
    }
    for (batch, inputs, outputs) in [(1, 1, 1), (4, 7, 5), (5, 33, 100), (3, 70, 500), (32, 300, 128)] {
        for act in ACTIVATIONS {
            seed += 1;
            agree(&Spec::Linear { inputs, outputs, act }, [batch, 0, 0], TRAIN, seed)?;
        }
        agree(&Spec::ProjectionHead { inputs, hidden: 2 * inputs, outputs }, [batch, 0, 0], TRAIN, seed)?;
        agree(&Spec::L2Normalise { width: inputs + 1 }, [batch, 0, 0], TRAIN, seed)?;
    }
    for (batch, width, queue) in [(1, 3, 1), (4, 8, 5), (7, 20, 333), (32, 128, 3000)] {
        let spec = Spec::InfoNce { width, queue, temperature: (width as f64).sqrt() };
        agree(&spec, [batch, 0, 0], TRAIN, 1100 + queue as u64)?;
    }
    Ok(())
}

pub(crate) fn blocks_of_transformers() -> TestResult {
    let mut seed = 1200;
    for spec in token_block::all() {
        for size in [[2, 3, 3], [4, 5, 2], [1, 9, 12]] {
            seed += 1;
            agree_in_all_modes(&Spec::Token(spec), size, seed)?;
        }
    }
    // One token, and sizes that are cut into several pieces.
    let attention = |heads, channels, cross_covariance| {
        Spec::Token(TokenSpec::AttentionBlock { heads, channels, cross_covariance, scaled: cross_covariance })
    };
    for spec in [attention(2, 20, false), attention(2, 20, true)] {
        agree_in_all_modes(&spec, [2, 1, 1], 1300)?;
    }
    for spec in [attention(3, 192, false), attention(4, 192, true)] {
        agree_in_all_modes(&spec, [4, 14, 14], 1301)?;
    }
    agree_in_all_modes(&Spec::Token(TokenSpec::LocalBlock { channels: 192 }), [4, 14, 14], 1302)?;
    let mlp = TokenSpec::MlpBlock { channels: 192, hidden: 768, scaled: false };
    agree_in_all_modes(&Spec::Token(mlp), [2, 14, 14], 1303)?;
    let resampling = PositionResampling::Timm;
    let patches = TokenSpec::EmbedPatches { patch: 16, side: 14, resampling, channels: 192 };
    agree_in_all_modes(&Spec::Token(patches), [2, 14, 9], 1304)
}
