"""Golden values of teacher embeddings: bytes of pixels in, unit rows out, by torchvision in f64.

Written with Python 3.11.7, torch 2.15.0, torchvision 0.29.2 on the CPU; the output states the versions. All weights and
pixels come from formula.py, so there is no seed. Run: python tests/golden/teacher.py > tests/golden/teacher.json
"""

import json

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from formula import load_into, unit

SAMPLES, VIEWS, SIDE, HIDDEN, EMBEDDING = 3, 2, 40, 48, 16
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)


def network(arch, method):
    model = getattr(torchvision.models, arch)(weights=None)
    width = model.fc.in_features
    model.fc = {
        "moco-v2": lambda: nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBEDDING)),
        "moco-v1": lambda: nn.Linear(width, EMBEDDING),
        "backbone": nn.Identity,
    }[method]()
    return load_into(model).double().eval()


def main():
    shape = (SAMPLES * VIEWS, SIDE, SIDE, 3)
    pixels = np.floor(unit("pixels", int(np.prod(shape))) * 256).reshape(shape)
    xs = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    cases = []
    for arch, method in [("resnet18", "moco-v2"), ("resnet18", "moco-v1"), ("resnet34", "backbone"), ("resnet50", "moco-v2")]:
        with torch.no_grad():
            rows = F.normalize(network(arch, method)(xs), dim=1)
        # Of wide rows the first numbers are enough: every number depends on the whole network.
        kept = [[float(f"{x:.9g}") for x in row[:EMBEDDING]] for row in rows.tolist()]
        cases.append({"arch": arch, "method": method, "width": rows.shape[1], "rows": kept})
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}
    print(json.dumps({"versions": versions, "cases": cases}))


if __name__ == "__main__":
    main()
