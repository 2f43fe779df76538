"""Quantiles of everything random about the views of the built-in recipes, drawn by torchvision.

usage: python tests/golden/draws.py     (writes draws.json beside itself; about 10 minutes)

Made with torchvision 0.29.2. Seed 0, 400,000 draws of each quantity.

draws.json:
  whole    name: 513 quantiles of a whole number, the lowest, then the differences from one to the next. Crops are named by the
           range of their area and the size of the image, rows x columns; `area` is rows * columns * 1000 // (rows * columns of the
           image). `order` numbers the 24 orders of the jitter's steps: 64 * first + 16 * second + 4 * third + fourth.
  real     the same for real numbers, in units of 0.0001
  chance   name: how often a step happened, as a share of the draws
"""
import json, multiprocessing, pathlib, random

import numpy as np
import torch
import torchvision
import torchvision.transforms as T
from PIL import Image

import recipes

DRAWS = 400_000
SIZES = [(333, 500), (32, 32), (160, 456)]
HERE = pathlib.Path(__file__).parent


def quantiles(values, unit=1.0):
    values = np.sort(np.asarray(values, dtype=np.float64))
    at = np.round(np.linspace(0, len(values) - 1, 513)).astype(int)
    chosen = np.round(values[at] / unit).astype(int)
    return [int(chosen[0]), *np.diff(chosen).tolist()]


def crops(job):
    (low, high), (rows, columns) = job
    torch.set_num_threads(1)
    torch.manual_seed(rows * 1000 + int(low * 100))
    img = Image.new("RGB", (columns, rows))
    boxes = np.array([T.RandomResizedCrop.get_params(img, [low, high], [3 / 4, 4 / 3]) for _ in range(DRAWS)])
    name = f"{low:g}-{high:g} {rows}x{columns}"
    whole = {f"{what} {name}": quantiles(boxes[:, i]) for i, what in enumerate(("top", "left", "height", "width"))}
    whole[f"area {name}"] = quantiles(boxes[:, 2] * boxes[:, 3] * 1000 // (rows * columns))
    return whole


class Probe:
    """Counts how often it is called."""
    def __init__(self): self.calls = 0
    def __call__(self, img): self.calls += 1; return img


def jitters(strengths):
    torch.manual_seed(1)
    b, c, s, h = strengths
    around = lambda x: (max(0.0, 1 - x), 1 + x)
    drawn = [T.ColorJitter.get_params(around(b), around(c), around(s), (-h, h)) for _ in range(DRAWS)]
    orders = np.array([d[0].tolist() for d in drawn])
    return orders @ [64, 16, 4, 1], np.array([d[1:] for d in drawn])


def chances():
    """Of the steps as torchvision's classes and the official code decide them."""
    torch.manual_seed(2); rng = random.Random(2)
    out = {}
    one, two = Image.new("RGB", (1, 1), (255, 0, 0)), Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    for p in sorted({v["jitter_p"] for *_, v in recipes.each_view() if v["jitter"]}):
        probe = Probe(); apply = T.RandomApply([probe], p=p)
        for _ in range(DRAWS): apply(one)
        out[f"jitter {p:g}"] = probe.calls / DRAWS
    grey, flip = T.RandomGrayscale(p=0.2), T.RandomHorizontalFlip(p=0.5)
    out["grayscale 0.2"] = sum(grey(one).getpixel((0, 0))[0] != 255 for _ in range(DRAWS)) / DRAWS
    out["flip 0.5"] = sum(flip(two).getpixel((0, 0))[0] == 255 for _ in range(DRAWS)) / DRAWS
    for p in sorted({v["blur"] for *_, v in recipes.each_view()} - {0.0}):
        out[f"blur {p:g}"] = sum(rng.random() <= p for _ in range(DRAWS)) / DRAWS
    out["solarize 0.2"] = sum(rng.random() < 0.2 for _ in range(DRAWS)) / DRAWS
    return out


def main():
    scales = sorted({v["scale"] for *_, v in recipes.each_view()})
    whole, real = {}, {}
    with multiprocessing.Pool(2) as pool:
        for part in pool.imap(crops, [(scale, size) for scale in scales for size in SIZES]):
            whole |= part
    for strengths in sorted({v["jitter"] for *_, v in recipes.each_view() if v["jitter"]}):
        orders, factors = jitters(strengths)
        whole.setdefault("order", quantiles(orders))
        for i, (strength, what) in enumerate(zip(strengths, ("factor", "factor", "factor", "hue"))):
            real.setdefault(f"{what} {strength:g}", quantiles(factors[:, i], 1e-4))
    rng = random.Random(3)
    real["sigma 0.1-2"] = quantiles([rng.uniform(*recipes.SIGMA) for _ in range(DRAWS)], 1e-4)
    tables = lambda tables: "{\n" + ",\n".join(f'{json.dumps(k)}: {json.dumps(v, separators=(",", ":"))}' for k, v in tables.items()) + "\n}"
    made_with = f"torchvision {torchvision.__version__.split('+')[0]}, seed 0, {DRAWS} draws"
    text = f'{{\n"made_with": {json.dumps(made_with)},\n"whole": {tables(whole)},\n"real": {tables(real)},\n"chance": {json.dumps(chances())}\n}}\n'
    (HERE / "draws.json").write_text(text)
    print(len(text), "bytes")


if __name__ == "__main__":
    main()
