"""What the explorer knows of its checkpoint without a server: layers, class names, exemplar images, policies."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from elude_runtime.checkpoint.catalogue import FeatureCatalogue, read_catalogue
from elude_runtime.checkpoint.exemplars import NEGATIVE, POSITIVE, TOP, Exemplars, read_exemplars
from elude_runtime.checkpoint.labels import AUTOMATIC
from elude_runtime.checkpoint.manifest import Manifest, read_manifest
from elude_runtime.errors import CheckpointError

_SAMPLES = 24


class Material:
    """A checkpoint directory, read once; a missing catalogue is a state and no error."""

    def __init__(self, checkpoint: Path) -> None:
        """CheckpointError where the directory is no checkpoint."""
        self.checkpoint = checkpoint
        self.manifest: Manifest = read_manifest(checkpoint)
        self.catalogue_missing: str | None = None
        self._exemplars: Exemplars | None = None
        try:
            self._exemplars = read_exemplars(checkpoint)
        except CheckpointError as error:
            self.catalogue_missing = str(error)
        try:
            self._features: FeatureCatalogue | None = read_catalogue(checkpoint)
        except CheckpointError:
            self._features = None  # the served archive may have its own

    @property
    def partition_sha256(self) -> str:
        return self.manifest.partition_sha256

    @property
    def policies_file(self) -> Path:
        return self.checkpoint / "policies.json"

    def facts(self) -> dict[str, Any]:
        """As the page reads them."""
        manifest = self.manifest
        return {
            "name": self.checkpoint.resolve().name,
            "path": str(self.checkpoint),
            "architecture": manifest.model.name,
            "checkpoint_sha256": manifest.checkpoint_sha256,
            "partition_sha256": manifest.partition_sha256,
            "output": manifest.output,
            "labels": manifest.labels,
            "layers": [
                {
                    "name": layer.name,
                    "grid": layer.grid,
                    "prefix": layer.prefix,
                    "token_types": [
                        {"name": t.name, "live": t.live, "concepts": t.concepts} for t in layer.token_types
                    ],
                    "auto": layer.attribution.auto,
                }
                for layer in manifest.layers
            ],
            "samples": [self._image(number) for number in self._spread()],
            "catalogue_missing": self.catalogue_missing,
        }

    def face(self, feature: str) -> dict[str, Any]:
        """A feature's label and its top images at either end, the most active first, as the page reads them."""
        facts = self._features.facts(feature) if self._features else None
        tops = [one for one in self._exemplars.of(feature) if one.role == TOP] if self._exemplars else []
        tops.sort(key=lambda one: one.rank)
        return {
            "label": facts.label if facts else None,
            "automatic": facts is not None and facts.label_source == AUTOMATIC,
            "ends": {
                end: [
                    {**self._image(one.image), "token": one.token, "activation": one.activation}
                    for one in tops
                    if one.end == end
                ]
                for end in (POSITIVE, NEGATIVE)
            },
        }

    def sample(self, number: int) -> Path | None:
        """The thumbnail file of an image of the catalogue."""
        image = self._exemplars.images.get(number) if self._exemplars else None
        return image.thumbnail if image and image.thumbnail and image.thumbnail.is_file() else None

    def original(self, number: int) -> bytes | None:
        """The image itself, where it still lies where the catalogue found it and is the same; else None."""
        image = self._exemplars.images.get(number) if self._exemplars else None
        try:
            encoded = Path(image.name).read_bytes() if image else b""
        except (OSError, ValueError):
            return None
        digest = hashlib.sha256(encoded).hexdigest()
        return encoded if image and digest.startswith(image.sha256) and image.sha256 else None

    def _spread(self) -> list[int]:
        """Some images with a thumbnail, spread over all of them."""
        images = self._exemplars.images if self._exemplars else {}
        shown = [number for number in sorted(images) if images[number].thumbnail is not None]
        count = min(_SAMPLES, len(shown))
        return [shown[place * len(shown) // count] for place in range(count)]

    def _image(self, number: int) -> dict[str, Any]:
        """An image of the catalogue. aspect: width over height of what the model saw; file: as the catalogue found it,
        None where it has moved; thumbnail: None where there is none."""
        assert self._exemplars is not None
        image = self._exemplars.images[number]
        x0, y0, x1, y1 = image.window
        return {
            "number": number,
            "name": Path(image.name).name,
            "aspect": (x1 - x0) / (y1 - y0) if y1 > y0 else 1.0,
            "file": image.name if _is_file(image.name) else None,
            "thumbnail": str(image.thumbnail) if image.thumbnail else None,
        }

    def save_policy(self, name: str, document: dict[str, Any]) -> bool:
        """Puts a policy beside the checkpoint; whether it took the place of one of its name. EludeError as of
        `checkpoint.policies.save_policy`."""
        from elude_runtime.checkpoint.policies import save_policy  # brings torch along

        return save_policy(self.checkpoint, name, document)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False
