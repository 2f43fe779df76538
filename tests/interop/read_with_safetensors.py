"""Reads every tensor file below a directory with the safetensors package and checks it against the documented layouts.

    python tests/interop/read_with_safetensors.py OUTPUT_OF_QUICKSTART

Needs numpy and safetensors, and Pillow where shards hold JPEGs. Exits 1 at the first violation.
"""

import io
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open


def check(condition, message):
    if not condition:
        sys.exit(f"error: {message}")


def read(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def check_shard(path, tensors):
    """Checks every layout of a shard; gives the number of stored views, 0 for source images."""
    samples = len(tensors["sample_ids"])
    check(tensors["sample_ids"].shape == tensors["labels"].shape == (samples,), f"{path}: sample_ids, labels")
    check(tensors["sample_ids"].dtype == np.uint64, f"{path}: sample_ids are {tensors['sample_ids'].dtype}")
    header = int.from_bytes(path.read_bytes()[:8], "little")
    check((header + 8) % 4096 == 0, f"{path}: pixels do not start on a page")
    if "sizes" in tensors:
        check(tensors["sizes"].shape == (samples, 2), f"{path}: sizes {tensors['sizes'].shape}")
        pieces = cut(path, tensors["bytes"], tensors["offsets"], samples)
        for piece, (height, width) in zip(pieces, tensors["sizes"]):
            if len(piece) != int(height) * int(width) * 3:
                check(decode(piece) == (height, width), f"{path}: a JPEG is not {height} x {width}")
        return 0
    views = 0
    for prefix in ["", "local_"]:
        if prefix + "view_params" not in tensors:
            continue
        count = tensors[prefix + "view_params"].shape[1]
        check(tensors[prefix + "view_params"].shape == (samples, count, 18), f"{path}: {prefix}view_params")
        views = views or count
        if prefix + "pixels" in tensors:
            pixels = tensors[prefix + "pixels"]
            check(pixels.dtype == np.uint8 and pixels.shape[:2] == (samples, count) and pixels.shape[4] == 3, f"{path}: {prefix}pixels {pixels.shape}")
        else:
            pieces = cut(path, tensors[prefix + "bytes"], tensors[prefix + "offsets"], samples * count)
            check(len({decode(piece) for piece in pieces}) == 1, f"{path}: {prefix}views of several sizes")
    return views


def cut(path, data, offsets, count):
    check(offsets.shape == (count + 1,) and offsets[-1] == len(data), f"{path}: offsets")
    return [data[start:end].tobytes() for start, end in zip(offsets, offsets[1:])]


def decode(piece):
    from PIL import Image

    picture = Image.open(io.BytesIO(piece)).convert("RGB")
    return picture.height, picture.width


def main(root):
    shards, embeddings, students = {}, [], 0
    for path in sorted(Path(root).rglob("*.safetensors")):
        tensors = read(path)
        if path.name.startswith("shard-"):
            views = check_shard(path, tensors)
            for sample in tensors["sample_ids"]:
                shards.setdefault(int(sample), set()).add(views)
        elif path.name.startswith("embeddings-"):
            embeddings.append((path, tensors))
        elif path.name == "student.safetensors":
            students += 1
            check("conv1.weight" in tensors and "fc.weight" not in tensors, f"{path}: {sorted(tensors)[:3]}")
            check(all(np.isfinite(tensor).all() for tensor in tensors.values()), f"{path}: not finite")
        else:
            check(len(tensors) > 0, f"{path}: empty")
    for path, tensors in embeddings:
        rows = tensors["embeddings"].astype(np.float32)
        check(all(rows.shape[1] in shards.get(int(sample), ()) for sample in tensors["sample_ids"]), f"{path}: samples")
        norms = np.linalg.norm(rows, axis=-1)
        check(np.abs(norms - 1).max() < 2e-3, f"{path}: norms {norms.min()} to {norms.max()}")
    check(shards and embeddings and students, f"`{root}` holds no shards, embeddings or students")
    print(f"read {len(shards)} samples, {len(embeddings)} embedding files, {students} students")


if __name__ == "__main__":
    main(sys.argv[1])
