"""Golden values of the augmentations and of decoding, made by torchvision + Pillow.

usage: python tests/golden/transforms.py     (writes transforms.json, photos/ and images/ beside itself)

Made with Python 3, Pillow 13.0.0, torchvision 0.29.2 and numpy, on x86-64 (Pillow for ARM may contract its blend to a fused
multiply-add). Seed 0. The source pictures are integer formulas that the test repeats, so only their checksums travel.

transforms.json:
  pictures  [seed, height, width, crc]: see `picture`
  photos    [number, file, crc]: small photos, cut from those of examples/photos
  recipes   recipes that are not built in
  views     recipe, kind and number of the view, pass order, picture, size, the 18 numbers of a shard's `view_params` row, and the
            CRC-32 after every step; the bytes are interleaved RGB. The last CRC is that of the f32 values after ToTensor + Normalize,
            channels last. Steps happen more often than the recipes say, so that all are seen.
  steps     single steps on a whole picture, with factors that show a fused multiply-add, and beyond the recipes' ranges
  colors    single steps on a picture of 4096 x 4096 pixels that holds every colour, in rising order
  decoded   [file, crc]: some of examples/photos, decoded by Pillow (libjpeg-turbo)
photos/     the photos as PNG, so that no JPEG decoder matters
images/     small files of every kind that decoding knows, and as NAME.expected.png what Pillow makes of them: `convert("RGB")`, but
            transparency laid over white and 16 bits divided by 257 (Pillow keeps the high byte of colours, and cuts grey off at 255).
refused/    headers of 60000 x 60000 pixels, and a kind of file that is not decoded
"""
import json, pathlib, random, struct, zlib

import numpy as np
import PIL
import torch
import torchvision
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageOps

from recipes import BICUBIC, BILINEAR, SIGMA, STEPS, each_view, step

HERE = pathlib.Path(__file__).parent
PHOTOS = HERE.parent.parent / "examples" / "photos"
PHOTO_FILES = ("animal/erase_crab.jpg", "animal/erase_giraffe.jpg", "animal/erase_kingfisher.jpg")  # public domain or CC0
FUSED = (0.6, 0.8, 1.1, 1.2)  # factors where a fused multiply-add changes many bytes
CENTERS = {"eval-center": BILINEAR, "eval-center-bicubic": BICUBIC}


