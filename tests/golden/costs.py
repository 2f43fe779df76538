"""What the backbones cost by PyTorch's own count: multiply-accumulate operations of one image, and trainable values.

`FlopCounterMode` sees every convolution and matrix product that runs, and counts two operations for each multiply-accumulate. The models are
those of models.py and transformers.py. Run: python tests/golden/costs.py > tests/golden/costs.json
"""

import json

import timm
import torch
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import OTHERS, RESNETS, SIDES, features, with_head
from transformers import VITS, XCITS, create

# Patches of 8 and of 16 pixels divide these.
TRANSFORMER_SIDES = [224, 80]


def multiply_accumulates(model, side):
    images = torch.zeros(1, 3, side, side)
    # Attention as the two matrix products that it is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features(model, images)
    operations = counter.get_total_flops()
    assert operations % 2 == 0
    return operations // 2


def cost(model, sides):
    return {
        "parameters": sum(x.numel() for key, x in model.named_parameters() if not key.startswith("fc.")),
        "multiply_accumulates": {side: multiply_accumulates(model, side) for side in sides},
    }


def main():
    costs = {name: cost(with_head(name).eval(), SIDES) for name in RESNETS + OTHERS}
    for name in VITS[16] + VITS[8]:
        costs[name] = cost(create(name, dynamic_img_size=True).eval(), TRANSFORMER_SIDES)
    for name in XCITS:
        costs[name] = cost(create(name).eval(), TRANSFORMER_SIDES)
    versions = {module.__name__: module.__version__ for module in [torch, torchvision, timm]}
    print(json.dumps({"versions": versions, "costs": costs}, indent=1))


if __name__ == "__main__":
    main()
