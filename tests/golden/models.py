"""Golden values of the convolutional networks in f64: the residual networks by torchvision (timm must agree on every name and shape),
the twice as wide one by torchvision's blocks put together as SwAV's `resnet50w2`, the others by timm.

Written with Python 3.11.7, torch 2.15.0, torchvision 0.29.2, timm 1.0.31 on the CPU; the output states the versions. All
weights and inputs come from formula.py, so there is no seed. Run: python tests/golden/models.py > tests/golden/models.json
"""

import json
import re

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from formula import fingerprint, load_into, unit, unit_rows, values

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet50w2"]
OTHERS = ["efficientnet_b0", "efficientnet_b1", "mobilenetv3_large_100"] + [f"tf_efficientnet_lite{i}" for i in range(5)]
# The usual size, and one that leaves an odd side after every stride.
SIDES = [224, 75]
HIDDEN, EMBEDDING = 48, 16
# By how much the running variances of the formula are multiplied for the evaluation. Squeeze-excite halves the signal again and again:
# with variances of 0.5 to 1, the features of two images in EfficientNet-B0 differ by 1e-4 only, with these by 0.2.
VARIANCE_SCALES = {"efficientnet_b0": 0.625, "efficientnet_b1": 0.7}
# The inputs of the training passes: see `training`.
TRAINING_IMAGES = {"resnet18": "images 17", "efficientnet_b0": "images 1", "mobilenetv3_large_100": "images 69"}


class ResNet50W2(torchvision.models.ResNet):
    """Twice as many channels everywhere, in the stem too."""

    def __init__(self):
        block = torchvision.models.resnet.Bottleneck
        super().__init__(block, [3, 4, 6, 3])
        self.inplanes = 128
        self.conv1 = nn.Conv2d(3, 128, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.layer1 = self._make_layer(block, 128, 3)
        self.layer2 = self._make_layer(block, 256, 4, stride=2)
        self.layer3 = self._make_layer(block, 512, 6, stride=2)
        self.layer4 = self._make_layer(block, 1024, 3, stride=2)
        self.fc = nn.Linear(4096, 1000)


def with_head(name):
    """A network with the projection head of MoCo v2, under the name that torchvision gives to the classifier of a ResNet."""
    if name in RESNETS:
        model = ResNet50W2() if name == "resnet50w2" else getattr(torchvision.models, name)(weights=None)
        width = model.fc.in_features
    else:
        model = timm.create_model(name, num_classes=0)
        width = model.head_hidden_size
    model.fc = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBEDDING))
    return load_into(model)


def images(name, batch, side):
    """f64 (B, 3, H, W) of what Rust holds as (B, H, W, 3)."""
    return torch.from_numpy(values(name, (batch, side, side, 3), -2.0, 2.0)).double().permute(0, 3, 1, 2).contiguous()


def features(model, xs):
    if not isinstance(model, torchvision.models.ResNet):
        return model(xs)  # made without a classifier
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
    if name != "resnet50w2":
        assert backbone == names_of(timm.create_model(name, num_classes=0)), name
    scale = VARIANCE_SCALES.get(name, 1.0)
    for key, variance in model.state_dict().items():
        if key.endswith("running_var"):
            variance.mul_(scale)  # in f32, as Rust does
    model.double()
    found = []
    for side in SIDES:
        with torch.no_grad():
            pooled = features(model, images("images", 2, side))
            embeddings = F.normalize(model.fc(pooled), dim=1)
        found.append({
            "side": side,
            "features": fingerprint("features", pooled.numpy()),
            "embeddings": fingerprint("embeddings", embeddings.numpy()),
        })
    return {
        "tensors": len(names_of(model)),
        "names_and_shapes": digest(names_of(model)),
        "variance_scale": scale,
        "images": found,
    }


def training(name):
    """One forward and backward pass in training mode.

    A gradient jumps where the input of a ReLU changes sign, that of a hard swish or a hard sigmoid passes -3 or 3, or a max pool's winner
    changes, and some of the many inputs usually lie within the rounding of f32. The images were chosen to lie far from a jump.
    ResNet-18, 150,000 inputs: of 60 draws by this formula "images 17" is the farthest, 1.1e-5. MobileNetV3, 930,000 inputs: of 120 draws
    "images 69" is, 1.7e-5. EfficientNet-B0 has jumps in the head only: 7e-3 in "images 1".

    A shift that a batch norm makes and the next one takes away, with no activation between them, has no gradient. In f64 about 1e-15
    is left of it; such gradients are listed by name.
    """
    model = with_head(name).double().train()
    embeddings = F.normalize(model.fc(features(model, images(TRAINING_IMAGES[name], 4, 40))), dim=1)
    target = torch.from_numpy(unit_rows("target", 4, EMBEDDING)).double()
    loss = (embeddings - target).square().sum(1).mean()
    loss.backward()
    buffers = {k: v for k, v in model.state_dict().items() if "running" in k}
    gradients = {k: p.grad.numpy() for k, p in sorted(model.named_parameters())}
    zero = [k for k, gradient in gradients.items() if np.linalg.norm(gradient) < 1e-12]
    return {
        "images": TRAINING_IMAGES[name],
        "loss": loss.item(),
        "embeddings": fingerprint("embeddings", embeddings.detach().numpy()),
        "zero_gradients": zero,
        "gradients": {k: fingerprint(k, gradient) for k, gradient in gradients.items() if k not in zero},
        "buffers": {k: fingerprint(k, v.numpy()) for k, v in sorted(buffers.items())},
    }


def main():
    torch.set_num_threads(1)
    versions = {module.__name__: module.__version__ for module in [torch, torchvision, timm, np]}
    golden = {
        "versions": versions,
        "evaluation": {name: evaluation(name) for name in RESNETS + OTHERS},
        "training": {name: training(name) for name in TRAINING_IMAGES},
    }
    lists = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    print(lists.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(golden, indent=1)))


if __name__ == "__main__":
    main()
