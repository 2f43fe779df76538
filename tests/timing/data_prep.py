"""Times `data-prep pack` against torchvision + Pillow on the same photos: two MoCo v2 views of each, 1 and 2 workers.

usage: python tests/timing/data_prep.py BINARY [--photos examples/photos] [--samples 960] [--size 224] [--rounds 3] [--resize 500x333]

    cargo build --release -p data-prep && python tests/timing/data_prep.py target/release/data-prep

Both sides alternate in one run, on files that were just read (warm cache). Ours is the whole command: it also draws, hashes, writes and
syncs the shards. Theirs is decoding and the transforms, to uint8 arrays, in worker processes that are already started and have already
imported everything; nothing is written, so the comparison favours them. Either side has as many cores as workers. Prints medians in samples per second, as JSON.
`--resize` re-encodes every photo at one size first, to compare with figures for that size.
"""
import argparse, json, multiprocessing, os, pathlib, platform, random, shutil, statistics, subprocess, sys, tempfile, time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL
import torch
import torchvision
import torchvision.transforms as T
from PIL import Image, ImageFilter


class Blur:
    """The blur of MoCo v2: Pillow's, with a standard deviation drawn from 0.1 to 2."""

    def __call__(self, img):
        return img.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def moco_v2(size):
    return T.Compose([
        T.RandomResizedCrop(size, scale=(0.2, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([Blur()], p=0.5),
        T.RandomHorizontalFlip(),
    ])


def start(size):
    global transform
    torch.set_num_threads(1)
    transform = moco_v2(size)


def two_views(path):
    with Image.open(path) as img:
        img = img.convert("RGB")
    return sum(int(np.asarray(transform(img))[0, 0, 0]) for _ in range(2))


def decode_only(path):
    with Image.open(path) as img:
        return img.convert("RGB").size[0]


def clock(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def collect(photos, folder, samples, resize):
    """`samples` files in class folders: the photos, repeated under new names."""
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    made = []
    for i in range(samples):
        source = files[i % len(files)]
        target = folder / source.parent.name / f"{i // len(files)}_{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if resize:
            Image.open(source).convert("RGB").resize(resize, Image.BICUBIC).save(target, quality=90)
        else:
            shutil.copy(source, target)
        made.append(target)
    return made


def main():
    p = argparse.ArgumentParser()
    p.add_argument("binary"); p.add_argument("--photos", type=pathlib.Path, default=pathlib.Path("examples/photos"))
    p.add_argument("--samples", type=int, default=960); p.add_argument("--size", type=int, default=224)
    p.add_argument("--rounds", type=int, default=3); p.add_argument("--resize")
    p.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    a = p.parse_args()
    resize = tuple(map(int, a.resize.split("x"))) if a.resize else None
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        files = collect(a.photos, root / "photos", a.samples, resize)
        rates = {}
        for workers in a.workers:
            # as many cores as workers, for both sides and all that they start
            os.sched_setaffinity(0, cores[:workers])
            with multiprocessing.Pool(workers, initializer=start, initargs=(a.size,)) as pool:
                each = lambda work: list(pool.imap_unordered(work, files, chunksize=8))
                each(decode_only)  # warm

                def ours():
                    shutil.rmtree(root / "out", ignore_errors=True)
                    subprocess.run([a.binary, "pack", "--input", root / "photos", "--output", root / "out", "--recipe", "moco-v2", "--views", "2",
                                    "--size", str(a.size), "--threads", str(workers), "--quiet"], check=True)

                times = {"torchvision decode": [], "torchvision decode + 2 views": [], "data-prep pack": []}
                for _ in range(a.rounds):
                    times["torchvision decode"].append(clock(lambda: each(decode_only)))
                    times["torchvision decode + 2 views"].append(clock(lambda: each(two_views)))
                    times["data-prep pack"].append(clock(ours))
            row = {name: round(a.samples / statistics.median(t), 1) for name, t in times.items()}
            row["ratio"] = round(row["data-prep pack"] / row["torchvision decode + 2 views"], 2)
            rates[f"{workers} workers"] = row
    print(json.dumps({
        "command": " ".join(sys.argv), "unit": "samples/s, median", "rounds": a.rounds, "samples": a.samples, "results": rates,
        "versions": {"python": platform.python_version(), "torchvision": torchvision.__version__, "Pillow": PIL.__version__},
        "cores": cores,
    }, indent=1))


if __name__ == "__main__":
    main()
