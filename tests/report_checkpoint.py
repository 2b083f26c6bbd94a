"""A checkpoint with a catalogue, generated: everything that a report reads, at any size, in a second."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from elude_runtime.checkpoint.exemplars import CATALOGUE_JSON, EXEMPLARS_TABLE, IMAGES_TABLE, LINKS_TABLE, THUMBS
from elude_runtime.checkpoint.manifest import (
    AttributionEntry,
    Calibration,
    LayerEntry,
    Manifest,
    ModelSource,
    TokenTypeEntry,
)
from elude_runtime.checkpoint.storage import write_manifest
from elude_runtime.offline.feature_table import SCHEMA, TABLE

LAYER = "blocks.1.mlp.fc2"
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
TYPES = ("patches", "cls")
LETTERS = "pc"


@dataclass(frozen=True)
class Made:
    """What to generate. names: files of the images, as many as `images` unless given; real: pictures to cut thumbnails
    from, instead of generated ones."""

    layer: str = LAYER
    neurons: int = 8
    subunits: int = 4
    concepts: int = 6
    inputs: int = 32
    grid: tuple[int, int] | None = (4, 4)
    prefix: int = 1
    images: int = 24
    classes: tuple[str, ...] = ("tabby", "tiger shark", HOSTILE, "Škoda & Söhne")
    neuron_exemplars: bool = True
    real: tuple[Path, ...] = ()
    seed: int = 0


def checkpoint(folder: Path, made: Made = Made(), *, catalogue: bool = True) -> Path:
    """Writes a checkpoint directory (without its tensors) and, unless told not to, its catalogue."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(made.seed)
    manifest = _manifest(made)
    write_manifest(folder, manifest)
    table = _table(made, rng)
    pq.write_table(table, folder / TABLE)
    if catalogue:
        _catalogue(folder, made, manifest, table, rng)
    return folder


def certificate(folder: Path, *, holds: bool = True, sha256: str = "") -> None:
    """`verification.json` of the checkpoint, or of another one."""
    manifest = Manifest.model_validate_json((folder / "elude.json").read_text())
    checks = [
        {"name": "tensors", "holds": True, "detail": "All 314 base tensors are byte-identical.", "figures": {}},
        {"name": "logits", "holds": holds, "detail": "The outputs of 24 images are bit-equal.", "figures": {}},
        {"name": "means", "holds": None, "detail": "Not recomputed.", "figures": {}},
    ]
    document = {
        "holds": holds, "made": "2026-01-02T03:04:05+00:00", "checks": checks, "images": 24,
        "checkpoint_sha256": sha256 or manifest.checkpoint_sha256, "environment": {"torch": "2", "threads": 2},
    }  # fmt: skip
    (folder / "verification.json").write_text(json.dumps(document))


def evaluation(folder: Path, *, sha256: str = "") -> None:
    """`evaluation.json` and one plot."""
    manifest = Manifest.model_validate_json((folder / "elude.json").read_text())
    value = {"value": 0.12, "low": 0.1, "high": 0.15}
    clarity = {"resnet50": {m: {"weighted": value, "chance": 0.01, "ceiling": 0.5} for m in ("img9", "tok9")}}
    sets = [
        {
            "name": name, "features": 6, "lossless": name != "SAE", "live": 1.0, "near_duplicates": 0.1,
            "top1_kept": None if name == "concepts" else value, "share_of_variance": 1.0, "clarity": clarity,
            "facts": {"fvu_output": 0.25} if name == "SAE" else {},
        }
        for name in ("concepts", "hidden units", "SAE")
    ]  # fmt: skip
    layer = {
        "layer": manifest.layers[0].name, "tokens": "patches", "calibration_tokens": 1000, "sets": sets,
        "encoders": {"resnet50": {"img9": {"chance": 0.01, "ceiling": 0.5}, "tok9": {"chance": 0.01, "ceiling": 0.5}}},
        "comparisons": [
            {"set": "concepts", "against": "hidden units", "encoder": "resnet50", "metric": "img9", "ratio": 1.5,
             "difference": {"value": 0.02, "low": 0.01, "high": 0.03}, "verdict": "clearer"}
        ],
    }  # fmt: skip
    document = {
        "statement": "On 24 images:\nconcepts are clearer.\nThis says nothing about other images.", "warnings": [],
        "images": {"scored": 24}, "encoders": [{"name": "resnet50"}], "layers": [layer],
        "checkpoint": {"checkpoint_sha256": sha256 or manifest.checkpoint_sha256},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(document))
    (folder / "evaluation").mkdir(exist_ok=True)
    plot = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><rect width="40" height="20" fill="#fff"/></svg>'
    )
    (folder / "evaluation" / f"{manifest.layers[0].name}.patches.clarity.svg").write_text(plot)


