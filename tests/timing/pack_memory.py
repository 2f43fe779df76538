"""Measures the memory that `data-prep pack` takes at its peak: many pictures of ImageNet's size, and some very large ones among them.

usage: python tests/timing/pack_memory.py BINARY [--photos examples/photos] [--samples 20000] [--large 16] [--threads 2] [--views 2]

    cargo build --release -p data-prep && python tests/timing/pack_memory.py target/release/data-prep

Every photo is encoded again once, at 500 x 375 pixels; the samples are hard links to those files under new names, so that the folder takes
little room. The large pictures are 8000 x 6000 pixels. Prints the peak resident memory of packing, in MiB, as JSON, and fails when it is
over `--limit`. Pages of shards that are mapped or cached by the system are not memory of the program.
"""
import argparse, json, os, pathlib, resource, shutil, subprocess, sys, tempfile, time

from PIL import Image


def encode(source, target, size):
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(source).convert("RGB").resize(size, Image.BICUBIC).save(target, quality=90)


def collect(photos, folder, samples, large):
    """A folder of classes with `samples` pictures, `large` of them huge."""
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    variants = []
    for i, source in enumerate(files):
        variants.append(folder / "variants" / f"{i}.jpg")
        encode(source, variants[-1], (500, 375))
    huge = []
    for i in range(min(large, 4)):
        huge.append(folder / "variants" / f"huge_{i}.jpg")
        encode(files[i], huge[-1], (8000, 6000))
    for i in range(samples):
        target = folder / "in" / f"class_{i % 100:03}" / f"{i:06}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        # large ones are spread evenly over the listing
        is_large = large and i * large // samples != (i + 1) * large // samples
        os.link(huge[i % len(huge)] if is_large else variants[i % len(variants)], target)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--photos", type=pathlib.Path, default=pathlib.Path("examples/photos"))
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--large", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1024, help="MiB")
    args = parser.parse_args()

    folder = pathlib.Path(tempfile.mkdtemp(prefix="pack-memory-"))
    try:
        collect(args.photos, folder, args.samples, args.large)
        command = [args.binary, "pack", "--input", folder / "in", "--output", folder / "out", "--recipe", "moco-v2"]
        command += ["--views", str(args.views), "--threads", str(args.threads), "--shard-bytes", "256MB", "--quiet"]
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # Linux counts in KiB
        bytes_written = sum(p.stat().st_size for p in (folder / "out").iterdir())
    finally:
        shutil.rmtree(folder)
    report = {
        "samples": args.samples, "large": args.large, "threads": args.threads, "views": args.views, "seconds": round(seconds, 1),
        "samples_per_sec": round(args.samples / seconds, 1), "written_mib": round(bytes_written / 2**20), "peak_mib": round(peak, 1),
    }
    print(json.dumps(report))
    sys.exit(0 if peak <= args.limit else f"peak memory {peak:.0f} MiB is over {args.limit:.0f} MiB")


if __name__ == "__main__":
    main()
