//! Operations in candle's graph whose gradients do not pass through candle.
//!
//! Where an operation's gradient reaches one of its inputs, candle makes zeros of that input's size and adds the gradient to them: two
//! more passes over tensors of a hundred megabytes. Here an operation is therefore a node of one number, which bears the graph, and a
//! slot, in which those that read its result leave their gradients. Its result is a second node, made from the first, which any other
//! operation of candle may read too: what comes back that way goes into the same slot.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Device, Layout, Shape, Tensor, TensorId, Var, bail};
use rayon::prelude::*;

use super::slice;

/// Numbers of a piece of a sum.
const PIECE_FLOATS: usize = 64 * 1024;

/// Gradients of an operation's inputs, in their order; none for those that need none.
pub(super) type InputGradients = Vec<Option<Vec<f32>>>;

/// Turns the gradient of a result into those of the inputs.
type Backward = Box<dyn FnOnce(Vec<f32>) -> candle_core::Result<InputGradients> + Send>;

/// What has come back to a result.
type Slot = Arc<Mutex<Option<Vec<f32>>>>;

/// The operation that made a tensor.
struct Origin {
    /// One number, which bears the graph.
    node: Tensor,
    slot: Slot,
    /// Of its result.
    id: Mutex<Option<TensorId>>,
}

/// The operations whose results still exist.
static ORIGINS: LazyLock<Mutex<HashMap<TensorId, Weak<Origin>>>> = LazyLock::new(Mutex::default);

/// The value behind a lock, whether a thread died with it or not: each is replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Origin {
    fn of(tensor: &Tensor) -> Option<Arc<Self>> {
        // The lock is free again before the origin can be dropped, which takes it.
        let origin = lock(&ORIGINS).get(&tensor.id()).cloned();
        origin?.upgrade()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(id) = lock(&self.id).take() {
            lock(&ORIGINS).remove(&id);
        }
    }
}

fn add_to(slot: &Slot, gradient: Vec<f32>) {
    let mut slot = lock(slot);
    match &mut *slot {
        Some(sum) => sum
            .par_chunks_mut(PIECE_FLOATS)
            .zip(gradient.par_chunks(PIECE_FLOATS))
            .for_each(|(sum, gradient)| super::tiles::add(sum, gradient)),
        empty => *empty = Some(gradient),
    }
}

/// Where the gradient of an input goes.
#[derive(Debug, Clone)]
enum Destination {
    /// To the operation that made it.
    Slot(Slot),
    /// To candle, with this shape.
    Candle(Shape),
    /// Nowhere.
    Nowhere,
}

/// A tensor of `out`, which `backward` leads back to `inputs`, one or two tensors.
///
/// The parameters' gradients are `backward`'s own business: it is called whether an input needs a gradient or not.
pub(super) fn record(
    name: &'static str,
    out: Vec<f32>,
    shape: impl Into<Shape>,
    inputs: &[&Tensor],
    backward: impl FnOnce(Vec<f32>) -> candle_core::Result<InputGradients> + Send + 'static,
) -> candle_core::Result<Tensor> {
    // A variable, which makes candle record the operation even where no input does.
    let anchor = Var::zeros((), DType::F32, &Device::Cpu)?.into_inner();
    let mut arguments = [anchor.clone(), anchor.clone()];
    let mut destinations = [Destination::Nowhere, Destination::Nowhere];
    if inputs.len() > arguments.len() {
        bail!("{name}: at most two inputs are recorded");
    }
    for ((input, argument), destination) in inputs.iter().zip(&mut arguments).zip(&mut destinations) {
        if let Some(origin) = Origin::of(input) {
            (*argument, *destination) = (origin.node.clone(), Destination::Slot(origin.slot.clone()));
        } else if input.track_op() {
            (*argument, *destination) = ((*input).clone(), Destination::Candle(input.shape().clone()));
        }
    }
    let slot = Slot::default();
    let backward = Mutex::new(Some(Box::new(backward) as Backward));
    let [first, second] = arguments;
    let node = first.apply_op3(&second, &anchor, Node { name, slot: slot.clone(), backward, destinations })?;
    let origin = Arc::new(Origin { node: node.clone(), slot, id: Mutex::default() });
    let emit = Emit { name, shape: shape.into(), values: Mutex::new(Some(out)), origin: origin.clone() };
    let result = node.apply_op1(emit)?;
    *lock(&origin.id) = Some(result.id());
    lock(&ORIGINS).insert(result.id(), Arc::downgrade(&origin));
    Ok(result)
}

