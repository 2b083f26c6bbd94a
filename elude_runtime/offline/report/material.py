"""What a report is made of: a checkpoint's manifest, table, exemplars, certificate and evaluation, as found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elude_runtime.checkpoint.certificate import Certificate, read_certificate
from elude_runtime.checkpoint.manifest import Manifest, read_manifest
from elude_runtime.errors import CheckpointError
from elude_runtime.offline.evaluation.files import FILE
from elude_runtime.offline.feature_table import read_table
from elude_runtime.offline.report.evaluated import EvaluationFound, read_evaluation

if TYPE_CHECKING:
    import pyarrow as pa

    from elude_runtime.checkpoint.exemplars import Exemplars


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
    if evaluation is not None and not (evaluation / FILE).is_file():
        raise CheckpointError(f"{evaluation} holds no {FILE}; give the folder that `elude evaluate` wrote it to.")
    return Material(
        checkpoint, manifest, read_table(checkpoint), exemplars, why,
        read_certificate(checkpoint, manifest.checkpoint_sha256),
        read_evaluation(evaluation or checkpoint, manifest.checkpoint_sha256),
    )  # fmt: skip


def _exemplars(checkpoint: Path) -> tuple[Exemplars | None, str]:
    from elude_runtime.checkpoint.exemplars import read_exemplars

    try:
        return read_exemplars(checkpoint), ""
    except CheckpointError as error:
        return None, str(error).replace(str(checkpoint), checkpoint.absolute().name)
