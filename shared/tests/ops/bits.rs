//! What holds of the CPU engine to the bit: the same results at any number of threads and whether or not a backward pass follows; and NaN
//! that reaches whatever depends on it.

use candle_core::{DType, Device, Tensor};
use shared::Error;
use shared::cli::with_threads;
use shared::ops::{Activation, Engine, Gate, Geometry, Mode, Pass};

use crate::block::{Spec, Squeeze, drawn};
use crate::support::{ACTIVATIONS, GROUPS, TRAIN, TestResult, flat, normal, pass};
use crate::token_block::{self, TokenSpec};
use crate::twins::{Results, run};

const SIZE: [usize; 3] = [6, 20, 18];

const SQUEEZE: Squeeze = Squeeze { channels: 3, act: Activation::Silu, gate: Gate::Sigmoid };

/// Every block, and every kernel of convolutions, at [`SIZE`] large enough for several pieces.
fn specs() -> Vec<Spec> {
    let convolution = |geometry, residual| Spec::ConvBn { geometry, act: Activation::Relu, residual };
    let mut specs = vec![
        convolution(Geometry::same(20, 40, 3, 1), true),
        convolution(Geometry::same(20, 40, 5, 2), false),
        convolution(Geometry::same(40, 70, 1, 1), true),
        convolution(Geometry::depthwise(40, 3, 1), false),
        convolution(Geometry::depthwise(40, 5, 2), false),
        Spec::Stem { channels: 20 },
        Spec::BasicBlock { inputs: 20, outputs: 20, stride: 1 },
        Spec::BasicBlock { inputs: 20, outputs: 24, stride: 2 },
        Spec::Bottleneck { inputs: 20, width: 9, outputs: 30, stride: 2 },
        Spec::mb_conv([12, 4, 12], |c| Geometry::depthwise(c, 5, 1), Activation::Silu, Some(SQUEEZE)),
        Spec::mb_conv([12, 1, 16], |c| Geometry::depthwise(c, 3, 2), Activation::HardSwish, None),
        Spec::MaxPool { channels: 20 },
        Spec::GlobalAveragePool { channels: 20 },
        Spec::Linear { inputs: 70, outputs: 400, act: Activation::Silu },
        Spec::ProjectionHead { inputs: 70, hidden: 90, outputs: 40 },
        Spec::L2Normalise { width: 40 },
        Spec::InfoNce { width: 40, queue: 5000, temperature: 6.0 },
    ];
    // A patch has several pixels.
    let fits = |spec: &TokenSpec| !matches!(spec, TokenSpec::EmbedPatches { channels, .. } if *channels > 6);
    specs.extend(token_block::all().into_iter().filter(fits).map(Spec::Token));
    specs
}

