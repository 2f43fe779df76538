"""Times decoding and augmentations against torchvision + Pillow, on one core, in one run.

usage: taskset -c 0 python tests/timing/augmentations.py [--photos examples/photos] [--resize 500x333] [--samples 96] [--rounds 7]

    cargo build --release -p tests --example augmentations && taskset -c 0 python tests/timing/augmentations.py

Both sides run on the core that taskset names and alternate, pass by pass, over the same JPEG files (the photos, re-encoded at `--resize`
first). Two MoCo v2 views of each at 224 x 224, ToTensor and Normalize included on both sides. Prints the medians of the rounds, in
milliseconds for a sample, and how many times faster this project's side is, as JSON.

  decode         the JPEG file to RGB pixels
  views          two views of decoded pixels
  decode+views   both
  redraw         two views of pictures whose short side had been resized to 256: what reading a source set costs; against torchvision's
                 transforms of the same pictures
"""
import argparse, json, os, pathlib, platform, statistics, subprocess, sys, tempfile, time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import PIL
import torch
import torchvision
import torchvision.transforms as T
from PIL import Image

from data_prep import collect, moco_v2

PASSES = ["decode", "views", "decode+views", "redraw"]


class Theirs:
    def __init__(self, files, size):
        torch.set_num_threads(1)
        self.files = files
        self.pictures = [self.decode(path) for path in files]
        shrink = T.Resize(256)
        self.small = [shrink(picture) for picture in self.pictures]
        self.transform = T.Compose([moco_v2(size), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def decode(self, path):
        with Image.open(path) as img:
            return img.convert("RGB")

    def views(self, picture):
        for _ in range(2):
            self.transform(picture)

    def run(self, name):
        start = time.perf_counter()
        if name == "decode":
            for path in self.files: self.decode(path)
        elif name == "decode+views":
            for path in self.files: self.views(self.decode(path))
        else:
            for picture in self.pictures if name == "views" else self.small: self.views(picture)
        return (time.perf_counter() - start) * 1e3


class Ours:
    def __init__(self, binary, files, size):
        self.process = subprocess.Popen([binary, "--size", str(size), *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.level = self.process.stdout.readline().strip()

    def run(self, name):
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--binary", default="target/release/examples/augmentations"); p.add_argument("--photos", type=pathlib.Path, default=pathlib.Path("examples/photos"))
    p.add_argument("--samples", type=int, default=96); p.add_argument("--size", type=int, default=224)
    p.add_argument("--rounds", type=int, default=7); p.add_argument("--resize", default="500x333")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as root:
        files = collect(a.photos, pathlib.Path(root), a.samples, tuple(map(int, a.resize.split("x"))))
        sides = {"torchvision": Theirs(files, a.size), "ours": Ours(a.binary, files, a.size)}
        times = {(side, name): [] for side in sides for name in PASSES}
        for side in sides:
            for name in PASSES: sides[side].run(name)  # warm
        for _ in range(a.rounds):
            for name in PASSES:
                for side in sides: times[side, name].append(sides[side].run(name))
    result = {}
    for name in PASSES:
        row = {side: statistics.median(times[side, name]) / a.samples for side in sides}
        result[name] = {**{side: round(ms, 3) for side, ms in row.items()}, "times": round(row["torchvision"] / row["ours"], 2)}
    print(json.dumps({
        "command": " ".join(sys.argv), "unit": "ms for a sample, median", "rounds": a.rounds, "samples": a.samples, "resize": a.resize,
        "results": result, "level": sides["ours"].level, "cores": sorted(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__, "Pillow": PIL.__version__},
    }, indent=1))


if __name__ == "__main__":
    main()
