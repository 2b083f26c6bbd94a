"""One feature for `elude inspect`: what the calibration and the catalogue say of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from elude_runtime.cli.progress import console as errors
from elude_runtime.cli.progress import printer
from elude_runtime.errors import CheckpointError, FeatureError, did_you_mean

if TYPE_CHECKING:
    from elude_runtime.checkpoint.exemplars import Exemplars

_FALLS = ", falls as the concept rises"
_SHOWN = {"top": 5, "near_miss": 2}  # exemplars in text; others are in --json
_MEMBERS = 10


def show_feature(
    checkpoint: Path, name: str, rows: Sequence[dict[str, Any]], classes: Sequence[str], as_json: bool
) -> None:
    """Print it. rows: of the feature table; classes: their names. FeatureError when there is none of that name."""
    by_name = {r["feature"]: r for r in rows}
    if name not in by_name:
        raise FeatureError(f"The checkpoint has no feature {name!r}.{did_you_mean(name, by_name)}")
    row = by_name[name]
    members = [r for r in rows if r["kind"] == "subunit" and r["concept"] == name] if row["kind"] == "concept" else []
    members.sort(key=lambda r: -r["share"])
    siblings = [
        r for r in rows if row["kind"] == r["kind"] == "subunit" and _neuron_of(r) == _neuron_of(row) and r is not row
    ]
    found, note = _Found(), ""
    try:
        found = _Found.of(checkpoint, name)
    except CheckpointError as error:
        note = str(error)
    if as_json:
        document = {
            **row,
            "members": _names(members),
            "falling_members": _names([m for m in members if m["sign"] < 0]),
            "siblings": _names(siblings),
            **found.document(),
            "note": note or None,
        }
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    console = printer()
    _print_facts(console, row, members)
    if siblings:
        labels = (f" ({escape(r['label'])})" if r["label"] else "" for r in siblings)
        told = (f"{r['feature'].rpartition('/')[2]}{text}" for r, text in zip(siblings, labels, strict=True))
        console.print(f"  siblings   {', '.join(told)}")
    for key in ("raises", "lowers"):
        if row[key]:
            effects = ", ".join(f"{_class(classes, e['class'])} {e['effect']:+.3f}" for e in row[key])
            console.print(f"  {key:10} {effects}")
    found.print(console, row["layer"], classes)
    if note:
        errors.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    elif not found.exemplars:
        console.print("  exemplars  none: it never varied on the calibration images, or its layer was left out")


def _neuron_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Which neuron a sub-unit is of."""
    return row["layer"], row["token_type"], row["neuron"]


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [r["feature"] for r in rows]


def _print_facts(console: Console, row: dict[str, Any], members: Sequence[dict[str, Any]]) -> None:
    made_of = "sub-units" if row["kind"] == "concept" else "edges"
    source = f"  ({row['label_source']})" if row["label_source"] else ""
    console.print(f"[bold]{row['feature']}[/]  {row['kind']} on {row['token_type']}, {row['size']} {made_of}")
    console.print(f"  label      {escape(row['label'] or '-')}{source}")
    console.print(f"  share      {row['share']:.2%} of the layer output's variance")
    console.print(
        f"  activation mean {row['mean']:.4g}, std {row['std']:.4g}, beyond two std on {row['density']:.1%} of tokens"
    )
    console.print(
        "  quantiles  " + "  ".join(f"{k[1:]} % {row[k]:.3g}" for k in row if k[0] == "q" and k[1:].isdigit())
    )
    if row["stability"] is not None:
        console.print(f"  stability  {row['stability']:.2f}")
    if row["kind"] == "subunit":
        console.print(f"  concept    {row['concept']}{_FALLS if row['sign'] < 0 else ''}")
    for member in members[:_MEMBERS]:
        falls = _FALLS if member["sign"] < 0 else ""
        console.print(f"  member     {member['feature']}  {member['size']} edges, share {member['share']:.2%}{falls}")
    if len(members) > _MEMBERS:
        console.print(f"  … and {len(members) - _MEMBERS} more; --json lists them all")


@dataclass(frozen=True)
class _Found:
    """What the catalogue has of a feature, as values of JSON."""

    inputs: Sequence[dict[str, Any]] = ()
    duplicates: Sequence[dict[str, Any]] = ()
    exemplars: Sequence[dict[str, Any]] = ()

    @classmethod
    def of(cls, checkpoint: Path, name: str) -> _Found:
        """CheckpointError where there is no catalogue, or a damaged one."""
        from elude_runtime.checkpoint.exemplars import read_exemplars

        read: Exemplars = read_exemplars(checkpoint)
        return cls(
            [{"input": channel, "share": round(share, 6)} for channel, share in read.inputs(name)],
            [{"feature": other, "correlation": round(value, 6)} for other, value in read.duplicates(name)],
            [
                {
                    "role": one.role, "end": one.end, "rank": one.rank, "image": read.images[one.image].name,
                    "token": one.token, "activation": one.activation, "predicted": read.images[one.image].predicted,
                }
                for one in read.of(name)
            ],
        )  # fmt: skip

    def document(self) -> dict[str, Any]:
        return {"inputs": list(self.inputs), "duplicates": list(self.duplicates), "exemplars": list(self.exemplars)}

    def print(self, console: Console, layer: str, classes: Sequence[str]) -> None:
        if self.inputs:
            told = ", ".join(f"x{i['input']} {i['share']:.1%}" for i in self.inputs)
            console.print(f"  inputs     {told}  (share of its variance)")
        if self.duplicates:
            told = ", ".join(
                f"{d['feature'].removeprefix(layer + '/')} {d['correlation']:+.2f}" for d in self.duplicates
            )
            console.print(f"  alike      {told}  (correlation of activations)")
        for one in self.exemplars:
            if one["rank"] < _SHOWN.get(one["role"], 0):
                role = "near miss" if one["role"] == "near_miss" else one["role"]
                first = one["predicted"][0] if one["predicted"] else None
                said = f", seen as {_class(classes, first[0])} {first[1]:.0%}" if first else ""
                image = escape(_plain(Path(one["image"]).name))
                console.print(
                    f"  {one['end']:8} {role:9} {one['activation']:+9.3g} at token {one['token']:4}  {image}{said}"
                )


def _class(classes: Sequence[str], number: int) -> str:
    return escape(_plain(classes[number])) if number < len(classes) else f"class {number}"


def _plain(text: str) -> str:
    """Without characters that would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
