"""The views of the built-in recipes as torchvision + Pillow make them, written down apart from the crate.

Used by transforms.py and draws.py. Sources: facebookresearch/moco `main_moco.py`, facebookresearch/dino `main_dino.py`
(`DataAugmentationDINO`), facebookresearch/swav `src/multicropdataset.py`; BYOL, arXiv 2006.07733, table 6; SimCLR, arXiv 2002.05709,
appendix A, google-research/simclr `data_util.py`.
"""
from PIL import Image, ImageFilter, ImageOps
import torchvision.transforms.functional as F

STEPS = ["brightness", "contrast", "saturation", "hue"]
BILINEAR, BICUBIC = Image.BILINEAR, Image.BICUBIC
SIGMA = (0.1, 2.0)


def shown(scale, interpolation, jitter, jitter_p=0.8, grey=0.2, grey_first=False, blur=0.0, solarize=0.0):
    """A random resized crop and what follows it; probabilities of 0 leave a step out. All flip half of the time."""
    return dict(scale=scale, interpolation=interpolation, jitter=jitter, jitter_p=jitter_p, grey=grey, grey_first=grey_first, blur=blur, solarize=solarize, flip=0.5)


def byol_like(scale, blur, solarize):
    return shown(scale, BICUBIC, (0.4, 0.4, 0.2, 0.1), blur=blur, solarize=solarize)


def swav_like(scale):
    return shown(scale, BILINEAR, (0.8, 0.8, 0.8, 0.2), blur=0.5)


# name: (global views, local views)
RECIPES = {
    "moco-v1": ([shown((0.2, 1.0), BILINEAR, (0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grey_first=True)], []),
    "moco-v2": ([shown((0.2, 1.0), BILINEAR, (0.4, 0.4, 0.4, 0.1), blur=0.5)], []),
    "simclr": ([shown((0.08, 1.0), BICUBIC, (0.8, 0.8, 0.8, 0.2), blur=0.5)], []),
    "byol": ([byol_like((0.08, 1.0), 1.0, 0.0), byol_like((0.08, 1.0), 0.1, 0.2)], []),
    "dino": ([byol_like((0.4, 1.0), 1.0, 0.0), byol_like((0.4, 1.0), 0.1, 0.2)], [byol_like((0.05, 0.4), 0.5, 0.0)]),
    "swav": ([swav_like((0.14, 1.0))], [swav_like((0.05, 0.14))]),
    "linear-train": ([shown((0.08, 1.0), BILINEAR, None, grey=0.0)], []),
}


def each_view():
    """(recipe, `global` or `local`, number of the view, its steps), in a fixed order."""
    for name, kinds in RECIPES.items():
        for kind, views in zip(("global", "local"), kinds):
            for number, view in enumerate(views):
                yield name, kind, number, view


def step(name, img, value):
    """One step on a Pillow image."""
    if name == "brightness": return F.adjust_brightness(img, value)
    if name == "contrast": return F.adjust_contrast(img, value)
    if name == "saturation": return F.adjust_saturation(img, value)
    if name == "hue": return F.adjust_hue(img, value)
    if name == "grayscale": return F.rgb_to_grayscale(img, 3)
    if name == "blur": return img.filter(ImageFilter.GaussianBlur(radius=value))
    return ImageOps.solarize(img, value)
