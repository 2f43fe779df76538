"""Times `data-prep pack --store source` beside FFCV's writer on the same JPEG files.

usage: python tests/timing/ffcv_writer.py BINARY [--photos examples/photos] [--samples 2000] [--rounds 3] [--workers 1 2]

    cargo build --release -p data-prep && python tests/timing/ffcv_writer.py target/release/data-prep

Needs a Python with ffcv, torch and Pillow. Both sides read a folder of classes of 500 x 333 JPEG files and write one decoded, smaller image a
sample: FFCV limits the long side (`max_resolution`), ours the short one, so both get 384 x 256 pixels here. `raw` stores pixels, `jpeg` quality 90.
FFCV keeps raw pixels of its own decoder and resizes by OpenCV's area filter; ours are Pillow's bytes, hashed, synced and with a manifest. The
sides alternate. Prints medians in samples a second, and the sizes of what they wrote, as JSON.
"""
import argparse, json, os, pathlib, platform, shutil, statistics, subprocess, sys, tempfile, time

import ffcv
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image


class Folder:
    """An ImageFolder, without torchvision."""

    def __init__(self, root):
        classes = sorted(p.name for p in root.iterdir())
        self.items = sorted((path, classes.index(path.parent.name)) for path in root.rglob("*.jpg"))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        return Image.open(path).convert("RGB"), label


def collect(photos, folder, samples):
    files = sorted(photos.rglob("*.jpg"))
    for i in range(samples):
        source = files[i % len(files)]
        target = folder / source.parent.name / f"{i // len(files)}_{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        first = folder / source.parent.name / f"0_{source.name}"
        if target == first:
            Image.open(source).convert("RGB").resize((500, 333), Image.BICUBIC).save(target, quality=90)
        else:
            shutil.copy(first, target)


def size_of(path):
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.iterdir())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("binary"); p.add_argument("--photos", type=pathlib.Path, default=pathlib.Path("examples/photos"))
    p.add_argument("--samples", type=int, default=2000); p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    a = p.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        collect(a.photos, root / "photos", a.samples)
        dataset = Folder(root / "photos")
        for workers in a.workers:
            for codec in ("raw", "jpeg"):
                def theirs():
                    mode = {"write_mode": "raw"} if codec == "raw" else {"write_mode": "jpg", "jpeg_quality": 90}
                    writer = DatasetWriter(str(root / "set.beton"), {"image": RGBImageField(max_resolution=384, **mode), "label": IntField()}, num_workers=workers)
                    writer.from_indexed_dataset(dataset, chunksize=100)

                def ours():
                    shutil.rmtree(root / "set", ignore_errors=True)
                    subprocess.run([a.binary, "pack", "--input", root / "photos", "--output", root / "set", "--recipe", "moco-v2", "--store", "source",
                                    "--codec", codec, *(["--quality", "90"] if codec == "jpeg" else []), "--threads", str(workers), "--quiet"], check=True)

                sides = {"ffcv": (theirs, root / "set.beton"), "data-prep": (ours, root / "set")}
                times = {side: [] for side in sides}
                for _ in range(a.rounds):
                    for side, (work, _) in sides.items():
                        start = time.perf_counter()
                        work()
                        times[side].append(time.perf_counter() - start)
                results[f"{codec}, {workers} workers"] = {
                    side: {"samples/s": round(a.samples / statistics.median(times[side]), 1), "kB a sample": round(size_of(path) / a.samples / 1e3, 1)}
                    for side, (_, path) in sides.items()}
    print(json.dumps({"command": " ".join(sys.argv), "rounds": a.rounds, "samples": a.samples, "results": results, "cores": os.cpu_count(),
                      "versions": {"python": platform.python_version(), "ffcv": ffcv.__version__}}, indent=1))


if __name__ == "__main__":
    main()
