"""What a report is made of: a checkpoint's manifest, feature table, exemplars, certificate and evaluation, as found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elude_runtime.checkpoint.certificate import Certificate, read_certificate
from elude_runtime.checkpoint.manifest import Manifest, read_manifest
from elude_runtime.errors import CheckpointError
from elude_runtime.offline.feature_table import read_table

if TYPE_CHECKING:
    import pyarrow as pa

    from elude_runtime.checkpoint.exemplars import Exemplars

_EVALUATION, _PLOTS = "evaluation.json", "evaluation"
_LISTS = ("sets", "comparisons")


@dataclass(frozen=True)
class EvaluationFound:
    """document: `evaluation.json`, None where there is none of this checkpoint; problem: why not, a sentence, where
    there is a file; plots: those of the figures that both lie there and belong to a layer of the document."""

    document: dict[str, Any] | None = None
    problem: str = ""
    plots: list[Path] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Material:
    """exemplars: None where the checkpoint has no catalogue that can be read, `no_exemplars` says why."""

    checkpoint: Path
    manifest: Manifest
    table: pa.Table
    exemplars: Exemplars | None
    no_exemplars: str
    certificate: Certificate
    evaluation: EvaluationFound

    @property
    def name(self) -> str:
        """What commands in the pages call the checkpoint: no page tells where it lay."""
        return self.checkpoint.absolute().name


def read_material(checkpoint: Path, evaluation: Path | None = None) -> Material:
    """Everything that a report shows. evaluation: the folder that holds `evaluation.json`, the checkpoint by default.

    CheckpointError where the manifest or the feature table cannot be read, or where the evaluation that was asked for
    by its folder is not there; whatever else is missing is a state of the pages.
    """
    manifest = read_manifest(checkpoint)
    exemplars, why = _exemplars(checkpoint)
    if evaluation is not None and not (evaluation / _EVALUATION).is_file():
        raise CheckpointError(
            f"{evaluation} holds no {_EVALUATION}; give the folder that `elude evaluate` wrote it to."
        )
    return Material(
        checkpoint, manifest, read_table(checkpoint), exemplars, why,
        read_certificate(checkpoint, manifest.checkpoint_sha256),
        _evaluation(evaluation or checkpoint, manifest.checkpoint_sha256),
    )  # fmt: skip


def _exemplars(checkpoint: Path) -> tuple[Exemplars | None, str]:
    from elude_runtime.checkpoint.exemplars import read_exemplars

    try:
        return read_exemplars(checkpoint), ""
    except CheckpointError as error:
        return None, str(error).replace(str(checkpoint), checkpoint.absolute().name)


def _evaluation(folder: Path, checkpoint_sha256: str) -> EvaluationFound:
    try:
        document = json.loads((folder / _EVALUATION).read_text(encoding="utf-8"))
        if document["checkpoint"]["checkpoint_sha256"] != checkpoint_sha256:
            return EvaluationFound(None, f"{_EVALUATION} belongs to another checkpoint.")
        if not all(isinstance(layer[name], list) for layer in document["layers"] for name in _LISTS):
            raise TypeError
    except FileNotFoundError:
        return EvaluationFound()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return EvaluationFound(None, f"{_EVALUATION} is damaged; evaluate again.")
    return EvaluationFound(document, "", sorted((folder / _PLOTS).glob("*.svg")))
