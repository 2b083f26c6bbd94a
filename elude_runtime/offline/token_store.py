"""The inputs of chosen tokens in a file: written as the images come by, read back by id, never held in memory whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class TokenStore:
    """Rows of float32, one a token, by ascending id. Several processes may write their own images' rows.

    Plain reads and writes instead of a mapped file: mapped pages would count as the process's memory.
    """

    def __init__(self, path: Path, ids: Tensor, shape: tuple[int, ...]) -> None:
        """ids int64 [S], any order, repeats allowed; shape (G, n, q) of what one token reads. `allocate` comes next."""
        self.path, self.shape = path, shape
        self.ids = ids.unique()
        self.columns = int(np.prod(shape))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.size = len(self.ids) * self.columns * 4
        self.whole = os.fstat(self._file).st_size == self.size  # an earlier run's, which may hold rows already

    def allocate(self) -> None:
        """Take the file's whole place on the disk: a full disk is an error here, before hours of work."""
        if not hasattr(os, "posix_fallocate"):  # macOS
            os.truncate(self._file, self.size)
        elif self.size:
            os.posix_fallocate(self._file, 0, self.size)

    def places(self, tokens: int) -> Tensor:
        """int64, ascending: the images that hold any of the tokens, `tokens` an image."""
        return torch.div(self.ids, tokens, rounding_mode="floor").unique()

    def add(self, places: Tensor, reads: Tensor) -> None:
        """Keep what was chosen of some images: places [B] ascending, reads [B, T_p, G, n, q]."""
        tokens = reads.shape[1]
        first = places * tokens
        starts, stops = torch.searchsorted(self.ids, first), torch.searchsorted(self.ids, first + tokens)
        for image, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            if start < stop:
                chosen = (self.ids[start:stop] - first[image]).to(reads.device)
                rows = reads[image, chosen].flatten(1).float().cpu().contiguous().numpy()
                self._write(start, rows)

    def read(self, ids: Tensor, groups: Tensor | None = None) -> Tensor:
        """What tokens hold: ids int64 [..., N] -> [..., N, G, n, q]; with groups int64 [...], of these convolution
        groups only: [..., N, n, q]."""
        wanted, where = ids.cpu().unique(return_inverse=True)
        rows = torch.from_numpy(self._read(torch.searchsorted(self.ids, wanted).numpy())).unflatten(1, self.shape)
        if groups is None:
            return rows[where]
        return rows[where, groups.cpu().unsqueeze(-1)] if self.shape[0] > 1 else rows[:, 0][where]

    def sync(self) -> None:
        """Once this returns, what was added survives the machine's failure."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _write(self, row: int, rows: np.ndarray) -> None:
        data, offset = memoryview(rows.data).cast("B"), row * self.columns * 4
        while data:
            done = os.pwrite(self._file, data, offset)
            data, offset = data[done:], offset + done

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """[R, columns] of ascending row numbers, neighbours in one go."""
        out = np.empty((len(rows), self.columns), dtype=np.float32)
        data, width = memoryview(out.data).cast("B"), self.columns * 4
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            view, offset = data[start * width : stop * width], int(rows[start]) * width if start < stop else 0
            while view:
                done = os.preadv(self._file, [view], offset)
                if not done:
                    raise OSError(f"{self.path} ends too early")
                view, offset = view[done:], offset + done
        return out
