"""Plots of an evaluation, for print: PNG and SVG, one file a figure, layer and token type."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elude_runtime.errors import EludeError
from elude_runtime.offline.evaluation.estimates import Estimate
from elude_runtime.offline.evaluation.files import plot_stem
from elude_runtime.offline.evaluation.interventions import FRACTIONS
from elude_runtime.offline.evaluation.own_sets import CONCEPTS, CONCEPTS_RANDOM_WEIGHTS, OWN, RANDOM_CONCEPTS, SUBUNITS
from elude_runtime.offline.evaluation.scores import IMG, TOK, SetScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from elude_runtime.offline.evaluation.result import LayerResult

_COLOURS = ("#0b5fa5", "#d9822b", "#5b8c5a", "#8e5ea2")  # told apart in print and by colour-blind readers
_GREY = "#8a8a8a"
_KINDS = ("#d9822b", "#8e5ea2", "#5b8c5a", "#444444", "#b04a5a")
_OF_SET = {
    CONCEPTS: "#0b5fa5", SUBUNITS: "#5aa2d6", RANDOM_CONCEPTS: _GREY, "hidden units": "#444444",
    "k-means directions of x": "#d9822b", "PCA directions of y": "#8e5ea2", "groups of hidden units": "#5b8c5a",
    CONCEPTS_RANDOM_WEIGHTS: "#c0a020",
}  # fmt: skip
_STEERING = {
    "side_effect": "mean |change| of the other logits / drop\n(less is more selective)",
    "drop_per_side_effect": "drop / mean |change| of the other logits\n(more is more selective)",
}
_DASHES = ((0, (3, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_TITLES = {IMG: "img9: most active images", TOK: "tok9: their most active patches"}
_SHORT = {IMG: "img9", TOK: "tok9"}
_FILES: tuple[tuple[str, dict[str, Any]], ...] = (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}}))
_STYLE: dict[Any, Any] = {
    "font.size": 8, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "elude", "axes.linewidth": 0.7,
}  # fmt: skip


def need_matplotlib() -> None:
    """EludeError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EludeError(
            "The plots need matplotlib: pip install 'elude-serving[evaluate]', in a checkout '.[evaluate]'."
        )


def draw(layers: Sequence[LayerResult], folder: Path) -> list[Path]:
    """All plots of an evaluation's layers into a folder; the files. EludeError without matplotlib."""
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    files = []
    with matplotlib.rc_context(_STYLE):
        for result in layers:
            stem = plot_stem(result.layer, result.tokens)
            for name, make in _plots(result):
                figure = Figure(layout="constrained")
                make(figure, result)
                figure.draw_without_rendering()  # lays it out once for both files
                figure.set_layout_engine("none")
                for ending, extra in _FILES:
                    files.append(folder / f"{stem}.{name}.{ending}")
                    figure.savefig(files[-1], **extra)
    return files


def _plots(result: LayerResult) -> Iterator[tuple[str, Callable[[Figure, LayerResult], None]]]:
    yield "clarity", _clarity
    yield "features", _features
    if _coders(result):
        yield "sparse", _sparse
    if any(e.deletion for e in result.effects):
        yield "deletion", _deletion
    if any(e.side for e in result.effects):
        yield "steering", _steering


def _heading(figure: Figure, result: LayerResult, text: str) -> None:
    figure.suptitle(f"{result.layer}, {result.tokens}: {text}", x=0.01, ha="left", fontsize=9)


def _metrics(result: LayerResult) -> list[str]:
    return [m for m in (IMG, TOK) if any(m in j.ceiling for j in result.judges)]


