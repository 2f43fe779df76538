"""How torchvision and timm draw the initial values of each student: statistics of every random tensor over several draws.

Written with Python 3.11.7, torch 2.15.0, torchvision 0.29.2, timm 1.0.31 on the CPU; the output states the versions. Residual networks
are torchvision's, as in the official code: timm draws them from the same distributions, but starts the scale of each block's last
batch norm at 0 (`zero_init_last`), which is checked here. All others are timm's. The head is two `torch.nn.Linear`, as MoCo v2's.

timm's `trunc_normal_` cuts at -2 and 2, a hundred deviations out, where no value ever should be; but about one in 17 million of its uniform
numbers is the end of their range, whose inverse error function is infinite, and becomes exactly -2. Such values are left out.
Run: python tests/golden/initial_values.py > tests/golden/initial_values.json
"""

import json
import re

import numpy as np
import timm
import torch
import torch.nn as nn
import torchvision

RESNETS = ["resnet18", "resnet34", "resnet50"]
TIMM = ["efficientnet_b0", "efficientnet_b1", "mobilenetv3_large_100", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "xcit_tiny_12_p16_224"]
DRAWS = 4
HIDDEN, EMBEDDING = 512, 128


def student(name):
    if name in RESNETS:
        model = getattr(torchvision.models, name)(weights=None)
        width = model.fc.in_features
    else:
        model = timm.create_model(name, num_classes=0)
        width = model.head_hidden_size
    model.fc = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBEDDING))
    return {key: x.double().numpy() for key, x in model.state_dict().items()}


def statistics(draws):
    """Number of values, mean, standard deviation, kurtosis (normal 3, uniform 1.8), least and largest value."""
    values = np.concatenate([draw.ravel() for draw in draws])
    clamped = np.abs(values) == 2
    assert clamped.sum() <= 2
    values = values[~clamped]
    mean, std = values.mean(), values.std()
    kurtosis = (((values - mean) / std) ** 4).mean()
    return [len(values), *(float(f"{x:.7g}") for x in (mean, std, kurtosis, values.min(), values.max()))]


def family(name):
    torch.manual_seed(0)
    draws = [student(name) for _ in range(DRAWS)]
    constants, random = {}, {}
    for key in sorted(draws[0]):
        values = {float(x) for draw in draws for x in (draw[key].min(), draw[key].max())}
        if len(values) == 1:
            constants.setdefault(str(values.pop()), []).append(key)
        else:
            random[key] = statistics([draw[key] for draw in draws])
    if name in RESNETS:
        zeros = {key for key, x in timm.create_model(name, num_classes=0).state_dict().items() if key.endswith("weight") and not x.any()}
        last = "bn3" if name == "resnet50" else "bn2"
        assert zeros == {key for key in draws[0] if re.fullmatch(rf"layer\d\.\d+\.{last}\.weight", key)}, name
    return {"constants": constants, "random": random}


def main():
    torch.set_num_threads(1)
    versions = {module.__name__: module.__version__ for module in [torch, torchvision, timm, np]}
    golden = {"versions": versions, "head": [HIDDEN, EMBEDDING], "students": {name: family(name) for name in RESNETS + TIMM}}
    lists = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    print(lists.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(golden, indent=1)))


if __name__ == "__main__":
    main()
