"""`evaluation.json` beside a checkpoint, as the report's tables."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elude_runtime.offline.evaluation.files import FILE, FOLDER, plot_stem

_FIRST = "img9"  # the metric that orders the sets, as `elude evaluate` prints them


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval; None where it is not known."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, estimate: Mapping[str, Any] | None) -> Figure:
        return cls(*(_number(estimate[key]) for key in ("value", "low", "high"))) if estimate else cls(None)


@dataclass(frozen=True)
class EvaluatedSet:
    """One set of features. lossless: `yes`, or what is lost; figures: clarity, by the layer's headings; kept: how often
    the top class stays with the features' sum in the layer's place."""

    name: str
    features: int
    lossless: str
    live: float
    duplicates: float
    figures: list[Figure]
    kept: Figure


@dataclass(frozen=True)
class EvaluatedLayer:
    """One layer and token type. headings: encoder and metric of each figure of clarity; plots: files."""

    layer: str
    tokens: str
    headings: list[str]
    sets: list[EvaluatedSet]
    plots: list[Path]


@dataclass(frozen=True)
class EvaluationFound:
    """problem: a sentence, where there is a file that cannot be shown; without statement and problem there is none."""

    statement: str = ""
    warnings: list[str] = field(default_factory=list)
    layers: list[EvaluatedLayer] = field(default_factory=list)
    problem: str = ""


def read_evaluation(folder: Path, checkpoint_sha256: str) -> EvaluationFound:
    """The evaluation of the checkpoint with this digest in a folder, whatever state it is in."""
    try:
        document = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if document["checkpoint"]["checkpoint_sha256"] != checkpoint_sha256:
            return EvaluationFound(problem=f"{FILE} belongs to another checkpoint.")
        layers = [_layer(layer, folder / FOLDER) for layer in document["layers"]]
        return EvaluationFound(str(document["statement"]), [str(w) for w in document["warnings"]], layers)
    except FileNotFoundError:
        return EvaluationFound()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return EvaluationFound(problem=f"{FILE} is damaged; evaluate again.")


def _layer(layer: Mapping[str, Any], folder: Path) -> EvaluatedLayer:
    name, tokens = str(layer["layer"]), str(layer["tokens"])
    columns = [(judge, metric) for judge, metrics in layer["encoders"].items() for metric in metrics]
    sets = sorted(layer["sets"], key=lambda one: _order(one, columns))
    plots = sorted(folder.glob(f"{glob.escape(plot_stem(name, tokens))}.*.svg"))
    return EvaluatedLayer(name, tokens, [" ".join(c) for c in columns], [_set(one, columns) for one in sets], plots)


def _order(one: Mapping[str, Any], columns: list[tuple[str, str]]) -> float:
    """The clearest to the first encoder first."""
    judge = columns[0][0] if columns else ""
    value = Figure.of(one["clarity"].get(judge, {}).get(_FIRST, {}).get("weighted")).value
    return 1.0 if value is None else -value


def _set(one: Mapping[str, Any], columns: list[tuple[str, str]]) -> EvaluatedSet:
    lost = one["facts"].get("fvu_output")
    lossless = "yes" if one["lossless"] else "no" if lost is None else f"FVU {lost:.2f}"
    return EvaluatedSet(
        str(one["name"]), int(one["features"]), lossless,
        float(one["live"]), float(one["near_duplicates"]),
        [Figure.of(one["clarity"][judge][metric]["weighted"]) for judge, metric in columns],
        Figure.of(one["top1_kept"]),
    )  # fmt: skip


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
