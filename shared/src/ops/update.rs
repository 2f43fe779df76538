//! How parameters move, in place: gradient descent, `AdamW`, moving averages; and the sums and checks that decide how far.

use candle_core::{DType, Tensor};

use super::{Engine, cpu, reference, shape_error};
use crate::Result;

/// The constants of one step of gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DescentStep {
    /// What remains of the previous steps.
    pub momentum: f64,
    /// Whether the step looks one step ahead.
    pub nesterov: bool,
    /// What the gradient gains, times the parameter.
    pub weight_decay: f64,
    /// Factor of the gradient and its decay together; 1 unless the optimiser adapts it to the tensor.
    pub scale: f64,
    /// Factor of the whole step.
    pub lr: f64,
}

/// The constants of one step of `AdamW`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// What the mean keeps of itself.
    pub beta1: f64,
    /// What the mean square keeps of itself.
    pub beta2: f64,
    /// Added to the divisor.
    pub epsilon: f64,
    /// Share of the parameter that goes in a step at rate 1.
    pub weight_decay: f64,
    /// Factor of the whole step.
    pub lr: f64,
    /// Steps that this parameter has made, this one included.
    pub step: u64,
}

impl AdamStep {
    /// What of the parameter stays: decay is decoupled from the gradient.
    pub fn keep(&self) -> f64 {
        1.0 - self.lr * self.weight_decay
    }

    /// Factor of the mean over its divisor, which makes up for a mean that started at 0.
    pub fn step_size(&self) -> f64 {
        self.lr / (1.0 - libm::pow(self.beta1, self.step as f64))
    }

    /// Divisor of the root of the mean square, for the same reason.
    pub fn square_correction(&self) -> f64 {
        (1.0 - libm::pow(self.beta2, self.step as f64)).sqrt()
    }
}

/// One step of stochastic gradient descent: `d = scale * (gradient + weight_decay * parameter)`,
/// `buffer = momentum * buffer + d`, then `parameter -= lr * buffer`, or by Nesterov `parameter -= lr * (d + momentum * buffer)`.
///
/// # Errors
/// Tensors of different shapes.
pub fn descend_in_place(parameter: &Tensor, gradient: &Tensor, buffer: &Tensor, step: &DescentStep) -> Result<()> {
    same_shape("gradient", parameter, gradient)?;
    same_shape("momentum", parameter, buffer)?;
    match Engine::for_device(parameter.device()) {
        Engine::Reference => reference::descend(parameter, gradient, buffer, step),
        Engine::Cpu => cpu::update::descend(parameter, &gradient.contiguous()?, buffer, step),
    }
}

/// One step of `AdamW`; `moments` are the running mean of the gradient and that of its square.
///
/// # Errors
/// Tensors of different shapes.
///
/// # Source
/// Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; the algorithm box of `torch.optim.AdamW`.
pub fn adamw_in_place(parameter: &Tensor, gradient: &Tensor, moments: [&Tensor; 2], step: &AdamStep) -> Result<()> {
    same_shape("gradient", parameter, gradient)?;
    for moment in moments {
        same_shape("moment", parameter, moment)?;
    }
    match Engine::for_device(parameter.device()) {
        Engine::Reference => reference::adamw(parameter, gradient, moments, step),
        Engine::Cpu => cpu::update::adamw(parameter, &gradient.contiguous()?, moments, step),
    }
}

/// `key = momentum * key + (1 - momentum) * query`, in place.
///
/// # Errors
/// Tensors of different shapes.
pub fn ema_in_place(key: &Tensor, query: &Tensor, momentum: f64) -> Result<()> {
    same_shape("ema", key, query)?;
    match Engine::for_device(key.device()) {
        Engine::Reference => reference::ema(key, query, momentum),
        Engine::Cpu => cpu::update::ema(key, query, momentum),
    }
}

/// `sum += value`, in place.
pub(super) fn add_in_place(sum: &Tensor, value: &Tensor) -> Result<()> {
    match Engine::for_device(sum.device()) {
        Engine::Reference => reference::add(sum, value),
        Engine::Cpu => cpu::update::add(sum, value),
    }
}

/// `values = factor * values`, in place.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn scale_in_place(values: &Tensor, factor: f64) -> Result<()> {
    match Engine::for_device(values.device()) {
        Engine::Reference => reference::assign(values, &(values.detach() * factor)?),
        Engine::Cpu => cpu::update::scale(values, factor),
    }
}

/// The sum of the squares of all elements, in f64; the same at any number of threads.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn sum_of_squares(values: &Tensor) -> Result<f64> {
    match Engine::for_device(values.device()) {
        Engine::Reference => Ok(values.detach().to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?),
        Engine::Cpu => cpu::update::sum_of_squares(&values.contiguous()?),
    }
}