def relabelled(folder: Path, labels: dict[str, str]) -> None:
    """Labels of features, as a user gave them."""
    table = pq.read_table(folder / TABLE)
    for column, value in (("label", None), ("label_source", "user")):
        old = table[column].to_pylist()
        new = [
            (value or labels[n]) if n in labels else o for n, o in zip(table["feature"].to_pylist(), old, strict=True)
        ]
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(place), pa.array(new, pa.string()))
    pq.write_table(table, folder / TABLE)


def _types(made: Made) -> int:
    return 2 if made.prefix else 1


def _manifest(made: Made) -> Manifest:
    patches = made.grid[0] * made.grid[1] if made.grid else 16
    types = [TokenTypeEntry(name=TYPES[t], live=True, concepts=made.concepts, tokens=500) for t in range(_types(made))]
    layer = LayerEntry(
        name=made.layer, kind="linear", neurons=made.neurons, inputs=made.inputs, kernel=[], groups=1,
        subunits=made.subunits, total=patches + made.prefix, prefix=made.prefix,
        grid=list(made.grid) if made.grid else None, token_types=types, follows="added to the stream",
        attribution=AttributionEntry(auto="gradient", completeness={"gradient": 0.01}, images=4),
    )  # fmt: skip
    return Manifest(
        format_version=1, elude_version="0.1.0", model=ModelSource(kind="timm", name="vit_made_up"), output="logits",
        data_config={"input_size": [3, 224, 224]}, labels=list(made.classes), layers=[layer],
        method={"partition": "sign-split", "subunits": made.subunits, "concepts": made.concepts}, seed=0, threads=2,
        versions={"torch": "2", "timm": "1"}, calibration=Calibration(images=made.images, sha256="c" * 64),
        base_sha256="a" * 64, partition_sha256="b" * 64,
    )  # fmt: skip


def _table(made: Made, rng: np.random.Generator) -> pa.Table:
    """Concepts, then sub-units, of each token type; every neuron's `rest` is dead."""
    rows = []
    for t in range(_types(made)):
        upper, lower = LETTERS[t].upper(), LETTERS[t]
        share = np.sort(rng.dirichlet(np.ones(made.concepts)))[::-1]
        for c in [*range(made.concepts), "rest"]:
            name = f"{made.layer}/{upper}{c}"
            part = 0.0 if c == "rest" else float(share[c])
            rows.append(_row(made, rng, name, "concept", t, None, None, name, part))
        part = rng.dirichlet(np.ones(made.neurons * made.subunits))
        for k in range(made.neurons):
            for m in [*range(made.subunits), "rest"]:
                joins = "rest" if m == "rest" else int(rng.integers(made.concepts))
                carried = 0.0 if m == "rest" else float(part[k * made.subunits + m])
                rows.append(
                    _row(
                        made, rng, f"{made.layer}/{k}/{lower}{m}", "subunit", t, k, None if m == "rest" else m,
                        f"{made.layer}/{upper}{joins}", carried,
                    )
                )  # fmt: skip
    effect = pa.list_(pa.struct([("class", pa.int32()), ("effect", pa.float32())]))
    more = [("stability", pa.float32()), ("raises", effect), ("lowers", effect)]
    schema = SCHEMA
    for name, kind in more:
        if name not in schema.names:
            schema = schema.append(pa.field(name, kind))
    return pa.Table.from_pylist(rows, schema=schema)


