"""What torchvision calls the tensors of the EfficientNets that timm names differently: pairs of names, in torchvision's order.

Written with Python 3.11.7, torch 2.15.0, torchvision 0.29.2, timm 1.0.31 on the CPU; the output states the versions. Both list their
tensors in the order of computation, so they are paired by position. That the pairs are right is checked here: timm's network with
torchvision's weights must give the same features. Run: python tests/golden/torchvision_names.py > tests/golden/torchvision_names.json
"""

import json

import timm
import torch
import torchvision

from formula import load_into

NETWORKS = ["efficientnet_b0", "efficientnet_b1"]


def pairs(name):
    theirs = load_into(getattr(torchvision.models, name)(weights=None)).double().eval()
    ours = timm.create_model(name, num_classes=0).double().eval()
    state = {key: x for key, x in theirs.state_dict().items() if key.startswith("features.")}
    paired = list(zip(state, ours.state_dict(), strict=True))
    ours.load_state_dict({timm_name: state[key] for key, timm_name in paired}, strict=True)
    xs = torch.linspace(-2, 2, 2 * 3 * 70 * 70).double().sin().reshape(2, 3, 70, 70)
    with torch.no_grad():
        expected, found = torch.flatten(theirs.avgpool(theirs.features(xs)), 1), ours(xs)
    assert (expected - found).abs().max() <= 1e-9 * expected.abs().max() and expected.abs().max() > 1e-3, name
    return [f"{key} {timm_name}" for key, timm_name in paired]


def main():
    torch.set_num_threads(1)
    versions = {module.__name__: module.__version__ for module in [torch, torchvision, timm]}
    print(json.dumps({"versions": versions, "networks": {name: pairs(name) for name in NETWORKS}}, indent=1))


if __name__ == "__main__":
    main()
