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
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.report.data import ReportData
from elude_runtime.offline.report.material import EvaluationFound, Material, read_material
from elude_runtime.offline.report.pages import OVERVIEW, Shell, copy_assets, render

MARKER = "assets/theme.js"  # what tells a report from other folders
_PLOTS = "evaluation"


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
            (folder / name).write_text(text, encoding="utf-8")
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


def contents(material: Material, plots: list[dict[str, str]]) -> dict[str, Any]:
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
        "evaluation": _in_order(material.evaluation),
        "plots": plots,
        "hero": hero(material),
        "has_catalogue": material.exemplars is not None,
        "no_catalogue": material.no_exemplars,
    }


def hero(material: Material) -> dict[str, Any] | None:
    """The neuron that shows best what a split does: of those whose sub-units join the most concepts and carry the most
    different labels, the one of the largest variance. None without exemplars, or where no neuron falls into parts."""
    if material.exemplars is None:
        return None
    place = {entry.name: i for i, entry in enumerate(material.manifest.layers)}
    live = {(e.name, t.name) for e in material.manifest.layers for t in e.token_types if t.live}
    columns = ("layer", "token_type", "neuron", "concept", "label", "std", "feature")
    found: dict[tuple[str, str, int], list[tuple[str, str, float]]] = {}
    for layer, tokens, neuron, concept, label, std, name in zip(
        *(material.table[c].to_pylist() for c in columns), strict=True
    ):
        if neuron is not None and std > 0 and (layer, tokens) in live and not name.endswith("rest"):
            found.setdefault((layer, tokens, neuron), []).append((concept, label or "", std))

    def merit(parts: list[tuple[str, str, float]]) -> tuple[int, int, float]:
        labels = {label for _, label, _ in parts if label}
        return len(labels), len({concept for concept, _, _ in parts}), sum(std**2 for _, _, std in parts)

    patches_first = sorted(found, key=lambda key: TYPE_NAMES.index(key[1]))
    several = [key for key in patches_first if len(found[key]) > 1]
    if not several:
        return None
    layer, tokens, neuron = max(several, key=lambda key: (key[1] == TYPE_NAMES[0], *merit(found[key])))
    return {"layer": place[layer], "tokens": tokens, "neuron": neuron}


def _in_order(found: EvaluationFound) -> EvaluationFound:
    """Sets with the clearest first, as `elude evaluate` prints them."""
    if found.document is None:
        return found
    for layer in found.document["layers"]:
        judge = next(iter(layer["encoders"]), None)
        for one in layer["sets"]:
            figure = one["clarity"].get(judge, {}).get("img9", {}).get("weighted", {}).get("value")
            one["order"] = -(figure if figure is not None else -1.0)
    return found


def _copy_plots(found: EvaluationFound, folder: Path) -> list[dict[str, str]]:
    if not found.plots:
        return []
    (folder / _PLOTS).mkdir()
    plots = []
    for path in found.plots:
        shutil.copyfile(path, folder / _PLOTS / path.name)
        plots.append({"file": f"{_PLOTS}/{path.name}", "alt": " ".join(path.stem.rsplit(".", 2)[::-1])})
    return plots


def _made() -> str:
    return f"report made {datetime.now(UTC):%-d %B %Y}"
