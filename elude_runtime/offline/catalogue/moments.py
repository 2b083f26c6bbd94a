"""Mean and covariance of what a layer's tokens read: all linear features' correlations follow from them exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from elude_runtime.offline.collect import State

WIDEST = 6144  # columns, of which the covariance takes 300 MB


class Moments:
    """Streamed over tokens, in float64; of more than `WIDEST` columns nothing is kept."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns, self.device = columns, device
        self.count = 0
        self.shift: Tensor | None = None  # near the mean, so that little cancels
        self.sum = self.outer = torch.zeros(0, dtype=torch.float64)

    @property
    def kept(self) -> bool:
        return self.columns <= WIDEST and self.count > 0

    def add(self, reads: Tensor) -> None:
        """reads [B, T, C]."""
        if self.columns > WIDEST or not len(reads):
            return
        rows = reads.flatten(0, 1)
        if self.shift is None:
            self.shift = rows.mean(0)
            self.sum = torch.zeros(self.columns, dtype=torch.float64, device=self.device)
            self.outer = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=self.device)
        rows = rows - self.shift
        self.sum += rows.sum(0, dtype=torch.float64)
        self.outer += rows.T @ rows
        self.count += len(rows)

    def covariance(self) -> Tensor:
        """float64 [C, C]."""
        mean = self.sum / self.count
        return self.outer / self.count - torch.outer(mean, mean)

    def state(self) -> State:
        shift = None if self.shift is None else self.shift.cpu()
        return {"count": self.count, "shift": shift, "sum": self.sum.cpu(), "outer": self.outer.cpu()}

    def restore(self, state: State) -> None:
        self.count = state["count"]
        self.sum, self.outer = state["sum"].to(self.device), state["outer"].to(self.device)
        self.shift = None if state["shift"] is None else state["shift"].to(self.device)
