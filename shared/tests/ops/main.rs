//! The CPU engine against the reference, against finite differences, and against itself at other thread counts.

mod block;
mod finite_differences;
mod support;
mod twins;

use candle_core::{Device, Tensor, Var};
use shared::cli::with_threads;
use shared::models::{Arch, Encoder, HeadConfig};
use shared::ops::{self, Activation, Builder, ConvBn, Engine, Geometry, Linear, Mode, ParameterStore, Pass};
use shared::{Error, losses, optim};

type TestResult = Result<(), Box<dyn std::error::Error>>;

const TRAIN: Mode = Mode::Train { bn_groups: 1 };

fn wave(shape: &[usize], step: f64) -> Tensor {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> =
        (0..count).map(|i| ((i as f64 * step).sin() + 0.3 * (i as f64 * 0.11).cos()) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("the values fill the shape")
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|tensor| tensor.to_vec1()).expect("an f32 tensor")
}

/// Largest difference over the largest value.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (flat(a), flat(b));
    let scale = a.iter().fold(1e-20f32, |top, x| top.max(x.abs()));
    a.iter().zip(&b).fold(0f32, |top, (a, b)| top.max((a - b).abs())) / scale
}

fn pass(engine: Engine, mode: Mode) -> Pass {
    Pass { mode, record: mode != Mode::Eval, engine }
}

/// A block with awkward values in every parameter and buffer.
fn conv_bn(geometry: Geometry) -> Result<(ConvBn, ParameterStore), Error> {
    let mut builder = Builder::new(&Device::Cpu);
    let block = builder.conv_bn("conv", "bn", geometry)?;
    let store = builder.finish(3)?;
    let mut tensors = store.to_tensors()?;
    for (name, step) in [("bn.weight", 0.7), ("bn.bias", 1.3), ("bn.running_mean", 0.4)] {
        tensors.insert(name.into(), wave(&[geometry.out_channels], step));
    }
    tensors.insert("bn.running_var".into(), (wave(&[geometry.out_channels], 0.9).sqr()? + 0.1)?);
    store.load(&tensors)?;
    Ok((block, store))
}

fn geometries() -> Vec<Geometry> {
    vec![
        Geometry::same(3, 8, 7, 2),
        Geometry::same(8, 12, 3, 1),
        Geometry::same(8, 20, 3, 2),
        Geometry::same(5, 7, 1, 1),
        Geometry::same(6, 9, 1, 2),
    ]
}

#[test]
fn convolutions_of_every_kind_at_odd_sizes() -> TestResult {
    twins::convolutions_of_every_kind_at_odd_sizes()
}

#[test]
fn every_activation_with_and_without_a_residual() -> TestResult {
    twins::every_activation_with_and_without_a_residual()
}

#[test]
fn depthwise_convolutions_at_odd_sizes() -> TestResult {
    twins::depthwise_convolutions_at_odd_sizes()
}

#[test]
fn one_pixel() -> TestResult {
    twins::one_pixel()
}

#[test]
fn sizes_that_are_cut_into_several_pieces() -> TestResult {
    twins::sizes_that_are_cut_into_several_pieces()
}

#[test]
fn residual_blocks() -> TestResult {
    twins::residual_blocks()
}

#[test]
fn inverted_residual_blocks() -> TestResult {
    twins::inverted_residual_blocks()
}

#[test]
fn pools_and_rows() -> TestResult {
    twins::pools_and_rows()
}

#[test]
fn nan_is_never_lost() -> TestResult {
    twins::nan_is_never_lost()
}

#[test]
fn all_gradients_have_the_same_bits_at_any_thread_count() -> TestResult {
    twins::all_gradients_have_the_same_bits_at_any_thread_count()
}