fn extras(spec: &Spec, size: [usize; 3]) -> Result<Vec<Tensor>, Error> {
    spec.extra_shapes(size).iter().zip(4..).map(|(shape, seed)| normal(shape, seed)).collect()
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>, Error> {
    let tensor = tensor.to_dtype(DType::F32)?; // Exact: all are f32 but small counters.
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

pub(crate) fn all_gradients_have_the_same_bits_at_any_thread_count() -> TestResult {
    for spec in specs() {
        let (xs, extras) = (normal(&spec.input_shape(SIZE), 3)?, extras(&spec, SIZE)?);
        for mode in [TRAIN, GROUPS, Mode::Eval] {
            let at = |threads: u16| -> Result<Results, Error> {
                let (block, store) = spec.build(DType::F32)?;
                store.load(&drawn(&store, 5)?)?;
                with_threads(Some(threads), || run(&block, &store, &xs, &extras, Engine::Cpu, mode))
            };
            let first = at(1)?;
            assert!(mode == Mode::Eval || first.contains_key("gradient of the input"), "{spec:?}");
            for threads in [2, 3, 5] {
                let results = at(threads)?;
                assert_eq!(first.keys().collect::<Vec<_>>(), results.keys().collect::<Vec<_>>());
                for (name, expected) in &first {
                    let same = bits(expected)? == bits(&results[name])?;
                    assert!(same, "{spec:?} {mode:?}: {name} differs at {threads} threads");
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn results_do_not_depend_on_whether_a_backward_pass_follows() -> TestResult {
    for spec in specs() {
        let (xs, extras) = (normal(&spec.input_shape(SIZE), 3)?, extras(&spec, SIZE)?);
        for mode in [TRAIN, GROUPS, Mode::Eval] {
            let recorded = |record: bool| -> Result<Results, Error> {
                let (block, store) = spec.build(DType::F32)?;
                store.load(&drawn(&store, 5)?)?;
                let pass = Pass { mode, record, engine: Engine::Cpu };
                let out = block.forward(&xs, &extras, &pass)?.detach();
                let mut results = store.to_tensors()?;
                results.insert("output".into(), out);
                Ok(results)
            };
            let (with, without) = (recorded(true)?, recorded(false)?);
            for (name, tensor) in &with {
                assert!(bits(tensor)? == bits(&without[name])?, "{spec:?} {mode:?}: {name} differs");
            }
        }
    }
    Ok(())
}

/// One NaN at a time, in evaluation mode: wherever the reference has NaN, the engine has it, and it has none in other images. Within an
/// image, a NaN may spread over the tile of pixels that is computed together.
pub(crate) fn nan_is_never_lost() -> TestResult {
    const SIZE: [usize; 3] = [2, 6, 5];
    let convolution = |geometry| move |act| Spec::ConvBn { geometry, act, residual: false };
    let mut specs: Vec<Spec> = Vec::new();
    for geometry in [
        Geometry::same(9, 18, 1, 1),
        Geometry::same(9, 18, 3, 1),
        Geometry::same(4, 18, 3, 2),
        Geometry::depthwise(18, 3, 1),
        Geometry::depthwise(18, 5, 2),
    ] {
        specs.extend(ACTIVATIONS.map(convolution(geometry)));
    }
    for act in ACTIVATIONS {
        specs.push(Spec::Linear { inputs: 4, outputs: 18, act });
        for gate in [Gate::Sigmoid, Gate::HardSigmoid] {
            let squeeze = Some(Squeeze { channels: 3, act, gate });
            specs.push(Spec::mb_conv([5, 4, 5], |c| Geometry::depthwise(c, 3, 1), Activation::Relu, squeeze));
        }
    }
    specs.extend([
        Spec::MaxPool { channels: 18 },
        Spec::GlobalAveragePool { channels: 18 },
        Spec::Stem { channels: 18 },
        Spec::BasicBlock { inputs: 18, outputs: 18, stride: 1 },
        Spec::Bottleneck { inputs: 9, width: 5, outputs: 18, stride: 2 },
        Spec::ProjectionHead { inputs: 4, hidden: 5, outputs: 18 },
    ]);
    specs.extend(token_block::all().into_iter().map(Spec::Token));
    for spec in specs {
        let (block, store) = spec.build(DType::F32)?;
        store.load(&drawn(&store, 1)?)?;
        let shape = spec.input_shape(SIZE);
        let count: usize = shape.iter().product();
        let image = count / shape[0];
        for place in [0, image / 2, image - 1, image, count - 1] {
            let mut values = flat(&normal(&shape, 8)?);
            values[place] = f64::NAN;
            let xs = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?.to_dtype(DType::F32)?;
            let results = [Engine::Reference, Engine::Cpu]
                .map(|engine| block.forward(&xs, &[], &pass(engine, Mode::Eval)).map(|out| flat(&out)));
            let [expected, found] = results;
            let (expected, found) = (expected?, found?);
            assert!(expected.iter().any(|x| x.is_nan()), "{spec:?}: the reference loses the NaN at {place}");
            let lost = expected.iter().zip(&found).filter(|(expected, found)| expected.is_nan() && !found.is_nan());
            assert_eq!(lost.count(), 0, "{spec:?} loses the NaN at {place}");
            let other = found.chunks(found.len() / shape[0]).nth(usize::from(place < image)).expect("two images");
            assert!(other.iter().all(|x| x.is_finite()), "{spec:?}: the NaN at {place} reaches another image");
        }
    }
    Ok(())
}

/// In training, batch norm carries a NaN to its whole group, and to no other.
pub(crate) fn nan_reaches_its_group_in_training() -> TestResult {
    for act in ACTIVATIONS {
        for geometry in [Geometry::same(9, 18, 1, 1), Geometry::same(9, 18, 3, 1), Geometry::same(9, 18, 5, 2)] {
            let (block, store) = Spec::ConvBn { geometry, act, residual: false }.build(DType::F32)?;
            store.load(&drawn(&store, 1)?)?;
            let mut values = flat(&normal(&[4, 6, 5, 9], 8)?);
            *values.last_mut().expect("there are values") = f64::NAN;
            let xs = Tensor::from_vec(values, (4, 6, 5, 9), &Device::Cpu)?.to_dtype(DType::F32)?;
            let out = flat(&block.forward(&xs, &[], &pass(Engine::Cpu, GROUPS))?);
            let (first, second) = out.split_at(out.len() / 2);
            assert!(first.iter().all(|x| x.is_finite()), "{geometry:?} {act:?}");
            assert!(second.iter().all(|x| x.is_nan()), "{geometry:?} {act:?}");
            assert!(flat(&store.to_tensors()?["conv.bn.running_mean"]).iter().all(|x| x.is_nan()));
        }
    }
    Ok(())
}

/// Rows of unit length and the contrastive loss: NaN reaches the whole row, and the loss from any of its inputs.
pub(crate) fn nan_reaches_its_row_and_the_loss() -> TestResult {
    let poisoned = |shape: &[usize], place: usize| -> Result<Tensor, Error> {
        let mut values = flat(&normal(shape, 8)?);
        values[place] = f64::NAN;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)?)
    };
    let loss = Spec::InfoNce { width: 18, queue: 2100, temperature: 4.0 };
    let (block, _) = loss.build(DType::F32)?;
    let shapes = [vec![3, 18], vec![3, 18], vec![2100, 18]];
    for poison in 0..shapes.len() {
        let last = shapes[poison].iter().product::<usize>() - 1;
        for place in [0, last] {
            let input = |i: usize| if i == poison { poisoned(&shapes[i], place) } else { normal(&shapes[i], 9) };
            let extras = [input(1)?, input(2)?];
            let out = flat(&block.forward(&input(0)?, &extras, &pass(Engine::Cpu, Mode::Eval))?);
            assert!(out[0].is_nan(), "a NaN at {place} of input {poison} gives the loss {}", out[0]);
        }
    }
    let (block, _) = Spec::L2Normalise { width: 18 }.build(DType::F32)?;
    for place in [0, 17] {
        let out = flat(&block.forward(&poisoned(&[2, 18], place)?, &[], &pass(Engine::Cpu, Mode::Eval))?);
        assert!(out[..18].iter().all(|x| x.is_nan()), "a NaN at {place} gives {:?}", &out[..18]);
        assert!(out[18..].iter().all(|x| x.is_finite()), "{:?}", &out[18..]);
    }
    Ok(())
}
