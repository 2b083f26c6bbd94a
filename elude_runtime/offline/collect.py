"""Token statistics of the calibration images, streamed: what the partition needs, in memory that no image count grows.

Pass one keeps, per layer and token type, the mean input, the ids of the tokens at both ends of every neuron, and a
uniform token sample. Pass two reads the inputs of the chosen tokens into a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.split_layers import SplitLayer
from elude_runtime.offline.images import ImageSource
from elude_runtime.partition import SplitConfig

SAMPLE_TOKENS = 6000
_SPARE = 1.25  # candidates kept beyond N, so that dropping norm outliers leaves enough
_NORM_BINS = np.geomspace(1e-6, 1e9, 3001)


class StopForward(Exception):
    """Ends a forward pass once the deepest split layer has run."""


@contextmanager
def layer_inputs(model: nn.Module, names: list[str], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While the block runs, every forward pass leaves (input, output) of the named layers in `seen`, then stops."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            seen[name] = (args[0].clone(), out.clone())  # glue code may change either in place
            if len(seen) == len(names):
                raise StopForward

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(keep(n)) for n in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_layers(
    model: nn.Module, layers: list[SplitLayer], source: ImageSource, progress: Callable[[int], None] | None = None
) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
    """One pass over the images: (index of the batch's first image, {layer: (input, output)}) for every batch."""
    parameter = next(model.parameters())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    first = 0
    with layer_inputs(model, [layer.name for layer in layers], seen), torch.no_grad():
        for images in source.batches():
            seen.clear()
            with suppress(StopForward):
                model(images.to(parameter.device, parameter.dtype))
            yield first, seen
            first += len(images)
            if progress:
                progress(len(images))


class EndTokens:
    """The N tokens with the largest and the N with the smallest output of every neuron, as ids.

    A token's id is image * T_p + token. Ties go to the earlier image.
    """

    def __init__(self, config: SplitConfig, tokens: int) -> None:
        self.config, self.tokens = config, tokens
        self.keep = int(config.tokens * _SPARE)
        self.best: list[tuple[Tensor, Tensor, Tensor] | None] = [None, None]  # values, ids, norms of each end
        self.norms = np.zeros(len(_NORM_BINS) + 1, dtype=np.int64)
        self.count = 0

    def add(self, first: int, y: Tensor, norms: Tensor) -> None:
        """y [B, T_p, d] outputs and norms [B, T_p] of the inputs of a batch whose first image has index `first`."""
        self.count += y.shape[0] * y.shape[1]
        self.norms += np.bincount(np.digitize(norms.cpu().numpy().ravel(), _NORM_BINS), minlength=len(self.norms))
        images = torch.arange(first, first + len(y), device=y.device)[:, None, None]
        take = min(self.config.per_image, y.shape[1])
        by_neuron = y.transpose(1, 2).contiguous()  # [B, d, T_p]
        for end, sign in enumerate((1.0, -1.0)):
            values, token = (part.transpose(1, 2) for part in (sign * by_neuron).topk(take, dim=2))
            ids = images * self.tokens + token
            norm = norms[:, :, None].expand_as(y).gather(1, token)
            fresh = (values.flatten(0, 1), ids.flatten(0, 1), norm.flatten(0, 1))
            old = self.best[end]
            merged = fresh if old is None else tuple(torch.cat([a, b]) for a, b in zip(old, fresh, strict=True))
            # a stable sort with the earlier images first orders equal values by image
            order = merged[0].sort(dim=0, descending=True, stable=True).indices[: self.keep]
            self.best[end] = tuple(m.gather(0, order) for m in merged)  # type: ignore[assignment]

    def ends(self) -> list[Tensor]:
        """int64 [d, N] ids, best first, for the positive and the negative end; tokens whose input norm is an outlier
        only stand where there are not enough others. N is at most half of all tokens, so that the ends stay apart."""
        limit = self.config.outlier * self.median_norm()
        wanted = max(1, min(self.config.tokens, self.count // 2))
        found = []
        for best in self.best:
            assert best is not None
            _, ids, norms = best
            order = (norms > limit).sort(dim=0, stable=True).indices
            found.append(ids.gather(0, order)[:wanted].T.contiguous())
        return found

    def median_norm(self) -> float:
        middle = int(np.searchsorted(self.norms.cumsum(), (self.norms.sum() + 1) // 2))
        return float(_NORM_BINS[min(middle, len(_NORM_BINS) - 1)])


class TokenSample:
    """A uniform sample of tokens: those with the smallest of random numbers that depend on seed and image alone, so
    that neither the batch size nor the number of images changes which of the same tokens are drawn."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.priorities: list[Tensor] = []
        self.parts: list[Tensor] = []
        self.pending = 0
        self.threshold = torch.inf  # the largest random number that is still in the sample

    def add(self, first: int, reads: Tensor) -> None:
        """reads [B, T_p, ...]: the inputs of a batch's tokens."""
        for offset, image in enumerate(reads):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + first + offset) % 2**63)
            draws = torch.rand(len(image), generator=generator, dtype=torch.float64)
            chosen = (draws < self.threshold).nonzero()[:, 0]
            self.priorities.append(draws[chosen])
            self.parts.append(image[chosen.to(image.device)].cpu())
            self.pending += len(chosen)
            if self.pending > 2 * self.size:
                self._cut()

    def take(self) -> Tensor:
        """[S, ...], at most `size` tokens, in order of their random numbers."""
        self._cut()
        return self.parts[0]

    def _cut(self) -> None:
        priority, inputs = torch.cat(self.priorities), torch.cat(self.parts)
        order = priority.sort(stable=True).indices[: self.size]
        self.priorities, self.parts, self.pending = [priority[order]], [inputs[order]], len(order)
        if len(order) == self.size:
            self.threshold = float(self.priorities[0][-1])


class LayerStatistics:
    """What pass one keeps of one layer, per live token type."""

    def __init__(self, layer: SplitLayer, linear: LinearMap, config: SplitConfig) -> None:
        self.layer, self.linear = layer, linear
        self.types = [t for t, live in enumerate(layer.live) if live]
        spans = layer.layout.slices
        self.tokens = [s.stop - s.start for s in spans]
        self.ends = {t: EndTokens(config, self.tokens[t]) for t in self.types}
        self.samples = {t: TokenSample(SAMPLE_TOKENS, config.seed) for t in self.types}
        self.sums: dict[int, Tensor] = {}
        self.counts = [0] * len(spans)

    def add(self, first: int, x: Tensor, y: Tensor) -> None:
        reads = self.linear.patches(x)  # [B, T, G, n, q]
        outputs = self.linear.tokens(y).float()
        norms = reads.flatten(2).norm(dim=2)
        for t, span in enumerate(self.layer.layout.slices):
            total = reads[:, span].sum((0, 1), dtype=torch.float64)
            self.sums[t] = total if t not in self.sums else self.sums[t] + total
            self.counts[t] += reads.shape[0] * self.tokens[t]
            if t in self.ends:
                self.ends[t].add(first, outputs[:, span], norms[:, span])
                self.samples[t].add(first, reads[:, span])

    def mean(self, token_type: int) -> Tensor:
        """float64 [G, n, q]: the exact mean input over all calibration tokens of the type."""
        return self.sums[token_type] / max(1, self.counts[token_type])


class TokenStore:
    """The inputs of chosen tokens, float32, in a file: read back by id."""

    def __init__(self, path: Path, ids: Tensor, shape: tuple[int, ...]) -> None:
        self.ids = ids.unique()
        self.shape = shape
        columns = int(np.prod(shape))
        with path.open("wb") as file:  # a full disk is an error here, and would be a crash once the file is mapped
            size = len(self.ids) * columns * 4
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS
                file.truncate(size)
        self.rows = np.memmap(path, dtype=np.float32, mode="r+", shape=(len(self.ids), columns))

    def add(self, first: int, reads: Tensor) -> None:
        """Keep what was chosen of a batch: reads [B, T_p, ...]."""
        tokens = reads.shape[1]
        start, stop = torch.searchsorted(self.ids, torch.tensor([first * tokens, (first + len(reads)) * tokens]))
        wanted = self.ids[start:stop] - first * tokens
        if len(wanted):
            self.rows[int(start) : int(stop)] = reads.flatten(0, 1).flatten(1)[wanted.to(reads.device)].cpu().numpy()

    def read(self, ids: Tensor, groups: Tensor) -> Tensor:
        """ids int64 [B, N], groups int64 [B] -> [B, N, n, q]: what the neurons of these groups read at the tokens."""
        rows = torch.searchsorted(self.ids, ids.cpu().contiguous()).numpy()
        by_group = self.rows.reshape(len(self.rows), *self.shape)
        return torch.from_numpy(by_group[rows, groups.cpu().numpy()[:, None]])
