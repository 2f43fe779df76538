"""Has torchvision and timm save classifiers in every format, imports them, and loads the result back into timm, strictly.

    python tests/interop/import_checkpoints.py STUDENT_TRAIN WORK [ARCH...]

Needs torch, torchvision, timm and safetensors. `STUDENT_TRAIN` is the binary, `WORK` a new directory. The weights are drawn; the
batch-norm statistics are moved away from their start. Every tensor must come back bit for bit; exits 1 otherwise.
"""

import json
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

# EfficientNets, which torchvision names differently from timm: the names are paired by position.
RENAMED = ["efficientnet_b0", "efficientnet_b1"]
ARCHS = ["resnet18", "resnet34", "resnet50", "efficientnet_b0", "efficientnet_b1", "mobilenetv3_large_100", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "xcit_tiny_12_p16_224"]


def classifier(arch, library):
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None) if library == "torchvision" else timm.create_model(arch)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(12345)
    return model


def save(model, arch, library, work):
    """Paths of the checkpoint: plain, in a wrapper with an optimiser, in the old format, in half precision, as safetensors."""
    state = model.state_dict()
    wrapped = {"epoch": 3, "arch": arch, "state_dict": {f"module.{name}": x for name, x in state.items()}}
    wrapped["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
    stem = work / f"{library}_{arch}"
    paths = [stem.with_name(stem.name + rest) for rest in [".pth", "_wrapped.pth.tar", "_legacy.pth.tar", "_half.pth", ".safetensors"]]
    torch.save(state, paths[0])
    torch.save(wrapped, paths[1])
    torch.save(wrapped, paths[2], _use_new_zipfile_serialization=False)
    torch.save({"model": {name: x.half() if x.is_floating_point() else x for name, x in state.items()}}, paths[3])
    save_file(state, paths[4])
    return paths


def main(binary, work, *archs):
    work = Path(work)
    work.mkdir(parents=True)
    networks = [(arch, "torchvision" if arch.startswith("resnet") else "timm") for arch in archs or ARCHS]
    for arch, library in networks + [(arch, "torchvision") for arch in RENAMED if not archs or arch in archs]:
        model = classifier(arch, library)
        headless = timm.create_model(arch, num_classes=0)
        backbone = {name: x for name, x in model.state_dict().items() if not name.startswith(("fc.", "classifier.", "head."))}
        expected = dict(zip(headless.state_dict(), backbone.values(), strict=True))
        for path in save(model, arch, library, work):
            output = work / "imported.safetensors"
            command = [binary, "import", path, "--output", output, "--overwrite", "--json"]
            summary = json.loads(subprocess.check_output(command))
            left = [(kind["tensors"]) for kind in summary["left-over"]]
            assert (summary["student"], summary["used"], left) == (arch, len(expected), [2]), summary
            found = load_file(output)
            headless.load_state_dict(found, strict=True)
            for name, x in expected.items():
                rounded = x.half().float() if "_half" in path.name and x.is_floating_point() else x
                assert torch.equal(found[name], rounded), f"{path}: {name}"
            print(f"{path.name}: {summary['used']} tensors")
        wrong = "resnet50" if arch != "resnet50" else "resnet18"
        command = [binary, "import", path, "--output", output, "--overwrite", "--student", wrong]
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 1 and refused.stderr.startswith("error: ") and arch in refused.stderr, refused


if __name__ == "__main__":
    main(*sys.argv[1:])
