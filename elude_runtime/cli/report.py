"""`elude report`: a checkpoint's features as pages that open from a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from elude_runtime.cli.progress import console, stages


def report(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint that `elude rewrite` made.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")] = ...,  # type: ignore[assignment]
    evaluation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where `evaluation.json` lies; default: beside the checkpoint.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the features of a checkpoint as static pages: no server, no network, any browser."""
    from elude_runtime.offline.report.report import write_report

    with stages() as bar:
        made = write_report(checkpoint, out, evaluation=evaluation, force=force, progress=bar)
    if made.problem:
        console.print(f"[yellow]note:[/] without exemplars: {made.problem}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({**asdict(made), "page": str(made.page)}, indent=2))
    else:
        print(
            f"{made.page}: {made.features:,} features, {made.images:,} images, {made.megabytes:.1f} MB; open it in a "
            "browser"
        )
