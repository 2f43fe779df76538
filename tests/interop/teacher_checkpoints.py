"""Has PyTorch save teachers of every method in both of its formats, embeds shards with them, and compares with PyTorch's embeddings.

    python tests/interop/teacher_checkpoints.py TEACHER_EMBED SHARDS WORK [LAYOUT...]

Needs torch, torchvision, timm and safetensors. `TEACHER_EMBED` is the binary, `SHARDS` a shard set whose sides are multiples of 16, `WORK` a new
directory. The checkpoints are whole networks, laid out and nested as the training programs do (`tests/golden/layouts.py`). Prints the largest
cosine distance of each file and exits 1 above 1e-5, or when something else is recognised.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
from layouts import LAYOUTS  # noqa: E402
from teachers import CASES, MEAN, STD, assembled, embeddings, official, optimiser  # noqa: E402

LIMIT = 1e-5


def nested(name, state):
    """The state dict within what the training program saves."""
    if name.startswith("dino") and name != "dino_both":
        student = {f"module.{key}": value + 1 if value.is_floating_point() else value for key, value in state.items()}
        return {"student": student, "teacher": state, "optimizer": optimiser(), "epoch": 800}
    if name == "byol":
        return {"online_network_state_dict": state, "optimizer_state_dict": optimiser()}
    if name.startswith(("barlow_twins", "vicreg")):
        return {"epoch": 1000, "model": state, "optimizer": optimiser()}
    if name.startswith(("moco", "deepcluster", "simclr")):
        return {"epoch": 200, "arch": "some", "state_dict": state, "optimizer": optimiser()}
    return state


def state_of(layout, backbone):
    """The tensors of a layout, under the names that the official code has where they are not timm's."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in layout.tree.state_dict().items()}
    prefix, naming = layout.networks[0]
    if naming != "official":
        return state
    renamed = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for key, value in backbone.state_dict().items():
        if official(key):
            fused = ".attn.qkv." in official(key) and ".attn.q." in key
            parts = [state[prefix + key.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"] if fused else [state[prefix + key]]
            renamed[prefix + official(key)] = torch.cat(parts) if fused else parts[0]
    return renamed


def read(path, name):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def main(binary, shards, work, *wanted):
    work = Path(work)
    work.mkdir(parents=True)
    functions = {function.__name__: function for function in LAYOUTS}
    pixels = [read(path, "pixels").flatten(0, 1) for path in sorted(Path(shards).glob("shard-*.safetensors"))]
    worst = 0.0
    for arch, name, asked in CASES:
        if wanted and name not in wanted:
            continue
        layout, backbone = assembled(functions[name], arch)
        expected = []
        for shard in pixels:
            images = (shard.permute(0, 3, 1, 2).double() / 255 - MEAN) / STD
            expected.append(torch.cat([embeddings(layout, backbone, batch, asked) for batch in images.split(32)]))
        for form in ("zip", "legacy"):
            label = f"{arch}-{name}-{asked or layout.method}-{form}"
            path = work / f"{label}.pth.tar"
            torch.save(nested(name, state_of(layout, backbone)), path, _use_new_zipfile_serialization=form == "zip")
            found = json.loads(subprocess.check_output([binary, "describe", path, "--json"]))["recognised"][0]
            assert (found["arch"], found["method"], found["missing"], found["unexpected"]) == (arch, layout.method, [], []), (label, found)
            command = [binary, "embed", "--shards", shards, "--weights", path, "--output", work / label, "--dtype", "f32", "--quiet"]
            subprocess.run([*command, *(["--method", asked] if asked else [])], check=True, stdout=subprocess.DEVNULL)
            distance = 0.0
            for rows, file in zip(expected, sorted((work / label).glob("embeddings-*.safetensors"))):
                ours = read(file, "embeddings").flatten(0, 1).double()
                distance = max(distance, (1 - (rows * ours).sum(1) / ours.norm(dim=1)).max().item())
            path.unlink()
            print(f"{label}: cosine distance at most {distance:.1e}", flush=True)
            worst = max(worst, distance)
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main(*sys.argv[1:])
