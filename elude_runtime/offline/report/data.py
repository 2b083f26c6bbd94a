"""The data of the pages: scripts that each assign to one global, in pieces that a page loads when it needs them.

features   every feature in columns, the first exemplars of each, layers, class names
images     every image that is an exemplar of something
classes    by class: features that raise and lower it, images predicted as it
f-N        features N * CHUNK … in full: facts, exemplars with heat, inputs, near-duplicates
y-L-N      neurons N * CHUNK … of layer L: their exemplars
x-L        inputs of layer L: the first exemplars of each
"""

from __future__ import annotations

import base64
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elude_runtime.errors import CheckpointError
from elude_runtime.offline.report.material import Material

if TYPE_CHECKING:
    from elude_runtime.checkpoint.exemplars import Exemplar

CHUNK = 32  # features a file
CARD = 4  # exemplars of each end on a card
THUMBNAILS = "thumbs"
_ENDS = {"positive": 1, "negative": -1, "": 0}
_ROLES = ("top", "quantile", "random", "near_miss")
_QUANTILES = ("q01", "q05", "q25", "q50", "q75", "q95", "q99")
_NUMBERS = ("share", "std", "density", "stability")


@dataclass
class _Images:
    """Images of the catalogue that the report shows, numbered from 0 as they are first met."""

    place: dict[int, int] = field(default_factory=dict)

    def __getitem__(self, image: int) -> int:
        return self.place.setdefault(image, len(self.place))


class ReportData:
    """Writes a report's `data/` and `thumbs/`. Holds the table and the first exemplars of each feature, and all
    exemplars of one chunk at a time."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.material, self.folder = material, folder
        self.columns: dict[str, list[Any]] = {
            name: material.table[name].to_pylist() for name in material.table.column_names
        }
        self.names: list[str] = self.columns["feature"]
        self.row = {name: i for i, name in enumerate(self.names)}
        self._images = _Images()

    @property
    def images(self) -> int:
        """How many images the report shows."""
        return len(self._images.place)

    def write(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Everything. progress: called with the number of features that were newly written."""
        (self.folder / "data").mkdir()
        cards: list[list[list[int]]] = []
        peaks: list[list[float | None]] = []
        for start in range(0, len(self.names), CHUNK):
            rows = range(start, min(start + CHUNK, len(self.names)))
            found = [self._exemplars(self.names[row]) for row in rows]
            cards += [[_card(exemplars, 1), _card(exemplars, -1)] for exemplars in found]
            peaks += [[_peak(exemplars, 1), _peak(exemplars, -1)] for exemplars in found]
            self._write(f"f-{start // CHUNK}", [self._whole(r, e) for r, e in zip(rows, found, strict=True)])
            progress(len(rows))
        parts = [self._layer_parts(place) for place in range(len(self.material.manifest.layers))]
        self._write("features", self._index(cards, peaks, parts))
        self._write("classes", self._classes())
        self._write("images", self._thumbnails())

    def _exemplars(self, name: str) -> list[list[Any]]:
        """Of a feature, neuron or input: [end, role, image, token, activation, heat, scale] each, by role and rank."""
        exemplars = self.material.exemplars
        if exemplars is None:
            return []
        found = sorted(exemplars.of(name), key=lambda e: (_ROLES.index(e.role), -_ENDS[e.end], e.rank))
        return [self._packed(e) for e in found if e.image in exemplars.images]

    def _packed(self, e: Exemplar) -> list[Any]:
        heat = 0 if e.heat is None else base64.b64encode(e.heat.tobytes()).decode()
        place = self._images[e.image]
        return [_ENDS[e.end], _ROLES.index(e.role), place, e.token, _short(e.activation), heat, _short(e.heat_scale)]

    def _whole(self, row: int, exemplars: list[list[Any]]) -> dict[str, Any]:
        """One feature as its page shows it."""
        at = {name: column[row] for name, column in self.columns.items()}
        found: dict[str, Any] = {
            "mean": _short(at["mean"]),
            "quantiles": [_short(at[q]) for q in _QUANTILES],
            "raises": _effects(at.get("raises")),
            "lowers": _effects(at.get("lowers")),
            "exemplars": exemplars,
        }
        if self.material.exemplars is not None:
            pairs = self.material.exemplars.duplicates(self.names[row])
            found["duplicates"] = [[self.row[name], _short(r)] for name, r in pairs if name in self.row]
            found["inputs"] = [[j, _short(share)] for j, share in self.material.exemplars.inputs(self.names[row])]
        return found

    def _layer_parts(self, place: int) -> dict[str, bool]:
        """Exemplars of a layer's neurons and inputs; whether there are any."""
        entry = self.material.manifest.layers[place]
        suffixes = ("", "c") if entry.prefix else ("",)
        any_neuron = False
        for start in range(0, entry.neurons, CHUNK):
            names = [f"y{k}{s}" for k in range(start, min(start + CHUNK, entry.neurons)) for s in suffixes]
            found = {name: e for name in names if (e := self._exemplars(f"{entry.name}/{name}"))}
            any_neuron = any_neuron or bool(found)
            self._write(f"y-{place}-{start // CHUNK}", found)
        names = [f"x{j}{s}" for j in range(entry.inputs) for s in suffixes]
        inputs = {name: card for name in names if (card := _card(self._exemplars(f"{entry.name}/{name}"), 1))}
        self._write(f"x-{place}", inputs)
        return {"neurons": any_neuron, "inputs": bool(inputs)}

    def _index(
        self, cards: list[list[list[int]]], peaks: list[list[float | None]], parts: list[dict[str, bool]]
    ) -> dict[str, Any]:
        manifest, columns = self.material.manifest, self.columns
        layers = [
            {
                "name": e.name, "grid": e.grid, "prefix": e.prefix, "neurons": e.neurons, "inputs": e.inputs,
                "live": {t.name: t.live for t in e.token_types}, "exemplars": part,
            }
            for e, part in zip(manifest.layers, parts, strict=True)
        ]  # fmt: skip
        place = {entry.name: i for i, entry in enumerate(manifest.layers)}
        return {
            "chunk": CHUNK,
            "layers": layers,
            "classes": manifest.labels if manifest.output == "logits" else None,
            "catalogue": self.material.exemplars is not None,
            "layer": [place[name] for name in columns["layer"]],
            "short": [n[len(layer) + 1 :] for n, layer in zip(self.names, columns["layer"], strict=True)],
            "concept": [self.row.get(name, -1) for name in columns["concept"]],
            "sign": columns["sign"],
            "size": columns["size"],
            "label": _words(columns["label"]),
            "source": _words(columns["label_source"]),
            **{name: list(map(_short, columns[name])) if name in columns else None for name in _NUMBERS},
            "cards": cards,
            "peaks": peaks,
        }

    def _classes(self) -> dict[str, Any]:
        """By class: features in the order of their effect, {class: [row, effect, row, effect, …]}, and images, {class:
        [image, …]}, the surest first. known: whether the table says anything of classes."""
        found: dict[str, Any] = {"known": any(effects is not None for effects in self.columns.get("raises", []))}
        for side in ("raises", "lowers"):
            by_class: dict[int, list[tuple[float, int]]] = defaultdict(list)
            for row, effects in enumerate(self.columns.get(side) or []):
                for effect in effects or []:
                    if effect["effect"] is not None and math.isfinite(effect["effect"]):
                        by_class[effect["class"]].append((effect["effect"], row))
            found[side] = {
                c: [v for effect, row in sorted(pairs, key=lambda p: (-abs(p[0]), p[1])) for v in (row, _short(effect))]
                for c, pairs in sorted(by_class.items())
            }
        images: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for image, place in self._images.place.items():
            for best, probability in self._image(image).predicted[:1]:
                images[best].append((-probability, place))
        found["images"] = {c: [place for _, place in sorted(pairs)] for c, pairs in sorted(images.items())}
        return found

    def _image(self, image: int) -> Any:
        assert self.material.exemplars is not None  # an image is numbered only where there are exemplars
        return self.material.exemplars.images[image]

    def _thumbnails(self) -> dict[str, Any]:
        """Copies the thumbnails of the images that are shown; names, aspects and predictions in columns."""
        (self.folder / THUMBNAILS).mkdir()
        names = without_common_folder([self._image(image).name for image in self._images.place])
        found: dict[str, list[Any]] = {"name": names, "thumb": [], "aspect": [], "predicted": []}
        for image, place in self._images.place.items():
            known = self._image(image)
            x0, y0, x1, y1 = known.window
            found["aspect"].append(_short((x1 - x0) / (y1 - y0)) if x1 > x0 and y1 > y0 else 1)
            found["predicted"].append([[c, _short(p)] for c, p in known.predicted])
            found["thumb"].append(self._copied(known.thumbnail, place))
        return found

    def _copied(self, thumbnail: Path | None, place: int) -> str | None:
        """Its file in the report; None where the catalogue has none, or none any more."""
        if thumbnail is None:
            return None
        name = f"{THUMBNAILS}/{place:06d}.webp"
        try:
            shutil.copyfile(thumbnail, self.folder / name)
        except FileNotFoundError:
            return None
        return name

    def _write(self, name: str, value: Any) -> None:
        write_data(self.folder, name, value)


