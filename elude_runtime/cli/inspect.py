"""`elude inspect`: what is in a checkpoint, and what a feature is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from elude_runtime.cli.progress import printer
from elude_runtime.errors import FeatureError, did_you_mean


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    feature: Annotated[str | None, typer.Argument(help="LAYER/P17, LAYER/12/p3, …")] = None,
    top: Annotated[int, typer.Option(help="Concepts shown, largest share of variance first.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a checkpoint, or one of its features."""
    from elude_runtime.checkpoint.certificate import read_certificate
    from elude_runtime.checkpoint.manifest import read_manifest
    from elude_runtime.offline.feature_table import read_table

    manifest = read_manifest(checkpoint)
    rows = read_table(checkpoint).to_pylist()
    if feature is not None:
        _feature(feature, rows, as_json)
        return
    certificate = read_certificate(checkpoint, manifest.checkpoint_sha256).sentence
    concepts = [r for r in rows if r["kind"] == "concept"]
    concepts.sort(key=lambda r: -r["share"])
    if as_json:
        facts = {"checkpoint_sha256": manifest.checkpoint_sha256, "certificate": certificate, "features": len(rows)}
        print(json.dumps({**facts, **manifest.model_dump(mode="json"), "concepts": concepts[:top]}, indent=2))
        return
    console = printer()
    console.print(f"[bold]{checkpoint}[/]  {manifest.model.name}  checkpoint {manifest.checkpoint_sha256[:12]}")
    console.print(f"  base {manifest.base_sha256[:12]}, partition {manifest.partition_sha256[:12]}; {certificate}")
    for entry in manifest.layers:
        types = ", ".join(f"{t.concepts} concepts on {t.name}" for t in entry.token_types if t.live)
        console.print(f"  {entry.name}: {entry.neurons} neurons, {entry.subunits} sub-units each at most; {types}")
    console.print(
        f"\nThe {min(top, len(concepts))} concepts with the largest share of the output's variance, of {len(concepts)}:"
    )
    table = Table(box=None, header_style="bold")
    for heading in ("concept", "sub-units", "share", "std", "1 %", "99 %", "label"):
        table.add_column(heading, justify="left" if heading in ("concept", "label") else "right", no_wrap=True)
    for r in concepts[:top]:
        table.add_row(
            r["feature"], str(r["size"]), f"{r['share']:.1%}", f"{r['std']:.2f}", f"{r['q01']:.2f}", f"{r['q99']:.2f}",
            r["label"] or "-",
        )  # fmt: skip
    console.print(table)
    console.print(f"\nelude inspect {checkpoint} FEATURE shows one of them.")


def _feature(name: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    by_name = {r["feature"]: r for r in rows}
    if name not in by_name:
        raise FeatureError(f"The checkpoint has no feature {name!r}.{did_you_mean(name, by_name)}")
    row = by_name[name]
    members = [r for r in rows if r["kind"] == "subunit" and r["concept"] == name] if row["kind"] == "concept" else []
    members.sort(key=lambda r: -r["share"])
    if as_json:
        print(json.dumps({**row, "members": [r["feature"] for r in members]}, indent=2))
        return
    console = printer()
    made_of = "sub-units" if row["kind"] == "concept" else "edges"
    console.print(f"[bold]{name}[/]  {row['kind']} on {row['token_type']}, {row['size']} {made_of}")
    console.print(f"  label      {row['label'] or '-'}")
    console.print(f"  share      {row['share']:.2%} of the layer output's variance")
    console.print(
        f"  activation mean {row['mean']:.4g}, std {row['std']:.4g}, beyond two std on {row['density']:.1%} of tokens"
    )
    console.print(
        "  quantiles  " + "  ".join(f"{k[1:]} % {row[k]:.3g}" for k in row if k[0] == "q" and k[1:].isdigit())
    )
    if row["kind"] == "subunit":
        console.print(f"  concept    {row['concept']}")
    for member in members[:10]:
        console.print(f"  member     {member['feature']}  {member['size']} edges, share {member['share']:.2%}")
    if len(members) > 10:
        console.print(f"  … and {len(members) - 10} more; --json lists them all")
