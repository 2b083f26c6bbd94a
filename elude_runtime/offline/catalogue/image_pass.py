"""The one pass over all images: what the model answers, and which images stand for which feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.errors import ImagesError
from elude_runtime.network.tail import record_layers
from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.draws import Draws
from elude_runtime.offline.catalogue.layer_pass import LayerPass
from elude_runtime.offline.collect import State
from elude_runtime.offline.images import Batch, ImageSource, Progress, none_read
from elude_runtime.offline.resume import Resume

SKIPPED_NAMED = 100
_STATE = "exemplars"


@dataclass
class Skipped:
    """Images that could not be read: how many, and the first of them with the reason."""

    count: int = 0
    named: list[tuple[str, str]] = field(default_factory=list)

    def add(self, skipped: list[tuple[str, str]]) -> None:
        self.count += len(skipped)
        self.named += skipped[: SKIPPED_NAMED - len(self.named)]


class ImagePass:
    """Everything kept of the images, in memory that the number of features bounds, and not that of images."""

    def __init__(self, model: EludeModel, layers: Mapping[str, LayerPass], seed: int) -> None:
        self.model, self.layers, self.draws = model, layers, Draws(seed)
        self.answers = Answers()
        self.skipped = Skipped()

    def run(self, source: ImageSource, resume: Resume, report: Progress) -> None:
        """Read all images, or go on where an earlier run was. ImagesError where none can be read, or activations are
        not finite."""
        start, size = 0, source.batch_size
        if kept := resume.load(_STATE):
            start = kept["next"]
            self._restore(kept)
        report("exemplars", min(start * size, source.count or 0), source.count)
        for batch in source.numbered(start):
            self.skipped.add(batch.skipped)
            if len(batch.places):
                self._add(batch, source)
            report("exemplars", len(batch.places) + len(batch.skipped), source.count)
            if resume.due():
                resume.save(_STATE, self._state(batch.number + 1))
        if not self.answers.count:
            raise none_read(self.skipped.named, self.skipped.count)

    def _add(self, batch: Batch, source: ImageSource) -> None:
        model, parameter = self.model, next(self.model.base.parameters())
        images = batch.images.to(parameter.device, parameter.dtype)
        modules = {name: one.split.linear.module for name, one in self.layers.items()}
        with model.lock, torch.no_grad():
            recording = record_layers(model.base, images, modules)
            logits = recording.logits if model.manifest.output == "logits" else None
            self._check_finite(batch, source, recording.x | ({} if logits is None else {"the output": logits}))
            self.answers.add(batch.places, batch.hashes, logits, self.draws.of(batch.places, 1)[0])
            for name, one in self.layers.items():
                one.add(batch.places, recording.x[name].float(), self.draws)
        if self.answers.crowded:
            self.answers.keep(places for one in self.layers.values() for places in one.places())

    def _check_finite(self, batch: Batch, source: ImageSource, values: Mapping[str, Tensor]) -> None:
        for name, one in values.items():
            broken = (~torch.isfinite(one.flatten(1)).all(1)).nonzero()
            if len(broken):
                raise ImagesError(
                    f"The values at {name} are not finite on {source.name(int(batch.places[int(broken[0])]))}; check "
                    "the base model's weights, or leave this image out."
                )

    def _state(self, following: int) -> State:
        return {
            "next": following,
            "layers": {name: one.state() for name, one in self.layers.items()},
            "answers": self.answers.state(),
            "skipped": (self.skipped.count, self.skipped.named),
        }

    def _restore(self, state: State) -> None:
        for name, one in self.layers.items():
            one.restore(state["layers"][name])
        self.answers.restore(state["answers"])
        self.skipped = Skipped(*state["skipped"])
