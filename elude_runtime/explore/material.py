"""What the explorer knows of its checkpoint without a server: layers, class names, exemplar images, policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from elude_runtime.checkpoint.manifest import Manifest, read_manifest
from elude_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from elude_runtime.checkpoint.exemplars import CatalogueImage, Exemplars

_SAMPLES = 24


class Material:
    """A checkpoint directory, read once; a missing catalogue is a state and no error."""

    def __init__(self, checkpoint: Path) -> None:
        """CheckpointError where the directory is no checkpoint."""
        self.checkpoint = checkpoint
        self.manifest: Manifest = read_manifest(checkpoint)
        self.catalogue_missing: str | None = None
        self._samples: dict[int, CatalogueImage] = {}
        try:
            self._samples = _samples(_exemplars(checkpoint))
        except CheckpointError as error:
            self.catalogue_missing = str(error)

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
                    "token_types": [{"name": t.name, "live": t.live, "concepts": t.concepts} for t in layer.token_types],
                    "auto": layer.attribution.auto,
                }
                for layer in manifest.layers
            ],
            "samples": [
                {"number": number, "name": Path(image.name).name, "predicted": [c for c, _ in image.predicted[:1]]}
                for number, image in self._samples.items()
            ],
            "catalogue_missing": self.catalogue_missing,
        }

    def sample(self, number: int) -> Path | None:
        """The thumbnail file of an exemplar image that the page offers."""
        image = self._samples.get(number)
        return image.thumbnail if image and image.thumbnail and image.thumbnail.is_file() else None

    def save_policy(self, name: str, document: dict[str, Any]) -> bool:
        """Puts a policy beside the checkpoint; whether it took the place of one of its name. EludeError as of
        `checkpoint.policies.save_policy`."""
        from elude_runtime.checkpoint.policies import save_policy  # brings torch along

        return save_policy(self.checkpoint, name, document)


def _exemplars(checkpoint: Path) -> Exemplars:
    try:
        from elude_runtime.checkpoint.exemplars import read_exemplars
    except ModuleNotFoundError as error:  # pragma: no cover - while the catalogue is built
        raise CheckpointError("There is no catalogue.") from error
    return read_exemplars(checkpoint)


def _samples(exemplars: Exemplars) -> dict[int, CatalogueImage]:
    """Some images with a thumbnail, spread over all of them."""
    shown = [number for number, image in sorted(exemplars.images.items()) if image.thumbnail is not None]
    step = max(1, len(shown) // _SAMPLES)
    return {number: exemplars.images[number] for number in shown[::step][:_SAMPLES]}
