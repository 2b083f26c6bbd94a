"""What an encoder says of the scoring images: one unit vector an image, and one a token of the evaluated layer.

Places stay on the encoder's own grid, in a file: memory does not grow with the number of images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elude_runtime.offline.evaluation.metrics import centred_units


class Embeddings:
    """Filled batch by batch, then read. folder: where places are kept."""

    def __init__(self, name: str, images: int, folder: Path) -> None:
        self.name, self.images, self.folder = name, images, folder
        self._images: list[Tensor] = []
        self._places: np.ndarray | None = None
        self._sum: Tensor | None = None
        self.grid: tuple[int, int] | None = None
        self.count = 0

    def add(self, images: Tensor, places: Tensor | None) -> None:
        """images [B, D]; places [B, D', rows, columns] or None."""
        self._images.append(images)
        if places is not None:
            if self._places is None:
                self.grid = (places.shape[2], places.shape[3])
                shape = (self.images, places.shape[2] * places.shape[3], places.shape[1])
                file = self.folder / f"places.{len(list(self.folder.iterdir()))}"
                self._places = np.memmap(file, np.float32, "w+", shape=shape)
                self._sum = torch.zeros(shape[1:], dtype=torch.float64)
            cells = places.flatten(2).mT.contiguous()
            self._places[self.count : self.count + len(images)] = cells.numpy()
            assert self._sum is not None
            self._sum += cells.sum(0, dtype=torch.float64)
        self.count += len(images)

    def image_vectors(self) -> Tensor:
        """[N, D]: centred, of unit length."""
        return centred_units(torch.cat(self._images))

    def on(self, grid: tuple[int, int] | None) -> TokenVectors | None:
        """The vectors of a layer's tokens, which stand on this grid; None where one of the two has no places."""
        if grid is None or self._places is None or self.grid is None or self._sum is None:
            return None
        return TokenVectors(self._places[: self.count], (self._sum / self.count).float(), self.grid, grid)


class TokenVectors:
    """(images, tokens) -> unit vectors of what the encoder has at these tokens' centres, read between the cells of its
    own grid (bilinear), less the mean over the images at that place (design "tokpos9")."""

    def __init__(self, places: np.ndarray, mean: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> None:
        cells = own[0] * own[1]
        spread = F.interpolate(torch.eye(cells).view(1, cells, *own), size=grid, mode="bilinear", align_corners=False)
        weight = spread.flatten(2)[0].T.contiguous()  # [T, cells]
        kept = int((weight != 0).sum(1).max())
        self._weight, self._cells = weight.topk(kept, dim=1)
        self._places, self._mean = torch.from_numpy(places).flatten(0, 1), weight @ mean
        self._per_image, self.tokens = cells, len(weight)

    def __call__(self, images: Tensor, tokens: Tensor) -> Tensor:
        """int64 [...], int64 [...] -> float32 [..., D]."""
        token = tokens.flatten()
        rows = images.flatten()[:, None] * self._per_image + self._cells[token]
        found = F.embedding_bag(rows, self._places, mode="sum", per_sample_weights=self._weight[token])
        found -= self._mean[token]
        return F.normalize(found, dim=-1, out=found).view(*images.shape, -1)
