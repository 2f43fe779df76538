"""Values and derivatives of PyTorch's activations, at their kinks and between them; prints `activations.json`.

    python tests/golden/activations.py > tests/golden/activations.json

Needs torch. Computed in f32: the points and what happens at them are exact.
"""

import json

import torch
import torch.nn.functional as F

POINTS = [-20.0, -3.0, -1.5, -0.25, 0.0, 0.5, 2.0, 3.0, 4.5, 6.0, 20.0]
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hard_swish": F.hardswish}


def at_points(function):
    points = torch.tensor(POINTS, requires_grad=True)
    values = function(points)
    values.sum().backward()
    return {"values": values.tolist(), "derivatives": points.grad.tolist()}


def main():
    golden = {"versions": {"torch": torch.__version__}, "points": POINTS}
    golden["activations"] = {name: at_points(function) for name, function in ACTIVATIONS.items()}
    print(json.dumps(golden, indent=1))


if __name__ == "__main__":
    main()
