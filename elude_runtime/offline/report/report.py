"""Writes a report: data, thumbnails, plots and pages, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elude_runtime.analysis.features import CONCEPT
from elude_runtime.checkpoint.manifest import Manifest
from elude_runtime.checkpoint.storage import new_directory
from elude_runtime.offline.evaluation.files import FOLDER
from elude_runtime.offline.report.data import ReportData
from elude_runtime.offline.report.evaluated import EvaluationFound
from elude_runtime.offline.report.hero import hero
from elude_runtime.offline.report.material import Material, read_material
from elude_runtime.offline.report.pages import OVERVIEW, Shell, copy_assets, day, render

MARKER = "assets/theme.js"  # what tells a report from other folders


@dataclass(frozen=True)
class Written:
    """What was written. megabytes: all files; problem: why there are no exemplars, where there are none."""

    page: Path
    features: int
    images: int
    megabytes: float
    problem: str


def write_report(
    checkpoint: Path,
    out: Path,
    *,
    evaluation: Path | None = None,
    force: bool = False,
    explorer: bool = False,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Written:
    """Make a folder of static pages of a checkpoint; opens from `index.html`.

    evaluation: the folder that `elude evaluate` wrote to, the checkpoint by default; force: replace an older report;
    explorer: link the pages to `explore.html`, which the live explorer adds. CheckpointError for a checkpoint that
    cannot be read; StorageError where `out` is there already, or the disk refuses. A checkpoint without catalogue,
    certificate or evaluation gives a report that says so.
    """
    material = read_material(checkpoint, evaluation)
    report = progress or (lambda *_: None)
    with new_directory(out, force=force, known_by=MARKER, what="a report") as folder:
        data = ReportData(material, folder)
        data.write(lambda done: report("features", done, len(data.names)))
        plots = _copy_plots(material.evaluation, folder)
        copy_assets(folder)
        shell = shell_of(material.manifest, explorer=explorer)
        for name, text in render(shell, contents(material, plots)):
            (folder / name).write_text(text, encoding="utf-8", errors="replace")
        megabytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    return Written(out / OVERVIEW, len(data.names), data.images, megabytes, material.no_exemplars)


def shell_of(manifest: Manifest, *, explorer: bool = False) -> Shell:
    """The frame of a checkpoint's pages; explorer: as the live explorer serves them."""
    shell = Shell(manifest.model.name, manifest.checkpoint_sha256, _made())
    if not explorer:
        return shell
    note = "These pages talk to their own address and to no other."
    pages = (*shell.pages, ("explore.html", "Explore"))
    return replace(shell, explorer=True, connect="'self'", pages=pages, note=note)


def contents(material: Material, plots: list[list[dict[str, str]]]) -> dict[str, Any]:
    """What the templates say about a checkpoint."""
    manifest, table = material.manifest, material.table
    kinds, names = table["kind"].to_pylist(), table["feature"].to_pylist()
    numbered = [kind for kind, name in zip(kinds, names, strict=True) if not name.endswith("rest")]
    return {
        "checkpoint": material.name,
        "layers": manifest.layers,
        "counts": {
            "neurons": sum(entry.neurons for entry in manifest.layers),
            "subunits": len(numbered) - numbered.count(CONCEPT),
            "concepts": numbered.count(CONCEPT),
            "labelled": sum(bool(label) for label in table["label"].to_pylist()),
        },
        "calibration": manifest.calibration,
        "digests": {"base": manifest.base_sha256, "partition": manifest.partition_sha256},
        "certificate": material.certificate,
        "evaluation": material.evaluation,
        "plots": plots,
        "hero": hero(material),
        "has_catalogue": material.exemplars is not None,
        "no_catalogue": material.no_exemplars,
    }


def _copy_plots(found: EvaluationFound, folder: Path) -> list[list[dict[str, str]]]:
    """The plots of each evaluated layer in the report: file and alternative text."""
    if any(layer.plots for layer in found.layers):
        (folder / FOLDER).mkdir()
    copied: list[list[dict[str, str]]] = []
    for layer in found.layers:
        copied.append([])
        for path in layer.plots:
            shutil.copyfile(path, folder / FOLDER / path.name)
            name = path.stem.rpartition(".")[2]
            copied[-1].append({"file": f"{FOLDER}/{path.name}", "alt": f"{name} in {layer.layer}, {layer.tokens}"})
    return copied


def _made() -> str:
    return f"report made {day(datetime.now(UTC).isoformat()).partition(',')[0]}"