/// The operation.
struct Node {
    name: &'static str,
    slot: Slot,
    backward: Mutex<Option<Backward>>,
    destinations: [Destination; 2],
}

impl Node {
    /// What candle gets for an input.
    fn deliver(destination: &Destination, gradient: Option<Vec<f32>>) -> candle_core::Result<Option<Tensor>> {
        match (destination, gradient) {
            (Destination::Slot(slot), Some(gradient)) => {
                add_to(slot, gradient);
                Ok(Some(Tensor::zeros((), DType::F32, &Device::Cpu)?))
            }
            (Destination::Candle(shape), Some(gradient)) => Ok(Some(Tensor::from_vec(gradient, shape, &Device::Cpu)?)),
            _ => Ok(None),
        }
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _first: &CpuStorage,
        _first_layout: &Layout,
        _second: &CpuStorage,
        _second_layout: &Layout,
        _anchor: &CpuStorage,
        _anchor_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), ().into()))
    }

    fn bwd(
        &self,
        _first: &Tensor,
        _second: &Tensor,
        _anchor: &Tensor,
        _node: &Tensor,
        _dnode: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (Some(backward), Some(gradient)) = (lock(&self.backward).take(), lock(&self.slot).take()) else {
            bail!("{}: the backward pass ran twice over one forward pass", self.name)
        };
        let mut gradients = backward(gradient)?.into_iter();
        let [first, second] = &self.destinations;
        let first = Self::deliver(first, gradients.next().flatten())?;
        Ok((first, Self::deliver(second, gradients.next().flatten())?, None))
    }
}

/// The operation's result as a tensor.
struct Emit {
    name: &'static str,
    shape: Shape,
    values: Mutex<Option<Vec<f32>>>,
    origin: Arc<Origin>,
}

impl CustomOp1 for Emit {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _node: &CpuStorage, _layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Some(values) = lock(&self.values).take() else { bail!("{}: the result was taken before", self.name) };
        Ok((CpuStorage::F32(values), self.shape.clone()))
    }

    fn bwd(&self, node: &Tensor, _out: &Tensor, dout: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dout = dout.contiguous()?;
        let (storage, layout) = dout.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else {
            bail!("{}: the gradient is not on the CPU", self.name)
        };
        add_to(&self.origin.slot, slice(storage, layout)?.to_vec());
        Ok(Some(node.zeros_like()?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::with_values;
    use super::*;

    /// `factor * xs`.
    fn scaled(xs: &Tensor, factor: f32) -> candle_core::Result<Tensor> {
        let out = with_values(xs, |xs| Ok(xs.iter().map(|x| x * factor).collect::<Vec<_>>()))?;
        record("scaled", out, xs.shape(), &[xs], move |mut dout| {
            for d in &mut dout {
                *d *= factor;
            }
            Ok(vec![Some(dout)])
        })
    }

    #[test]
    fn gradients_of_all_readers_are_added_whoever_they_are() -> candle_core::Result<()> {
        let xs = Var::new(&[1.0f32, 2.0, 3.0], &Device::Cpu)?;
        let doubled = scaled(&xs, 2.0)?;
        // Two readers of our own, one of candle's.
        let sum = ((scaled(&doubled, 3.0)? + scaled(&doubled, 5.0)?)? + (&doubled * 7.0)?)?;
        let gradients = sum.sum_all()?.backward()?;
        assert_eq!(gradients.get(&xs).map(Tensor::to_vec1::<f32>).transpose()?, Some(vec![30.0; 3]));
        Ok(())
    }

    #[test]
    fn a_result_that_is_gone_leaves_nothing_behind_but_its_gradient() -> candle_core::Result<()> {
        let xs = Var::new(&[1.0f32], &Device::Cpu)?;
        let middle = scaled(&xs, 2.0)?;
        let id = middle.id();
        let last = scaled(&middle, 4.0)?;
        drop(middle);
        assert!(lock(&ORIGINS).get(&id).is_none());
        assert_eq!(last.backward()?.get(&xs).map(Tensor::to_vec1::<f32>).transpose()?, Some(vec![8.0]));
        assert!(last.backward().is_err());
        Ok(())
    }
}
