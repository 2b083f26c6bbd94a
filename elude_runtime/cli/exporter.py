"""`elude exporter`: serves the workers' metrics to Prometheus, as a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def exporter(
    directory: Annotated[Path, typer.Option("--dir", help="The workers' metrics_dir.", envvar="ELUDE_METRICS_DIR")],
    address: Annotated[str, typer.Option(help="0.0.0.0 in a pod of its own.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 9464,
    process: Annotated[int | None, typer.Option("--while", metavar="PID", help="End with this process.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Serve the metrics of all workers of a folder until Ctrl-C; `elude serve` starts one by itself.

    Start it before the workers: it wipes what those that are gone left in the folder.
    """
    from elude_runtime.metrics.exporter import exporting, until_told

    with exporting(directory, address, port) as taken:
        url = f"http://{address}:{taken}/metrics"
        print(json.dumps({"url": url, "dir": str(directory)}) if as_json else f"Ready: {url}", flush=True)
        until_told(process)