def without_common_folder(names: Sequence[str]) -> list[str]:
    """File names without the folders that all of them lie in: a report does not tell where its images lay."""
    folders = [name.split("/")[:-1] for name in names]
    depth = 0
    while folders and all(len(f) > depth and f[depth] == folders[0][depth] for f in folders):
        depth += 1
    return ["/".join(name.split("/")[depth:]) for name in names]


def write_data(folder: Path, name: str, value: Any) -> None:
    """`data/NAME.js`: pure ASCII, so that no page can read it in another encoding."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise CheckpointError(f"The checkpoint holds a number that is not finite ({error}); make it again.") from error
    key = json.dumps(name)
    (folder / "data" / f"{name}.js").write_text(f"(window.EludeData=window.EludeData||{{}})[{key}]={text};\n", "ascii")


def _card(exemplars: Sequence[Sequence[Any]], end: int) -> list[int]:
    """[image, token, …] of the first exemplars of one end."""
    first = [e for e in exemplars if e[0] == end and e[1] == 0][:CARD]
    return [value for e in first for value in (e[2], e[3])]


def _peak(exemplars: Sequence[Sequence[Any]], end: int) -> float | None:
    """The activation of the first exemplar of one end."""
    return next((e[4] for e in exemplars if e[0] == end and e[1] == 0), None)


def _effects(effects: Iterable[dict[str, Any]] | None) -> list[list[Any]] | None:
    """[[class, effect], …]; None where the table does not say."""
    return None if effects is None else [[e["class"], _short(e["effect"])] for e in effects]


def _words(column: Sequence[str | None]) -> dict[str, Any]:
    """A column of strings that repeat: each stands in `values` once."""
    values = list(dict.fromkeys(text or "" for text in column))
    code = {value: i for i, value in enumerate(values)}
    return {"values": values, "codes": [code[text or ""] for text in column]}


def _short(value: float | None) -> float | None:
    """Four figures are enough to look at; None where it is no number."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() else rounded
