"""Reads every tensor file below a directory with the safetensors package and checks it against the documented layouts.

    python tests/interop/read_with_safetensors.py OUTPUT_OF_QUICKSTART

Needs numpy and safetensors. Exits 1 at the first violation.
"""

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


def main(root):
    shards, embeddings, students = {}, [], 0
    for path in sorted(Path(root).rglob("*.safetensors")):
        tensors = read(path)
        if path.name.startswith("shard-"):
            samples, views, height, width, channels = tensors["pixels"].shape
            check(tensors["pixels"].dtype == np.uint8 and channels == 3, f"{path}: pixels {tensors['pixels'].shape}")
            check(tensors["view_params"].shape == (samples, views, 18), f"{path}: view_params")
            check(tensors["sample_ids"].shape == tensors["labels"].shape == (samples,), f"{path}: sample_ids, labels")
            check(tensors["sample_ids"].dtype == np.uint64, f"{path}: sample_ids are {tensors['sample_ids'].dtype}")
            header = int.from_bytes(path.read_bytes()[:8], "little")
            check((header + 8) % 4096 == 0, f"{path}: pixels do not start on a page")
            for sample in tensors["sample_ids"]:
                shards[int(sample)] = views
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
        check(all(shards.get(int(sample)) == rows.shape[1] for sample in tensors["sample_ids"]), f"{path}: samples")
        norms = np.linalg.norm(rows, axis=-1)
        check(np.abs(norms - 1).max() < 2e-3, f"{path}: norms {norms.min()} to {norms.max()}")
    check(shards and embeddings and students, f"`{root}` holds no shards, embeddings or students")
    print(f"read {len(shards)} samples, {len(embeddings)} embedding files, {students} students")


if __name__ == "__main__":
    main(sys.argv[1])
