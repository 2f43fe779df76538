"""Golden values of the residual networks, by torchvision in f64; timm must agree on every name and shape.

Written with Python 3.11.7, torch 2.15.0, torchvision 0.29.2, timm 1.0.31 on the CPU; the output states the versions. All
weights and inputs come from formula.py, so there is no seed. Run: python tests/golden/models.py > tests/golden/models.json
"""

import json

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from formula import fingerprint, load_into, unit, unit_rows, values

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
HIDDEN, EMBEDDING = 48, 16


def with_head(name):
    """A torchvision network with the projection head of MoCo v2."""
    model = getattr(torchvision.models, name)(weights=None)
    width = model.fc.in_features
    model.fc = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBEDDING))
    return load_into(model).double()


def images(name, batch, side):
    """f64 (B, 3, H, W) of what Rust holds as (B, H, W, 3)."""
    return torch.from_numpy(values(name, (batch, side, side, 3), -2.0, 2.0)).double().permute(0, 3, 1, 2).contiguous()


def features(model, xs):
    for part in [model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4]:
        xs = part(xs)
    return torch.flatten(model.avgpool(xs), 1)


def digest(shapes):
    """The first of the 24-bit numbers that the sorted list of names and shapes hashes to."""
    text = ";".join(f"{name}:{','.join(map(str, shape))}" for name, shape in sorted(shapes.items()))
    return int(unit(text, 1)[0] * 2**24)


def names_of(model):
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def evaluation(name):
    model = with_head(name).eval()
    backbone = {key: shape for key, shape in names_of(model).items() if not key.startswith("fc.")}
    assert backbone == names_of(timm.create_model(name, num_classes=0)), name
    with torch.no_grad():
        pooled = features(model, images("images", 2, 64))
        embeddings = F.normalize(model.fc(pooled), dim=1)
    return {
        "tensors": len(names_of(model)),
        "names_and_shapes": digest(names_of(model)),
        "features": fingerprint("features", pooled.numpy()),
        "embeddings": fingerprint("embeddings", embeddings.numpy()),
    }


def training():
    """One forward and backward pass of ResNet-18 in training mode.

    A gradient jumps where a ReLU's input changes sign or a max pool's winner changes, and some of 150,000 inputs usually lie within the
    rounding of f32. Of 60 inputs by this formula, "images 17" is the farthest from such a jump: 1.1e-5.
    """
    model = with_head("resnet18").train()
    embeddings = F.normalize(model.fc(features(model, images("images 17", 4, 40))), dim=1)
    target = torch.from_numpy(unit_rows("target", 4, EMBEDDING)).double()
    loss = (embeddings - target).square().sum(1).mean()
    loss.backward()
    buffers = {k: v for k, v in model.state_dict().items() if "running" in k}
    return {
        "loss": loss.item(),
        "embeddings": fingerprint("embeddings", embeddings.detach().numpy()),
        "gradients": {k: fingerprint(k, p.grad.numpy()) for k, p in sorted(model.named_parameters())},
        "buffers": {k: fingerprint(k, v.numpy()) for k, v in sorted(buffers.items())},
    }


def main():
    torch.set_num_threads(1)
    versions = {module.__name__: module.__version__ for module in [torch, torchvision, timm, np]}
    golden = {"versions": versions, "evaluation": {name: evaluation(name) for name in NAMES}, "training": training()}
    print(json.dumps(golden, indent=1).replace("\n    ", " ").replace("\n   ]", "]"))


if __name__ == "__main__":
    main()
