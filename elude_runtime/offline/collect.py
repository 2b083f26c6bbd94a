"""Token statistics of the calibration images, streamed: what the partition needs, in memory that no image count grows.

One pass keeps, per layer and token type, the mean input, and as indices only the tokens at both ends of every neuron
and a uniform token sample; a second pass reads what these tokens hold (`token_store`). Every result is independent of
which process saw which batch, and in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.split_layers import SplitLayer
from elude_runtime.network.tokens import by_image
from elude_runtime.offline.images import Batch
from elude_runtime.partition import SplitConfig

SAMPLE_TOKENS = 6000
_PATCH_FLOATS = 16_000_000  # inputs unfolded at once: 64 MB of float32
_LOWEST = -(2**31) + 1  # below the rank of every float32 that is a number
_NOTHING = -(2**31)  # where there is no token

_Kept = tuple[Tensor, Tensor]  # ranks int32 [N, d] and ids int64 [N, d] of tokens

State = dict[str, Any]  # tensors, numbers and strings: what torch.save writes and reads back without unpickling code


class StopForward(Exception):
    """Ends a forward pass once the deepest split layer has run."""


@contextmanager
def layer_inputs(model: nn.Module, names: list[str], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While the block runs, every forward pass leaves (input, output) of the named layers in `seen`, then stops."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Tensor) -> None:
            last = len(seen) == len(names) - 1
            # glue code may change either in place, but no more once the pass has stopped
            seen[name] = (args[0], out) if last else (args[0].clone(), out.clone())
            if last:
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
    model: nn.Module, layers: list[SplitLayer], batches: Iterable[Batch]
) -> Iterator[tuple[Batch, dict[str, tuple[Tensor, Tensor]]]]:
    """One pass: every batch with {layer: (input, output)}; nothing in it for a batch without a readable image."""
    parameter = next(model.parameters())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with layer_inputs(model, [layer.name for layer in layers], seen), torch.no_grad():
        for batch in batches:
            seen.clear()
            if len(batch.places):
                with suppress(StopForward):
                    model(batch.images.to(parameter.device, parameter.dtype))
                for name, (x, y) in seen.items():
                    seen[name] = by_image(x, len(batch.places)), by_image(y, len(batch.places))
            yield batch, seen


def token_inputs(linear: LinearMap, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(images, what their tokens read [b, T, G, n, q]) for the layer's input x [B, ...], a few images at a time where
    unfolding makes it larger."""
    if linear.positions == 1:
        yield slice(0, len(x)), linear.patches(x)
        return
    step = max(1, _PATCH_FLOATS // (x[0].numel() * linear.positions))
    for start in range(0, len(x), step):
        images = slice(start, min(start + step, len(x)))
        yield images, linear.patches(x[images])


class ExactSum:
    """A float64 sum in two parts (Knuth's TwoSum), so exact that the order of its terms cannot be told from it."""

    def __init__(self) -> None:
        self.high: Tensor | None = None
        self.low: Tensor | None = None

    def add(self, term: Tensor) -> None:
        if self.high is None or self.low is None:
            self.high, self.low = term.clone(), torch.zeros_like(term)
            return
        total = self.high + term
        back = total - self.high
        self.low += (self.high - (total - back)) + (term - back)
        self.high = total

    @property
    def value(self) -> Tensor:
        if self.high is None or self.low is None:
            raise ValueError("nothing was added")
        return self.high + self.low


class EndTokens:
    """The N tokens with the largest and the N with the smallest output of every neuron, as ids image * T_p + token.

    Equal outputs are ordered by id. A token whose input norm is over the limit comes after all others.
    """

    def __init__(self, config: SplitConfig, tokens: int) -> None:
        self.config, self.tokens = config, tokens
        self.best: list[tuple[Tensor, Tensor] | None] = [
            None,
            None,
        ]  # of each end: ranks [N, d], ids [N, d], best first
        self.fresh: list[list[_Kept]] = [[], []]  # not yet sorted in
        self.count = 0

    def add(self, places: Tensor, y: Tensor, outlier: Tensor) -> None:
        """y [B, T_p, d] outputs of the images at `places` [B], ascending from call to call; outlier [B, T_p]."""
        self.count += y.shape[0] * y.shape[1]
        take = min(self.config.per_image, y.shape[1])
        position = torch.arange(self.tokens, device=y.device)
        first_id = places.to(y.device) * self.tokens
        for end in range(2):
            ranks = float_ranks(y if end == 0 else -y).masked_fill_(outlier[..., None], _LOWEST).transpose(1, 2)
            ranks = ranks.contiguous()  # [B, d, T_p]
            # Only an image whose best token beats the N-th so far has anything to add; an equal one comes later.
            best = self.best[end]
            full = best is not None and len(best[0]) == self.config.tokens
            image, neuron = (ranks.amax(2) > (best[0][-1] if best is not None and full else _NOTHING)).nonzero().T
            # rank and token in one number: no two are equal, and the largest is the best rank's first token
            keys = ranks[image, neuron].long().mul_(2**32).sub_(position)
            top = keys.topk(take, dim=1).values
            token = -top % 2**32
            fresh = torch.full((len(y), y.shape[2], take), _NOTHING, dtype=torch.int32, device=y.device)
            ids = torch.zeros_like(fresh, dtype=torch.int64)
            fresh[image, neuron] = ((top + token) // 2**32).int()
            ids[image, neuron] = first_id[image, None] + token
            self._take_in(end, (fresh.transpose(1, 2).flatten(0, 1), ids.transpose(1, 2).flatten(0, 1)))

    def merge(self, other: EndTokens) -> None:
        """Take in what another process kept of other images."""
        self.count += other.count
        for end in range(2):
            if kept := other._sorted(end):
                self._take_in(end, kept)

    def ends(self) -> list[Tensor]:
        """int64 [d, N] ids, best first, for the positive and the negative end. N is at most half of all tokens, so
        that the ends stay apart."""
        wanted = max(1, min(self.config.tokens, self.count // 2))
        kept = [self._sorted(end) for end in range(2)]
        return [ids[:wanted].T.contiguous().cpu() for _, ids in filter(None, kept)]

    def _take_in(self, end: int, kept: _Kept) -> None:
        self.fresh[end].append(kept)
        if sum(len(ranks) for ranks, _ in self.fresh[end]) >= self.config.tokens:
            self._sorted(end)

    def _sorted(self, end: int) -> _Kept | None:
        """What is kept of an end, nothing left unsorted; None before the first image."""
        best = self.best[end]
        if self.fresh[end]:
            parts = [*([best] if best else []), *self.fresh[end]]
            ranks, ids = torch.cat([r for r, _ in parts]), torch.cat([i for _, i in parts])
            by_id = ids.sort(dim=0)
            ranks = ranks.gather(0, by_id.indices)
            order = ranks.sort(dim=0, descending=True, stable=True).indices[: self.config.tokens]
            best = ranks.gather(0, order), by_id.values.gather(0, order)
            self.best[end], self.fresh[end] = best, []
        return best

    def state(self) -> State:
        kept = [self._sorted(end) for end in range(2)]
        return {"best": [k and tuple(part.cpu() for part in k) for k in kept], "count": self.count}

    def restore(self, state: State, device: torch.device) -> None:
        self.best = [k and (k[0].to(device), k[1].to(device)) for k in state["best"]]
        self.count = state["count"]


def float_ranks(values: Tensor) -> Tensor:
    """int32 numbers in the order of the float32 values; both zeros are one."""
    bits = (values.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


class TokenSample:
    """A uniform sample of tokens, as ids: those with the smallest of random numbers that depend on the seed and the
    image's place alone."""

    def __init__(self, size: int, seed: int, tokens: int) -> None:
        self.size, self.seed, self.tokens = size, seed, tokens
        self.draws = torch.empty(0, dtype=torch.float64)
        self.ids = torch.empty(0, dtype=torch.int64)

    def add(self, places: Tensor) -> None:
        draws, ids = [self.draws], [self.ids]
        for place in places.tolist():
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63)
            drawn = torch.rand(self.tokens, generator=generator, dtype=torch.float64)
            draws.append(drawn)
            ids.append(torch.arange(self.tokens) + place * self.tokens)
        self._keep(torch.cat(draws), torch.cat(ids))

    def merge(self, other: TokenSample) -> None:
        self._keep(torch.cat([self.draws, other.draws]), torch.cat([self.ids, other.ids]))

    def take(self) -> Tensor:
        """int64 [S] ids in ascending order, S at most `size`."""
        return self.ids.sort().values

    def _keep(self, draws: Tensor, ids: Tensor) -> None:
        order = draws.sort(stable=True).indices[: self.size] if len(draws) > self.size else slice(None)
        self.draws, self.ids = draws[order], ids[order]

    def state(self) -> State:
        return {"draws": self.draws, "ids": self.ids}

    def restore(self, state: State) -> None:
        self.draws, self.ids = state["draws"], state["ids"]


class LayerStatistics:
    """What pass one keeps of one layer, per token type."""

    def __init__(self, layer: SplitLayer, linear: LinearMap, config: SplitConfig) -> None:
        self.layer, self.linear, self.config = layer, linear, config
        self.types = [t for t, live in enumerate(layer.live) if live]
        self.tokens = [s.stop - s.start for s in layer.layout.slices]
        self.ends = {t: EndTokens(config, self.tokens[t]) for t in self.types}
        self.samples = {t: TokenSample(SAMPLE_TOKENS, config.seed, self.tokens[t]) for t in self.types}
        self.sums = [ExactSum() for _ in self.tokens]
        self.counts = [0] * len(self.tokens)
        self.limits = [float("inf")] * len(self.tokens)

    def set_limits(self, x: Tensor) -> None:
        """Norm limits from the layer's input on a few images: a multiple of each token type's median norm."""
        norms = torch.cat([reads.flatten(2).norm(dim=2) for _, reads in token_inputs(self.linear, x)])
        medians = [float(norms[:, span].float().median()) for span in self.layer.layout.slices]
        self.limits = [self.config.outlier * m if m > 0 else float("inf") for m in medians]

    def add(self, places: Tensor, x: Tensor, y: Tensor) -> None:
        """Input x and output y of the layer, in its own layout, for the images at `places`."""
        outputs = self.linear.tokens(y).float()
        totals: list[list[Tensor]] = [[] for _ in self.tokens]
        norms = []
        for _, reads in token_inputs(self.linear, x):
            norms.append(reads.flatten(2).norm(dim=2))
            for t, span in enumerate(self.layer.layout.slices):
                totals[t].append(reads[:, span].sum(1).sum(0, dtype=torch.float64))
        norm = torch.cat(norms)
        for t, span in enumerate(self.layer.layout.slices):
            self.sums[t].add(torch.stack(totals[t]).sum(0))
            self.counts[t] += len(places) * self.tokens[t]
            if t in self.ends:
                self.ends[t].add(places, outputs[:, span], norm[:, span] > self.limits[t])
                self.samples[t].add(places)

    def mean(self, token_type: int) -> Tensor:
        """float64 [G, n, q]: the mean input over all calibration tokens of the type."""
        return self.sums[token_type].value / self.counts[token_type]

    def merge(self, other: LayerStatistics) -> None:
        """Take in what another process kept of other images."""
        for t, sums in enumerate(other.sums):
            if sums.high is not None and sums.low is not None:
                self.sums[t].add(sums.high)
                self.sums[t].add(sums.low)
            self.counts[t] += other.counts[t]
        for t in self.types:
            self.ends[t].merge(other.ends[t])
            self.samples[t].merge(other.samples[t])

    def state(self) -> State:
        """Everything that images change."""
        return {
            "sums": [None if s.high is None or s.low is None else (s.high.cpu(), s.low.cpu()) for s in self.sums],
            "counts": list(self.counts),
            "limits": list(self.limits),
            "ends": {t: e.state() for t, e in self.ends.items()},
            "samples": {t: s.state() for t, s in self.samples.items()},
        }

    def restore(self, state: State) -> None:
        device = self.linear.module.weight.device
        for sums, kept in zip(self.sums, state["sums"], strict=True):
            if kept is not None:
                sums.high, sums.low = (part.to(device) for part in kept)
        self.counts, self.limits = list(state["counts"]), list(state["limits"])
        for t in self.types:
            self.ends[t].restore(state["ends"][t], device)
            self.samples[t].restore(state["samples"][t])

    def like(self, state: State) -> LayerStatistics:
        """Statistics of the same layer from another process's state."""
        other = LayerStatistics(self.layer, self.linear, self.config)
        other.restore(state)
        return other