def _row(
    made: Made, rng: np.random.Generator, name: str, kind: str, t: int, neuron: int | None, m: int | None,
    concept: str, share: float,
) -> dict[str, Any]:  # fmt: skip
    dead = name.endswith("rest")
    spread = 0.0 if dead else float(rng.uniform(0.1, 1.0))
    levels = np.sort(rng.normal(0, spread, 16)) if spread else np.zeros(16)
    words = ("striped fur", "sky above water", "wheels", "feathers, grass", "text on white", "")
    label = "" if dead else str(rng.choice(words))
    picked = rng.permutation(len(made.classes))
    effects = [[{"class": int(c), "effect": s * float(rng.uniform(0, 1))} for c in picked[:5]] for s in (1, -1)]
    return {
        "feature": name, "kind": kind, "layer": made.layer, "token_type": TYPES[t], "neuron": neuron, "subunit": m,
        "concept": concept, "sign": -1 if m is not None and m % 2 else 1,
        "size": int(rng.integers(1, 90)), "label": label,
        "label_source": "automatic" if label else "", "mean": 0.0, "std": spread, "density": 0.0 if dead else 0.04,
        **dict(zip(("q01", "q05", "q25", "q50", "q75", "q95", "q99"), map(float, levels[:7]), strict=True)),
        "drift_edges": [float(v) for v in levels[7:]], "share": share,
        "stability": None if dead else float(rng.uniform(0.2, 1)),
        "raises": None if dead else effects[0], "lowers": None if dead else effects[1],
    }  # fmt: skip


def _catalogue(folder: Path, made: Made, manifest: Manifest, table: pa.Table, rng: np.random.Generator) -> None:
    exemplars = folder / "exemplars"
    (exemplars / THUMBS).mkdir(parents=True)
    _images(exemplars, made, rng)
    rows: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    names = table["feature"].to_pylist()
    for name, kind in zip(names, table["token_type"].to_pylist(), strict=True):
        if name.endswith("rest"):
            continue
        rows += _exemplars(made, rng, name, kind == "cls", ("top", "quantile", "random", "near_miss"))
        others = [n for n in names if n != name and n.count("/") == name.count("/") and not n.endswith("rest")]
        links += [{"feature": name, "kind": "duplicate", "rank": i, "other": o, "value": 0.9 - 0.1 * i}
                  for i, o in enumerate(others[:3])]  # fmt: skip
        if name.count("/") == 2:
            links += [{"feature": name, "kind": "input", "rank": i, "other": str(j), "value": 0.3 / (i + 1)}
                      for i, j in enumerate(rng.permutation(made.inputs)[:8].tolist())]  # fmt: skip
    for j in range(made.inputs):
        rows += [e for e in _exemplars(made, rng, f"{made.layer}/x{j}", False, ("top",)) if e["end"] == "positive"]
    for k in range(made.neurons if made.neuron_exemplars else 0):
        for suffix in ("", "c")[: _types(made)]:
            rows += _exemplars(made, rng, f"{made.layer}/y{k}{suffix}", suffix == "c", ("top",))
    pq.write_table(pa.Table.from_pylist(rows, schema=_EXEMPLAR), exemplars / EXEMPLARS_TABLE)
    pq.write_table(pa.Table.from_pylist(links, schema=_LINK), exemplars / LINKS_TABLE)
    facts = {
        "format_version": 1, "checkpoint_sha256": manifest.checkpoint_sha256,
        "partition_sha256": manifest.partition_sha256, "made": "2026-01-02T03:04:05+00:00", "settings": {},
        "images": {"read": made.images, "skipped": [{"file": "broken.jpg", "reason": "it does not decode"}]},
        "layers": [{"name": made.layer, "grid": made.grid, "prefix": made.prefix, "token_types": list(TYPES),
                    "units": "output"}],
    }  # fmt: skip
    (exemplars / CATALOGUE_JSON).write_text(json.dumps(facts))


