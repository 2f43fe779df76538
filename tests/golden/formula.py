"""Values that Rust (tests/src/formula.rs) and Python draw alike, so that no weights are stored.

A value depends on a tensor's name and the element's index (row-major, in PyTorch's layout) and is exact in f32. A `fingerprint`
is what is stored of a large tensor: its norm, three projections on random signs, and up to 16 of its elements.
"""

import math

import numpy as np

SIGNS = 3
SAMPLES = 16


def unit(name, count):
    """`count` numbers in [0, 1) with 24 random bits each: FNV-1a of the name, then SplitMix64."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = ((key ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        x = np.uint64(key) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float64) / 2.0**24


def values(name, shape, low, high):
    """An f32 tensor, uniform in [low, high): `low + (high - low) * unit`, computed in f64 and rounded once."""
    count = math.prod(shape)
    return (low + (high - low) * unit(name, count)).astype(np.float32).reshape(shape)


def parameter(name, shape):
    """The value of a model's parameter or buffer: nothing is zero, one, or so large that activations explode."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if len(shape) > 1:
        bound = math.sqrt(6.0 / math.prod(shape[1:]))
        return values(name, shape, -bound, bound)
    if name.endswith("running_var") or name.endswith(".weight"):
        return values(name, shape, 0.5, 1.0)
    return values(name, shape, -0.2, 0.2)


def unit_rows(name, rows, width):
    """f32 rows of unit length (normalised in f64, rounded once)."""
    x = values(name, (rows, width), -1.0, 1.0).astype(np.float64)
    return (x / np.sqrt((x * x).sum(1, keepdims=True))).astype(np.float32)


def fingerprint(name, tensor):
    """[norm, three projections on random signs, up to 16 elements at even distances], in f64."""
    flat = np.asarray(tensor, dtype=np.float64).reshape(-1)
    numbers = [math.sqrt(float((flat * flat).sum()))]
    for sign in range(SIGNS):
        signs = np.where(unit(f"{name}#{sign}", flat.size) < 0.5, -1.0, 1.0)
        numbers.append(float((flat * signs).sum()))
    numbers += [float(x) for x in flat[:: max(1, -(-flat.size // SAMPLES))]]
    return [float(f"{x:.9g}") for x in numbers]


def load_into(model):
    """Gives every tensor of a PyTorch model its value."""
    import torch

    state = model.state_dict()
    model.load_state_dict({name: torch.from_numpy(parameter(name, tuple(x.shape))) for name, x in state.items()})
    return model
