"""Golden values of the transformers by timm in f64: features of images of two sizes, and a training pass.

Written with Python 3.11.7, torch 2.15.0, timm 1.0.31 on the CPU; the output states the versions. All weights and inputs come
from formula.py, so there is no seed. Run: python tests/golden/transformers.py > tests/golden/transformers.json
"""

import json
import re

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from formula import fingerprint, load_into, unit_rows, values
from models import digest, names_of

VITS = {16: ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"],
        8: ["vit_tiny_patch8_224", "vit_small_patch8_224", "vit_base_patch8_224"]}
XCITS = ["xcit_tiny_12_p16_224", "xcit_small_12_p16_224"]
# The formula makes a tensor's values the smaller the longer it is, and the factors of branches at most 0.2: too little to be seen. These
# powers of two multiply the tensors whose last name begins so.
SCALES = {"pos_embed": 64.0, "gamma": 4.0}
# Height and width, which the patches divide; the first is what the positions are made for.
SIZES = {16: [(224, 224), (160, 96)], 8: [(224, 224), (72, 104)]}
SIDE = 224
BATCH, TRAINING_BATCH, TRAINING_SIZE = 2, 4, (48, 80)


def scale(name):
    last = name.rsplit(".", 1)[-1]
    return next((factor for start, factor in SCALES.items() if last.startswith(start)), 1.0)


def create(name, **options):
    if name == "vit_tiny_patch8_224":  # which timm does not have
        model = VisionTransformer(patch_size=8, embed_dim=192, depth=12, num_classes=0, **{"num_heads": 3, **options})
    else:
        model = timm.create_model(name, num_classes=0, **options)
    load_into(model)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if scale(key) != 1.0:
                value.mul_(scale(key))
    return model


def images(batch, height, width):
    """f64 (B, 3, H, W) of what Rust holds as (B, H, W, 3)."""
    drawn = values("images", (batch, height, width, 3), -2.0, 2.0)
    return torch.from_numpy(drawn).double().permute(0, 3, 1, 2).contiguous()


def features(model, batch, size):
    with torch.no_grad():
        found = model.double().eval()(images(batch, *size)).numpy()
    if batch > 1:
        apart = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[0])
        assert apart > 0.05, f"the features of two images differ by {apart} only"
    return {"size": size, "batch": batch, "features": fingerprint("features", found)}


def evaluation(name, patch):
    options = {"dynamic_img_size": True} if name.startswith("vit") else {}
    model = create(name, **options)
    # The largest network takes seconds for an image of many patches.
    batch = {size: 1 if (name, size) == ("vit_base_patch8_224", (SIDE, SIDE)) else BATCH for size in SIZES[patch]}
    return {
        "tensors": len(names_of(model)),
        "names_and_shapes": digest(names_of(model)),
        "images": [features(model, batch[size], size) for size in SIZES[patch]],
    }


def dino(name, patch):
    """Positions by the arithmetic of DINO's `interpolate_pos_encoding`, in a network made for the size of the images."""
    size = SIZES[patch][1]
    model = create(name, img_size=size)
    table = create(name).pos_embed.detach().double()
    side = SIDE // patch
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = tuple((pixels // patch + 0.1) / side for pixels in size)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    model.double()
    model.pos_embed = torch.nn.Parameter(torch.cat([table[:, :1], grid], dim=1))
    return features(model, BATCH, size)


def training(name):
    """One forward and backward pass in training mode. Nothing in these networks has a kink, so any images do.

    A bias of keys moves all similarities of a query alike, which softmax takes away: it has no gradient. In f64 about 1e-15 is left of it;
    such gradients are listed by name.
    """
    options = {"dynamic_img_size": True} if name.startswith("vit") else {}
    model = create(name, **options).double().train()
    rows = F.normalize(model(images(TRAINING_BATCH, *TRAINING_SIZE)), dim=1)
    target = torch.from_numpy(unit_rows("target", *rows.shape)).double()
    loss = (rows - target).square().sum(1).mean()
    loss.backward()
    gradients = {k: p.grad.numpy() for k, p in sorted(model.named_parameters())}
    zero = [k for k, gradient in gradients.items() if np.linalg.norm(gradient) < 1e-12]
    buffers = {k: v for k, v in model.state_dict().items() if "running" in k}
    return {
        "size": TRAINING_SIZE,
        "batch": TRAINING_BATCH,
        "loss": loss.item(),
        "rows": fingerprint("rows", rows.detach().numpy()),
        "zero_gradients": zero,
        "gradients": {k: fingerprint(k, gradient) for k, gradient in gradients.items() if k not in zero},
        "buffers": {k: fingerprint(k, v.numpy()) for k, v in sorted(buffers.items())},
    }


def main():
    torch.set_num_threads(1)
    golden = {
        "versions": {module.__name__: module.__version__ for module in [torch, timm, np]},
        "scales": SCALES,
        "evaluation": {name: evaluation(name, patch) for patch in VITS for name in VITS[patch]}
        | {name: evaluation(name, 16) for name in XCITS},
        "dino": {name: dino(name, patch) for patch, name in [(16, VITS[16][1]), (8, VITS[8][0])]},
        # As many heads as MoCo v3's small network has.
        "twelve_heads": features(create(VITS[16][1], num_heads=12), BATCH, (SIDE, SIDE)),
        "training": {name: training(name) for name in [VITS[16][0], XCITS[0]]},
    }
    lists = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")
    print(lists.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(golden, indent=1)))


if __name__ == "__main__":
    main()
