"""`elude search`: features by label or name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from elude_runtime.cli.progress import printer


def search(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    text: Annotated[str, typer.Argument(help="Looked for in labels and names.")],
    layer: Annotated[str | None, typer.Option(help="Of this split layer only.")] = None,
    limit: Annotated[int, typer.Option(help="Features shown.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find features by what they are called: the best first, concepts before sub-units."""
    from elude_runtime.checkpoint.catalogue import read_catalogue
    from elude_runtime.checkpoint.manifest import read_manifest
    from elude_runtime.errors import LayerError, did_you_mean

    names = [entry.name for entry in read_manifest(checkpoint).layers]
    if layer is not None and layer not in names:
        raise LayerError(
            f"The checkpoint has no split layer {layer[:80]!r}."
            f"{did_you_mean(layer, names) or ' It has ' + ', '.join(names) + '.'}"
        )
    found, total = read_catalogue(checkpoint).search(text, layer, limit=limit)
    if as_json:
        print(json.dumps({"total": total, "features": [asdict(f) for f in found]}, indent=2, ensure_ascii=False))
        return
    console = printer()
    if not found:
        console.print(f"No feature is called anything like {escape(repr(text[:80]))}.")
        return
    table = Table(box=None, header_style="bold")
    for heading in ("feature", "label", "source", "on", "share"):
        table.add_column(heading, justify="right" if heading == "share" else "left", no_wrap=True)
    for one in found:
        table.add_row(
            one.feature, escape(one.label or "-"), one.label_source or "-", one.token_type, f"{one.share:.1%}"
        )
    console.print(table)
    if total > len(found):
        console.print(f"{len(found)} of {total}; --limit shows more.")
