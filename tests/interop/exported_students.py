"""Trains a student of every architecture for a few steps, exports it in every format, and has other programs compute its features.

    python tests/interop/exported_students.py BINARIES PHOTOS WORK [ARCH...]

Needs numpy, safetensors, onnx and onnxruntime; with torch and timm it also loads the weights into timm's models, strictly.
`BINARIES` is the directory of the four binaries, `PHOTOS` one of images, `WORK` a new one. What the others compute is compared with
`student-eval features`, at two sizes. Prints the largest error of each student, relative to the largest feature, and exits 1 above 1e-4.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from safetensors import safe_open

try:
    import timm
    import torch
    from safetensors.torch import load_file
except ImportError:
    timm = None

# Enough for running statistics under which images differ, and under which f32 is exact to 1e-5: after fewer steps of smaller images
# even PyTorch in f32 is 9e-4 from PyTorch in f64.
TRAINING_SIZE = 64
SIZES = [224, 75]
# Patches must divide the sides.
PATCH_SIZES = [224, 80]
IMAGES = 4
TRAINING_IMAGES = 24
EPOCHS = 8
BATCH = 8
TOLERANCE = 1e-4
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
METHODS = {
    "moco-v2": ["--queue-size", 2 * BATCH, "--head-hidden", 32],
    "moco-v1": ["--queue-size", 2 * BATCH],
    "swav": ["--swav-queue-size", 0, "--head-hidden", 32, "--prototypes", 10],
}
# timm has neither SwAV's own network nor this size of transformer.
ABSENT_FROM_TIMM = {"resnet50w2", "vit_tiny_patch8_224"}


class Stages:
    def __init__(self, binaries, work):
        self.binaries, self.work = Path(binaries), Path(work)

    def run(self, program, *arguments):
        subprocess.run([self.binaries / program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)

    def architectures(self):
        text = subprocess.check_output([self.binaries / "student-train", "pretrain", "--help"], text=True)
        listed = text.split("--student <ARCH>")[1].split("--epochs")[0]
        return re.findall(r"^ +- (\w+):", listed, re.MULTILINE)


def read(path, name):
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def pixels(shards):
    """f32 (N, 3, H, W), normalised."""
    stored = np.concatenate([read(path, "pixels")[:, 0] for path in sorted(shards.glob("shard-*.safetensors"))])
    return np.ascontiguousarray(((stored.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2))


def our_features(stages, run, shards):
    output = run.with_name(shards.name)
    stages.run("student-eval", "features", "--shards", shards, "--output", output, "--quiet", run)
    files = sorted(output.rglob("features-*.safetensors"))
    features = np.concatenate([read(path, "features")[:, 0] for path in files]).astype(np.float32)
    spread = np.abs(features - features.mean(0)).max() / np.abs(features).max()
    assert spread > 1e-2, f"{run}, {shards}: images differ by {spread} only, so that equal features would show nothing"
    return features


def relative_error(found, expected, what):
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_onnx(stages, run, arch, size, images, expected):
    """The graph alone, then with the head, whose weights the run's last checkpoint holds."""
    worst = 0.0
    for head in [[], ["--head"]]:
        path = run.with_name(f"{size}{''.join(head)}.onnx")
        stages.run("student-train", "export", run, "--format", "onnx", "--size", size, "--output", path, *head)
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["arch"] == arch and metadata["image_size"] == f"{size}x{size}", metadata
        assert np.allclose(json.loads(metadata["mean"]), MEAN) and np.allclose(json.loads(metadata["std"]), STD)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        assert names == ["features", "embeddings"][: len(names)] and len(names) == 1 + len(head), names
        found = session.run(None, {"images": images})
        worst = max(worst, relative_error(found[0], expected, f"{arch}, {path.name}, features"))
        # A batch of another size in the same session.
        single = session.run(["features"], {"images": images[:1]})[0]
        worst = max(worst, float(np.abs(single - found[0][:1]).max() / np.abs(found[0]).max()))
        if head:
            worst = max(worst, relative_error(found[1], embeddings(run, found[0]), f"{arch}, {path.name}, embeddings"))
    return worst


