"""The two passes over the calibration images: every process reads its own batches, and all end with the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from elude_runtime.errors import ImagesError, ModelError
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.split_layers import SplitLayer
from elude_runtime.offline.collect import LayerStatistics, State, run_layers, token_inputs
from elude_runtime.offline.image_files import spread
from elude_runtime.offline.images import Batch, ImageSource, Progress, none_read
from elude_runtime.offline.input_cache import InputCache
from elude_runtime.offline.ranks import Ranks
from elude_runtime.offline.resume import Resume
from elude_runtime.offline.seen_images import SeenImages
from elude_runtime.offline.token_store import TokenStore
from elude_runtime.partition import SplitConfig

_PROBE_IMAGES = 8
LayerPair = tuple[Tensor, Tensor]  # a layer's input and output


@dataclass(frozen=True)
class Passes:
    """What both passes share. layers: the split layers in network order."""

    model: nn.Module
    layers: list[SplitLayer]
    source: ImageSource
    config: SplitConfig
    ranks: Ranks
    resume: Resume
    report: Progress

    @cached_property
    def cache(self) -> InputCache:
        return InputCache(self.resume.folder)

    def token_statistics(self) -> tuple[list[LayerStatistics], SeenImages]:
        """Pass one: statistics of every layer, and the images they are of. ImagesError when none could be read."""
        modules = dict(self.model.named_modules())
        own = [LayerStatistics(y, LinearMap(modules[y.name], y.name), self.config) for y in self.layers]
        images, start = SeenImages(), 0
        kept = self.resume.load("statistics")
        if kept:
            images, start = SeenImages.of([kept["images"]]), kept["next"]
            _restore(own, kept)
        else:
            self._set_limits(own)
        for batch, seen in self._run(self.source, "token statistics", start):
            images.add(batch)
            if len(batch.places):
                for one in own:
                    one.add(batch.places, *seen[one.layer.name])
                self.cache.add(batch.number, batch.places, {name: x for name, (x, _) in seen.items()})
            if self.resume.due():
                self.cache.sync()
                self.resume.save("statistics", _state(own, images, batch.number + 1))
        if self.ranks.world > 1:
            shares = self.ranks.gather(_state(own, images, 0))
            own = [LayerStatistics(one.layer, one.linear, self.config) for one in own]
            images = SeenImages.of(share["images"] for share in shares)
            for share in shares:
                others = [LayerStatistics(one.layer, one.linear, self.config) for one in own]
                _restore(others, share)
                for one, other in zip(own, others, strict=True):
                    one.merge(other)
        self.resume.basis = images.digest
        if not images.hashes:
            raise none_read(images.skipped)
        for one in own:
            if not all(bool(torch.isfinite(one.mean(t)).all()) for t in range(len(one.tokens))):
                raise ModelError(
                    f"{one.layer.name} reads values that are not finite (NaN or infinity) on these images; check the "
                    "weights and the data configuration, and prefer bfloat16 or float32 to float16."
                )
        return own, images

    def chosen_tokens(self, statistics: list[LayerStatistics], seen: SeenImages) -> dict[str, dict[int, TokenStore]]:
        """Pass two, over the images that hold a chosen token and are not in the cache: {layer: {token type: inputs of
        its end tokens and of its sample}}. The stores' files lie in the resume folder. ImagesError when an image is not
        what pass one saw."""
        stores: dict[str, dict[int, TokenStore]] = {}
        needed = []
        for number, one in enumerate(statistics):
            linear, stores[one.layer.name] = one.linear, {}
            for t in one.types:
                ids = torch.cat([*(e.flatten() for e in one.ends[t].ends()), one.samples[t].take()])
                path = self.resume.folder / f"tokens.{number}.{t}"
                store = TokenStore(path, ids, (linear.groups, linear.inputs, linear.positions))
                stores[one.layer.name][t] = store
                needed.append(store.places(one.tokens[t]))
        places = torch.cat(needed).unique()

        def keep(places: Tensor, inputs: dict[str, Tensor]) -> None:
            for one in statistics:
                for images, reads in token_inputs(one.linear, inputs[one.layer.name]):
                    for t, store in stores[one.layer.name].items():
                        store.add(places[images], reads[:, one.layer.layout.slices[t]])

        every = [store for of_layer in stores.values() for store in of_layer.values()]
        whole = all(self.ranks.gather(all(store.whole for store in every)))
        for store in every:
            store.allocate()
        cached = self.cache.places(self.ranks.owns)
        for number in cached:
            keep(*self.cache.read(number))
        for share in self.ranks.gather(cached):
            places = places[~torch.isin(places, torch.cat([places[:0], *share.values()]))]
        found = 0
        if len(places):
            kept = self.resume.load("tokens") if whole else None
            found = self._read_again(places, seen, keep, every, kept or {"next": 0, "found": 0})
        if self.ranks.world > 1:
            for store in every:  # another machine reads what this one wrote
                store.sync()
        missing = len(places) - sum(self.ranks.gather(found))
        if missing:
            raise ImagesError(f"{missing} images did not come again; give images that can be read twice in one order.")
        return stores

    def _read_again(
        self, places: Tensor, known: SeenImages, keep: Callable[..., None], stores: list[TokenStore], done: State
    ) -> int:
        """The number of images that this process found of those at `places`; done: where it stands."""
        source, found = self.source.at(places), done["found"]
        for batch, seen in self._run(source, "chosen tokens", done["next"]):
            known.check(batch, source)
            found += int(torch.isin(batch.places, places).sum())
            if len(batch.places):
                keep(batch.places, {name: x for name, (x, _) in seen.items()})
            if self.resume.due():
                for store in stores:
                    store.sync()
                self.resume.save("tokens", {"next": batch.number + 1, "found": found})
        return found

    def _run(self, source: ImageSource, stage: str, start: int) -> Iterator[tuple[Batch, dict[str, LayerPair]]]:
        total, size = source.count, source.batch_size
        self.report(stage, min(start * size, total or start * size), total)
        batches = source.numbered(start, self.ranks.rank, self.ranks.world)
        for batch, seen in run_layers(self.model, self.layers, batches):
            yield batch, seen
            self.report(stage, (len(batch.places) + len(batch.skipped)) * self.ranks.world, total)

    def _set_limits(self, statistics: list[LayerStatistics]) -> None:
        """Norm limits from a few images spread over the source, the same in every process."""
        count = self.source.count
        few = self.source.at(torch.from_numpy(spread(count, _PROBE_IMAGES))) if count else self.source
        for source in (few, self.source):
            inputs: dict[str, list[Tensor]] = {one.layer.name: [] for one in statistics}
            found = 0
            for batch, seen in run_layers(self.model, self.layers, source.numbered()):
                found += len(batch.places)
                for name, (x, _) in seen.items():
                    inputs[name].append(x[:_PROBE_IMAGES])
                if found >= _PROBE_IMAGES:
                    break
            if found:
                for one in statistics:
                    one.set_limits(torch.cat(inputs[one.layer.name]))
                return


def _state(statistics: list[LayerStatistics], images: SeenImages, following: int) -> State:
    return {"next": following, "layers": [one.state() for one in statistics], "images": images.state()}


def _restore(statistics: list[LayerStatistics], state: State) -> None:
    for one, kept in zip(statistics, state["layers"], strict=True):
        one.restore(kept)