#[test]
fn conv_bn_agrees_with_the_reference_forward_and_backward() -> TestResult {
    for geometry in geometries() {
        for (mode, with_residual, act) in [
            (TRAIN, true, Activation::Relu),
            (Mode::Train { bn_groups: 2 }, false, Activation::Relu),
            (TRAIN, false, Activation::Identity),
            (Mode::Eval, true, Activation::Relu),
        ] {
            let (height, width) = (11, 9); // candle's own gradient fails where the sides differ in parity
            let xs = wave(&[4, height, width, geometry.in_channels], 0.37);
            let shape = [4, geometry.output_side(height), geometry.output_side(width), geometry.out_channels];
            let mut results = Vec::new();
            for engine in [Engine::Reference, Engine::Cpu] {
                let (block, store) = conv_bn(geometry)?;
                let (xs, residual) = (Var::from_tensor(&xs)?, Var::from_tensor(&wave(&shape, 0.23))?);
                let residual = with_residual.then_some(residual);
                let out = ops::conv_bn(&xs, &block, residual.as_deref(), act, &pass(engine, mode))?;
                let mut tensors = vec![out.clone()];
                if mode != Mode::Eval {
                    store.clear_deposits();
                    let tracked = (&out * wave(&shape, 0.51))?.sum_all()?.backward()?;
                    let grads = store.take_gradients(&tracked)?;
                    tensors.extend(
                        ["conv.weight", "bn.weight", "bn.bias"].map(|n| grads.get(n).expect("reached").clone()),
                    );
                    tensors.extend(tracked.get(&xs).cloned());
                    tensors.extend(residual.and_then(|residual| tracked.get(&residual).cloned()));
                }
                let buffers = store.to_tensors()?;
                tensors.extend(["bn.running_mean", "bn.running_var"].map(|name| buffers[name].clone()));
                assert_eq!(buffers["bn.num_batches_tracked"].to_scalar::<i64>()?, i64::from(mode != Mode::Eval));
                results.push(tensors);
            }
            assert_eq!(results[0].len(), results[1].len());
            for (index, (reference, cpu)) in results[0].iter().zip(&results[1]).enumerate() {
                let error = distance(reference, cpu);
                assert!(error < 2e-5, "{geometry:?} {mode:?} tensor {index}: {error}");
            }
        }
    }
    Ok(())
}

#[test]
fn groups_are_batches_of_their_own_and_move_the_buffers_to_their_mean() -> TestResult {
    let geometry = Geometry::same(5, 6, 3, 1);
    let xs = wave(&[4, 5, 5, 5], 0.37);
    let (grouped_block, grouped) = conv_bn(geometry)?;
    let grouped_pass = pass(Engine::Cpu, Mode::Train { bn_groups: 2 });
    let out = ops::conv_bn(&xs, &grouped_block, None, Activation::Relu, &grouped_pass)?;
    let mut means = Vec::new();
    for half in 0..2 {
        let (block, store) = conv_bn(geometry)?;
        let alone =
            ops::conv_bn(&xs.narrow(0, 2 * half, 2)?, &block, None, Activation::Relu, &pass(Engine::Cpu, TRAIN))?;
        assert!(distance(&alone, &out.narrow(0, 2 * half, 2)?.contiguous()?) < 1e-6);
        means.push(store.to_tensors()?["bn.running_mean"].clone());
    }
    let expected = ((&means[0] + &means[1])? * 0.5)?;
    assert!(distance(&expected, &grouped.to_tensors()?["bn.running_mean"]) < 1e-6);
    assert!(distance(&means[0], &means[1]) > 1e-3);
    Ok(())
}

