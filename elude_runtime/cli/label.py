"""`elude label`: what people call features, over the automatic labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elude_runtime.errors import SettingsError


def label(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    feature: Annotated[str | None, typer.Argument(help="LAYER/P17, LAYER/12/p3, …")] = None,
    text: Annotated[str | None, typer.Argument(help="The label, one line of at most 200 characters.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Labels of many features: columns feature and label.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Take the feature's label away.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the labels as JSON.")] = False,
) -> None:
    """Give a feature a label. It wins over the automatic one and survives a new catalogue."""
    from elude_runtime.checkpoint.manifest import read_manifest
    from elude_runtime.offline.labelling import set_labels, set_labels_of

    given = (feature is not None and text is not None and not clear, csv is not None, clear)
    if (
        sum(given) != 1
        or (csv is not None and feature is not None)
        or (clear and (feature is None or text is not None))
    ):
        raise SettingsError("Give FEATURE and TEXT, or FEATURE and --clear, or --csv FILE.")
    read_manifest(checkpoint)
    if csv is not None:
        found = set_labels_of(checkpoint, csv)
    else:
        found = set_labels(checkpoint, {feature or "": None if clear else text})
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    if csv is not None:
        print(f"{len(found)} features labelled.")
    else:
        print("".join(f"{name}: {now or 'no label'}" for name, now in found.items()))
    print("A server shows it once `elude archive` has packed the checkpoint again.")
