//! The reference's gradients against central differences in f64.

use candle_core::{DType, Device, Tensor, Var};
use shared::ops::{Activation, Engine, Gate, Geometry, Mode, Padding};

use crate::block::{Spec, Squeeze, drawn};
use crate::support::{ACTIVATIONS, GROUPS, TRAIN, TestResult, flat, norm, normal};
use crate::token_block;
use crate::twins::run;

const STEP: f64 = 1e-5;
/// On a directional derivative, as a part of the lengths of gradient and direction.
const TOLERANCE: f64 = 1e-7;

/// Compares all gradients of the weighted sum of a block's outputs along drawn directions.
fn confirm(spec: &Spec, size: [usize; 3], mode: Mode, seed: u64) -> TestResult {
    let (block, store) = spec.build(DType::F64)?;
    let wide = |tensor: Tensor| tensor.to_dtype(DType::F64);
    let xs = wide(normal(&spec.input_shape(size), seed)?)?;
    let shapes = spec.extra_shapes(size);
    let extras = shapes.iter().zip(1..).map(|(shape, i)| Ok(wide(normal(shape, seed + i)?)?));
    let extras: Vec<Tensor> = extras.collect::<Result<_, shared::Error>>()?;
    store.load(&drawn(&store, seed)?)?;
    block.avoid_kinks(&xs, &extras, mode)?;
    let start = store.to_tensors()?;
    let results = run(&block, &store, &xs, &extras, Engine::Reference, mode)?;
    let loss = |xs: &Tensor, extras: &[Tensor]| -> Result<f64, shared::Error> {
        let out = block.forward(xs, extras, &crate::support::pass(Engine::Reference, mode))?;
        let weights = normal(out.dims(), 99)?.to_dtype(DType::F64)?;
        Ok((out * weights)?.sum_all()?.to_scalar()?)
    };
    let along = |from: &Tensor, direction: &Tensor, by: f64| from + (direction * by)?;
    let gradients = results.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("gradient of ")?, tensor)));
    for (name, gradient) in gradients {
        if name == "key.bias" {
            // It moves all similarities of a query alike, which softmax takes away: its gradient is rounding.
            assert!(norm(&flat(gradient)) < 1e-12, "{spec:?}");
            continue;
        }
        let direction = wide(normal(gradient.dims(), seed + 50)?)?;
        let mut sides = Vec::new();
        for by in [STEP, -STEP] {
            store.load(&start)?;
            sides.push(match name {
                "the input" => loss(&along(&xs, &direction, by)?, &extras)?,
                "the residual" => loss(&xs, &[along(&extras[0], &direction, by)?])?,
                _ => {
                    // Gradients lie as in memory, `start` as in files: the parameter is moved where it is.
                    let (_, parameter) =
                        store.parameters().find(|(found, _)| *found == name).expect("a gradient has a parameter");
                    let moved = along(&parameter.var().as_detached_tensor(), &direction, by)?;
                    parameter.var().set(&moved)?;
                    loss(&xs, &extras)?
                }
            });
        }
        let difference = (sides[0] - sides[1]) / (2.0 * STEP);
        let product: f64 = flat(gradient).iter().zip(flat(&direction)).map(|(g, d)| g * d).sum();
        let scale = norm(&flat(gradient)) * norm(&flat(&direction));
        assert!(scale > 0.0, "{spec:?}: the gradient of {name} is 0");
        let error = (difference - product).abs() / scale;
        assert!(error < TOLERANCE, "{spec:?} {mode:?}: along {name} {difference} instead of {product}");
    }
    Ok(())
}

#[test]
fn convolutions() -> TestResult {
    let mut seed = 0;
    for geometry in [
        Geometry::same(3, 4, 1, 1),
        Geometry::same(3, 4, 3, 1),
        Geometry::same(3, 2, 3, 2),
        Geometry { padding: Padding::Same, ..Geometry::same(2, 3, 5, 2) },
        Geometry::depthwise(4, 3, 1),
        Geometry { padding: Padding::Same, ..Geometry::depthwise(4, 5, 2) },
    ] {
        for act in ACTIVATIONS {
            for mode in [TRAIN, GROUPS] {
                seed += 1;
                confirm(&Spec::ConvBn { geometry, act, residual: seed % 2 == 0 }, [4, 6, 5], mode, seed)?;
            }
        }
    }
    Ok(())
}

#[test]
fn blocks() -> TestResult {
    let silu = Squeeze { channels: 3, act: Activation::Silu, gate: Gate::Sigmoid };
    let relu = Squeeze { channels: 6, act: Activation::Relu, gate: Gate::HardSigmoid };
    for mode in [TRAIN, GROUPS] {
        for spec in [
            Spec::Stem { channels: 3 },
            Spec::BasicBlock { inputs: 3, outputs: 3, stride: 1 },
            Spec::BasicBlock { inputs: 3, outputs: 4, stride: 2 },
            Spec::Bottleneck { inputs: 4, width: 3, outputs: 5, stride: 2 },
            Spec::mb_conv([3, 2, 3], |c| Geometry::depthwise(c, 3, 1), Activation::Silu, Some(silu)),
            Spec::mb_conv([3, 3, 4], |c| Geometry::depthwise(c, 5, 2), Activation::HardSwish, Some(relu)),
            Spec::mb_conv([4, 1, 4], |c| Geometry::depthwise(c, 3, 1), Activation::Relu6, None),
            Spec::MaxPool { channels: 3 },
            Spec::GlobalAveragePool { channels: 3 },
            Spec::Linear { inputs: 5, outputs: 4, act: Activation::Silu },
            Spec::ProjectionHead { inputs: 5, hidden: 7, outputs: 3 },
            Spec::L2Normalise { width: 6 },
        ] {
            confirm(&spec, [4, 9, 8], mode, 70)?;
        }
    }
    Ok(())
}

#[test]
fn blocks_of_transformers() -> TestResult {
    for (seed, spec) in (200..).zip(token_block::all()) {
        for mode in [TRAIN, GROUPS] {
            confirm(&Spec::Token(spec), [2, 3, 4], mode, seed)?;
        }
    }
    Ok(())
}

/// The percentage of correct rows has no gradient, so it is taken out of the sum.
#[test]
fn contrastive_loss() -> TestResult {
    let rows = |count: usize, seed: u64| normal(&[count, 6], seed)?.to_dtype(DType::F64).map_err(shared::Error::from);
    let (q, k, queue) = (Var::from_tensor(&rows(4, 1)?)?, rows(4, 2)?, rows(9, 3)?);
    let loss = |q: &Tensor| shared::ops::info_nce(q, &k, &queue, 0.7, Engine::Reference).map(|(loss, _)| loss);
    let tracked = loss(&q)?.backward()?;
    let gradient = flat(tracked.get(&q).expect("a variable"));
    for place in 0..gradient.len() {
        let mut step = vec![0.0; gradient.len()];
        step[place] = STEP;
        let step = Tensor::from_vec(step, (4, 6), &Device::Cpu)?;
        let [up, down] = [loss(&(q.as_tensor() + &step)?)?, loss(&(q.as_tensor() - &step)?)?];
        let difference = (up.to_scalar::<f64>()? - down.to_scalar::<f64>()?) / (2.0 * STEP);
        assert!((difference - gradient[place]).abs() < 1e-8, "{place}: {difference} instead of {}", gradient[place]);
    }
    Ok(())
}
