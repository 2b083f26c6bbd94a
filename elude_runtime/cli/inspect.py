"""`elude inspect`: what is in a checkpoint, and what a feature is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from elude_runtime.cli.inspect_feature import show_feature
from elude_runtime.cli.progress import printer


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
        show_feature(checkpoint, feature, rows, manifest.labels, as_json)
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
            escape(r["label"] or "-"),
        )  # fmt: skip
    console.print(table)
    console.print(f"\nelude inspect {checkpoint} FEATURE shows one of them.")
