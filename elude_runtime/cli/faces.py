"""Exemplars of features as small pictures, from the catalogue beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from elude_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from elude_runtime.checkpoint.exemplars import CatalogueLayer, Exemplar, Exemplars

_PART = 0.42  # of the shorter side of the model's view that a picture around a patch shows, as in reports


class Faces:
    """Pictures of the images where a feature is most active; none where there is no catalogue that can be read."""

    def __init__(self, checkpoint: Path) -> None:
        from elude_runtime.checkpoint.exemplars import read_exemplars

        self._exemplars: Exemplars | None = None
        try:
            self._exemplars = read_exemplars(checkpoint)
        except CheckpointError:
            return
        self._layers = {layer.name: layer for layer in self._exemplars.layers}

    def of(self, feature: str, activation: float, count: int) -> list[Image.Image]:
        """At most `count` square pictures, the strongest first, of the end that the activation points to: around the
        patch where the feature peaks, or all of the image where it has no place in it."""
        from elude_runtime.checkpoint.exemplars import NEGATIVE, POSITIVE, TOP

        if self._exemplars is None:
            return []
        end = NEGATIVE if activation < 0 else POSITIVE
        tops = [one for one in self._exemplars.of(feature) if one.role == TOP and one.end == end]
        layer = next((found for name, found in self._layers.items() if feature.startswith(f"{name}/")), None)
        pictures = (self._picture(one, layer) for one in sorted(tops, key=lambda one: one.rank))
        return [picture for picture in pictures if picture is not None][:count]

    def _picture(self, exemplar: Exemplar, layer: CatalogueLayer | None) -> Image.Image | None:
        """None where the thumbnail is missing or damaged."""
        assert self._exemplars is not None
        file = self._exemplars.images[exemplar.image].thumbnail
        if file is None:
            return None
        try:
            with Image.open(file) as opened:
                seen = opened.convert("RGB")
        except (OSError, ValueError):
            return None
        side, centre = float(min(seen.size)), (seen.width / 2, seen.height / 2)
        if layer is not None and layer.grid is not None and exemplar.token >= layer.prefix:
            row, column = divmod(exemplar.token - layer.prefix, layer.grid[1])
            side *= _PART
            centre = (column + 0.5) / layer.grid[1] * seen.width, (row + 0.5) / layer.grid[0] * seen.height
        size = max(1, round(side))
        left = min(max(0, round(centre[0] - size / 2)), seen.width - size)
        top = min(max(0, round(centre[1] - size / 2)), seen.height - size)
        return seen.crop((left, top, left + size, top + size))