_EXEMPLAR = pa.schema(
    [
        ("feature", pa.string()), ("end", pa.string()), ("role", pa.string()), ("rank", pa.int32()),
        ("image", pa.int32()), ("token", pa.int32()), ("activation", pa.float32()), ("heat", pa.binary()),
        ("heat_scale", pa.float32()),
    ]
)  # fmt: skip
_LINK = pa.schema(
    [
        ("feature", pa.string()), ("kind", pa.string()), ("rank", pa.int32()), ("other", pa.string()),
        ("value", pa.float32()),
    ]
)  # fmt: skip


def _exemplars(
    made: Made, rng: np.random.Generator, name: str, prefix: bool, roles: tuple[str, ...]
) -> list[dict[str, Any]]:
    counts = {"top": 9, "quantile": 5, "random": 4, "near_miss": 4}
    rows = []
    for role in roles:
        for end in ("",) if role == "random" else ("positive", "negative"):
            chosen = rng.permutation(made.images)[: counts[role]]
            for rank, image in enumerate(chosen.tolist()):
                sign = -1 if end == "negative" else 1
                size = sign * float(rng.uniform(2, 3) if role == "top" else rng.uniform(0, 2)) * (1 - rank / 20)
                rows.append(
                    {"feature": name, "end": end, "role": role, "rank": rank, "image": image}
                    | _at(made, rng, prefix, size)
                )
    return rows


def _at(made: Made, rng: np.random.Generator, prefix: bool, size: float) -> dict[str, Any]:
    """A peak somewhere with heat around it."""
    if prefix or made.grid is None:
        return {"token": 0 if prefix else made.prefix, "activation": size, "heat": None, "heat_scale": 0.0}
    rows, columns = made.grid
    r, c = int(rng.integers(rows)), int(rng.integers(columns))
    y, x = np.mgrid[:rows, :columns]
    heat = np.exp(-((y - r) ** 2 + (x - c) ** 2) / max(1.0, rows / 3)) * size + rng.normal(0, 0.15, (rows, columns))
    heat[r, c] = size
    scale = float(np.abs(heat).max())
    return {
        "token": made.prefix + r * columns + c, "activation": size, "heat_scale": scale,
        "heat": np.round(heat / scale * 127).astype(np.int8).tobytes(),
    }  # fmt: skip


def _images(exemplars: Path, made: Made, rng: np.random.Generator) -> None:
    rows = []
    for i in range(made.images):
        thumb = f"{i:06d}.webp"
        if made.real:
            picture = Image.open(made.real[i % len(made.real)]).convert("RGB")
            side = min(picture.size) * 0.875
            left, top = (picture.width - side) / 2, (picture.height - side) / 2
            size, name = picture.size, made.real[i % len(made.real)].name
            window = (left, top, left + side, top + side)
            picture = picture.resize((160, 160), box=window)
        else:
            size, window = (300, 260), (20.0, 0.0, 280.0, 260.0)
            name = HOSTILE + ".png" if i == 1 else f"folder/image {i} & more.png"
            picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((96, 96))
        picture.save(exemplars / THUMBS / thumb, "WEBP", quality=75)
        best = rng.permutation(len(made.classes))[:3].tolist()
        rows.append(
            {
                "image": i, "name": name, "sha256": f"{i:032x}", "width": size[0], "height": size[1],
                "window": list(window), "thumbnail": thumb,
                "predicted": [{"class": c, "probability": p} for c, p in zip(best, (0.7, 0.2, 0.1), strict=False)],
            }
        )  # fmt: skip
    predicted = pa.list_(pa.struct([("class", pa.int32()), ("probability", pa.float32())]))
    schema = pa.schema(
        [
            ("image", pa.int32()), ("name", pa.string()), ("sha256", pa.string()), ("width", pa.int32()),
            ("height", pa.int32()), ("window", pa.list_(pa.float32())), ("thumbnail", pa.string()),
            ("predicted", predicted),
        ]
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), exemplars / IMAGES_TABLE)
