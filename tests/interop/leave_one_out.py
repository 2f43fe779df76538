"""k-NN accuracy of an embedding set over its own labelled samples, each classified by all others.

    python tests/interop/leave_one_out.py EMBEDDINGS SHARDS [K...]

Needs numpy and safetensors. Takes the first view of each sample; a neighbour votes for its class with exp(similarity / 0.07), as in
`student-eval knn`. Prints the percentage for each K (1, 5 and 10 unless given).
"""

import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

TEMPERATURE = 0.07


def read(path, *names):
    with safe_open(path, framework="numpy") as file:
        return [file.get_tensor(name) for name in names]


def load(embeddings, shards):
    """Unit rows of the first views, and the labels of the same samples."""
    rows, labels = [], []
    for path in sorted(Path(shards).glob("shard-*.safetensors")):
        ids, label = read(path, "sample_ids", "labels")
        other = Path(embeddings) / path.name.replace("shard-", "embeddings-")
        embedded, row = read(other, "sample_ids", "embeddings")
        assert np.array_equal(ids, embedded), f"`{other}` holds other samples than `{path}`"
        rows.append(row[:, 0].astype(np.float64))
        labels.append(label)
    rows, labels = np.concatenate(rows), np.concatenate(labels)
    assert (labels >= 0).all(), f"`{shards}` has samples without a label"
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def accuracy(rows, labels, k):
    similarities = rows @ rows.T
    np.fill_diagonal(similarities, -np.inf)
    right = 0
    for similarity, label in zip(similarities, labels):
        nearest = np.argsort(-similarity, kind="stable")[:k]
        votes = np.bincount(labels[nearest], np.exp(similarity[nearest] / TEMPERATURE), labels.max() + 1)
        right += votes.argmax() == label
    return 100 * right / len(labels)


def main(embeddings, shards, *ks):
    rows, labels = load(embeddings, shards)
    print(f"{len(rows)} samples of {len(np.unique(labels))} classes, {rows.shape[1]} numbers each")
    for k in [int(k) for k in ks] or [1, 5, 10]:
        print(f"k = {k}: {accuracy(rows, labels, k):.2f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