#[test]
fn conv_bn_gradients_agree_with_finite_differences() -> TestResult {
    let geometry = Geometry::same(3, 4, 3, 2);
    let (block, store) = conv_bn(geometry)?;
    let xs = wave(&[2, 6, 5, 3], 0.37);
    let weights = wave(&[2, 3, 3, 4], 0.51);
    let loss = |xs: &Tensor| -> Result<Tensor, Error> {
        let out = ops::conv_bn(xs, &block, None, Activation::Identity, &pass(Engine::Cpu, TRAIN))?;
        Ok((out * &weights)?.sum_all()?)
    };
    let xs_var = Var::from_tensor(&xs)?;
    store.clear_deposits();
    let tracked = loss(&xs_var)?.backward()?;
    let grads = store.take_gradients(&tracked)?;
    let step = 1e-2f32;
    let check = |gradient: f32, above: &Tensor, below: &Tensor| -> Result<(), Error> {
        let slope = (above.to_scalar::<f32>()? - below.to_scalar::<f32>()?) / (2.0 * step);
        assert!((gradient - slope).abs() < 2e-2 * slope.abs().max(1.0), "{gradient} {slope}");
        Ok(())
    };
    let dxs = flat(tracked.get(&xs_var).expect("reached"));
    for index in (0..dxs.len()).step_by(7) {
        let moved = |by: f32| -> Result<Tensor, Error> {
            let mut values = flat(&xs);
            values[index] += by;
            Ok(Tensor::from_vec(values, xs.shape(), &Device::Cpu)?)
        };
        check(dxs[index], &loss(&moved(step)?)?, &loss(&moved(-step)?)?)?;
    }
    for (name, parameter) in store.parameters() {
        let gradient = flat(grads.get(name).expect("reached"));
        let original = parameter.var().copy()?;
        for index in (0..gradient.len()).step_by(5) {
            let moved = |by: f32| -> Result<Tensor, Error> {
                let mut values = flat(&original);
                values[index] += by;
                parameter.var().set(&Tensor::from_vec(values, original.shape(), &Device::Cpu)?)?;
                loss(&xs)
            };
            check(gradient[index], &moved(step)?, &moved(-step)?)?;
            parameter.var().set(&original)?;
        }
    }
    Ok(())
}

type Op<'a> = Box<dyn Fn(&Tensor, &Pass) -> Result<Tensor, Error> + 'a>;

#[test]
fn pools_linear_and_unit_rows_agree_with_the_reference() -> TestResult {
    let mut builder = Builder::new(&Device::Cpu);
    let layer: Linear = builder.linear("fc", 40, 150)?;
    let store = builder.finish(1)?;
    let images = wave(&[3, 9, 6, 5], 0.37);
    let rows = wave(&[19, 40], 0.29);
    let cases: Vec<(&str, &Tensor, Op<'_>)> = vec![
        ("max_pool", &images, Box::new(ops::max_pool)),
        ("global_average_pool", &images, Box::new(ops::global_average_pool)),
        ("linear", &rows, Box::new(|xs, pass| ops::linear(xs, &layer, Activation::Relu, pass))),
        ("l2_normalise", &rows, Box::new(ops::l2_normalise)),
    ];
    for (name, xs, op) in cases {
        let mut results = Vec::new();
        for engine in [Engine::Reference, Engine::Cpu] {
            let xs = Var::from_tensor(xs)?;
            let out = op(&xs, &pass(engine, TRAIN))?;
            let weights = wave(out.dims(), 0.51);
            store.clear_deposits();
            let tracked = (&out * weights)?.sum_all()?.backward()?;
            let grads = store.take_gradients(&tracked)?;
            let mut tensors = vec![out, tracked.get(&xs).expect("reached").clone()];
            tensors.extend(grads.iter().map(|(_, gradient)| gradient.clone()));
            results.push(tensors);
        }
        assert_eq!(results[0].len(), if name == "linear" { 4 } else { 2 });
        for (reference, cpu) in results[0].iter().zip(&results[1]) {
            let error = distance(reference, cpu);
            assert!(error < 1e-5, "{name}: {error}");
        }
    }
    Ok(())
}

#[test]
fn max_pool_sends_a_tie_to_the_first_pixel() -> TestResult {
    let xs = Var::ones((1, 2, 2, 1), candle_core::DType::F32, &Device::Cpu)?;
    let out = ops::max_pool(&xs, &pass(Engine::Cpu, TRAIN))?;
    let grads = out.sum_all()?.backward()?;
    assert_eq!(flat(grads.get(&xs).expect("reached")), [1.0, 0.0, 0.0, 0.0]);
    Ok(())
}

