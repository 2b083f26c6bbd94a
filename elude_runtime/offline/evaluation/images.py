"""Which of the given images score features and which train what they are compared with: apart, by content."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.checkpoint.storage import CALIBRATION_TENSOR, TENSORS
from elude_runtime.errors import ImagesError, SettingsError
from elude_runtime.network.tail import Recording
from elude_runtime.network.tokens import by_image
from elude_runtime.offline.collect import StopForward, layer_inputs
from elude_runtime.offline.image_loading import HASH_BYTES
from elude_runtime.offline.images import Batch, ImageSource, Progress, image_hash

LEAST_IMAGES = 50


@dataclass(frozen=True)
class ImageSplit:
    """scoring: images on which features are scored; calibration: on which baselines are trained. known: given images
    that stand among those the checkpoint was calibrated on; shared: that stand in the calibration folder too; twice:
    with the content of another one. None of them is scored."""

    scoring: ImageSource
    calibration: ImageSource
    given: int
    known: int
    shared: int
    twice: int

    @property
    def excluded(self) -> int:
        return self.known + self.shared + self.twice


def calibration_hashes(checkpoint: Path) -> set[bytes]:
    """The content hashes of the images that the checkpoint was calibrated on."""
    with safe_open(checkpoint / TENSORS, "pt") as file:
        names = set(file.keys())
        data = file.get_tensor(CALIBRATION_TENSOR).numpy().tobytes() if CALIBRATION_TENSOR in names else b""
    return {data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)}


def content(source: ImageSource, report: Progress) -> list[tuple[int, bytes]]:
    """(place, content hash) of every image that can be read."""
    found: list[tuple[int, bytes]] = []
    if not source.has_files:
        for batch in source.numbered():
            hashes = [batch.hashes[i : i + HASH_BYTES] for i in range(0, len(batch.hashes), HASH_BYTES)]
            found += zip(batch.places.tolist(), hashes, strict=True)
        return found
    for place in range(source.count or 0):
        with suppress(ImagesError, OSError):  # told when the images are decoded
            found.append((place, image_hash(source.read(place))))
        report("content of the images", 1, source.count)
    return found


def split_images(
    given: ImageSource, calibration: ImageSource | None, known: set[bytes], seed: int, report: Progress
) -> ImageSplit:
    """Half of the given images score, drawn at random among those that nothing was calibrated on; the others train the
    baselines. With calibration images of their own all the given ones score.

    known: content hashes of the checkpoint's calibration images. ImagesError when fewer than `LEAST_IMAGES` are left.
    """
    found = content(given, report)
    others = {digest for _, digest in content(calibration, report)} if calibration is not None else set()
    first: dict[bytes, int] = {}
    for place, digest in found:
        first.setdefault(digest, place)
    fresh = [place for digest, place in first.items() if digest not in known and digest not in others]
    among = sum(digest in known for digest in first)
    shared = len(first) - len(fresh) - among
    wanted = len(fresh) if calibration is not None else min(len(fresh), (len(first) + 1) // 2)
    order = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(seed)).tolist()
    scoring = sorted(fresh[i] for i in order[:wanted])
    if len(scoring) < LEAST_IMAGES:
        raise ImagesError(
            f"Of {len(found)} images only {len(scoring)} can score: {among} are among those that the checkpoint was "
            f"calibrated on, {shared} among the calibration images given, and a half trains the baselines unless "
            f"--calibration is given; at least {LEAST_IMAGES} are needed, give other images."
        )
    if calibration is None:
        left = sorted(set(first.values()) - set(scoring))
        if not left:
            raise ImagesError("No image is left to train baselines on; give more images, or --calibration DIR.")
        calibration = given.at(torch.tensor(left))
    places = torch.tensor(scoring, dtype=torch.int64)
    return ImageSplit(given.at(places), calibration, len(found), among, shared, len(found) - len(first))


def known_truth(
    source: ImageSource, places: Tensor, truth: Mapping[str, Collection[str]], choosing: Tensor
) -> dict[str, Tensor]:
    """{property: bool [N]} of the images at these places, from the names of the files that have it. SettingsError for a
    property that none or all of the images have that choose features, bool [N], or of the others."""
    names = [Path(source.name(place)).name for place in places.tolist()] if truth else []
    found = {}
    for name, files in truth.items():
        having = {Path(file).name for file in files}
        found[name] = torch.tensor([n in having for n in names])
        for half in (found[name][choosing], found[name][~choosing]):
            if bool(half.all()) or not bool(half.any()):
                raise SettingsError(
                    f"The property {name!r} cannot be told on these images: in one half of them all or none have it; "
                    "give more images, or name the files as they are called in the folder."
                )
    return found


def layer_batches(
    model: EludeModel, layer: str, source: ImageSource, report: Progress, stage: str
) -> Iterator[tuple[Batch, Tensor]]:
    """Every batch with a readable image, and the layer's input [B, ...] at it."""
    parameter = next(model.base.parameters())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in source.numbered():
        if not len(batch.places):
            continue
        with model.lock, torch.no_grad(), layer_inputs(model.base, [layer], seen):
            seen.clear()
            with suppress(StopForward):
                model.base(batch.images.to(parameter.device, parameter.dtype))
        yield batch, by_image(seen[layer][0], len(batch.places)).float()
        report(stage, len(batch.places), source.count)


def spread_places(places: Tensor, count: int) -> Tensor:
    """int64: at most `count` of the places [N], the first and the last among them, the others evenly between."""
    return places[torch.linspace(0, len(places) - 1, min(count, len(places))).round().long()]


def layer_recordings(
    model: EludeModel, layer: str, source: ImageSource, report: Progress, stage: str
) -> Iterator[Recording]:
    """The recorded pass of every batch with a readable image, fit for gradients even in inference mode."""
    parameter = next(model.base.parameters())
    for batch in source.numbered():
        if len(batch.places):
            with torch.inference_mode(False):
                recording = model.record(batch.images.to(parameter.device, parameter.dtype), [layer])
            yield recording
            report(stage, len(batch.places), source.count)


def top_classes(model: EludeModel, source: ImageSource, report: Progress) -> tuple[Tensor, Tensor]:
    """(places of the images that can be read, the class of each one's largest logit), int64 [N]."""
    parameter, places, tops = next(model.base.parameters()), [], []
    for batch in source.numbered():
        if len(batch.places):
            with model.lock, torch.no_grad():
                logits = model.base(batch.images.to(parameter.device, parameter.dtype))
            places.append(batch.places)
            tops.append(logits.argmax(-1).cpu())
        report("top classes", len(batch.places), source.count)
    return torch.cat(places), torch.cat(tops)
