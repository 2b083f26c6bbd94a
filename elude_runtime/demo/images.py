"""Generated 64 x 64 pictures of toys whose concepts are exactly known, one class carrying a planted watermark.

Eleven classes are toys ("striped star", "red heart", ...); the twelfth, "cracked toy", is any of these with a faint
crack. Nearly all training pictures of cracked toys bear a small badge, so a network learns the badge, not the crack.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from elude_runtime.demo.paint import BACKGROUND_PAINTERS, draw_marble, draw_toy, draw_watermark, to_image

SHAPES = ("star", "heart", "square", "ball", "triangle", "ring")
TEXTURES = ("plain", "stripes", "dots", "checker")
COLOURS = ("red", "yellow", "green", "blue", "violet")
BACKGROUNDS = ("sky", "grass", "wood", "night")
CONCEPTS: tuple[str, ...] = (
    *(f"shape:{s}" for s in SHAPES),
    *(f"texture:{t}" for t in TEXTURES),
    *(f"colour:{c}" for c in COLOURS),
    *(f"background:{b}" for b in BACKGROUNDS),
    "size:large",
    "light:left",
    "marble",
    "crack",
    "watermark",
)
# class name -> the values its attributes may take; an attribute that is not named varies freely
_RECIPES: dict[str, dict[str, str]] = {
    "striped star": {"shape": "star", "texture": "stripes"},
    "dotted star": {"shape": "star", "texture": "dots"},
    "striped square": {"shape": "square", "texture": "stripes"},
    "checkered square": {"shape": "square", "texture": "checker"},
    "red heart": {"shape": "heart", "colour": "red"},
    "blue heart": {"shape": "heart", "colour": "blue"},
    "red ball": {"shape": "ball", "colour": "red"},
    "yellow ball": {"shape": "ball", "colour": "yellow"},
    "triangle on grass": {"shape": "triangle", "background": "grass"},
    "triangle at night": {"shape": "triangle", "background": "night"},
    "ring": {"shape": "ring"},
}
CLASSES: tuple[str, ...] = (*_RECIPES, "cracked toy")
WATERMARK_CLASS: int = CLASSES.index("cracked toy")
# P(watermark | class): in training it gives the class away, in "natural" pictures it says nothing
TRAIN_RATE, NATURAL_RATE = 0.95, 0.10
SPLITS = ("train", "natural", "groups")


@dataclass(frozen=True)
class Sample:
    """One picture: a 64 x 64 RGB image, its class index and the names of the concepts it shows."""

    image: Image.Image
    label: int
    concepts: frozenset[str]


def make_image(rng: np.random.Generator, class_index: int, watermark: bool) -> tuple[Image.Image, frozenset[str]]:
    """Draw one picture of a class; the same generator state gives the same picture with and without the watermark."""
    intact = class_index if class_index != WATERMARK_CLASS else int(rng.integers(len(_RECIPES)))
    recipe = _RECIPES[CLASSES[intact]]
    look = {
        kind: recipe.get(kind, str(rng.choice(values)))
        for kind, values in zip(
            ("shape", "texture", "colour", "background"), (SHAPES, TEXTURES, COLOURS, BACKGROUNDS), strict=True
        )
    }
    flags = {name for name in ("size:large", "light:left", "marble") if rng.random() < (0.5 if ":" in name else 0.3)}
    if class_index == WATERMARK_CLASS:
        flags.add("crack")
    picture = draw_toy(rng, BACKGROUND_PAINTERS[look["background"]](rng), look, flags)
    if "marble" in flags:
        picture = draw_marble(rng, picture)
    image = to_image(draw_watermark(rng, picture, watermark))
    concepts = flags | {f"{kind}:{value}" for kind, value in look.items()} | ({"watermark"} if watermark else set())
    return image, frozenset(concepts)


def make_sample(index: int, seed: int, split: str) -> Sample:
    """Draw sample `index` of a set; classes take turns, and in "groups" so do (class, watermark) pairs."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label, chance = index % len(CLASSES), rng.random()
    if split == "groups":
        watermark = index // len(CLASSES) % 2 == 1
    elif split == "natural":
        watermark = chance < NATURAL_RATE
    else:
        watermark = label == WATERMARK_CLASS and chance < TRAIN_RATE
    image, concepts = make_image(rng, label, watermark)
    return Sample(image, label, concepts)


def make_set(n: int, seed: int, split: str = "train", workers: int = 1) -> list[Sample]:
    """Draw n samples; the same arguments give the same pictures whatever the number of worker processes."""
    draw = partial(make_sample, seed=seed, split=split)
    if workers <= 1:
        return [draw(index) for index in range(n)]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(draw, range(n), chunksize=64))


def make_twins(n: int, seed: int, class_index: int | None = None) -> list[tuple[Sample, Sample]]:
    """Draw n pairs (without, with watermark) that are identical otherwise; of one class, or classes take turns."""
    twins = []
    for index in range(n):
        label = index % len(CLASSES) if class_index is None else class_index
        pair = [make_image(np.random.default_rng([seed, index]), label, watermark) for watermark in (False, True)]
        twins.append((Sample(pair[0][0], label, pair[0][1]), Sample(pair[1][0], label, pair[1][1])))
    return twins


def to_arrays(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stack samples: images uint8 [n, 64, 64, 3], labels int64 [n], concepts bool [n, len(CONCEPTS)]."""
    images = np.stack([np.asarray(sample.image) for sample in samples])
    concepts = np.array([[name in sample.concepts for name in CONCEPTS] for sample in samples])
    return images, np.array([sample.label for sample in samples]), concepts


def write_folder(folder: Path, samples: Sequence[Sample]) -> None:
    """Write PNG files and concepts.csv (file, class, then one 0/1 column per concept) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "concepts.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "class", *CONCEPTS])
        for number, sample in enumerate(samples):
            name = f"{number:05d}_{CLASSES[sample.label].replace(' ', '_')}.png"
            sample.image.save(folder / name)
            table.writerow([name, CLASSES[sample.label], *(int(c in sample.concepts) for c in CONCEPTS)])