def embeddings(run, features):
    """The head of the run's checkpoint, applied to features."""
    details = json.loads((run / "manifest.json").read_text())["details"]

    def tensor(name):
        return read(run / details["checkpoint"], f"query.{name}")

    def linear(rows, name):
        return rows @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")

    match details.get("head", "mlp"):
        case "linear":
            rows = linear(features, "fc")
        case "mlp":
            rows = linear(np.maximum(linear(features, "fc.0"), 0), "fc.2")
        case "mlp-batch-norm":
            norm = {name: tensor(f"projection_head.1.{name}") for name in ["weight", "bias", "running_mean", "running_var"]}
            normal = (linear(features, "projection_head.0") - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5)
            rows = linear(np.maximum(normal * norm["weight"] + norm["bias"], 0), "projection_head.3")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def check_timm(stages, run, arch, images, expected):
    """Safetensors and `.pth`, loaded strictly, at every size."""
    paths = {form: run.with_name(f"student.{form}") for form in ["safetensors", "pth"]}
    for form, path in paths.items():
        stages.run("student-train", "export", run, "--format", form, "--output", path)
    states = [load_file(paths["safetensors"]), torch.load(paths["pth"], weights_only=True)]
    worst = 0.0
    for state in states:
        options = {"dynamic_img_size": True} if arch.startswith("vit") else {}
        model = timm.create_model(arch, num_classes=0, **options).eval()
        theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert theirs == {name: tuple(tensor.shape) for name, tensor in state.items()}, arch
        model.load_state_dict(state, strict=True)
        for size in expected:
            with torch.no_grad():
                found = model(torch.from_numpy(images[size])).numpy()
            worst = max(worst, relative_error(found, expected[size], f"{arch} at {size} by timm"))
    return worst


def detectron2_name(name):
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name) if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def check_detectron2(stages, run, arch):
    """The names of the modules in Detectron2's `resnet.py`, which its checkpointer matches with any prefix."""
    path = run.with_name("detectron2.pth")
    stages.run("student-train", "export", run, "--format", "pth", "--names", "detectron2", "--output", path)
    found = torch.load(path, weights_only=True)
    assert found["matching_heuristics"] is True and isinstance(found["__author__"], str), arch
    expected = {detectron2_name(name): tensor for name, tensor in load_file(run.with_name("student.safetensors")).items()}
    assert found["model"].keys() == expected.keys(), arch
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in expected.items()), arch


def main(binaries, photos, work, *archs):
    stages = Stages(binaries, work)
    stages.work.mkdir(parents=True)
    photos = sorted(Path(photos).rglob("*.jpg"))[:TRAINING_IMAGES]
    for name, chosen in [("few", photos[:IMAGES]), ("more", photos)]:
        (stages.work / name).mkdir()
        for path in chosen:
            (stages.work / name / path.name).symlink_to(path.resolve())
    training = stages.work / "shards"
    pack = ["--quiet", "--shard-samples", 64]
    stages.run(
        "data-prep", "pack", "--input", stages.work / "more", "--output", training,
        "--recipe", "moco-v2", "--views", 2, "--size", TRAINING_SIZE, *pack,
    )  # fmt: skip
    for size in {*SIZES, *PATCH_SIZES}:
        stages.run(
            "data-prep", "pack", "--input", stages.work / "few", "--output", stages.work / f"size{size}",
            "--recipe", "eval-center", "--size", size, *pack,
        )  # fmt: skip
    images = {size: pixels(stages.work / f"size{size}") for size in {*SIZES, *PATCH_SIZES}}
    if timm is None:
        print("torch and timm are not installed: their part is left out")
    failed = False
    archs = archs or stages.architectures()
    other_heads = [(arch, method) for arch in archs if arch == "resnet18" for method in ["moco-v1", "swav"]]
    for arch, method in [*((arch, "moco-v2") for arch in archs), *other_heads]:
        run = stages.work / f"{arch}-{method}" / "run"
        run.parent.mkdir()
        stages.run(
            "student-train", "pretrain", "--shards", training, "--student", arch, "--output", run, "--epochs", EPOCHS,
            "--batch-size", BATCH, "--embedding-dim", 16, "--quiet", "--method", method, *METHODS[method],
        )  # fmt: skip
        sizes = PATCH_SIZES if "_patch" in arch or arch.startswith("xcit") else SIZES
        expected = {size: our_features(stages, run, stages.work / f"size{size}") for size in sizes}
        errors = {f"onnx {size}": check_onnx(stages, run, arch, size, images[size], expected[size]) for size in sizes}
        if timm is not None and arch not in ABSENT_FROM_TIMM:
            errors["timm"] = check_timm(stages, run, arch, images, expected)
            if arch.startswith("resnet"):
                check_detectron2(stages, run, arch)
        print(f"{arch}, {method}: relative error of features " + ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))
        failed |= not max(errors.values()) <= TOLERANCE
        shutil.rmtree(run.parent)
    sys.exit(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
