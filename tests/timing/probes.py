"""Times k-NN and the linear probe on cached features side by side: `student-eval`'s code, scikit-learn and PyTorch.

Sizes as in eval/benches/probes.rs: 20 000 training and 5 000 validation features of width 512, f32, drawn alike on both sides.
Each figure is the median of several runs after one to warm up. Versions measured with are printed.
Needs torch and scikit-learn, and a Rust toolchain. Run: python tests/timing/probes.py [--threads N]
"""

import argparse
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

TRAIN, VAL, WIDTH = 20_000, 5_000, 512


def median_seconds(work, runs=5):
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rust(threads):
    """Medians of the Criterion benchmarks, by name, in seconds."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    command = ["cargo", "bench", "--quiet", "-p", "eval", "--bench", "probes"]
    root = Path(__file__).resolve().parents[2]
    text = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    units = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
    found = {}
    name = ""
    for line in text.splitlines():
        timing = re.search(r"time:\s+\[\S+ \S+ (\S+) (\S+) \S+ \S+\]", line)
        before = line.split("time:")[0].strip()
        if before.startswith("probes/"):
            name = before
        if timing:
            found[name] = float(timing[1]) * units[timing[2]]
    return found


def features(count, classes, seed):
    import numpy

    rng = numpy.random.default_rng(seed)
    labels = numpy.arange(count) % classes
    signal = (numpy.arange(WIDTH)[None, :] % classes == labels[:, None]) * 0.2
    return (rng.random((count, WIDTH)) - 0.5 + signal).astype(numpy.float32), labels


def scikit_learn_knn():
    import numpy
    from sklearn.neighbors import KNeighborsClassifier

    xs, ys = features(TRAIN, 100, 1)
    queries, truth = features(VAL, 100, 2)
    weights = lambda distance: numpy.exp((1.0 - distance) / 0.07)
    model = KNeighborsClassifier(n_neighbors=200, metric="cosine", algorithm="brute", weights=weights)

    def work():
        return (model.fit(xs, ys).predict(queries) == truth).mean()

    return median_seconds(work, 3)


def torch_knn():
    """Matrix product, topk and a weighted vote for five values of k, as DINO's evaluation does it."""
    import torch

    xs, ys = (torch.tensor(part) for part in features(TRAIN, 100, 1))
    queries, truth = (torch.tensor(part) for part in features(VAL, 100, 2))

    @torch.no_grad()
    def work():
        train = torch.nn.functional.normalize(xs, dim=1).T.contiguous()
        unit = torch.nn.functional.normalize(queries, dim=1)
        hits = dict.fromkeys([1, 5, 10, 20, 200], 0)
        for rows, labels in zip(unit.split(256), truth.split(256)):
            similarity, index = (rows @ train).topk(200, dim=1)
            weight, voted = (similarity / 0.07).exp(), ys[index]
            for k in hits:
                votes = torch.zeros(len(rows), 100).scatter_add_(1, voted[:, :k], weight[:, :k])
                hits[k] += (votes.argmax(1) == labels).sum().item()
        return hits

    return median_seconds(work)


def torch_linear(classes, heads):
    """One epoch of SGD over cached features and one pass over the validation set; `heads` learning rates in a loop."""
    import torch

    xs, ys = (torch.tensor(part) for part in features(TRAIN, classes, 1))
    val_xs, val_ys = (torch.tensor(part) for part in features(VAL, classes, 2))

    def work():
        layers = [torch.nn.Linear(WIDTH, classes) for _ in range(heads)]
        optimizers = [torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9) for layer in layers]
        for batch in torch.randperm(TRAIN).split(256):
            rows, labels = xs[batch], ys[batch]
            for layer, optimizer in zip(layers, optimizers):
                loss = torch.nn.functional.cross_entropy(layer(rows), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            for layer in layers:
                for rows, labels in zip(val_xs.split(1024), val_ys.split(1024)):
                    (layer(rows).topk(5).indices == labels[:, None]).any(1).sum().item()

    return median_seconds(work)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import sklearn
    import torch

    torch.set_num_threads(threads)
    ours = rust(threads)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {threads} threads, seconds\n")
    rows = [
        ("probes/knn/20000x512/5000 queries/k 200", "scikit-learn", scikit_learn_knn),
        ("probes/knn/20000x512/5000 queries/k 200", "PyTorch", torch_knn),
    ]
    for classes in (100, 1000):
        for heads in (1, 8):
            rates = "learning rates"
            name = f"probes/linear/20000x512/{classes} classes/{heads} {rates}/1 epoch"
            rows.append((name, "PyTorch", lambda classes=classes, heads=heads: torch_linear(classes, heads)))
    print(f"{'work':<62} {'ours':>8} {'other':>8}  {'ratio':>6}  other")
    for name, what, work in rows:
        other = work()
        print(f"{name:<62} {ours[name]:8.3f} {other:8.3f}  {other / ours[name]:6.2f}  {what}", flush=True)


if __name__ == "__main__":
    main()
