"""Loads an exported ResNet into timm, strictly, and compares its features with those of `student-eval features`.

    python tests/interop/load_in_timm.py EXPORTED.safetensors SHARDS FEATURES

Needs torch, timm and safetensors. `FEATURES` is the feature set of the exported student over `SHARDS`. Prints the relative
error (largest difference over largest value) and exits 1 above 1e-4.
"""

import sys
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file


def tensor(path, name):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def main(student, shards, features):
    with safe_open(student, framework="pt") as file:
        arch = (file.metadata() or {}).get("arch", "resnet18")
    model = timm.create_model(arch, num_classes=0, pretrained=False)
    model.load_state_dict(load_file(student), strict=True)
    model.eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    worst = largest = 0.0
    for path in sorted(Path(shards).glob("shard-*.safetensors")):
        pixels = tensor(path, "pixels")
        ours = tensor(Path(features) / path.name.replace("shard-", "features-"), "features").float()
        inputs = (pixels.flatten(0, 1).permute(0, 3, 1, 2).float() / 255 - mean) / std
        with torch.no_grad():
            theirs = torch.cat([model(batch) for batch in inputs.split(32)]).view(ours.shape)
        worst = max(worst, (ours - theirs).abs().max().item())
        largest = max(largest, theirs.abs().max().item())
    print(f"{arch}: strict load, relative error of features {worst / largest:.2e}")
    sys.exit(worst > 1e-4 * largest)


if __name__ == "__main__":
    main(*sys.argv[1:])
