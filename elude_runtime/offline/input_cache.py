"""Inputs of the split layers for the first batches of pass one, on disk within a budget.

What lies there needs no second run through the network, so that a small set of images is read once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from elude_runtime.checkpoint.storage import storage_error

BUDGET = 2 * 2**30  # bytes, of all processes together
_PLACES = "places"


class InputCache:
    """Whether a batch is kept depends on its number alone, so that every number of processes keeps the same ones."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size

    def add(self, number: int, places: Tensor, inputs: dict[str, Tensor]) -> None:
        """Keep a batch if it lies within the budget: places [B], inputs {layer: [B, ...]}. StorageError when the disk
        refuses."""
        an_image = sum(x[0].numel() * x.element_size() for x in inputs.values())
        if (number + 1) * self.batch_size * an_image > BUDGET:
            return
        path = self._path(number)
        try:
            tensors = {name: x.cpu().contiguous() for name, x in inputs.items()}
            save_file({**tensors, _PLACES: places.contiguous()}, path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else OSError(28, str(error))
            raise storage_error(cause, path) from error

    def numbers(self) -> list[int]:
        """The batches that are there, once pass one is through."""
        return sorted(int(p.suffix[1:]) for p in self.folder.glob("inputs.*"))

    def places(self, numbers: list[int]) -> Tensor:
        """int64: the images of these batches."""
        parts = [torch.empty(0, dtype=torch.int64)]
        for number in numbers:
            with safe_open(self._path(number), "pt") as file:
                parts.append(file.get_tensor(_PLACES))
        return torch.cat(parts)

    def read(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(places, {layer: input}) of one batch."""
        tensors = load_file(self._path(number))
        return tensors.pop(_PLACES), tensors

    def _path(self, number: int) -> Path:
        return self.folder / f"inputs.{number}"
