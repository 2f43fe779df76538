"""Teachers of every layout in layouts.py: what is to be recognised, embeddings by torchvision and timm in f64, and tiny checkpoint
files.

Writes `teachers.json` and `teachers/*.pth`. Made with Python 3.11.7, torch 2.15.0, torchvision 0.29.2, timm 1.0.31 on the CPU; the output states
the versions. All weights and pixels come from formula.py, so there is no seed. Run it from this folder: `python teachers.py`. The files
of the legacy format then differ in the names of their storages, which PyTorch takes from addresses in memory.
"""

import argparse
import json
import pathlib

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.models.xcit import checkpoint_filter_fn

from formula import fingerprint, load_into, parameter, unit
from layouts import LAYOUTS, Sizes, tree
from transformers import SCALES, scale

HERE = pathlib.Path(__file__).parent
SAMPLES, VIEWS = 3, 2
# Side of the images: of residual networks, and of transformers, which patches must divide.
SIDE, PATCHED_SIDE, PATCH, TABLE_SIDE = 40, 48, 16, 14
# Sizes as published, as far as one set of sizes can be: only their equality matters. A width that no other size has stands for the
# feature width, which the tests replace by that of each architecture.
FULL, FULL_WIDTH = Sizes(hidden=8192, embedding=128, prototypes=3000, queue=65536), 7777
SMALL = Sizes(hidden=48, embedding=16, prototypes=24, queue=32)
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)
KINDS = {torch.float32: "f32", torch.float16: "f16", torch.int64: "i64"}
# Architecture, layout, and the method that is asked for where it is not the one that is told: beside resnet18 with every layout.
MORE = [
    ("resnet50", "moco_v2", None), ("resnet34", "backbone", None), ("vit_tiny_patch16_224", "dino", None),
    ("vit_tiny_patch16_224", "backbone", None), ("vit_tiny_patch16_224", "backbone", "dino"),
    ("vit_tiny_patch16_224", "supervised_transformer", None), ("vit_small_patch16_224", "moco_v3_transformer", None),
    ("vit_small_patch16_224", "moco_v3_transformer", "backbone"), ("xcit_tiny_12_p16_224", "dino", None),
    ("xcit_tiny_12_p16_224", "dino_official", None),
]
# The same of all that are compared.
CASES = [
    ("resnet18", function.__name__, None) for function in LAYOUTS if not function.__name__.endswith(("_transformer", "_official"))
] + MORE


RESNET = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
TRANSFORMER = ["cls_token", "pos_embed", "pos_embeder", "patch_embed", "blocks", "cls_attn_blocks", "norm"]
NUMBERED = ["0", "1", "4", "5", "6", "7"]


def beside_networks(layout, state):
    """The names of the state dict that are of no backbone."""

    def of_network(name):
        for prefix, naming in layout.networks:
            layers = NUMBERED if naming == "numbered" else RESNET + TRANSFORMER
            if name.startswith(prefix) and name[len(prefix):].split(".")[0] in layers:
                return True
        return False

    return [name for name in state if not of_network(name)]


def described(function, layout):
    state = layout.tree.state_dict()
    shape = lambda name: [None if size == FULL_WIDTH else size for size in state[name].shape]
    beside = beside_networks(layout, state)
    left = layout.left_over
    # What a copy of the network holds depends on the architecture: counted here without it.
    counts = {kind: sum(any(name.startswith(start) for start in starts) for name in beside) for kind, starts in left.items()}
    copies = {kind: [prefix for prefix, _ in layout.networks[1:] for start in starts if prefix.startswith(start)]
              for kind, starts in left.items()}
    return {
        "name": function.__name__, "method": layout.method, "alike": layout.alike, "archs": layout.archs,
        "networks": [{"prefix": prefix, "naming": naming} for prefix, naming in layout.networks],
        "others": [[name, shape(name)] for name in sorted(beside)],
        "left_over": {kind: {"others": counts[kind], "networks": len(copies[kind])} for kind in sorted(left)},
    }


def stub(numbered=False):
    return nn.Sequential() if numbered else nn.Module()


def pixels(side):
    """f64 (B, 3, H, W), normalised."""
    shape = (SAMPLES * VIEWS, side, side, 3)
    drawn = np.floor(unit("pixels", int(np.prod(shape))) * 256).reshape(shape)
    return (torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255 - MEAN) / STD


def create(arch, layout):
    """A backbone without a classifier."""
    if arch.startswith("resnet"):
        made = getattr(torchvision.models, arch)(weights=None)
        del made.fc
        return made
    # MoCo v3's small transformer has 12 heads.
    options = {"num_heads": 12} if layout == "moco_v3_transformer" else {}
    dynamic = {"dynamic_img_size": True} if arch.startswith("vit") else {}
    return timm.create_model(arch, num_classes=0, **options, **dynamic)


