"""A whole evaluation: its layers, the sentences that sum them up, and the files that it leaves beside a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elude_runtime.checkpoint.storage import storage_error, write_json
from elude_runtime.offline.evaluation.files import FILE, FOLDER
from elude_runtime.offline.evaluation.plots import draw
from elude_runtime.offline.evaluation.result import LayerResult
from elude_runtime.offline.evaluation.statement import statement


@dataclass(eq=False)
class Evaluation:
    """What `evaluate` found. facts: environment, settings, images, encoders, checkpoint; warnings: a sentence each."""

    facts: dict[str, Any]
    layers: list[LayerResult]
    draws: int
    seed: int
    warnings: list[str] = field(default_factory=list)

    @property
    def statement(self) -> str:
        """What the run shows and what it does not."""
        return statement(self.facts, self.layers)

    def document(self) -> dict[str, Any]:
        return {
            "format_version": 1,
            "statement": self.statement,
            **self.facts,
            "warnings": self.warnings,
            "layers": [layer.document(self.draws, self.seed) for layer in self.layers],
        }

    def write(self, checkpoint: Path) -> list[Path]:
        """`evaluation.json` and the plots in `evaluation/`, each whole or not at all; the files written. StorageError
        where the disk refuses."""
        folder = checkpoint / FOLDER
        try:
            work = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", suffix=".part", dir=checkpoint))
        except OSError as error:
            raise storage_error(error, folder) from error
        try:
            names = [path.name for path in draw(self.layers, work)]
            work.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(work, folder)
        except OSError as error:
            raise storage_error(error, folder) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        write_json(checkpoint / FILE, self.document())
        return [checkpoint / FILE, *(folder / name for name in names)]
