"""Golden values and derivatives of activations and gates by PyTorch, at their kinks, beside them, and far away.

Written with Python 3.11.7 and torch 2.15.0 on the CPU; the output states the version. Values are exact or rounded from f32, but for GELU.
Run: python tests/golden/activations.py > tests/golden/activations.json
"""

import json

import torch
import torch.nn.functional as F

FUNCTIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    # In f64: PyTorch's own f32 loses digits where erf comes close to -1.
    "gelu": lambda x: F.gelu(x.double()),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
KINKS = [-3.0, 0.0, 3.0, 6.0]


def inputs():
    beside = []
    for kink in KINKS:
        at = torch.tensor(kink)
        beside += [torch.nextafter(at, torch.tensor(sign * torch.inf)).item() for sign in [-1.0, 1.0]]
    # The smallest f32 beside 0 is no normal number; 1e-30 is.
    beside = [x for x in beside if abs(x) > 1e-30] + [-1e-30, 1e-30]
    return sorted(KINKS + beside + [-100.0, -20.0, -7.5, -3.5, -1.25, -0.25, 0.25, 1.5, 3.5, 7.5, 20.0, 100.0])


def main():
    points = inputs()
    functions = {}
    for name, function in FUNCTIONS.items():
        x = torch.tensor(points, requires_grad=True)
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        functions[name] = {"values": y.tolist(), "slopes": slope.tolist()}
    print(json.dumps({"versions": {"torch": torch.__version__}, "inputs": points, "functions": functions}, indent=1))


if __name__ == "__main__":
    main()