def _clarity(figure: Figure, result: LayerResult) -> None:
    """A row a feature set, a dot and its interval an encoder."""
    metrics = _metrics(result)
    rows = _by_clarity(result)
    figure.set_size_inches(2.4 + 3.1 * len(metrics), 1.3 + 0.2 * len(rows))
    axes = _row_of(figure, len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        for i, judge in enumerate(j for j in result.judges if metric in j.ceiling):
            figures = [s.clarity[judge.name].averages[metric]["weighted"] for s in rows]
            places = np.arange(len(rows)) + (i - (len(result.judges) - 1) / 2) * 0.28
            _dots(axis, places, figures, _COLOURS[i % len(_COLOURS)], judge.name)
        axis.axvline(0, color=_GREY, lw=0.6, zorder=0)
        ceilings = ", ".join(f"{j.name} {j.ceiling[metric]:.2f}" for j in result.judges if metric in j.ceiling)
        axis.set_xlabel(f"mean pairwise cosine\n(ceiling: {ceilings})", fontsize=7)
        axis.set_title(_TITLES[metric])
        _rows(axis, rows, names=axis is axes[0])
    _legend(figure, axes[0], len(result.judges))
    _heading(figure, result, "clarity, weighted by share of variance over both ends; 95 % intervals")


def _rows(axis: Axes, rows: Sequence[SetScores], names: bool) -> None:
    axis.set_yticks(range(len(rows)), [f"{s.name}  ({len(s.set.share)})" for s in rows] if names else [])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    for i, one in enumerate(rows):
        if one.name in OWN:
            axis.axhspan(i - 0.5, i + 0.5, color="#eef3f8", zorder=-2)
            if names:
                axis.get_yticklabels()[i].set_fontweight("bold")


def _by_clarity(result: LayerResult) -> list[SetScores]:
    first = result.judges[0].name
    return sorted(result.sets, key=lambda s: -np.nan_to_num(s.clarity[first].averages[IMG]["weighted"].value, nan=-1))


def _dots(axis: Axes, places: Any, figures: Sequence[Estimate], colour: str, label: str) -> None:
    values = np.array([f.value for f in figures])
    low, high = np.array([f.interval for f in figures]).T
    axis.hlines(places, low, high, color=colour, lw=1.1)
    axis.plot(values, places, "o", color=colour, ms=3.2, label=label, mec="white", mew=0.4)


def _features(figure: Figure, result: LayerResult) -> None:
    """How the features of the main sets are distributed: cumulative, both ends."""
    judge = result.judges[0]
    metrics = [m for m in _metrics(result) if m in judge.ceiling]
    figure.set_size_inches(_width(metrics), 3.1)
    axes = _row_of(figure, len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        for i, one in enumerate(_main_sets(result)):
            values = one.clarity[judge.name].features[metric].flatten().numpy()
            values = np.sort(values[np.isfinite(values)])
            if len(values):
                left, own = 1 - np.arange(len(values)) / len(values), one.name in OWN
                axis.step(
                    values, left, where="post", label=one.name, lw=1.6 if own else 1, color=_colour(one.name),
                    ls="-" if own else _DASHES[i % len(_DASHES)],
                )  # fmt: skip
        axis.axvline(judge.chance.get(metric, 0.0), color=_GREY, lw=0.5)
        axis.set_title(_SHORT[metric])
        axis.set_xlabel(f"mean pairwise cosine ({judge.name})")
        axis.set_ylim(0, 1.01)
    axes[0].set_ylabel("part of ends at least as clear")
    _legend(figure, axes[0], 3 if len(metrics) > 1 else 2)
    _heading(figure, result, "distribution over features, both ends")


def _main_sets(result: LayerResult) -> list[SetScores]:
    """The checkpoint's own and the best known others, few enough to be told apart."""
    wanted = [*OWN, RANDOM_CONCEPTS, CONCEPTS_RANDOM_WEIGHTS, "hidden units", "k-means directions of x"]
    found = [s for name in wanted if (s := result.named(name))]
    return found + [s for s in _by_clarity(result) if s in _coders(result)][:1]


def _coders(result: LayerResult) -> list[SetScores]:
    return [s for s in result.sets if "latents" in s.set.facts]


def _sparse(figure: Figure, result: LayerResult) -> None:
    """Sparse coders: what they lose against how clear they are; what loses nothing stands at 0."""
    judge = result.judges[0]
    metrics = [m for m in _metrics(result) if m in judge.ceiling]
    coders = _coders(result)
    kinds = list(dict.fromkeys(_kind(s) for s in coders))
    sizes = list(dict.fromkeys(s.set.facts["latents"] for s in coders))
    axes = _row_of(figure, len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        for kind, size in ((k, s) for k in kinds for s in sizes):
            group = [s for s in coders if (_kind(s), s.set.facts["latents"]) == (kind, size)]
            group.sort(key=lambda s: s.set.facts["fvu_output"])
            style: dict[str, Any] = {
                "color": _KINDS[kinds.index(kind) % len(_KINDS)], "marker": "os^Dv"[sizes.index(size) % 5],
                "mfc": "white" if sizes.index(size) % 2 else None, "label": f"{kind}, {size} latents",
            }  # fmt: skip
            _curve(axis, [s.set.facts["fvu_output"] for s in group], _weighted(group, judge.name, metric), style)
            for one in group:
                place = one.set.facts["fvu_output"], one.clarity[judge.name].averages[metric]["weighted"].value
                text = f"{one.set.facts['k']}"
                axis.annotate(text, place, fontsize=5, xytext=(3, 2), textcoords="offset points")
        for name, marker in ((CONCEPTS, "*"), (SUBUNITS, "P"), ("hidden units", "X")):
            lossless = result.named(name)
            if lossless is not None:
                style = {"color": _colour(name), "marker": marker, "ms": 7, "label": f"{name} (lossless)"}
                _curve(axis, [0.0], _weighted([lossless], judge.name, metric), style)
        axis.set_title(_SHORT[metric])
        axis.set_xlabel("part of the output's variance lost (FVU)")
        axis.set_xlim(left=-0.03)
    axes[0].set_ylabel(f"mean pairwise cosine\n({judge.name})")
    columns = 3 if len(metrics) > 1 else 2
    labels = _legend(figure, axes[0], columns)
    figure.set_size_inches(_width(metrics), 3.2 + 0.14 * -(-labels // columns))
    _heading(figure, result, "sparse coders, each with its number of active latents")


def _weighted(sets: Sequence[SetScores], judge: str, metric: str) -> list[Estimate]:
    return [s.clarity[judge].averages[metric]["weighted"] for s in sets]


def _curve(axis: Axes, x: Sequence[float], figures: Sequence[Estimate], style: dict[str, Any]) -> None:
    if figures:
        low, high = np.array([f.interval for f in figures]).T
        axis.vlines(x, low, high, color=style["color"], lw=0.7, alpha=0.6)
        axis.plot(x, [f.value for f in figures], **{"ms": 3.5, "lw": 0.8, **style})


def _kind(one: SetScores) -> str:
    facts = one.set.facts
    same = facts["reads"] == facts["writes"]
    return f"{facts['kind']} SAE on {facts['reads']}" if same else f"{facts['kind']} transcoder"


def _deletion(figure: Figure, result: LayerResult) -> None:
    """What is left of the target as features are taken out, and as they are put in."""
    figure.set_size_inches(7, 3.3)
    left, right = _row_of(figure, 2)
    shown = [e for e in result.effects if e.deletion]
    for effects in shown:
        areas = [np.median(effects.areas()[name]) for name in ("deletion", "insertion")]
        for axis, curves in ((left, effects.deletion), (right, effects.insertion)):
            axis.plot(
                FRACTIONS, np.mean(curves, axis=0), label=f"{effects.name} ({areas[0]:.2f}, {areas[1]:.2f})",
                lw=1.6 if effects.name == CONCEPTS else 1, marker=".", ms=3, color=_colour(effects.name),
            )  # fmt: skip
    left.set_title("deletion")
    right.set_title("insertion")
    _legend(figure, left, 2)
    for axis in (left, right):
        axis.set_xlabel("part of the features, in the order of attribution")
        axis.axhline(0, color=_GREY, lw=0.5)
    left.set_ylabel("target, of value - baseline")
    images = len(shown[0].deletion)
    _heading(figure, result, f"what carries the prediction, mean of {images} images (median area of each curve)")


def _steering(figure: Figure, result: LayerResult) -> None:
    shown = [e for e in result.effects if e.side]
    figure.set_size_inches(7, 1.1 + 0.22 * len(shown))
    axes = _row_of(figure, 2)
    titles = {"side_effect": "at equal drop of the target", "drop_per_side_effect": "at equal norm of the change"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        figures = [e.figures(1000, 0)[key] for e in shown]
        for i, (effects, one) in enumerate(zip(shown, figures, strict=True)):
            _dots(axis, np.array([i]), [one], _colour(effects.name), "")
        axis.set_yticks(range(len(shown)), [e.name for e in shown] if axis is axes[0] else [""] * len(shown))
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(shown) - 0.5, -0.5)
        axis.set_title(title)
        axis.set_xlabel(_STEERING[key], fontsize=7)
    _heading(figure, result, f"steering against the top class, median of {len(shown[0].side)} images, 95 % intervals")


def _colour(name: str) -> str:
    """One colour a feature set in all figures; all sparse coders share one."""
    return _OF_SET.get(name, "#b04a5a")


def _width(panels: Sequence[str]) -> float:
    """Inches: a single panel leaves room for the heading."""
    return max(4.8, 3.3 * len(panels) + 0.4)


def _legend(figure: Figure, axis: Axes, columns: int) -> int:
    """One legend for a row of panels, below them; the number of its entries."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=6.5)
    return len(labels)


def _row_of(figure: Figure, count: int) -> list[Axes]:
    return list(np.atleast_1d(np.array(figure.subplots(1, count), dtype=object)))