def dino_positions(table, side):
    """By the arithmetic of DINO's `interpolate_pos_encoding`."""
    grid = table[:, 1:].reshape(1, TABLE_SIDE, TABLE_SIDE, -1).permute(0, 3, 1, 2)
    factor = (side // PATCH + 0.1) / TABLE_SIDE
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([table[:, :1], grid], dim=1)


def features(backbone, xs, as_dino):
    if isinstance(backbone, nn.Sequential):
        return torch.flatten(backbone(xs), 1)
    if hasattr(backbone, "layer1"):
        for name in ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]:
            xs = getattr(backbone, name)(xs)
        return torch.flatten(xs, 1)
    if isinstance(backbone, timm.models.VisionTransformer) and as_dino:
        tokens = backbone.patch_embed(xs).flatten(1, 2)
        tokens = torch.cat([backbone.cls_token.expand(len(xs), -1, -1), tokens], dim=1)
        tokens = backbone.blocks(tokens + dino_positions(backbone.pos_embed, xs.shape[-1]))
        return backbone.norm(tokens)[:, 0]
    # Not `forward`, which goes on to a head that is a layer of the network.
    return backbone.forward_features(xs)[:, 0]


def official(name):
    """What the official code of XCiT calls a tensor of timm; `None` where it is a part of another."""
    part = [part for part in ("q", "k", "v") if name.startswith("cls_attn_blocks.") and f".attn.{part}." in name]
    if part:
        return name.replace(".attn.q.", ".attn.qkv.") if part == ["q"] else None
    return name.replace("pos_embed.", "pos_embeder.")


def load(layout, backbone):
    """Gives every tensor of the tree the value of its name in the file."""
    load_into(layout.tree)
    prefix, naming = layout.networks[0]
    if naming == "official":
        state = {}
        for name, value in backbone.state_dict().items():
            if official(name):
                shape = [value.shape[0] * 3, *value.shape[1:]] if ".attn.qkv." in official(name) and ".attn.q." in name else value.shape
                state[official(name)] = torch.from_numpy(parameter(prefix + official(name), tuple(shape)))
        backbone.load_state_dict(checkpoint_filter_fn(state, backbone))
    with torch.no_grad():
        for name, value in layout.tree.state_dict().items():
            if scale(name) != 1.0:
                value.mul_(scale(name))
    return layout.tree.double().eval()


def assembled(function, arch):
    """A checkpoint laid out so, in f64, and the backbone in it that is to be taken."""
    made = []

    def net(numbered=False):
        made.append(create(arch, function.__name__))
        return nn.Sequential(*made[-1].children()) if numbered else made[-1]

    width = net().num_features if not arch.startswith("resnet") else 512 if arch in ("resnet18", "resnet34") else 2048
    layout = function(net, width, SMALL)
    backbone = layout.tree
    for part in [part for part in layout.networks[0][0].split(".") if part]:
        backbone = getattr(backbone, part)
    load(layout, backbone)
    return layout, backbone


def embeddings(layout, backbone, xs, asked=None):
    """Rows of unit length; `asked`: the method that is asked for where it is not the layout's."""
    with torch.no_grad():
        rows = features(backbone, xs, "dino" in (layout.method, asked))
        return F.normalize(rows if asked in ("backbone", "dino") else layout.embed(rows), dim=1)


def embedded(function, arch, asked=None):
    layout, backbone = assembled(function, arch)
    side = SIDE if arch.startswith("resnet") else PATCHED_SIDE
    rows = embeddings(layout, backbone, pixels(side), asked)
    # Of wide rows the first numbers are enough: every number depends on the whole network.
    kept = [[float(f"{x:.9g}") for x in row[: SMALL.embedding]] for row in rows.tolist()]
    return described(function, layout) | {"arch": arch, "asked": asked, "side": side, "width": rows.shape[1], "rows": kept}