/// Three steps of the whole objective; returns every byte that could differ.
fn three_steps(engine: Engine) -> Result<Vec<u32>, Error> {
    let head = Some(HeadConfig { hidden: 96, embedding_dim: 16 });
    let query = Encoder::new(Arch::ResNet18, head, 5)?.with_engine(engine);
    let key = query.momentum_copy()?;
    let mut sgd = optim::Sgd::new(optim::SgdConfig { momentum: 0.9, weight_decay: 1e-4 });
    let unit = Pass { mode: Mode::Eval, record: false, engine };
    let queue = ops::l2_normalise(&wave(&[70, 16], 0.71), &unit)?;
    let teacher = ops::l2_normalise(&wave(&[4, 16], 0.77), &unit)?;
    let mut trace = Vec::new();
    for step in 0..3 {
        let (view_q, view_k) = (wave(&[4, 40, 40, 3], 0.3 + 0.01 * f64::from(step)), wave(&[4, 40, 40, 3], 0.5));
        let mode = Mode::Train { bn_groups: 2 };
        optim::ema_update(key.store(), query.store(), 0.99)?;
        let k = key.embeddings(&view_k, mode)?;
        let (s_q, s_k) = (query.embeddings(&view_q, mode)?, query.embeddings(&view_k, mode)?);
        let contrast = losses::info_nce(&s_q, &k, &queue, 0.2)?.loss;
        let agreement = (losses::distillation(&s_q, &teacher)? + losses::distillation(&s_k, &teacher)?)?;
        let loss = (contrast + (agreement * 4.0)?)?;
        let grads = query.store().backward(&loss)?;
        sgd.step(query.store(), &grads, 0.03)?;
        trace.push(loss.to_scalar::<f32>()?.to_bits());
    }
    for store in [query.store(), key.store()] {
        for tensor in store.to_tensors()?.values().filter(|tensor| tensor.dtype().is_float()) {
            trace.extend(flat(tensor).into_iter().map(f32::to_bits));
        }
    }
    Ok(trace)
}

#[test]
fn training_gives_the_same_bits_at_any_thread_count() -> TestResult {
    let one = with_threads(Some(1), || three_steps(Engine::Cpu))?;
    for threads in [2, 3] {
        let more = with_threads(Some(threads), || three_steps(Engine::Cpu))?;
        assert!(one == more, "{threads} threads differ from one");
    }
    Ok(())
}

#[test]
fn whole_steps_agree_with_the_reference() -> TestResult {
    let (reference, cpu) = (three_steps(Engine::Reference)?, three_steps(Engine::Cpu)?);
    for (step, (a, b)) in reference.iter().zip(&cpu).take(3).enumerate() {
        let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
        assert!((a - b).abs() < 2e-3 * a.abs(), "loss of step {step}: {a} {b}");
    }
    Ok(())
}

#[test]
fn loss_falls_on_a_toy_batch() -> TestResult {
    let head = Some(HeadConfig { hidden: 64, embedding_dim: 8 });
    let student = Encoder::new(Arch::ResNet18, head, 1)?;
    let eval = Pass { mode: Mode::Eval, record: false, engine: Engine::Cpu };
    let teacher = ops::l2_normalise(&wave(&[8, 8], 1.9), &eval)?;
    let xs = wave(&[8, 32, 32, 3], 0.37);
    let mut sgd = optim::Sgd::new(optim::SgdConfig { momentum: 0.9, weight_decay: 1e-4 });
    let mut trace = Vec::new();
    for _ in 0..12 {
        let loss = losses::distillation(&student.embeddings(&xs, TRAIN)?, &teacher)?;
        let grads = student.store().backward(&loss)?;
        assert_eq!(grads.iter().count(), student.store().parameters().count());
        sgd.step(student.store(), &grads, 0.05)?;
        trace.push(loss.to_scalar::<f32>()?);
    }
    assert!(trace[11] < 0.5 * trace[0], "{trace:?}");
    Ok(())
}

#[test]
fn a_batch_that_the_groups_do_not_divide_is_refused() -> TestResult {
    let encoder = Encoder::new(Arch::ResNet18, None, 1)?;
    let xs = wave(&[3, 32, 32, 3], 0.37);
    let error = encoder.features(&xs, Mode::Train { bn_groups: 2 }).expect_err("3 is odd");
    assert!(error.to_string().contains("a batch of 3 cannot be cut into 2 batch norm groups"), "{error}");
    let error = encoder.features(&wave(&[1, 32, 32, 3], 0.37), TRAIN).expect_err("one value per channel at the end");
    assert!(error.to_string().contains("more than one value per channel"), "{error}");
    let error = encoder.features(&wave(&[2, 32, 32, 4], 0.37), TRAIN).expect_err("four channels");
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    Ok(())
}
