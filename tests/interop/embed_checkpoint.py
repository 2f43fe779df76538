"""Has PyTorch save MoCo v2 teachers in both of its formats, embeds shards with them, and compares with PyTorch's embeddings.

    python tests/interop/embed_checkpoint.py TEACHER_EMBED SHARDS WORK [ARCH...]

Needs torch, torchvision and safetensors. `TEACHER_EMBED` is the binary, `SHARDS` a shard set, `WORK` a new directory. The
files are as the official ones: `state_dict` with `module.encoder_q.`, `module.encoder_k.` and the queue, beside the epoch, the
settings and an optimiser. Prints the largest cosine distance of each file and exits 1 above 1e-5.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from safetensors import safe_open


def teacher(arch):
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None)
    width = model.fc.in_features
    model.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def save(model, arch, path, legacy):
    state = {f"module.{encoder}.{name}": x for encoder in ("encoder_q", "encoder_k") for name, x in model.state_dict().items()}
    state["module.queue"] = F.normalize(torch.randn(128, 512), dim=0)
    state["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    value = {"epoch": 200, "arch": arch, "state_dict": state, "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.03)}
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def read(path, name):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def main(binary, shards, work, *archs):
    work = Path(work)
    work.mkdir(parents=True)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    worst = 0.0
    for arch in archs or ["resnet18", "resnet50"]:
        model = teacher(arch)
        for legacy in (False, True):
            name = f"{arch}_{'legacy' if legacy else 'zip'}"
            save(model, arch, work / f"{name}.pth.tar", legacy)
            described = json.loads(subprocess.check_output([binary, "describe", work / f"{name}.pth.tar", "--json"]))
            found = described["recognised"][0]
            assert (found["arch"], found["method"], found["missing"], found["unexpected"]) == (arch, "moco-v2", [], []), found
            command = [binary, "embed", "--shards", shards, "--weights", work / f"{name}.pth.tar", "--output", work / name]
            subprocess.check_call([*command, "--dtype", "f32"], stdout=subprocess.DEVNULL)
            distance = 0.0
            for path in sorted(Path(shards).glob("shard-*.safetensors")):
                pixels = read(path, "pixels").flatten(0, 1).permute(0, 3, 1, 2).float()
                with torch.no_grad():
                    rows = [F.normalize(model((batch / 255 - mean) / std).double(), dim=1) for batch in pixels.split(16)]
                ours = read(work / name / path.name.replace("shard-", "embeddings-"), "embeddings").flatten(0, 1).double()
                distance = max(distance, (1 - (torch.cat(rows) * ours).sum(1) / ours.norm(dim=1)).max().item())
            print(f"{name}: cosine distance at most {distance:.2e}")
            worst = max(worst, distance)
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])
