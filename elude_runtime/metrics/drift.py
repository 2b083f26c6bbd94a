"""Feature drift: where the peaks of watched features lie among their quantiles over the catalogue's images, counted on
a sample of the traffic, off the hot path.

Peaks, because a watermark is a few tokens of an image: the distribution over all tokens hardly moves when it comes
(measured on the demo: a watermark on every picture moved no concept's tokens beyond chance). The population stability
index (PSI) of the counts is a recording rule of Prometheus (`deploy/prometheus/rules.yml`), which takes off what chance
alone makes.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from elude_runtime.analysis.activations import peak
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.model import EludeModel
from elude_runtime.checkpoint.catalogue import BIN_SHARES, FeatureCatalogue
from elude_runtime.errors import FeatureError
from elude_runtime.network.tokens import by_image

logger = logging.getLogger(__name__)
BINS = len(BIN_SHARES)
_WAITING = 8  # sampled batches; more are dropped, so that drift never takes memory or time from answers
_FLUSH_SECONDS = 2.0
Count = Callable[[Feature, NDArray[np.int64]], None]
"""What was counted of one feature: images by bin, int64 [12]."""


@dataclass(frozen=True)
class Watched:
    """Features of one layer and token type with their bin edges, float32 [F, 11]."""

    features: list[Feature]
    edges: Tensor


def watched(
    model: EludeModel, catalogue: FeatureCatalogue, named: Sequence[str], most: int
) -> tuple[list[Watched], list[str]]:
    """What to watch, and the features that cannot be. named: features that are watched in any case; with them the
    concepts of every layer, those with the largest shares of its variance first, up to `most` features.

    A feature whose quantiles coincide, or one without a catalogue, cannot be watched.
    """
    unknown, chosen = [], {}
    for name in named:
        try:
            chosen[name] = model.feature(name)
        except FeatureError:
            unknown.append(name)
    shares = []
    for layer in model.layers:
        state = model.state(layer)
        for token_type in state.live_types:
            for feature in state.concept_features(token_type):
                facts = catalogue.facts(feature.name)
                if feature.index is not None and facts is not None:
                    shares.append((facts.share, feature))
    for _, feature in sorted(shares, key=lambda pair: -pair[0]):
        chosen.setdefault(feature.name, feature)
    groups: dict[tuple[str, int], list[tuple[Feature, NDArray[np.float32]]]] = {}
    taken = 0
    for feature in chosen.values():
        edges = catalogue.peak_edges(feature.name) if taken < most else None
        if edges is None:
            if feature.name in named:
                unknown.append(feature.name)
            continue
        taken += 1
        groups.setdefault((feature.layer, feature.token_type), []).append((feature, edges))
    found = []
    for pairs in groups.values():
        table = np.stack([own for _, own in pairs])
        found.append(Watched([feature for feature, _ in pairs], torch.from_numpy(table)))
    return found, unknown


def count_bins(activations: Tensor, edges: Tensor) -> NDArray[np.int64]:
    """activations [B, T_p, F] of B images, edges [F, 11] -> images by bin of their peak, [F, 12]; those whose peak is
    not finite are not counted."""
    values = peak(activations.float()).values.cpu().T.contiguous()  # [F, B]
    bins = torch.searchsorted(edges, values)
    place = torch.arange(len(edges))[:, None] * BINS + bins
    return torch.bincount(place[values.isfinite()], minlength=len(edges) * BINS).view(-1, BINS).numpy()


def stability_index(counts: NDArray[np.int64]) -> float:
    """Population stability index of counts [12], with one image of the expected shares added, as the recording rules
    have it: the sum over the bins of (p - q) ln(p / q)."""
    q = np.array(BIN_SHARES)
    p = (counts + q) / (counts.sum() + 1)
    return float(((p - q) * np.log(p / q)).sum())


def chance_of_psi(images: int, expected_images: int) -> float:
    """The index's mean where nothing moved: of so many images against those behind the expected shares."""
    return (BINS - 1) * (1 / images + 1 / expected_images)


class DriftWatch:
    """Counts the watched features on a share of the images. `looking` is called around every forward pass; the counting
    is done by a thread of its own, from copies of the sampled rows of the layers' inputs.

    count: called from that thread, every two seconds at most; dropped: called for a batch that found no room.
    """

    def __init__(
        self,
        model: EludeModel,
        groups: Sequence[Watched],
        sample: float,
        count: Count,
        dropped: Callable[[], None],
        seed: int | None = None,
    ) -> None:
        self._model, self._groups, self._sample = model, list(groups), sample
        self._count, self._dropped, self._random = count, dropped, random.Random(seed)
        self._modules: dict[str, nn.Module] = {
            layer: model.state(layer).linear.module for layer in {group.features[0].layer for group in self._groups}
        }
        self._queue: queue.Queue[dict[str, Tensor] | None] = queue.Queue(_WAITING)
        self._pending: dict[int, NDArray[np.int64]] = {}
        self._thread = threading.Thread(target=self._work, name="elude-drift", daemon=True)
        self._thread.start()

    def sampled(self, images: int) -> list[int]:
        """Those of a batch's images that are to be looked at."""
        return [row for row in range(images) if self._groups and self._random.random() < self._sample]

    @contextmanager
    def looking(self, rows: list[int], images: int) -> Iterator[None]:
        """A forward pass of so many images runs inside the block; rows: of these, those to look at. Without any,
        nothing happens."""
        if not rows:
            yield
            return
        inputs: dict[str, Tensor] = {}

        def keep(layer: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any) -> None:
                try:
                    # indexing copies: the pass may go on to change it in place, and a view would hold the whole batch
                    inputs[layer] = by_image(args[0], images)[rows]
                except Exception:  # an answer is worth more
                    logger.exception("drift cannot look at %s", layer)

            return hook

        with self._model.lock:
            handles = [module.register_forward_pre_hook(keep(name)) for name, module in self._modules.items()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
        if inputs.keys() != self._modules.keys():
            return
        try:
            self._queue.put_nowait(inputs)
        except queue.Full:
            self._dropped()

    def close(self) -> None:
        """Counts what waits, and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        flushed = time.monotonic()
        going = True
        while going:
            try:
                inputs = self._queue.get(timeout=_FLUSH_SECONDS)
                going = inputs is not None
                if inputs is not None:
                    self._look(inputs)
            except queue.Empty:
                pass
            except Exception:  # drift is not worth an answer, or the thread
                logger.exception("counting drift failed on a sampled batch")
            if not going or time.monotonic() - flushed >= _FLUSH_SECONDS:
                self._flush()
                flushed = time.monotonic()

    def _look(self, inputs: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for number, group in enumerate(self._groups):
                state = self._model.state(group.features[0].layer)
                found = count_bins(state.feature_activations(inputs[state.name].float(), group.features), group.edges)
                self._pending[number] = self._pending.get(number, 0) + found

    def _flush(self) -> None:
        for number, counts in self._pending.items():
            for feature, buckets in zip(self._groups[number].features, counts, strict=True):
                self._count(feature, buckets)
        self._pending.clear()