/// The sum of the squares of `gradient + weight_decay * parameter`, in f64; the same at any number of threads.
///
/// # Errors
/// Tensors of different shapes.
pub fn sum_of_squares_decayed(gradient: &Tensor, parameter: &Tensor, weight_decay: f64) -> Result<f64> {
    same_shape("gradient", parameter, gradient)?;
    match Engine::for_device(parameter.device()) {
        Engine::Reference => sum_of_squares(&(gradient.detach() + (parameter.detach() * weight_decay)?)?),
        Engine::Cpu => cpu::update::sum_of_squares_decayed(&gradient.contiguous()?, parameter, weight_decay),
    }
}

/// Whether every element is a number, neither infinite nor undefined. Integers always are.
///
/// # Errors
/// Only if a tensor operation fails.
pub fn is_finite(values: &Tensor) -> Result<bool> {
    if !values.dtype().is_float() {
        return Ok(true);
    }
    match Engine::for_device(values.device()) {
        Engine::Reference => Ok((values.detach().to_dtype(DType::F64)? * 0.0)?.sum_all()?.to_scalar::<f64>()? == 0.0),
        Engine::Cpu => cpu::update::is_finite(&values.contiguous()?),
    }
}

pub(super) fn same_shape(op: &'static str, expected: &Tensor, got: &Tensor) -> Result<()> {
    if expected.dims() == got.dims() {
        return Ok(());
    }
    Err(shape_error(op, format!("{:?}", expected.dims()), got))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// More elements than one piece of work has, and no multiple of anything.
    const LENGTH: usize = 150_001;

    fn wave(frequency: f64) -> Tensor {
        let values: Vec<f32> = (0..LENGTH).map(|i| (i as f64 * frequency).sin() as f32).collect();
        Tensor::from_vec(values, LENGTH, &Device::Cpu).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn descent_is_the_references() {
        for nesterov in [false, true] {
            let step = DescentStep { momentum: 0.9, nesterov, weight_decay: 0.1, scale: 0.7, lr: 0.5 };
            let tensors = || [wave(0.1), wave(0.23), wave(0.37)].map(|tensor| tensor.copy().unwrap());
            let [ours, gradient, our_buffer] = tensors();
            descend_in_place(&ours, &gradient, &our_buffer, &step).unwrap();
            let [theirs, gradient, their_buffer] = tensors();
            reference::descend(&theirs, &gradient, &their_buffer, &step).unwrap();
            assert!(distance(&ours, &theirs) < 1e-6 && distance(&our_buffer, &their_buffer) < 1e-6);
            assert!(distance(&ours, &wave(0.1)) > 0.1);
        }
    }

    #[test]
    fn adamw_is_the_references() {
        let step = AdamStep { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1, lr: 0.01, step: 3 };
        let tensors = || [wave(0.1), wave(0.23), wave(0.37), wave(0.41).sqr().unwrap()].map(|t| t.copy().unwrap());
        let [ours, gradient, mean, square] = tensors();
        adamw_in_place(&ours, &gradient, [&mean, &square], &step).unwrap();
        let [theirs, gradient, their_mean, their_square] = tensors();
        reference::adamw(&theirs, &gradient, [&their_mean, &their_square], &step).unwrap();
        assert!(distance(&mean, &their_mean) < 1e-6 && distance(&square, &their_square) < 1e-6);
        assert!(distance(&ours, &theirs) < 1e-5 && distance(&ours, &wave(0.1)) > 1e-3);
    }

    #[test]
    fn sums_are_those_of_f64_and_the_same_at_any_thread_count() {
        let (xs, ys) = (wave(0.1), wave(0.2));
        let (a, b) = (xs.to_vec1::<f32>().unwrap(), ys.to_vec1::<f32>().unwrap());
        let plain: f64 = a.iter().map(|&x| f64::from(x).powi(2)).sum();
        let decayed: f64 = a.iter().zip(&b).map(|(&x, &y)| (f64::from(x) + 0.5 * f64::from(y)).powi(2)).sum();
        let found = |threads| {
            crate::cli::with_threads(Some(threads), || {
                Ok([sum_of_squares(&xs)?, sum_of_squares_decayed(&xs, &ys, 0.5)?])
            })
            .unwrap()
        };
        let one = found(1);
        assert!((one[0] / plain - 1.0).abs() < 1e-12 && (one[1] / decayed - 1.0).abs() < 1e-6);
        assert_eq!(one.map(f64::to_bits), found(3).map(f64::to_bits));
    }

    #[test]
    fn one_bad_number_is_found_and_scaling_reaches_every_element() {
        let xs = wave(0.1);
        assert!(is_finite(&xs).unwrap());
        assert!(is_finite(&Tensor::new(7i64, &Device::Cpu).unwrap()).unwrap());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = xs.to_vec1::<f32>().unwrap();
            values[LENGTH - 2] = bad;
            assert!(!is_finite(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap(), "{bad}");
        }
        let scaled = xs.copy().unwrap();
        scale_in_place(&scaled, 0.25).unwrap();
        assert_eq!(distance(&scaled, &(xs * 0.25).unwrap()), 0.0);
    }
}
