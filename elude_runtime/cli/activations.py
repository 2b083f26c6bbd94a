"""`elude activations`: all features of a layer on a folder of images, as a file for numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import console, print_skipped, stages

if TYPE_CHECKING:
    from elude_runtime.offline.activations import ActivationsFile


def activations(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="The file to make.")] = ...,  # type: ignore[assignment]
    layer: Annotated[str | None, typer.Option(help="A split layer; needed where there are several.")] = None,
    level: Annotated[
        str, typer.Option(help="concepts: [N, K] in float32; subunits: [N, P, d, M+1] in float16, `rest` last.")
    ] = "concepts",
    per_token: Annotated[
        bool,
        typer.Option("--per-token", help="Every token, [N, T, …], in place of the largest in absolute value."),
    ] = False,
    max_images: Annotated[int | None, typer.Option(help="Use this many, spread over the folder.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing file, once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the centred activations of a layer's features on every image, with the names of features and files."""
    from elude_runtime.offline.activations import size_text, write_activations

    with stages() as bar:
        result = write_activations(
            checkpoint, images, layer, out, level=level, per_token=per_token, batch_size=batch_size, workers=workers,
            limit=max_images, device=device, trust_factory=trust_factory, force=force, progress=bar,
        )  # fmt: skip
    for warning in result.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_document(result), indent=2))
        return
    print_skipped(result.skipped)
    what = "on every token" if result.per_token else "peaks"
    shape = ", ".join(map(str, result.shape))
    print(f"{out}: {result.layer}, {result.level}, {what}, {size_text(result.size)}")
    print(f"  activations  {result.dtype} [{shape}]")
    if result.level == "concepts":
        print(f"  names        [{result.shape[-1]}]")
    print(f"  files        [{result.shape[0]}]")


def _document(result: ActivationsFile) -> dict[str, object]:
    return {
        "file": str(result.path),
        "checkpoint_sha256": result.checkpoint_sha256,
        "layer": result.layer,
        "level": result.level,
        "per_token": result.per_token,
        "shape": list(result.shape),
        "dtype": result.dtype,
        "bytes": result.size,
        "skipped": [{"file": file, "reason": reason} for file, reason in result.skipped],
        "warnings": result.warnings,
    }
