"""`elude catalogue`: a face for every feature of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elude_runtime.cli import model_options as options
from elude_runtime.cli.progress import console, print_skipped, stages

if TYPE_CHECKING:
    from elude_runtime.offline.catalogue.run import CatalogueResult

_MB = 1_000_000


def catalogue(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    images: Annotated[str, typer.Option(help=options.IMAGES)] = ...,  # type: ignore[assignment]
    layers: Annotated[
        list[str] | None,
        typer.Option(help="A split layer; repeated. Default: all. The catalogue of the others goes."),
    ] = None,
    effect_images: Annotated[
        int, typer.Option(help="Images on which the classes raised and lowered are measured; 0 for none.", min=0)
    ] = 8,
    thumbnail_budget: Annotated[float, typer.Option(help="Megabytes of all thumbnails together.", min=0)] = 64,
    seed: Annotated[int, typer.Option(help="Of images and tokens drawn at random.", min=0)] = 0,
    max_images: Annotated[int | None, typer.Option(help="Use this many, spread over the folder.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 25,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    save_every: Annotated[
        float,
        typer.Option(help="Seconds between saves of the progress; after a kill, the same command goes on.", min=0),
    ] = 60.0,
    trust_factory: Annotated[
        bool, typer.Option("--trust-factory", help="Run the code that the checkpoint carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find each feature's exemplars, the classes it raises and lowers, its inputs and duplicates, and label it."""
    from elude_runtime.offline.catalogue.run import CatalogueOptions, make_catalogue

    wanted = CatalogueOptions(round(thumbnail_budget * _MB), effect_images, seed)
    try:
        with stages() as bar:
            result = make_catalogue(
                checkpoint, images, wanted, layers=layers, batch_size=batch_size, workers=workers, limit=max_images,
                device=device, trust_factory=trust_factory, save_every=save_every, progress=bar,
            )  # fmt: skip
    except BaseException as error:
        for note in getattr(error, "__notes__", ()):
            console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
        raise
    for warning in result.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_document(result), indent=2))
        return
    print_skipped(result.skipped, result.skipped_count)
    print_skipped([(file, f"no picture: {reason}") for file, reason in result.missing])
    _print(result, checkpoint)


def _print(result: CatalogueResult, checkpoint: Path) -> None:
    from elude_runtime.offline.activations import size_text

    print(f"{result.path}: {result.exemplar_images} of {result.images} images are exemplars, {size_text(result.size)}")
    for layer, count in result.features.items():
        dead = f", {result.dead[layer]} that never vary" if result.dead[layer] else ""
        print(f"  {layer}: {count} features{dead}")
    labels = result.labels
    print(f"  labels: {labels['automatic']} automatic, {labels['user']} given by people")
    print(f"  thumbnails: {result.thumbnails}, {size_text(result.thumbnail_bytes)}")
    print(f"Next: elude report {checkpoint} --out DIR, or elude explore {checkpoint}, to look at them;")
    print(f"as text, elude search {checkpoint} TEXT, elude inspect {checkpoint} FEATURE")


def _document(result: CatalogueResult) -> dict[str, object]:
    named = {
        key: [{"file": file, "reason": reason} for file, reason in getattr(result, key)]
        for key in ("skipped", "missing")
    }
    return {**asdict(result), "path": str(result.path), **named}
