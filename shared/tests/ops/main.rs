//! The CPU engine against the reference, against finite differences, and against itself at other thread counts.

mod bits;
mod block;
mod finite_differences;
mod support;
mod token_block;
mod twins;

use candle_core::{DType, Device, Tensor, Var};
use shared::cli::with_threads;
use shared::models::{Arch, Encoder, HeadConfig};
use shared::ops::{self, Activation, ConvBn, Engine, Geometry, Mode, ParameterStore, Pass};
use shared::{Error, losses, optim};
use support::{TRAIN, TestResult, difference, flat, pass};

fn wave(shape: &[usize], step: f64) -> Tensor {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> =
        (0..count).map(|i| ((i as f64 * step).sin() + 0.3 * (i as f64 * 0.11).cos()) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("the values fill the shape")
}

/// L2 norm of the difference, as a part of the norm.
fn distance(expected: &Tensor, found: &Tensor) -> f64 {
    let (apart, scale) = difference(expected, found);
    apart / scale
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
fn small_and_thin_images() -> TestResult {
    twins::small_and_thin_images()
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
fn blocks_of_transformers() -> TestResult {
    twins::blocks_of_transformers()
}

#[test]
fn all_gradients_have_the_same_bits_at_any_thread_count() -> TestResult {
    bits::all_gradients_have_the_same_bits_at_any_thread_count()
}

#[test]
fn results_do_not_depend_on_whether_a_backward_pass_follows() -> TestResult {
    bits::results_do_not_depend_on_whether_a_backward_pass_follows()
}

#[test]
fn nan_is_never_lost() -> TestResult {
    bits::nan_is_never_lost()
}

#[test]
fn nan_reaches_its_group_in_training() -> TestResult {
    bits::nan_reaches_its_group_in_training()
}

#[test]
fn nan_reaches_its_row_and_the_loss() -> TestResult {
    bits::nan_reaches_its_row_and_the_loss()
}

fn conv_bn(geometry: Geometry) -> Result<(ConvBn, ParameterStore), Error> {
    let spec = block::Spec::ConvBn { geometry, act: Activation::Relu, residual: false };
    let (block::Block::ConvBn(params, _), store) = spec.build(DType::F32)? else { unreachable!("as specified") };
    store.load(&block::drawn(&store, 3)?)?;
    Ok((params, store))
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
        means.push(store.to_tensors()?["conv.bn.running_mean"].clone());
    }
    let expected = ((&means[0] + &means[1])? * 0.5)?;
    assert!(distance(&expected, &grouped.to_tensors()?["conv.bn.running_mean"]) < 1e-6);
    assert!(distance(&means[0], &means[1]) > 1e-3);
    Ok(())
}

#[test]
fn max_pool_sends_a_tie_to_the_first_pixel() -> TestResult {
    let xs = Var::ones((1, 2, 2, 1), DType::F32, &Device::Cpu)?;
    let out = ops::max_pool(&xs, &pass(Engine::Cpu, TRAIN))?;
    let grads = out.sum_all()?.backward()?;
    assert_eq!(flat(grads.get(&xs).expect("reached")), [1.0, 0.0, 0.0, 0.0]);
    Ok(())
}

/// Three steps of the whole objective; returns every byte that could differ.
fn three_steps(engine: Engine) -> Result<Vec<u32>, Error> {
    let head = Some(HeadConfig::mlp(96, 16));
    let query = Encoder::new(Arch::ResNet18, head, 5)?.with_engine(engine);
    let key = query.momentum_copy()?;
    let mut sgd = optim::Optimizer::new(optim::OptimizerConfig::sgd(0.9, 1e-4));
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
        sgd.step("query", query.store(), &grads, 0.03)?;
        trace.push(loss.to_scalar::<f32>()?.to_bits());
    }
    for store in [query.store(), key.store()] {
        for tensor in store.to_tensors()?.values().filter(|tensor| tensor.dtype().is_float()) {
            trace.extend(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
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
    let head = Some(HeadConfig::mlp(64, 8));
    let student = Encoder::new(Arch::ResNet18, head, 1)?;
    let eval = Pass { mode: Mode::Eval, record: false, engine: Engine::Cpu };
    let teacher = ops::l2_normalise(&wave(&[8, 8], 1.9), &eval)?;
    let xs = wave(&[8, 32, 32, 3], 0.37);
    let mut sgd = optim::Optimizer::new(optim::OptimizerConfig::sgd(0.9, 1e-4));
    let mut trace = Vec::new();
    for _ in 0..12 {
        let loss = losses::distillation(&student.embeddings(&xs, TRAIN)?, &teacher)?;
        let grads = student.store().backward(&loss)?;
        assert_eq!(grads.iter().count(), student.store().parameters().count());
        sgd.step("student", student.store(), &grads, 0.05)?;
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
