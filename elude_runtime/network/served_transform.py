"""timm's evaluation transform for serving: the same numbers bit for bit, in less time, and from several threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elude_runtime.network.preprocessing import DataConfig


def served_transform(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    """RGB image -> float32 [3, H, W], as `config.transform()` makes it.

    Its last two steps, bytes to floats and normalisation, are done by numpy: torch starts threads for them wherever it
    is called from, so that several images at a time would crowd the processor, and copies more. An operation on each
    number for itself has 3 x 256 possible results; all of them are compared with timm's here, and if one were another,
    or the transform ended in other steps, timm's own would be taken.
    """
    whole = config.transform()
    steps = list(getattr(whole, "transforms", []))
    if [type(step).__name__ for step in steps[-2:]] != ["MaybeToTensor", "Normalize"]:
        return whole
    made = _Transform(steps[:-2], steps[-1])
    values = np.arange(256, dtype=np.uint8)
    every = Image.fromarray(np.stack([values.reshape(16, 16)] * 3, axis=-1))
    return made if torch.equal(made.numbers(every), steps[-1](steps[-2](every))) else whole


class _Transform:
    """Geometry by timm's steps, numbers by numpy. normalize: torchvision's step with mean and std."""

    def __init__(self, geometry: list[Any], normalize: Any) -> None:
        self._geometry = geometry
        mean, std = (torch.as_tensor(getattr(normalize, n), dtype=torch.float32) for n in ("mean", "std"))
        self._mean, self._std = mean.numpy().reshape(3, 1, 1), std.numpy().reshape(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self._geometry:
            image = step(image)
        return self.numbers(image)

    def numbers(self, image: Image.Image) -> Tensor:
        """RGB image of the model's input size -> float32 [3, H, W]."""
        pixels = np.asarray(image)
        found = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        found[...] = pixels.transpose(2, 0, 1)
        found /= np.float32(255)
        found -= self._mean
        found /= self._std
        return torch.from_numpy(found)