def tiny(numbered=False):
    """The first layers of a backbone, a few channels wide."""
    conv, norm = nn.Conv2d(3, 4, 7 if numbered else 3, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(conv, norm) if numbered else tree(conv1=conv, bn1=norm)


def weights(function):
    sizes = Sizes(hidden=5, embedding=3, prototypes=6, queue=4)
    return load_into(function(tiny, 4, sizes).tree).state_dict()


def optimiser():
    """State of an optimiser that has made a step."""
    weight = nn.Parameter(torch.ones(2, 3))
    sgd = torch.optim.SGD([weight], lr=0.03, momentum=0.9)
    weight.sum().backward()
    sgd.step()
    return sgd.state_dict()


def containers():
    """What the programs save, by layout: the whole value, where its state dict is, and what else is told of it."""
    by_name = {function.__name__: function for function in LAYOUTS}
    state = lambda name: weights(by_name[name])
    settings = argparse.Namespace(arch="resnet50", out_dim=65536, use_bn_in_head=False, lr=0.3)
    moco = lambda name: {"epoch": 200, "arch": "resnet50", "state_dict": state(name), "optimizer": optimiser()}
    student = {f"module.{name}": value for name, value in state("dino").items()}
    target = {name: value + 1 for name, value in state("byol").items() if value.is_floating_point()}
    told = {"epoch": 200, "arch": "resnet50"}
    yield "moco_v1", moco("moco_v1"), "state_dict", told
    yield "moco_v2", moco("moco_v2"), "state_dict", told
    yield "moco_v3", moco("moco_v3") | {"scaler": {"scale": 65536.0}}, "state_dict", told
    yield "swav", state("swav"), "", {}
    yield "deepcluster_v2", {"epoch": 400, "state_dict": state("deepcluster_v2"), "optimizer": optimiser()}, "state_dict", {"epoch": 400}
    yield "dino", {
        "student": student, "teacher": state("dino"), "optimizer": optimiser(), "epoch": 800, "args": settings,
        "dino_loss": {"center": torch.zeros(1, 6)}, "fp16_scaler": {"scale": 1024.0},
    }, "teacher", {"epoch": 800, "args.arch": "resnet50", "args.lr": 0.3}
    yield "simclr", {"epoch": 100, "arch": "resnet18", "state_dict": state("simclr"), "optimizer": optimiser()}, "state_dict", {"epoch": 100}
    yield "simclr_beside", state("simclr_beside"), "", {}
    yield "simclr_lightly", {
        "epoch": 7, "global_step": 70, "pytorch-lightning_version": "2.1.0", "state_dict": state("simclr_lightly"), "loops": None,
        "callbacks": {}, "optimizer_states": [optimiser()], "lr_schedulers": [], "hyper_parameters": {"lr": 0.06},
    }, "state_dict", {"epoch": 7, "hyper_parameters.lr": 0.06}
    yield "byol", {
        "online_network_state_dict": state("byol"), "target_network_state_dict": target, "optimizer_state_dict": optimiser(),
    }, "online_network_state_dict", {}
    yield "byol_whole", state("byol_whole"), "", {}
    yield "barlow_twins", {"epoch": 1000, "model": state("barlow_twins"), "optimizer": optimiser()}, "model", {"epoch": 1000}
    yield "vicreg", {"epoch": 1000, "model": state("vicreg"), "optimizer": optimiser()}, "model", {"epoch": 1000}
    yield "supervised", state("supervised"), "", {}
    yield "backbone", {name: value.half() for name, value in state("backbone").items() if value.is_floating_point()}, "", {}
    trunk = {name.removeprefix("trunk."): value for name, value in state("vissl").items()}
    yield "vissl", {
        "phase_idx": 99, "loss": {}, "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}},
    }, "classy_state_dict.base_model.model.trunk", {"phase_idx": 99}


def files():
    (HERE / "teachers").mkdir(exist_ok=True)
    found = []
    for name, value, key, told in containers():
        state = value
        for part in [part for part in key.split(".") if part]:
            state = state[part]
        for form in ("zip", "legacy"):
            file = f"{name}_{form}.pth"
            torch.save(value, HERE / "teachers" / file, _use_new_zipfile_serialization=form == "zip")
            tensors = [[key, KINDS[x.dtype], list(x.shape), fingerprint(key, x)[:2]] for key, x in state.items()]
            found.append({"file": file, "state_key": key, "metadata": told, "tensors": tensors})
    return found


def main():
    with torch.device("meta"):
        layouts = [described(function, function(stub, FULL_WIDTH, FULL)) for function in LAYOUTS]
    by_name = {function.__name__: function for function in LAYOUTS}
    cases = [embedded(by_name[name], arch, asked) for arch, name, asked in CASES]
    versions = {module.__name__: module.__version__ for module in [torch, torchvision, timm, np]}
    golden = {"versions": versions, "scales": SCALES, "layouts": layouts, "cases": cases, "files": files()}
    lines = [f"{json.dumps(key)}: " + (json.dumps(value) if isinstance(value, dict) else
             "[\n" + ",\n".join(json.dumps(entry) for entry in value) + "\n]") for key, value in golden.items()]
    (HERE / "teachers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