def picture(seed, height, width):
    """A smooth gradient with noise; even seeds less noise, odd ones much. Only integers: the test has the same formula."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3].astype(np.uint64)
    n = (y * np.uint64(width) + x) * np.uint64(3) + c + np.uint64(seed * 1_000_003)
    n = (n ^ (n >> np.uint64(15))) * np.uint64(0x2C1B3C6D) & np.uint64(0xFFFFFFFF)
    n = (n ^ (n >> np.uint64(12))) * np.uint64(0x297A2D39) & np.uint64(0xFFFFFFFF)
    n = (n ^ (n >> np.uint64(15))).astype(np.int64)
    spread = 41 if seed % 2 == 0 else 301
    ramps = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    smooth = np.choose(c.astype(np.int64), [r.astype(np.int64) for r in ramps])
    return Image.fromarray(np.clip(smooth + n % spread - spread // 2, 0, 255).astype(np.uint8))


def crc(array):
    return f"{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"


def resize(img, size, box, order, interpolation):
    """Crop, then resize to (height, width); the horizontal pass of Pillow up to 12 is spelled out as two resizes of one axis."""
    top, left, h, w = box
    if order == "pillow13":
        return F.resized_crop(img, top, left, h, w, list(size), interpolation=interpolation)
    img = F.crop(img, top, left, h, w)
    img = img.resize((size[1], img.height), interpolation)
    return img.resize((size[1], size[0]), interpolation)


def f32(value):
    return float(np.float32(value))


def finish(row, checks, out):
    tensor = F.normalize(F.to_tensor(out), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    checks.append(["normalize", crc(tensor.permute(1, 2, 0).numpy())])
    return {"row": row, "checks": checks}


def center_view(interpolation, order, img, size):
    """The short side resized to size / 0.875, then the centre."""
    h, w = img.height, img.width
    short = round(size / 0.875)
    if order == "pillow13":
        out = T.Compose([T.Resize(short, interpolation=interpolation), T.CenterCrop(size)])(img)
    else:
        out = F.center_crop(resize(img, F._compute_resized_output_size((h, w), [short]), (0, 0, h, w), order, interpolation), [size, size])
    row = [0, 0, h, w, 0.0, 1.0, 1.0, 1.0, 0.0, -1, -1, -1, -1, 0.0, 0.0, -1.0, h, w]
    return finish(row, [["resize", crc(np.asarray(out))]], out)


def random_view(rng, steps, order, img, size):
    """One view with parameters drawn by torchvision, as a row and the checksums after each step."""
    h, w = img.height, img.width
    checks = []
    box = T.RandomResizedCrop.get_params(img, list(steps["scale"]), [3 / 4, 4 / 3])
    out = resize(img, (size, size), box, order, steps["interpolation"])
    flip = rng.random() < 0.5
    out = F.hflip(out) if flip else out  # a flip commutes with all that follows
    checks.append(["resize", crc(np.asarray(out))])
    row = [*box, float(flip), 1.0, 1.0, 1.0, 0.0, -1, -1, -1, -1, 0.0, 0.0, -1.0, h, w]

    def then(name, value=0):
        nonlocal out
        out = step(name, out, value)
        checks.append([name, crc(np.asarray(out))])

    row[13] = float(steps["grey"] > 0 and rng.random() < 0.3)
    if row[13] and steps["grey_first"]:
        then("grayscale")
    if steps["jitter"] and rng.random() < 0.9:
        *around, hue = steps["jitter"]
        perm, *factors = T.ColorJitter.get_params(*[(max(0.0, 1 - s), 1 + s) for s in around], (-hue, hue))
        if rng.random() < 0.3:
            factors[:3] = rng.sample(FUSED, 3)
        row[5:9] = [f32(f) for f in factors]
        row[9:13] = perm.tolist()
        for i in perm.tolist():
            then(STEPS[i], row[5 + i])
    if row[13] and not steps["grey_first"]:
        then("grayscale")
    if rng.random() < min(1, steps["blur"] + 0.1 * (steps["blur"] > 0)):
        row[14] = f32(rng.uniform(*SIGMA))
        then("blur", row[14])
    if rng.random() < 2 * steps["solarize"]:
        row[15] = 128.0
        then("solarize", 128)
    return finish(row, checks, out)


def photos(folder):
    """Three photos, shrunk to less than 200 pixels."""
    folder.mkdir(exist_ok=True)
    found = {}
    for number, (path, size) in enumerate(zip(PHOTO_FILES, ((170, 128), (128, 160), (150, 113))), 100):
        img = Image.open(PHOTOS / path).convert("RGB").resize(size, Image.LANCZOS)
        img.save(folder / f"{number}.png", optimize=True)
        found[number] = img
    return found


def all_colors():
    n = np.arange(1 << 24, dtype=np.uint32)
    return Image.fromarray(np.stack([n >> 16, n >> 8, n], -1).astype(np.uint8).reshape(4096, 4096, 3))


def chunk(name, data):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def refused_files(folder, images):
    """Files whose headers announce 60000 x 60000 pixels, and a kind of file that is not decoded."""
    folder.mkdir(exist_ok=True)
    side = 60_000
    read = lambda name: bytearray((images / name).read_bytes())

    def write(name, data, *patches):
        for at, patch in patches:
            data[at:at + len(patch)] = patch
        (folder / name).write_bytes(bytes(data))

    png = read("rgb.png")
    write("bomb.png", png[:8] + chunk(b"IHDR", struct.pack(">II", side, side) + png[24:29]) + png[33:])
    jpeg = read("rgb_420.jpg")
    write("bomb.jpg", jpeg, (jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", side, side)))
    jpeg = read("progressive.jpg")
    write("bomb_progressive.jpg", jpeg, (jpeg.index(b"\xff\xc2") + 5, struct.pack(">HH", side, side)))
    gif = read("palette.gif")
    frame = gif.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 23, 18))
    write("bomb.gif", gif, (6, struct.pack("<HH", side, side)), (frame + 5, struct.pack("<HH", side, side)))
    write("bomb.bmp", read("rgb.bmp"), (18, struct.pack("<ii", side, side)))
    write("bomb.ppm", bytearray(b"P6 %d %d 255\n" % (side, side)) + bytes(100))
    inner = bytes(read("lossless.webp")[12:])
    canvas = struct.pack("<I", side - 1)[:3] * 2
    extended = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + inner
    write("bomb.webp", bytearray(b"RIFF" + struct.pack("<I", len(extended)) + extended))
    tiff = read("rgb.tif")
    at = struct.unpack_from("<I", tiff, 4)[0]
    for i in range(struct.unpack_from("<H", tiff, at)[0]):
        entry = at + 2 + 12 * i
        tag, kind = struct.unpack_from("<HH", tiff, entry)
        if tag in (256, 257):
            tiff[entry + 2:entry + 12] = struct.pack("<HII", 4, 1, side)
    write("bomb.tif", tiff)
    picture(2, 18, 23).quantize(16).save(folder / "palette.tif")


def decode_files(folder):
    folder.mkdir(exist_ok=True)
    rgb = picture(2, 18, 23)
    small = {
        "rgb_420.jpg": (rgb, dict(quality=90)),
        "rgb_444.jpg": (rgb, dict(quality=90, subsampling=0)),
        "progressive.jpg": (rgb, dict(quality=90, progressive=True)),
        "restart.jpg": (rgb, dict(quality=90, restart_marker_blocks=1)),
        "grey.jpg": (rgb.convert("L"), dict(quality=90)),
        "cmyk.jpg": (rgb.convert("CMYK"), dict(quality=95)),
        "rgb.png": (rgb, {}),
        "grey.png": (rgb.convert("L"), {}),
        "palette.png": (rgb.quantize(16), {}),
        "one_bit.png": (rgb.convert("1"), {}),
        "lossless.webp": (rgb, dict(lossless=True)),
        "lossy.webp": (rgb, dict(quality=95)),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (rgb.quantize(16), {}),
        "rgb.tif": (rgb, {}),
        "lzw.tif": (rgb, dict(compression="tiff_lzw")),
        "deflate.tif": (rgb, dict(compression="tiff_adobe_deflate")),
        "packbits.tif": (rgb, dict(compression="packbits")),
        "grey.tif": (rgb.convert("L"), {}),
        "one_bit.tif": (rgb.convert("1"), {}),
        "cmyk.tif": (rgb.convert("CMYK"), {}),
        "rgb.ppm": (rgb, {}),
        "grey.pgm": (rgb.convert("L"), {}),
        "one_bit.pbm": (rgb.convert("1"), {}),
        "palette.gif": (rgb.quantize(16), {}),
        "grey.gif": (rgb.convert("L"), {}),
        "transparent.gif": (rgb.quantize(16), dict(transparency=3)),
    }
    for name, (img, options) in small.items():
        img.save(folder / name, **options)
    # animations, whose first frame counts
    later = [ImageOps.invert(rgb), rgb.rotate(180)]
    for name, options in (("gif", {}), ("png", {}), ("webp", dict(lossless=True))):
        frames = [frame.quantize(16) if name == "gif" else frame for frame in (rgb, *later)]
        frames[0].save(folder / f"animated.{name}", save_all=True, append_images=frames[1:], duration=50, **options)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: must not be applied
    rgb.save(folder / "exif_turned.jpg", quality=90, exif=exif)
    # the same CMYK file with the transform byte of its Adobe segment set to 2 is a YCCK file
    cmyk = bytearray((folder / "cmyk.jpg").read_bytes())
    cmyk[cmyk.index(b"Adobe") + 11] = 2
    (folder / "ycck.jpg").write_bytes(bytes(cmyk))
    alpha = Image.fromarray(np.asarray(picture(3, 18, 23))[:, :, 0])
    rgba = rgb.copy(); rgba.putalpha(alpha)
    rgba.save(folder / "rgba.png"); rgba.save(folder / "rgba.webp", lossless=True, exact=True)
    grey_alpha = rgb.convert("L"); grey_alpha.putalpha(alpha); grey_alpha.save(folder / "grey_alpha.png")
    palette = rgb.quantize(16); palette.save(folder / "palette_transparent.png", transparency=3)
    grey16 = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) * 257 + np.arange(23, dtype=np.uint16) * 4) & 0xFFFF)
    grey16.save(folder / "grey16.png"); grey16.save(folder / "grey16.tif")
    # 16 bits a channel in colour, which Pillow reads but does not write
    deep = (np.asarray(rgb).astype(np.uint16) * 257 + np.arange(23 * 3, dtype=np.uint16).reshape(23, 3) * 3) & 0xFFFF
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (folder / "rgb16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 23, 18, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))
    (folder / "rgb16.ppm").write_bytes(b"P6 23 18 65535\n" + deep.astype(">u2").tobytes())
    to_8 = lambda values: ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".expected.png"):
            continue
        img = Image.open(path)
        if path.name.startswith("grey16"):
            img = Image.fromarray(to_8(np.asarray(grey16)))
        elif path.name.startswith("rgb16"):
            img = Image.fromarray(to_8(deep))
        elif img.mode in ("RGBA", "LA") or "transparency" in img.info:
            pixels = np.asarray(img.convert("RGBA")).astype(np.int64)
            over = (pixels[..., :3] * pixels[..., 3:] + 255 * (255 - pixels[..., 3:]) + 127) // 255
            img = Image.fromarray(over.astype(np.uint8))
        img.convert("RGB").save(folder / f"{path.name}.expected.png", optimize=True)


def main():
    torch.manual_seed(0); rng = random.Random(0)
    sizes = [(0, 90, 120), (1, 150, 97), (2, 300, 60), (3, 1, 1), (4, 400, 3), (5, 3, 400), (6, 53, 37), (7, 8, 8), (8, 333, 500), (9, 700, 260), (10, 10000, 3), (11, 3, 10000)]
    pictures = {seed: picture(seed, h, w) for seed, h, w in sizes}
    real = photos(HERE / "photos")
    views, turn = [], 0
    for order in ("pillow13", "horizontal"):
        for seed, img in (pictures | real).items():
            for recipe, kind, number, steps in each_view():
                for _ in range(3 if (recipe, order) == ("moco-v2", "pillow13") else 1):
                    turn += 1
                    size = 96 if kind == "local" else (224, 96, 33)[turn % 3]
                    where = {"picture": seed, "recipe": recipe, "view": [kind, number], "order": order, "size": size}
                    views.append(where | random_view(rng, steps, order, img, size))
            for recipe, interpolation in CENTERS.items():
                size = 33 if min(img.size) < 20 and max(img.size) > 20 else (224, 96)[seed % 2]
                where = {"picture": seed, "recipe": recipe, "view": ["global", 0], "order": order, "size": size}
                views.append(where | center_view(interpolation, order, img, size))
    steps = []
    for seed in (0, 9):
        for name in STEPS[:3]:
            for value in (*FUSED, 0.0, 0.3, 1.0, 1.7, 3.0):
                steps.append([seed, name, f32(value), crc(np.asarray(step(name, pictures[seed], f32(value))))])
        for value in (-0.5, -0.1, -0.03, 0.0, 0.002, 0.1, 0.37, 0.5):
            steps.append([seed, "hue", f32(value), crc(np.asarray(step("hue", pictures[seed], f32(value))))])
        for value in (0.1, 0.7, 1.414, 1.415, 2.0, 3.3, 17.0):
            steps.append([seed, "blur", f32(value), crc(np.asarray(step("blur", pictures[seed], f32(value))))])
        for value in (0, 1, 100, 128, 255):
            steps.append([seed, "solarize", value, crc(np.asarray(step("solarize", pictures[seed], value)))])
        steps.append([seed, "grayscale", 0, crc(np.asarray(step("grayscale", pictures[seed], 0)))])
    every = all_colors()
    colors = [[name, f32(value), crc(np.asarray(step(name, every, f32(value))))] for name, value in (
        ("hue", -0.5), ("hue", -0.1), ("hue", 0.0), ("hue", 0.1), ("hue", 0.4), ("hue", 0.5), ("saturation", 0.2), ("saturation", 0.6),
        ("saturation", 1.2), ("saturation", 1.8), ("contrast", 0.8), ("brightness", 1.1), ("grayscale", 0))]
    decoded = [[str(path.relative_to(PHOTOS)), crc(np.asarray(Image.open(path).convert("RGB")))] for path in sorted(PHOTOS.glob("*/*.jpg"))[::16]]
    custom = {"eval-center-bicubic": {"name": "eval-center-bicubic", "global": [{"crop": {"kind": "center", "fraction": 0.875, "interpolation": "bicubic"}}]}}
    versions = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__.split('+')[0]}, seed 0"
    parts = [f'"made_with": {json.dumps(versions)}', f'"recipes": {json.dumps(custom)}']
    tables = {
        "pictures": [[s, h, w, crc(np.asarray(pictures[s]))] for s, h, w in sizes],
        "photos": [[number, f"{number}.png", crc(np.asarray(img))] for number, img in real.items()],
        "views": views, "steps": steps, "colors": colors, "decoded": decoded,
    }
    for name, rows in tables.items():
        parts.append(f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    (HERE / "transforms.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    decode_files(HERE / "images")
    refused_files(HERE / "refused", HERE / "images")


if __name__ == "__main__":
    main()
