"""Inputs of the split layers for the first batches of pass one, on disk within a budget.

What lies there needs no second run through the network, so that a small set of images is read once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from elude_runtime.checkpoint.storage import storage_error, sync_file

BUDGET = 2 * 2**30  # bytes, of all processes together
_PLACES = "places"


class InputCache:
    """Whether a batch is kept depends on its places alone, so that every number of processes keeps the same ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unsynced: list[Path] = []

    def add(self, number: int, places: Tensor, inputs: dict[str, Tensor]) -> None:
        """Keep a batch if all images up to its last lie within the budget: places [B] ascending, inputs {layer:
        [B, ...]}. StorageError when the disk refuses."""
        an_image = sum(x[0].numel() * x.element_size() for x in inputs.values())
        if (int(places[-1]) + 1) * an_image > BUDGET:
            return
        path = self._path(number)
        try:
            tensors = {name: x.cpu().contiguous() for name, x in inputs.items()}
            save_file({**tensors, _PLACES: places.contiguous()}, path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else OSError(28, str(error))
            raise storage_error(cause, path) from error
        self._unsynced.append(path)

    def sync(self) -> None:
        """Once this returns, what was added survives the machine's failure."""
        for path in self._unsynced:
            try:
                sync_file(path)
            except OSError as error:
                raise storage_error(error, path) from error
        self._unsynced.clear()

    def places(self, own: Callable[[int], bool]) -> dict[int, Tensor]:
        """{number: int64 places of its images} of this process's batches that are there, once pass one is through; one
        that is damaged counts as absent."""
        found = {}
        for number in sorted(filter(own, (int(p.suffix[1:]) for p in self.folder.glob("inputs.*")))):
            with suppress(SafetensorError), safe_open(self._path(number), "pt") as file:
                found[number] = file.get_tensor(_PLACES)
        return found

    def read(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(places, {layer: input}) of one batch."""
        tensors = load_file(self._path(number))
        return tensors.pop(_PLACES), tensors

    def _path(self, number: int) -> Path:
        return self.folder / f"inputs.{number}"
